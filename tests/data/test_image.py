"""Decoding, the crop of ADM, encoding."""

import contextlib
import io
import struct
import subprocess
import sys
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features
from pydantic import ValidationError

from vavae.data import image as images
from vavae.data.config import PixelFormat, ShardsConfig
from vavae.data.image import (
    UnreadableImage,
    center_crop_resize,
    decode_image,
    encode_image,
    prepare_image,
    stored_image,
)


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


RGB = noise(5, 7)
CROPS = ("center", "random", "random_resized")


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels_back(form):
    assert (decode_image(saved(Image.fromarray(RGB), form)) == RGB).all()


@pytest.mark.parametrize(("form", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("JPEG2000", {})])
def test_lossy_formats_come_close(form, options):
    smooth = np.broadcast_to(np.linspace(40, 200, 64)[None, :, None], (48, 64, 3)).astype(np.uint8)
    decoded = decode_image(saved(Image.fromarray(smooth), form, **options))
    assert decoded.shape == (48, 64, 3)
    assert np.abs(decoded.astype(int) - smooth).max() <= 4


OPTIONAL = [
    pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow has no AVIF here")),
    pytest.param("HEIF", marks=pytest.mark.skipif(find_spec("pillow_heif") is None, reason="needs pillow-heif")),
    pytest.param("JXL", marks=pytest.mark.skipif(find_spec("pillow_jxl") is None, reason="needs pillow-jxl-plugin")),
]


@pytest.mark.parametrize("form", OPTIONAL)
def test_formats_with_decoders_of_their_own(form):
    smooth = np.broadcast_to(np.linspace(40, 200, 64)[None, :, None], (48, 64, 3)).astype(np.uint8)
    decoded = decode_image(saved(Image.fromarray(smooth), form, quality=95))
    assert decoded.shape == (48, 64, 3)
    assert np.abs(decoded.astype(int) - smooth).max() <= 6
    assert {*images._OPTIONAL[form]} <= images.IMAGE_SUFFIXES


@pytest.mark.parametrize("form", OPTIONAL)
def test_damage_is_an_unreadable_image_to_decoders_of_their_own_too(form):
    data = saved(Image.fromarray(np.zeros((16, 16, 3), np.uint8)), form)
    for place in range(len(data)):
        flipped = bytes([*data[:place], data[place] ^ 0xFF, *data[place + 1 :]])
        for damaged in (flipped, data[:place]):
            with contextlib.suppress(UnreadableImage), pytest.MonkeyPatch.context() as patch:
                patch.setattr(images, "MAX_PIXELS", 10_000)
                assert decode_image(damaged).dtype == np.uint8


def test_suffixes_without_a_decoder_are_told_from_those_with_one():
    assert not images.IMAGE_SUFFIXES & images.UNDECODABLE_SUFFIXES
    assert {".avif", ".heic", ".jxl", ".jpg"} <= images.IMAGE_SUFFIXES | images.UNDECODABLE_SUFFIXES


def test_a_fresh_process_knows_every_format(tmp_path):
    forms = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
    for form in forms:
        (tmp_path / form).write_bytes(saved(Image.fromarray(RGB), form))
    program = "import sys, vavae.data.image as i\nfor path in sys.argv[1:]: i.decode_image(open(path, 'rb').read())"
    subprocess.run([sys.executable, "-c", program, *(str(tmp_path / form) for form in forms)], check=True)


GRAY, DEEP, CLEAR = PixelFormat(1), PixelFormat(1, 16), PixelFormat(4)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_of_gray_stay_what_they_are(form):
    pixels = np.random.default_rng(0).integers(0, 65536, (20, 31)).astype(np.uint16)
    data = saved(Image.fromarray(pixels), form)
    assert (decode_image(data, form=DEEP) == pixels[..., None]).all()
    config = ShardsConfig(source="x", image_size=(20, 31), channels=1, depth=16)
    stored = stored_image(data, config)
    assert stored.extension == "png"
    assert (prepare_image(stored.data, (20, 31), form=DEEP) == pixels[..., None]).all()
    (cropped, turned) = (prepare_image(data, (20, 20), crop, np.random.default_rng(0), form=DEEP) for crop in CROPS[:2])
    assert cropped.dtype == turned.dtype == np.uint16
    assert (cropped == pixels[:, 5:25, None]).all()
    smaller = prepare_image(data, (10, 15), form=DEEP)
    assert abs(smaller.mean() - pixels.mean()) < 1500, "scaled in its own range"
    assert len(np.unique(smaller % 257)) > 1, "values between those of 8 bits"


