"""The representation autoencoder: a frozen vision foundation model encodes, a trained transformer decodes (RAE).

Sources: arXiv 2510.11690 (one layer) and 2605.18324 (a mean of several). Shapes: B batch, C channels of the latent,
h x w grid.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from vavae.errors import UserError
from vavae.models.backbones.color import as_color
from vavae.models.backbones.load import LoadBackbone, load_backbone, meta_backbone
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import EncoderConfig, TokenizerConfig
from vavae.models.tokenizer.teacher import FrozenNetwork, check_teacher, teacher_geometry
from vavae.models.tokenizer.vit_decoder import ViTDecoder

_ONE_LAYER_EPSILON = 1e-6
"""Epsilon of the norm of a single layer: that of the network's own last norm."""
_LAYERS_EPSILON = 1e-5
"""Epsilon of the norms of several layers (released code of RAEv2)."""


@dataclass(frozen=True)
class PointLatent:
    """A latent without a spread, with the interface of a posterior.

    Args:
        mean: the latent, float32 [B, C, h, w].
    """

    mean: Tensor
    std = None
    """There is none."""

    @property
    def mode(self) -> Tensor:
        """The latent."""
        return self.mean

    def at(self, noise: Tensor) -> Tensor:
        """The latent, whatever the noise."""
        return self.mean

    def sample(self, rng: torch.Generator) -> Tensor:
        """The latent; nothing is drawn."""
        return self.mean

    def kl(self) -> None:
        """None: a point has no divergence from a normal distribution."""


def combine_layers(layers: Sequence[Tensor], global_mean: bool, epsilon: float = _LAYERS_EPSILON) -> Tensor:
    """Mean of the outputs of layers, each normalized at each position over its channels, without scale and shift.

    z = mean_l LN(x_l) (+ mean over positions of LN(x_last)).

    Args:
        layers: outputs [B, h, w, C], in the order of the layers.
        global_mean: add the second term.
        epsilon: of the norms.
    """
    normalized = [F.layer_norm(each, each.shape[-1:], eps=epsilon) for each in layers]
    z = torch.stack(normalized).mean(0)
    return z + normalized[-1].mean((1, 2), keepdim=True) if global_mean else z


class RepresentationEncoder(FrozenNetwork):
    """The frozen encoder: no gradient to its parameters or through it, and in evaluation mode for good."""

    config: EncoderConfig

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents float32 [B, C, h, w] on a grid (h, w), of images [B, c, H, W] in [-1, 1], seen in color."""
        size, images = self.geometry.image_size(grid), as_color(images)
        if images.shape[2:] != size:
            # Bicubic without antialiasing, as the released code feeds a 256 px image to a network of patch 14.
            images = F.interpolate(images, size, mode="bicubic", align_corners=False)
        if self.config.normalize:
            images = self.normalizer(images)
        levels = [self.geometry.level] if self.config.layers is None else [*self.config.layers]
        found = self.model.forward_intermediates(
            images, indices=levels, norm=False, stop_early=True, intermediates_only=True
        )
        epsilon = _ONE_LAYER_EPSILON if self.config.layers is None else _LAYERS_EPSILON
        with torch.autocast(images.device.type, enabled=False):
            layers = [each.float().movedim(1, -1) for each in found]
            z = combine_layers(layers, self.config.global_mean, epsilon).movedim(-1, 1).contiguous()
        assert z.shape[2:] == grid, f"the encoder gave {tuple(z.shape)} for grid {grid}"
        return z

    def weights_digest(self) -> str:
        """SHA-256 in hexadecimal of all weights and running statistics, by name."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()


