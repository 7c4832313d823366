"""Decoding, the crop of ADM, encoding."""

import contextlib
import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vavae.data import image as images
from vavae.data.config import ShardsConfig
from vavae.data.image import UnreadableImage, center_crop_resize, decode_image, encode_image, stored_image


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


RGB = noise(5, 7)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels_back(form):
    assert (decode_image(saved(Image.fromarray(RGB), form)) == RGB).all()


@pytest.mark.parametrize(("form", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("JPEG2000", {})])
def test_lossy_formats_come_close(form, options):
    smooth = np.broadcast_to(np.linspace(40, 200, 64)[None, :, None], (48, 64, 3)).astype(np.uint8)
    decoded = decode_image(saved(Image.fromarray(smooth), form, **options))
    assert decoded.shape == (48, 64, 3)
    assert np.abs(decoded.astype(int) - smooth).max() <= 4


def test_a_fresh_process_knows_every_format(tmp_path):
    forms = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
    for form in forms:
        (tmp_path / form).write_bytes(saved(Image.fromarray(RGB), form))
    program = "import sys, vavae.data.image as i\nfor path in sys.argv[1:]: i.decode_image(open(path, 'rb').read())"
    subprocess.run([sys.executable, "-c", program, *(str(tmp_path / form) for form in forms)], check=True)


def test_other_modes():
    grey = RGB[..., 0]
    expected = np.repeat(grey[..., None], 3, 2)
    assert (decode_image(saved(Image.fromarray(grey))) == expected).all()
    assert (decode_image(saved(Image.fromarray(grey.astype(np.uint16) * 257))) == expected).all()
    assert (decode_image(saved(Image.fromarray(grey.astype(np.int32) * 257), "TIFF")) == expected).all()
    palette = Image.fromarray(grey).convert("P")
    assert (decode_image(saved(palette, transparency=3)) == expected).all()
    alpha = np.dstack([RGB, grey])
    assert (decode_image(saved(Image.fromarray(alpha))) == RGB).all()
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # cyan
    assert np.abs(decode_image(saved(cmyk, "JPEG")).astype(int) - (0, 255, 255)).max() <= 2


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
    assert (np.asarray(center_crop_resize(Image.fromarray(pixels), 16)) == halved).all()


@pytest.mark.parametrize("turned", [False, True])
def test_crop_is_central_and_keeps_pixels_that_fit(turned):
    pixels = noise(20, 31)
    expected = pixels[:, 5:25]
    if turned:
        pixels, expected = pixels.transpose(1, 0, 2), expected.transpose(1, 0, 2)
    assert (np.asarray(center_crop_resize(Image.fromarray(pixels), 20)) == expected).all()


@given(st.integers(1, 90), st.integers(1, 90), st.integers(8, 40))
@settings(max_examples=60, deadline=None)
def test_crop_has_the_size_asked_for_and_keeps_a_constant(height, width, size):
    image = center_crop_resize(Image.new("RGB", (width, height), (10, 20, 30)), size)
    assert image.size == (size, size)
    assert (np.asarray(image) == (10, 20, 30)).all()


def test_a_thread_of_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    with pytest.raises(UnreadableImage, match="elongated"):
        center_crop_resize(Image.new("RGB", (2000, 1)), 8)


def test_encoding_is_deterministic_and_as_good_as_asked():
    image = Image.fromarray(noise(32, 32))
    png = encode_image(image, "png")
    assert (png.extension, encode_image(image, "png")) == ("png", png)
    assert (decode_image(png.data) == np.asarray(image)).all()
    good, bad = (encode_image(image, "jpeg", quality) for quality in (95, 30))
    assert good.extension == "jpg"
    assert len(good.data) > len(bad.data)
    assert np.abs(decode_image(good.data).astype(int) - np.asarray(image)).mean() < 4  # needs whole colours


def test_stored_form():
    data = saved(Image.fromarray(noise(40, 30)), "JPEG")
    config = ShardsConfig(source="x", image_size=16)
    cropped = stored_image(data, config)
    assert cropped.extension == "png"
    assert decode_image(cropped.data).shape == (16, 16, 3)
    keep = config.model_copy(update={"keep_original": True})
    assert stored_image(data, keep) == (data, "jpg")
    assert decode_image(stored_image(data, keep.model_copy(update={"image_size": 31})).data).shape == (31, 31, 3)
    assert stored_image(saved(Image.fromarray(noise(40, 30)), "BMP"), keep).extension == "png"