def test_gray_and_opacity_are_kept():
    rng = np.random.default_rng(0)
    gray, clear = rng.integers(0, 256, (12, 9), np.uint8), rng.integers(0, 256, (12, 9, 4), np.uint8)
    assert (decode_image(saved(Image.fromarray(gray)), form=GRAY) == gray[..., None]).all()
    assert (decode_image(saved(Image.fromarray(clear)), form=CLEAR) == clear).all()
    assert (decode_image(saved(Image.fromarray(gray)), form=DEEP) == gray[..., None].astype(int) * 257).all()
    opaque = decode_image(saved(Image.fromarray(clear[..., :3])), form=CLEAR)
    assert (opaque[..., :3] == clear[..., :3]).all()
    assert (opaque[..., 3] == 255).all()
    deep = saved(Image.fromarray(gray.astype(np.uint16) * 257))
    assert (decode_image(deep, form=GRAY) == gray[..., None]).all()
    for channels, kept in ((1, gray[..., None]), (4, clear)):
        config = ShardsConfig(source="x", image_size=(12, 9), channels=channels)
        stored = stored_image(saved(Image.fromarray(kept[..., 0] if channels == 1 else kept)), config)
        assert (decode_image(stored.data, form=config.pixel_format) == kept).all()


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("form", [GRAY, DEEP, CLEAR], ids=str)
def test_crops_of_every_format(crop, form):
    data = saved(SCENE.resize((60, 40)), "JPEG")
    pixels = prepare_image(data, (16, 24), crop, np.random.default_rng(0), form=form)
    assert pixels.shape == (16, 24, form.channels)
    assert pixels.dtype == (np.uint16 if form == DEEP else np.uint8)


def png_of_16_bits(kind, channels):
    """A PNG of one pixel with 16 bits in each channel, which Pillow does not write."""
    rows = zlib.compress(b"\0" + b"\x12\x34" * channels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    whole = [name + body for name, body in chunks]
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in whole]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_sixteen_bits_of_color_are_refused_where_sixteen_bits_are_asked_for(kind, channels):
    data = png_of_16_bits(kind, channels)
    assert decode_image(data).shape == (1, 1, 3)
    with pytest.raises(UnreadableImage, match="16 bits of color"):
        decode_image(data, form=DEEP)
    assert decode_image(png_of_16_bits(0, 1), form=DEEP).item() == 0x1234


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"depth": 16}, "depth=16 with channels=3"),
        ({"depth": 16, "channels": 1, "format": "jpeg"}, "format=jpeg with channels=1 and depth=16"),
        ({"channels": 4, "format": "jpeg"}, "format=jpeg with channels=4"),
        ({"channels": 2}, "channels"),
    ],
)
def test_formats_that_cannot_be_are_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        ShardsConfig(source="x", **fields)


def test_other_modes():
    gray = RGB[..., 0]
    expected = np.repeat(gray[..., None], 3, 2)
    assert (decode_image(saved(Image.fromarray(gray))) == expected).all()
    assert (decode_image(saved(Image.fromarray(gray.astype(np.uint16) * 257))) == expected).all()
    assert (decode_image(saved(Image.fromarray(gray.astype(np.int32) * 257), "TIFF")) == expected).all()
    palette = Image.fromarray(gray).convert("P")
    assert (decode_image(saved(palette, transparency=3)) == expected).all()
    alpha = np.dstack([RGB, gray])
    assert (decode_image(saved(Image.fromarray(alpha))) == RGB).all()
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # cyan
    assert np.abs(decode_image(saved(cmyk, "JPEG")).astype(int) - (0, 255, 255)).max() <= 2


