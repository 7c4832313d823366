"""Decoding and encoding of image files, and the crops that training and evaluation make of them."""

import importlib
import importlib.util
import io
import math
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from PIL.ImageFile import ImageFile

from vavae.data.config import RGB, Crop, PixelFormat, ShardsConfig

MAX_PIXELS = 100_000_000
"""Pixels above which an image is taken for a decompression bomb."""

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""File extension of each stored format, by Pillow's names."""

# Pillow knows more, some through other programs; a set of photographs has no use for them.
_ALWAYS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
_OPTIONAL = {"AVIF": (".avif", ".avifs"), "HEIF": (".heic", ".heif", ".hif"), "JXL": (".jxl",)}
"""File suffixes of formats that Pillow decodes in some builds, or with another package, by Pillow's names."""
Image.init()  # registers every format; Pillow would do it on demand, but not where formats are named


def _decoders() -> frozenset[str]:
    """The optional formats that can be decoded here."""
    found = {"AVIF"} if features.check("avif") else set()
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
        found.add("HEIF")
    if importlib.util.find_spec("pillow_jxl") is not None:
        importlib.import_module("pillow_jxl")  # which registers itself
        found.add("JXL")
    return frozenset(found)


_FOUND = _decoders()
_FORMATS = (*_ALWAYS, *sorted(_FOUND))

IMAGE_SUFFIXES = _SUFFIXES.union(*(_OPTIONAL[form] for form in _FOUND))
"""Suffixes of the names of image files that can be decoded here, in lower case."""

UNDECODABLE_SUFFIXES = frozenset(suffix for form in _OPTIONAL.keys() - _FOUND for suffix in _OPTIONAL[form])
"""Suffixes of those that another package would decode."""

# What Pillow raises on damaged files; TypeError and OverflowError come from damaged TIFF tags, RuntimeError from the
# decoders of AVIF and JPEG XL.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    TypeError,
    OverflowError,
    RuntimeError,
)


