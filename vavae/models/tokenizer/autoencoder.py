"""The autoencoder of VA-VAE: its layers, encoder, posterior and decoder.

Names and order of the parameters are those of the released checkpoints. Shapes: B batch, C channels, H height,
W width, N = H·W positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vavae.models.tokenizer.config import TokenizerConfig


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """The normalization before every non-linearity (released code)."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two norm, swish, 3x3 convolution units and a residual path: [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Add the two units to their input, projected where the channels change."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Residual self-attention over all positions with one head and 1x1 convolutions: [B, C, H, W] -> same."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Add softmax(q·kᵀ/√C)·v to the input."""
        h = self.norm(x)
        q, k, v = (
            layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )  # [B, 1, N, C]
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # [B, C, H, W]
        return x + self.proj_out(h)


class Level(nn.Module):
    """The layers of one resolution: residual blocks, each followed by attention or not, then a change of size.

    A decoder applies the same parts in the same order; its change of size is an :class:`Upsample`. With `recompute`,
    a graph through it keeps only what enters its blocks.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, blocks: int, attention: bool, recompute: bool
    ) -> None:
        super().__init__()
        self.recompute = recompute
        widths = [in_channels] + [out_channels] * (blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(width, out_channels, groups) for width in widths)
        self.attn = nn.ModuleList(AttentionBlock(out_channels, groups) for _ in widths if attention)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers: [B, C_in, H, W] -> [B, C_out, H', W']."""
        for index, block in enumerate(self.block):
            x = self._run(block, x)
            if self.attn:
                x = self._run(self.attn[index], x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x

    def _run(self, part: nn.Module, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, x, use_reentrant=False, preserve_rng_state=False)
        return part(x)


class Middle(nn.Module):
    """Residual block, attention or none, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks: [B, C, H, W] -> same."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Downsampling by 2: one row and column of zeros at the far edges, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the resolution: [B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Upsampling by 2: nearest neighbor, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Double the resolution: [B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


_LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent Gaussians over [B, C, h, w], in nats and latent units.

    Args:
        mean: [B, C, h, w].
        logvar: logarithm of the variance, same shape; clamped to the range of the released code.
    """

    mean: Tensor
    logvar: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "logvar", self.logvar.clamp(*_LOG_VARIANCE_RANGE))

    @property
    def std(self) -> Tensor:
        """Standard deviation, [B, C, h, w]."""
        return torch.exp(0.5 * self.logvar)

    @property
    def mode(self) -> Tensor:
        """The most likely latent, [B, C, h, w]."""
        return self.mean

    def at(self, noise: Tensor) -> Tensor:
        """The latent mean + std · noise; standard normal noise makes it a sample that gradients flow through."""
        return self.mean + self.std * noise

    def sample(self, rng: torch.Generator) -> Tensor:
        """One sample per position, [B, C, h, w], drawn from an rng of the same device."""
        noise = torch.randn(self.mean.shape, generator=rng, device=self.mean.device, dtype=self.mean.dtype)
        return self.at(noise)

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, ½ Σ (μ² + σ² - 1 - log σ²) over C, h, w: [B], in nats."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


class Encoder(nn.Module):
    """The encoder of LDM: [B, image_channels, H, W] in [-1, 1] -> [B, 2·latent_dim, H/f, W/f].

    The adaptive weight of the vision-foundation loss is measured at ``conv_out.weight`` (released code).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, kernel_size=3, padding=1)
        self.down = nn.ModuleList(
            Level(
                width_in,
                width,
                groups=config.norm_groups,
                blocks=config.res_blocks,
                attention=index in config.attention_levels,
                recompute=config.checkpoint_activations,
            )
            for index, (width_in, width) in enumerate(zip([config.channels, *widths[:-1]], widths, strict=True))
        )
        for level, width in zip(self.down[:-1], widths[:-1], strict=True):
            level.downsample = Downsample(width)
        self.mid = Middle(widths[-1], config.norm_groups, config.middle_attention)
        self.norm_out = group_norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_dim, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] to raw moments [B, 2·latent_dim, H/f, W/f], before ``quant_conv``."""
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """The decoder of LDM: [B, latent_dim, h, w] -> [B, image_channels, f·h, f·w], about [-1, 1] and not clamped.

    Levels are numbered as in the encoder, from the image inwards, and run from the last to the first. The adaptive
    weight of the adversarial loss is measured at ``conv_out.weight`` (released code).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_dim, widths[-1], kernel_size=3, padding=1)
        self.mid = Middle(widths[-1], config.norm_groups, config.middle_attention)
        self.up = nn.ModuleList(
            Level(
                width_in,
                width,
                groups=config.norm_groups,
                blocks=config.res_blocks + 1,
                attention=index in config.attention_levels,
                recompute=config.checkpoint_activations,
            )
            for index, (width_in, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = group_norm(widths[0], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents [B, latent_dim, h, w] that have passed ``post_quant_conv`` to images [B, 3, f·h, f·w]."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAVAE(nn.Module):
    """The autoencoder of VA-VAE, arXiv 2501.01423; parameters are named and initialized as in the released code.

    The moments are computed in the parameters' dtype and held in float32, so that half precision costs the posterior
    nothing.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        assert config.kind == "kl", f"a tokenizer of kind {config.kind} is another network"
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments, latent = 2 * config.latent_dim, config.latent_dim
        self.quant_conv = nn.Conv2d(moments, moments, kernel_size=1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent, latent, kernel_size=1) if config.post_quant_conv else nn.Identity()

    @property
    def last_layers(self) -> tuple[Tensor, Tensor]:
        """Weights at which adaptive weights are measured: the last convolutions of encoder and decoder."""
        return self.encoder.conv_out.weight, self.decoder.conv_out.weight

    def residual_blocks(self) -> list[ResnetBlock]:
        """All residual blocks of encoder and decoder, which do most of the work."""
        return [layer for layer in self.modules() if isinstance(layer, ResnetBlock)]

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """The posterior of images [B, 3, H, W] in [-1, 1]; H and W are multiples of ``config.downsample``.

        Returns:
            Moments of shape [B, latent_dim, H/f, W/f], float32.
        """
        moments = self.quant_conv(self.encoder(images.to(self.encoder.conv_in.weight.dtype)))
        mean, logvar = moments.float().chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar)

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, 3, f·h, f·w], about [-1, 1] and not clamped, from latents [B, latent_dim, h, w]."""
        return self.decoder(self.post_quant_conv(z.to(self.decoder.conv_in.weight.dtype)))