SCENE = Image.fromarray(noise(9, 12)).resize((120, 90), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "data",
    [
        saved(SCENE, "JPEG", quality=70),
        saved(SCENE, "JPEG", subsampling=0, progressive=True),
        saved(SCENE.convert("L"), "JPEG"),
        saved(SCENE.convert("CMYK"), "JPEG"),
        saved(SCENE, "JPEG", keep_rgb=True),
        saved(SCENE.crop((0, 0, 33, 17)), "JPEG"),
        saved(SCENE, "JPEG")[:40] + b"\0\0\0" + saved(SCENE, "JPEG")[40:],
        b"".join(saved(SCENE, "JPEG").partition(b"\xff\xdb")[:1]) + b"\0\0" + saved(SCENE, "JPEG")[20:],
    ],
)
def test_jpegs_are_decoded_as_pillow_decodes_them(data):
    try:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError:
        with pytest.raises(UnreadableImage):
            decode_image(data)
    else:
        assert np.array_equal(decode_image(data), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpegs_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(SCENE, "JPEG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(decode_image(data), np.asarray(expected))


def test_a_jpeg_may_be_decoded_smaller_but_never_below_what_is_asked():
    data, photograph = saved(SCENE.resize((1200, 900)), "JPEG", quality=95), SCENE.resize((1200, 900))
    for shorter, width in (
        (900, 1200),
        (451, 1200),
        (450, 600),
        (338, 450),
        (225, 300),
        (20, 150),
        (1000, 1200),
        (0, 1200),
    ):
        found = decode_image(data, (shorter, shorter) if shorter else None)
        assert found.shape == (-(-width * 3 // 4), width, 3)
        expected = np.asarray(photograph.resize((width, found.shape[0]), Image.Resampling.BOX)).astype(int)
        assert np.abs(found - expected).mean() < 2


def test_the_center_is_adm_s_and_never_decoded_smaller():
    data = saved(SCENE.resize((1200, 900)), "JPEG")
    expected = center_crop_resize(Image.open(io.BytesIO(data)), (64, 64))
    assert np.array_equal(prepare_image(data, (64, 64)), np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (10, 14), (8, 8), (5, 6)])
@pytest.mark.parametrize("size", [(8, 8), (8, 10), (12, 6)])
def test_a_random_crop_covers_the_size_and_reaches_every_window(height, width, size):
    pixels, random = noise(height, width), np.random.default_rng(0)
    scale = max(size[0] / height, size[1] / width)
    covering = (round(width * scale), round(height * scale))
    scaled = np.asarray(Image.fromarray(pixels).resize(covering, Image.Resampling.BICUBIC))
    windows = {
        scaled[top : top + size[0], left : left + size[1]].tobytes()
        for top in range(covering[1] - size[0] + 1)
        for left in range(covering[0] - size[1] + 1)
    }
    data = saved(Image.fromarray(pixels))
    assert {prepare_image(data, size, "random", random).tobytes() for _ in range(200)} == windows


def test_what_is_not_square_is_halved_scaled_and_cut_at_the_center():
    pixels = noise(40, 100)
    halved = Image.fromarray(pixels).resize((50, 20), Image.Resampling.BOX)
    assert (np.asarray(center_crop_resize(Image.fromarray(pixels), (20, 40))) == np.asarray(halved)[:, 5:45]).all()
    turned = Image.fromarray(pixels.transpose(1, 0, 2))
    halved = turned.resize((20, 50), Image.Resampling.BOX)  # older Pillows round between the directions
    assert (np.asarray(center_crop_resize(turned, (40, 20))) == np.asarray(halved)[5:45]).all()


def test_a_large_jpeg_is_cut_at_random_from_a_smaller_decode(monkeypatch):
    data, asked = saved(SCENE.resize((1200, 900)), "JPEG"), []
    monkeypatch.setattr(images, "decode_image", lambda data, at_least, *_: asked.append(at_least) or decode_image(data))
    assert prepare_image(data, (64, 64), "random", np.random.default_rng(0)).shape == (64, 64, 3)
    assert asked == [(128, 128)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000))
def test_random_parts_lie_within_and_keep_their_area_and_aspect(width, height, seed):
    left, top, right, bottom = images._random_box(width, height, 1, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    if min(width, height) > 60 and max(width, height) < 1.2 * min(width, height):
        assert 0.07 < w * h / (width * height) <= 1
        assert 0.7 < w / h < 1.42


def test_random_parts_have_the_areas_of_a_uniform_draw():
    random = np.random.default_rng(0)
    boxes = np.array([images._random_box(1000, 1000, 1, random) for _ in range(4000)])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 1e6
    fitting = areas[areas < 0.7]  # whatever the aspect, such a part fits; larger ones are sometimes drawn again
    for quantile in (0.25, 0.5, 0.75):
        assert abs(np.quantile(fitting, quantile) - (0.08 + quantile * (0.7 - 0.08))) < 0.02
    assert boxes[:, 0].min() == boxes[:, 1].min() == 0
    assert boxes[:, 2].max() == boxes[:, 3].max() == 1000


def test_a_random_part_is_scaled_to_the_size():
    data = saved(Image.new("RGB", (50, 40), (9, 8, 7)))
    assert (
        prepare_image(data, (16, 16), "random_resized", np.random.default_rng(0)) == np.full((16, 16, 3), (9, 8, 7))
    ).all()


def test_exif_turns_the_image_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert (decode_image(saved(Image.fromarray(RGB), exif=exif)) == np.rot90(RGB, -1)).all()


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"no image at all", saved(Image.fromarray(noise(40, 40)), "JPEG")[:900]]
)
def test_damaged_images(data):
    with pytest.raises(UnreadableImage):
        decode_image(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255))),
)
@example("TIFF", [(72, 2)])
@settings(max_examples=100, deadline=None)
def test_any_damage_is_an_image_or_an_unreadable_one(form, changes):
    data = bytearray(saved(Image.fromarray(RGB), form))
    for place, value in changes:
        data[place % len(data)] = value
    with contextlib.suppress(UnreadableImage), pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 10_000)  # spares the time of large decodes
        assert decode_image(bytes(data)).dtype == np.uint8


