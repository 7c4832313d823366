"""Pixels in their two ranges, whole numbers in shards and [-1, 1] for the tokenizer; pictures of many images.

Gaps between images are transparent, so that a picture suits any page.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vavae.data.image import encode_pixels
from vavae.models.backbones.color import as_color

_PICTURE_PIXELS = 64
_DIFFERENCE_SCALE = 4
_HALVES = {torch.uint8: 127.5, torch.uint16: 32767.5}
"""Half of the largest value of a pixel."""


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 or uint16 [B, C, H, W] to float32 in [-1, 1], contiguous however the pixels lie in memory."""
    assert images.dtype in _HALVES, f"expected pixels of 8 or 16 bits, got {images.dtype}"
    return images.to(torch.float32, memory_format=torch.contiguous_format) / _HALVES[images.dtype] - 1


def pixel_dtype(depth: int) -> torch.dtype:
    """Type of pixels of 8 or 16 bits."""
    return {8: torch.uint8, 16: torch.uint16}[depth]


def to_pixels(images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Convert float [B, C, H, W], nominally in [-1, 1], to uint8 or uint16, clamped; exact inverse of `to_float`."""
    half = _HALVES[dtype]
    return images.float().mul(half).add(half).round().clamp(0, 2 * half).to(dtype)


def to_rgb(images: Tensor) -> Tensor:
    """View pixels of any format, uint8 or uint16 [B, C, H, W], in color: uint8 [B, 3, H, W].

    Gray is taken three times, and what is not opaque lies over mid-gray; 16 bits are rounded to 8.
    """
    if images.dtype == torch.uint8 and images.shape[1] == 3:
        return images
    return to_pixels(as_color(to_float(images)))


def difference_image(images: Tensor, others: Tensor) -> Tensor:
    """Four times the absolute difference of two sets of images, clamped: uint8 [B, C, H, W], as both of them are."""
    return ((images.int() - others.int()).abs() * _DIFFERENCE_SCALE).clamp(max=255).byte()


def encode_png(image: Tensor) -> bytes:
    """Encode an image, uint8 or uint16 [C, H, W], as a PNG file."""
    return encode_pixels(image.permute(1, 2, 0).contiguous().numpy()).data


def enlargement(size: Sequence[int]) -> int:
    """Whole-number factor by which images of a height and width in pixels are enlarged in pictures."""
    return max(1, _PICTURE_PIXELS // max(size))


def image_grid(images: Tensor, columns: int, *, scale: int = 1, padding: int = 2) -> Image.Image:
    """Lay out images in reading order; given class after class with ``columns`` of each, rows are classes.

    Args:
        images: uint8 or uint16 [N, C, H, W].
        columns: images in a row; the last row may be shorter.
        scale: whole-number enlargement, each pixel a square.
        padding: gap between images, in pixels of the picture.

    Returns:
        The picture, RGBA.
    """
    return _lay_out(_tiles(images, scale), columns, padding)


def pair_grid(
    originals: Tensor, reconstructions: Tensor, columns: int, *, scale: int = 1, padding: int = 2
) -> Image.Image:
    """Lay out rows of originals, each right above the row of its reconstructions; a wider gap follows.

    Arguments as in :func:`image_grid`; the two sets have one shape.
    """
    assert originals.shape == reconstructions.shape, f"{originals.shape} and {reconstructions.shape} do not pair"
    above, below = _tiles(originals, scale), _tiles(reconstructions, scale)
    gap = np.zeros((len(above), padding, *above.shape[2:]), np.uint8)
    return _lay_out(np.concatenate([above, gap, below], axis=1), columns, padding, row_padding=4 * padding)


def _tiles(images: Tensor, scale: int) -> np.ndarray:
    """Enlarged opaque tiles [N, H scale, W scale, 4]."""
    pixels = to_rgb(images.cpu()).permute(0, 2, 3, 1).numpy()
    opaque = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=3)
    return opaque.repeat(scale, axis=1).repeat(scale, axis=2)


def _lay_out(tiles: np.ndarray, columns: int, padding: int, row_padding: int | None = None) -> Image.Image:
    """Place tiles [N, H, W, 4] on a transparent canvas, with gaps between them only."""
    assert len(tiles) > 0, "a picture needs at least one image"
    row_padding = padding if row_padding is None else row_padding
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    _, height, width, _ = tiles.shape
    shape = (rows * (height + row_padding) - row_padding, columns * (width + padding) - padding, 4)
    canvas = np.zeros(shape, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + row_padding), index % columns * (width + padding)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas)
