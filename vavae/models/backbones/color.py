"""Images as networks that were trained on color see them."""

import torch
from torch import Tensor


def as_color(images: Tensor) -> Tensor:
    """Three channels of images [B, C, H, W] in [-1, 1]; gradients flow through.

    Gray (C = 1) is taken three times; color with opacity (C = 4, the last channel from -1, transparent, to 1, opaque)
    lies over mid-gray, which is 0.
    """
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] == 4:
        color, opacity = torch.split(images, [3, 1], dim=1)
        return color * ((opacity + 1) / 2)
    return images
