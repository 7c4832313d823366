"""Token routing: tokens that skip a range of blocks, other ones in every image, as many in each (TREAD)."""

from torch import Tensor

from vavae.models.dit.config import count_kept


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
