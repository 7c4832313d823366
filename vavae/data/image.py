"""From the bytes of an image file to RGB pixels and back, and the crop that ImageNet generation is measured on."""

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from vavae.data.config import ShardsConfig

MAX_PIXELS = 100_000_000
"""More than this in one image is taken for a decompression bomb."""

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that are stored, by Pillow's names."""

# Pillow knows more, some through other programs; a set of photographs has no use for them.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
Image.init()  # registers every format; Pillow would do it on demand, but not where formats are named

# What Pillow raises on damaged files; the last ones come from damaged TIFF tags.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    TypeError,
    OverflowError,
)


class UnreadableImage(ValueError):  # noqa: N818 - it says what the image is, not what went wrong with us
    """These bytes are no image, or a damaged one, or one too large to be honest."""


class StoredImage(NamedTuple):
    """An image as it goes into a shard."""

    data: bytes
    extension: str


def decode_image(data: bytes) -> np.ndarray:
    """RGB pixels of an image file: uint8 [H, W, 3], upright (EXIF), from any mode; UnreadableImage otherwise."""
    return np.asarray(_load(_open(data)))


def stored_image(data: bytes, config: ShardsConfig) -> StoredImage:
    """The form in which the shards hold an image file; UnreadableImage where it cannot be decoded."""
    file = _open(data)
    image = _load(file)
    if config.keep_original and file.format in EXTENSIONS and min(image.size) >= config.image_size:
        return StoredImage(data, EXTENSIONS[file.format])
    return encode_image(center_crop_resize(image, config.image_size), config.format, config.jpeg_quality)


def center_crop_resize(image: Image.Image, size: int) -> Image.Image:
    """The central square, `size` pixels wide, as in guided diffusion (`center_crop_arr` of ADM).

    Halve with a box filter while both sides stay at least `size`, scale the shorter side to `size` with a bicubic
    filter, crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width} x {image.height} pixels: too elongated to crop")
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def encode_image(image: Image.Image, form: str, jpeg_quality: int = 95) -> StoredImage:
    """The file of an RGB image; `form` is `png` or `jpeg`."""
    buffer = io.BytesIO()
    if form == "jpeg":
        image.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return StoredImage(buffer.getvalue(), EXTENSIONS[form.upper()])


def _open(data: bytes) -> ImageFile:
    """The image with its header read and its pixels not yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UnreadableImage("no image of a known format") from error
    except _DAMAGE as error:
        raise UnreadableImage(str(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS}")
    return image


def _load(image: ImageFile) -> Image.Image:
    """The image upright and in RGB."""
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except _DAMAGE as error:
        raise UnreadableImage(str(error)) from error


def _rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue. An alpha channel is dropped, as ADM does."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise UnreadableImage(f"grey values {grey.min()} to {grey.max()}: not 16 bits")
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise UnreadableImage("floating-point pixels have no agreed range")
    elif image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")
