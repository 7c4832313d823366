"""Pictures to the latents of a tokenizer and back, in one call each."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vavae.data.config import PixelFormat
from vavae.data.image import UnreadableImage, picture_pixels
from vavae.data.pixels import to_float, to_pixels
from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.representation import Autoencoder, RepresentationAutoencoder
from vavae.randomness import torch_generator

Pictures = Image.Image | Sequence[Image.Image] | np.ndarray | Tensor
"""One or several pictures of one height and width, see :func:`encode`."""

_PIXELS = (torch.uint8, torch.uint16)
_OVERSHOOT = 1e-3
"""Tolerance of the range of floating-point images, for rounding."""


@torch.no_grad()
def encode(tokenizer: Autoencoder, images: Pictures, seed: int | None = None, batch_size: int = 16) -> Tensor:
    """Encode pictures to latents, which are the tokenizer's own: no statistics have normalized them.

    The LightningDiT of a run takes them as `sampler.normalizer.normalize(latents)`.

    Args:
        tokenizer: one of `load_tokenizer`.
        images: one or several of one size, whose height and width are multiples of `tokenizer.config.downsample`:
            pictures of Pillow, one or a list of them, which are turned upright (EXIF) and converted to the channels of
            the tokenizer; or an array uint8 [N, H, W, C]; or a tensor [N, C, H, W], uint8, or floating-point in
            [-1, 1]. Pixels may be uint16, too.
        seed: takes a sample of each posterior, which seed and position of its image determine; None takes the mean.
        batch_size: images that are encoded at a time.

    Returns:
        Latents float32 [N, latent_dim, H / downsample, W / downsample], on the device of the tokenizer.

    Raises:
        UserError: the images are of another kind, shape, size or range.
    """
    _check_tokenizer(tokenizer)
    pixels, device, latents = _as_batch(images, tokenizer), _device_of(tokenizer), []
    for first in range(0, len(pixels), batch_size):
        batch = pixels[first : first + batch_size]
        posterior = tokenizer.encode((to_float(batch) if batch.dtype in _PIXELS else batch.float()).to(device))
        if seed is None:
            latents.append(posterior.mean)
        else:
            latents.append(posterior.at(posterior_noise(posterior.mean.shape, seed, first).to(device)))
    return torch.cat(latents)


@torch.no_grad()
def decode(tokenizer: Autoencoder, latents: Tensor, batch_size: int = 16) -> Tensor:
    """Decode latents to pixels.

    Args:
        tokenizer: one of `load_tokenizer`.
        latents: floating-point [N, latent_dim, h, w], on any device, as :func:`encode` returns them; those of a
            LightningDiT are normalized, and `sampler.normalizer.denormalize(latents)` is what this takes.
        batch_size: latents that are decoded at a time.

    Returns:
        Pixels uint8 [N, C, h * downsample, w * downsample] on the CPU. `tokenizer.decode` itself returns floating-point
        images, about [-1, 1] and not clamped.

    Raises:
        UserError: the latents are of another kind or shape, or not finite.
    """
    _check_tokenizer(tokenizer)
    channels = tokenizer.config.latent_dim
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
        raise UserError(f"latents: {kind}, expected a floating-point tensor [N, {channels}, h, w]")
    if latents.ndim != 4 or latents.shape[1] != channels or not latents.numel():
        raise UserError(f"latents: shape {list(latents.shape)}, expected [N, {channels}, h, w]")
    require_finite({"latents": latents}, "decode", "give latents that are finite")
    device = _device_of(tokenizer)
    return torch.cat([to_pixels(tokenizer.decode(batch.to(device))).cpu() for batch in latents.split(batch_size)])


def posterior_noise(shape: Sequence[int], seed: int, first: int) -> Tensor:
    """Draw standard normal noise float32 [B, C, h, w] for posterior samples, each image's keyed by its index.

    Args:
        shape: B, C, h and w.
        seed: of the run.
        first: index of the first image.
    """
    draws = [
        torch.randn(*shape[1:], generator=torch_generator(seed, "reconstruction", first + i)) for i in range(shape[0])
    ]
    return torch.stack(draws)


def _check_tokenizer(tokenizer: object) -> None:
    if not isinstance(tokenizer, (VAVAE, RepresentationAutoencoder)):
        raise UserError(
            f"tokenizer: a {type(tokenizer).__name__}, expected what load_tokenizer returns, before images or latents"
        )


def _device_of(tokenizer: Autoencoder) -> torch.device:
    return tokenizer.last_layers[1].device


def _as_batch(images: Pictures, tokenizer: Autoencoder) -> Tensor:
    """Pixels, or images in [-1, 1], [N, C, H, W]; UserError unless the tokenizer can take them."""
    channels, factor = tokenizer.config.image_channels, tokenizer.config.downsample
    expected = (
        f"expected pictures of Pillow, an array uint8 [N, H, W, {channels}], or a tensor [N, {channels}, H, W] of "
        "uint8 or in [-1, 1]"
    )
    given: np.ndarray | Tensor
    if isinstance(images, np.ndarray | Tensor):
        given = images
    else:
        pictures = [images] if isinstance(images, Image.Image) else images
        if not isinstance(pictures, Sequence) or not all(isinstance(each, Image.Image) for each in pictures):
            raise UserError(f"images: a {type(images).__name__}, {expected}")
        given = _stack(pictures, channels)
    if isinstance(given, np.ndarray) and given.dtype not in (np.uint8, np.uint16):
        raise UserError(f"images: an array of {given.dtype}, {expected}")
    batch = given if isinstance(given, Tensor) else torch.from_numpy(np.ascontiguousarray(given))
    if not isinstance(given, Tensor) and batch.ndim == 4:
        batch = batch.movedim(-1, 1)
    if batch.ndim != 4 or batch.shape[1] != channels or not batch.numel():
        raise UserError(f"images: shape {[*given.shape]}, {expected}")
    height, width = batch.shape[2:]
    if height % factor or width % factor:
        raise UserError(
            f"images: {height} x {width} pixels, expected multiples of {factor}, the tokenizer's downsampling: crop or "
            "resize them"
        )
    if batch.is_floating_point():
        low, high = batch.min().item(), batch.max().item()
        if not -1 - _OVERSHOOT <= low <= high <= 1 + _OVERSHOOT:
            raise UserError(
                f"images: floating-point values from {low:g} to {high:g}, expected [-1, 1]: give pixels as uint8, or "
                "pixels / 127.5 - 1"
            )
    elif batch.dtype not in _PIXELS:
        raise UserError(f"images: a tensor of {batch.dtype}, {expected}")
    return batch


def _stack(pictures: Sequence[Image.Image], channels: int) -> np.ndarray:
    """Pixels uint8 [N, H, W, C] of pictures; UserError where they are of several sizes, or one can't be converted."""
    try:
        pixels = [picture_pixels(each, PixelFormat(channels)) for each in pictures]
    except UnreadableImage as error:
        raise UserError(f"images: {error}: convert it to 8 bits") from error
    sizes = sorted({each.shape[:2] for each in pixels})
    if len(sizes) > 1:
        (height, width), (other_height, other_width), *_ = sizes
        raise UserError(
            f"images: {height} x {width} and {other_height} x {other_width} pixels: crop or resize them to one size, "
            "or encode them one by one"
        )
    return np.stack(pixels) if pixels else np.empty((0, 0, 0, channels), np.uint8)