class RepresentationAutoencoder(nn.Module):
    """A frozen encoder and a decoder; parameters, state dict and training mode are those of the decoder alone.

    The encoder is no submodule: engines, averages and checkpoints do not see it, and it moves between devices only by
    `to`.

    Args:
        config: of kind `representation`.
        encoder: the encoder; None where latents are decoded alone.
    """

    def __init__(self, config: TokenizerConfig, encoder: RepresentationEncoder | None) -> None:
        super().__init__()
        assert config.decoder is not None, "a representation autoencoder has a decoder"
        self.config = config
        self._beside = (encoder,)  # a tuple, which torch does not look into
        self.decoder = ViTDecoder(
            config.decoder, config.latent_dim, config.image_channels, config.checkpoint_activations
        )

    @property
    def encoder(self) -> RepresentationEncoder:
        """The frozen encoder; UserError where the autoencoder was loaded to decode alone."""
        (encoder,) = self._beside
        if encoder is None:
            raise UserError(
                "this tokenizer was loaded to decode alone, as a sampler's is: load_tokenizer has its encoder"
            )
        return encoder

    @property
    def last_layers(self) -> tuple[None, Tensor]:
        """Weights at which adaptive weights are measured: none of the encoder, the decoder's last linear map."""
        return None, self.decoder.output.weight

    def residual_blocks(self) -> list[nn.Module]:
        """All residual blocks, which do most of the work: of the encoder, where there is one, and of the decoder."""
        (encoder,) = self._beside
        of_encoder = [] if encoder is None else encoder.blocks
        return of_encoder + [block for block in self.decoder.blocks]

    def encode(self, images: Tensor) -> PointLatent:
        """The latents of images [B, c, H, W] in [-1, 1]; H and W are multiples of ``config.downsample``.

        Returns:
            Latents float32 [B, C, h, w], without a graph.
        """
        factor = self.config.downsample
        return PointLatent(self.encoder(images, (images.shape[2] // factor, images.shape[3] // factor)))

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, c, f·h, f·w], about [-1, 1] and not clamped, from latents [B, C, h, w]."""
        return self.decoder(z.to(self.decoder.output.weight.dtype))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move both parts, as `nn.Module.to` does."""
        (encoder,) = self._beside
        if encoder is not None:
            encoder.to(*args, **kwargs)
        return super().to(*args, **kwargs)


Autoencoder = VAVAE | RepresentationAutoencoder
"""A tokenizer of any kind: `encode`, `decode`, `config`, `last_layers`, `residual_blocks`."""


def build_autoencoder(config: TokenizerConfig, encoder: RepresentationEncoder | None = None) -> Autoencoder:
    """Build a tokenizer with its initial weights.

    Args:
        config: its kind and sizes.
        encoder: the frozen encoder of kind `representation`; None where latents are decoded alone.
    """
    return VAVAE(config) if config.encoder is None else RepresentationAutoencoder(config, encoder)


def load_encoder(config: TokenizerConfig, load: LoadBackbone = load_backbone) -> RepresentationEncoder | None:
    """Load the frozen encoder of a tokenizer; None where its encoder is trained.

    Args:
        config: of the tokenizer.
        load: see `RepresentationEncoder`.

    Raises:
        UserError: its weights can't be had, or it does not give the configured latents.
    """
    if config.encoder is None:
        return None
    _check_layers(config, config.encoder)
    return RepresentationEncoder(config.encoder, load)


def check_encoder(config: TokenizerConfig, grid: tuple[int, int]) -> None:
    """Check before workers start, and without its weights, that a frozen encoder gives latents on a grid (h, w).

    Raises:
        UserError: it is unknown, has no such layers, other channels, or refuses images of the size.
    """
    if config.encoder is not None:
        _check_layers(config, config.encoder)
        check_teacher(config.encoder, grid)


def _check_layers(config: TokenizerConfig, encoder: EncoderConfig) -> None:
    geometry = teacher_geometry(encoder)
    model: Any = meta_backbone(encoder.backbone)
    levels = [*model.feature_info]
    if encoder.layers is not None and not geometry.isotropic:
        raise UserError(
            f"tokenizer.encoder.layers={[*encoder.layers]}: {encoder.name} is convolutional, and its levels have other "
            "sizes each: leave layers out, and stage_stride names the level"
        )
    last = geometry.level if encoder.layers is None else encoder.layers[-1]
    if last >= len(levels):
        raise UserError(
            f"tokenizer.encoder.layers={[*(encoder.layers or ())]}: {encoder.name} has blocks 0 to {len(levels) - 1}"
        )
    channels = levels[last]["num_chs"]
    if config.latent_dim != channels:
        raise UserError(
            f"tokenizer.latent_dim={config.latent_dim}, but tokenizer.encoder.name={encoder.name} gives {channels} "
            f"channels: set latent_dim={channels}"
        )
