"""The encoder of the autoencoder: images to the raw moments of their posteriors."""

import torch.nn.functional as F
from torch import Tensor, nn

from vavae.models.tokenizer.config import TokenizerConfig
from vavae.models.tokenizer.layers import Downsample, Level, Middle, group_norm


class Encoder(nn.Module):
    """The encoder of LDM: [B, 3, H, W] in [-1, 1] -> [B, 2·latent_dim, H/f, W/f].

    The adaptive weight of the vision-foundation loss is measured at ``conv_out.weight`` (released code).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, kernel_size=3, padding=1)
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
        self.mid = Middle(widths[-1], config.norm_groups)
        self.norm_out = group_norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_dim, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] to raw moments [B, 2·latent_dim, H/f, W/f], before ``quant_conv``."""
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))
