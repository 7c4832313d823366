"""Conversion between the two ranges of pixels: uint8 in shards, pictures and metrics; [-1, 1] for the tokenizer."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 [B, 3, H, W] in 0..255 to float32 in [-1, 1], contiguous however the pixels lie in memory."""
    assert images.dtype == torch.uint8, f"expected uint8 pixels, got {images.dtype}"
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert float [B, 3, H, W], nominally in [-1, 1], to uint8, clamped; exact inverse of `to_float`."""
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