def test_no_meaning_is_made_up_for_unscaled_pixels():
    with pytest.raises(UnreadableImage, match="floating-point"):
        decode_image(saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))
    with pytest.raises(UnreadableImage, match="not 16 bits"):
        decode_image(saved(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"))


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    bomb = saved(Image.new("1", (12000, 12000)))
    assert len(bomb) < 20_000
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(UnreadableImage, match="12000 x 12000"):
        decode_image(bomb)


def test_crop_halves_with_a_box_filter():
    pixels = noise(64, 64)
    halved = pixels.astype(int)
    for _ in range(2):  # 64 → 32 → 16; Pillow rounds after each direction
        halved = (halved[:, ::2] + halved[:, 1::2] + 1) // 2
        halved = (halved[::2] + halved[1::2] + 1) // 2
    assert (np.asarray(center_crop_resize(Image.fromarray(pixels), (16, 16))) == halved).all()


@pytest.mark.parametrize("turned", [False, True])
def test_crop_is_central_and_keeps_pixels_that_fit(turned):
    pixels = noise(20, 31)
    expected = pixels[:, 5:25]
    if turned:
        pixels, expected = pixels.transpose(1, 0, 2), expected.transpose(1, 0, 2)
    assert (np.asarray(center_crop_resize(Image.fromarray(pixels), (20, 20))) == expected).all()


@given(st.integers(1, 90), st.integers(1, 90), st.tuples(st.integers(8, 40), st.integers(8, 40)))
@settings(max_examples=60, deadline=None)
def test_crop_has_the_size_asked_for_and_keeps_a_constant(height, width, size):
    image = Image.new("RGB", (width, height), (10, 20, 30))
    data, random = saved(image), np.random.default_rng(0)
    crops = [prepare_image(data, size, crop, random) for crop in ("center", "random", "random_resized")]
    for pixels in [np.asarray(center_crop_resize(image, size)), *crops]:
        assert pixels.shape == (*size, 3)
        assert (pixels == (10, 20, 30)).all()


def test_a_thread_of_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    with pytest.raises(UnreadableImage, match="elongated"):
        center_crop_resize(Image.new("RGB", (2000, 1)), (8, 8))


def test_encoding_is_deterministic_and_as_good_as_asked():
    image = Image.fromarray(noise(32, 32))
    png = encode_image(image, "png")
    assert (png.extension, encode_image(image, "png")) == ("png", png)
    assert (decode_image(png.data) == np.asarray(image)).all()
    good, bad = (encode_image(image, "jpeg", quality) for quality in (95, 30))
    assert good.extension == "jpg"
    assert len(good.data) > len(bad.data)
    assert np.abs(decode_image(good.data).astype(int) - np.asarray(image)).mean() < 4  # needs whole colors


def test_stored_form():
    data = saved(Image.fromarray(noise(40, 30)), "JPEG")
    config = ShardsConfig(source="x", image_size=16)
    cropped = stored_image(data, config)
    assert cropped.extension == "png"
    assert decode_image(cropped.data).shape == (16, 16, 3)
    keep = config.model_copy(update={"keep_original": True})
    assert stored_image(data, keep) == (data, "jpg")
    assert decode_image(stored_image(data, keep.model_copy(update={"image_size": 31})).data).shape == (31, 31, 3)
    for size, kept in ((40, 30), True), ((40, 31), False), ((41, 8), False):
        stored = stored_image(data, keep.model_copy(update={"image_size": size}))
        assert (stored == (data, "jpg")) == kept
        assert kept or decode_image(stored.data).shape == (*size, 3)
    assert stored_image(saved(Image.fromarray(noise(40, 30)), "BMP"), keep).extension == "png"


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize(("form", "side"), [("JPEG", 24), ("JPEG", 60), ("JPEG", 20), ("PNG", 24)])
def test_only_a_jpeg_of_the_size_is_decoded_in_place(form, side, crop):
    data, buffer = saved(Image.fromarray(noise(side, side)), form), np.zeros((24, 24, 3), np.uint8)
    expected = prepare_image(data, (24, 24), crop, np.random.default_rng(3))
    found = prepare_image(data, (24, 24), crop, np.random.default_rng(3), buffer)
    assert np.array_equal(found, expected)
    assert np.may_share_memory(found, buffer) == (form == "JPEG" and side == 24)
