"""Pixels in their two ranges, uint8 in shards and pictures and [-1, 1] for the tokenizer; pictures of many images.

Gaps between images are transparent, so that a picture suits any page.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vavae.data.image import encode_image

_PICTURE_PIXELS = 64


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 [B, 3, H, W] in 0..255 to float32 in [-1, 1], contiguous however the pixels lie in memory."""
    assert images.dtype == torch.uint8, f"expected uint8 pixels, got {images.dtype}"
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert float [B, 3, H, W], nominally in [-1, 1], to uint8, clamped; exact inverse of `to_float`."""
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)


def encode_png(image: Tensor) -> bytes:
    """Encode an image, uint8 [3, H, W], as a PNG file."""
    return encode_image(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), "png").data


def enlargement(size: Sequence[int]) -> int:
    """Whole-number factor by which images of a height and width in pixels are enlarged in pictures."""
    return max(1, _PICTURE_PIXELS // max(size))


def image_grid(images: Tensor, columns: int, *, scale: int = 1, padding: int = 2) -> Image.Image:
    """Lay out images in reading order; given class after class with ``columns`` of each, rows are classes.

    Args:
        images: uint8 [N, 3, H, W].
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
    assert images.shape[1] == 3, f"images are [N, 3, H, W], not {tuple(images.shape)}"
    pixels = images.cpu().permute(0, 2, 3, 1).numpy()
    assert pixels.dtype == np.uint8, f"images are uint8, not {pixels.dtype}"
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