_START, _SCAN = b"\xff\xd8", b"\xda"  # of a JPEG
_FAST_COLORS = ("YCbCr", "Gray", "RGB")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Modes of Pillow by the number of channels."""
_GRAY_16 = PixelFormat(1, 16)
_STEPS = 257
"""Steps of 16 bits in one of 8."""
_BITS_PER_SAMPLE = 258
"""Tag of TIFF."""
_OVERSIZE = 2  # scaled decoding leaves the last halving to a better filter
_AREA, _RATIO, _ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10


class UnreadableImage(ValueError):  # noqa: N818 - it says what the image is, not what went wrong with us
    """Raised for bytes that are no image, a damaged image or a decompression bomb."""


class StoredImage(NamedTuple):
    """An image as it goes into a shard."""

    data: bytes
    extension: str


def prepare_image(
    data: bytes,
    size: tuple[int, int],
    crop: Crop = "center",
    rng: np.random.Generator | None = None,
    buffer: np.ndarray | None = None,
    form: PixelFormat = RGB,
) -> np.ndarray:
    """Decode the part of an image file that training, extraction and evaluation see: [H, W, C] as `decode_image` has.

    Args:
        data: the file.
        size: H and W, pixels.
        crop: `center` is ADM's crop and draws nothing; `random` scales the image to cover H x W and cuts anywhere
            (the public training of the tokenizer); `random_resized` cuts 8 to 100 % of the area at 3/4 to 4/3 of the
            aspect ratio W / H and scales that (Szegedy et al. 2015, with torchvision's bounds).
        rng: draws the cut; not needed for `center`.
        buffer: uint8 [H, W, 3], overwritten; a JPEG of that size is decoded into it, and a view of it returned.
        form: channels and depth.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    height, width = size
    if crop == "center":  # published figures rest on these very pixels: no scaled decoding
        pixels = decode_image(data, buffer=buffer, form=form)
        if pixels.shape[:2] == size:
            return pixels
        return _pixels(center_crop_resize(_picture(pixels), size), form)
    assert rng is not None, f"crop {crop} needs an rng"
    if crop == "random_resized":
        pixels = decode_image(data, form=form)
        image, box = _picture(pixels), _random_box(pixels.shape[1], pixels.shape[0], width / height, rng)
        return _pixels(image.resize((width, height), Image.Resampling.BICUBIC, box), form)
    pixels = decode_image(data, (_OVERSIZE * height, _OVERSIZE * width), buffer, form)
    spare = np.array(pixels.shape[:2]) - size
    if spare.min() != 0:
        pixels = _pixels(_scale_to_cover(_picture(pixels), size), form)
        spare = np.array(pixels.shape[:2]) - size
    top, left = (rng.random(2) * (spare + 1)).astype(int)
    return pixels[top : top + height, left : left + width]


def decode_image(
    data: bytes,
    at_least: tuple[int, int] | None = None,
    buffer: np.ndarray | None = None,
    form: PixelFormat = RGB,
) -> np.ndarray:
    """Pixels of an image file: uint8 or uint16 [H, W, C], upright (EXIF), from any mode.

    Args:
        data: the file.
        at_least: where given, a JPEG may come two to eight times smaller, but not below this height and width.
        buffer: uint8, overwritten and returned where it has the shape of a JPEG's pixels.
        form: channels and depth.

    Raises:
        UnreadableImage: no image, a damaged or an absurdly large one; or one in color with 16 bits where those are
            asked for.
    """
    if form == RGB and data.startswith(_START) and _is_upright(data):
        pixels = _decode_jpeg(data, at_least, buffer)
        if pixels is not None:
            return pixels
    return _pixels(_load(data, form), form)


def picture_pixels(image: Image.Image, form: PixelFormat = RGB) -> np.ndarray:
    """Pixels of an image that is open already: uint8 or uint16 [H, W, C], upright (EXIF), from any mode.

    Args:
        image: the image.
        form: channels and depth.

    Raises:
        UnreadableImage: its pixels have no agreed range, or its file is damaged.
    """
    return _pixels(_converted(image, form), form)


def stored_image(data: bytes, config: ShardsConfig) -> StoredImage:
    """The form in which the shards hold an image file; UnreadableImage where it cannot be decoded."""
    kind, form, size = _open(data).format, config.pixel_format, config.height_and_width
    image = _picture(decode_image(data, form=form))
    if config.keep_original and kind in EXTENSIONS and _covers(image, size):
        return StoredImage(data, EXTENSIONS[kind])
    return encode_pixels(_pixels(center_crop_resize(image, size), form), config.format, config.jpeg_quality)


def center_crop_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The central part of a height and width; a square as in guided diffusion (`center_crop_arr` of ADM).

    Halve with a box filter while both sides stay long enough, scale with a bicubic filter to cover the size, crop.
    """
    height, width = size
    while _covers(image, (2 * height, 2 * width)):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = _scale_to_cover(image, size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def encode_pixels(pixels: np.ndarray, form: str = "png", jpeg_quality: int = 95) -> StoredImage:
    """The file of pixels, as `decode_image` gives them; `form` is `png` or `jpeg`."""
    return encode_image(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), form, jpeg_quality)


def encode_image(image: Image.Image, form: str, jpeg_quality: int = 95) -> StoredImage:
    """The file of an image; `form` is `png` or `jpeg`."""
    buffer = io.BytesIO()
    if form == "jpeg":
        image.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return StoredImage(buffer.getvalue(), EXTENSIONS[form.upper()])


def png_bytes(picture: Image.Image) -> bytes:
    """The PNG file of a picture of any mode."""
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def _covers(image: Image.Image, size: tuple[int, int]) -> bool:
    return image.height >= size[0] and image.width >= size[1]


def _scale_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image to cover a height and width, one of which it then has."""
    scale = max(size[0] / image.height, size[1] / image.width)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width} x {image.height} pixels: too elongated to crop")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _random_box(width: int, height: int, aspect: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part, about as wide as `aspect` times its height.

    The center, as wide as the ratios allow, where none fits.
    """
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*_AREA)
        ratio = aspect * math.exp(rng.uniform(*np.log(_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * aspect * _RATIO[1])), min(height, round(width / (aspect * _RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _is_upright(data: bytes) -> bool:
    """Return whether a JPEG surely needs no rotation; only one with EXIF has to be opened to tell."""
    if not _has_exif(data):
        return True
    image = _open(data)
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except _DAMAGE:
        return False


def _has_exif(data: bytes) -> bool:
    """Return whether a segment before the scan of a JPEG is EXIF's: marker (2 bytes), length (2 bytes), content."""
    at = len(_START)
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != _SCAN:
        if data.startswith(b"Exif\0", at + 4):
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _decode_jpeg(data: bytes, at_least: tuple[int, int] | None, buffer: np.ndarray | None) -> np.ndarray | None:
    """Pixels as Pillow decodes them, but faster; None where Pillow has to decode (CMYK, damage)."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            raise UnreadableImage(f"{width} x {height} pixels: more than {MAX_PIXELS}")
        if colors not in _FAST_COLORS:
            return None
        if buffer is not None and buffer.shape != (height, width, 3):
            buffer = None
        least_height, least_width = at_least or (0, 0)
        factor = 1 if at_least is None else 2
        return simplejpeg.decode_jpeg(
            data, "RGB", min_height=least_height, min_width=least_width, min_factor=factor, buffer=buffer
        )
    except UnreadableImage:
        raise
    except ValueError:
        return None


def _open(data: bytes) -> ImageFile:
    """Open an image file: its header is read, its pixels are not."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UnreadableImage("no image of a known format") from error
    except _DAMAGE as error:
        raise UnreadableImage(str(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS}")
    return image


def _load(data: bytes, form: PixelFormat) -> Image.Image:
    """Decode an image, upright, in a mode of these channels; of 16 bits, in floating point."""
    image = _open(data)
    if form.depth == 16 and _is_deep_color(data, image):  # which Pillow would decode to 8 bits
        raise UnreadableImage("16 bits of color: only gray images keep 16 bits; convert it to gray")
    return _converted(image, form)


def _converted(image: Image.Image, form: PixelFormat) -> Image.Image:
    """Image, upright, in a mode of these channels; of 16 bits, in floating point.

    Opacity is dropped where there is no channel for it, as ADM does.
    """
    try:
        upright = ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        raise UnreadableImage(str(error)) from error
    if upright.mode == "F":
        raise UnreadableImage("floating-point pixels have no agreed range")
    try:
        if upright.mode == "I" or upright.mode.startswith("I;16"):
            gray = np.asarray(upright).astype(np.int64)
            if gray.min() < 0 or gray.max() > _GRAY_16.largest:
                raise UnreadableImage(f"gray values {gray.min()} to {gray.max()}: not 16 bits")
            if form == _GRAY_16:
                return Image.fromarray(gray.astype(np.float32))
            upright = Image.fromarray((gray / _STEPS).round().astype(np.uint8))
        elif upright.mode == "P":
            upright = upright.convert("RGBA")
        converted = upright.convert(_MODES[form.channels])
    except UnreadableImage:
        raise
    except _DAMAGE as error:
        raise UnreadableImage(str(error)) from error
    return converted if form.depth == 8 else Image.fromarray(np.asarray(converted, np.float32) * _STEPS)


def _is_deep_color(data: bytes, image: ImageFile) -> bool:
    """Return whether the header of an image tells of 16 bits in more than one channel."""
    if image.format == "PNG":
        depth, kind = data[24:26]  # of the chunk IHDR
        return depth == 16 and kind != 0
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())
    return isinstance(bits, tuple) and len(bits) > 1 and max(bits) > 8


def _picture(pixels: np.ndarray) -> Image.Image:
    """Image of pixels that Pillow scales: of 16 bits, in floating point."""
    if pixels.dtype == np.uint16:
        pixels = pixels.astype(np.float32)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _pixels(image: Image.Image, form: PixelFormat) -> np.ndarray:
    """Pixels [H, W, C] of an image, the inverse of `_picture`."""
    pixels = np.asarray(image)
    if form.depth == 16:
        pixels = pixels.round().clip(0, form.largest).astype(np.uint16)
    return pixels[..., None] if form.channels == 1 else pixels
