"""The decoder of the autoencoder: latents to images."""

import torch.nn.functional as F
from torch import Tensor, nn

from vavae.models.tokenizer.config import TokenizerConfig
from vavae.models.tokenizer.layers import Level, Middle, Upsample, group_norm


class Decoder(nn.Module):
    """The decoder of LDM: [B, latent_dim, h, w] -> [B, 3, f·h, f·w], about [-1, 1] and not clamped.

    Levels are numbered as in the encoder, from the image inwards, and run from the last to the first. The adaptive
    weight of the adversarial loss is measured at ``conv_out.weight`` (released code).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.latent_dim, widths[-1], kernel_size=3, padding=1)
        self.mid = Middle(widths[-1], config.norm_groups)
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
        self.conv_out = nn.Conv2d(widths[0], 3, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents [B, latent_dim, h, w] that have passed ``post_quant_conv`` to images [B, 3, f·h, f·w]."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
