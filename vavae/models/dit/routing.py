"""Token routing: tokens that skip a range of blocks, other ones in every image, as many in each (TREAD, SPRINT)."""

import torch
from torch import Tensor, nn

from vavae.models.dit.config import RoutingConfig, count_kept


def draw_tokens(config: RoutingConfig, grid: tuple[int, int], images: int, rng: torch.Generator) -> Tensor:
    """Draw the tokens that do not skip in training, int64 [B, K], on the device of the rng.

    Args:
        config: how many, and from where.
        grid: rows and columns of tokens.
        images: B.
        rng: of this purpose alone.
    """
    uniform = torch.rand(images, grid[0] * grid[1], generator=rng, device=rng.device)
    if config.square is None:
        return kept_tokens(uniform, config.drop)
    places = in_squares(torch.arange(uniform.shape[1], device=rng.device)[None], grid, config.square)
    chosen = in_squares(uniform, grid, config.square).argsort(dim=-1, stable=True)
    kept = chosen[..., : count_kept(config.square**2, config.drop)]
    return places.expand(images, -1, -1).gather(-1, kept).flatten(1)


def in_squares(values: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Values of tokens [B, N] by squares, [B, N / side², side²], both row by row."""
    rows, columns = grid
    squares = values.unflatten(1, (rows // side, side, columns // side, side)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)


def kept_tokens(uniform: Tensor, drop: float) -> Tensor:
    """Indices int64 [B, K] of the tokens that do not skip, in random order.

    Args:
        uniform: independent uniform numbers [B, N], one for each token.
        drop: share of the tokens that skip, in [0, 1).
    """
    # Stable: among 256 tokens two numbers are equal in one of 500 images.
    return uniform.argsort(dim=1, stable=True)[:, : count_kept(uniform.shape[1], drop)]


def take_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    """Tokens [B, K, D] of tokens [B, N, D] at indices keep [B, K]."""
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))


def put_tokens(tokens: Tensor, keep: Tensor, taken: Tensor) -> Tensor:
    """Tokens [B, N, D] with others [B, K, D] in the places keep [B, K]."""
    return tokens.scatter(1, keep[..., None].expand(-1, -1, tokens.shape[-1]), taken)


class TokenFusion(nn.Module):
    """Linear map of what left a range of blocks, beside what entered it, [B, N, 2 D] -> [B, N, D] (SPRINT).

    In the places of tokens that skipped stands one vector; as in the public code it is random and not trained.
    """

    mask_token: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)
        self.register_buffer("mask_token", torch.empty(1, 1, width))

    def forward(self, before: Tensor, inner: Tensor, keep: Tensor | None, path_dropped: Tensor | None) -> Tensor:
        """Join tokens, in the dtype of those before.

        Args:
            before: tokens that entered, [B, N, D].
            inner: tokens that left, [B, K, D].
            keep: their places, int64 [B, K]; None: all.
            path_dropped: images in which none counts, bool [B]; None: no image.
        """
        if keep is not None:
            inner = put_tokens(self.mask_token.expand_as(before), keep, inner)
        if path_dropped is not None:
            inner = torch.where(path_dropped[:, None, None], self.mask_token, inner)
        return self.linear(torch.cat([inner, before], dim=-1)).to(before.dtype)
