"""How well a tokenizer reconstructs held-out images, and how well its latents agree with the teacher."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vavae.data.passes import LabelledImages
from vavae.data.pixels import to_float, to_uint8
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.metrics.features import FeatureExtractor
from vavae.metrics.frechet import FeatureStatistics, frechet_distance
from vavae.metrics.reconstruction import psnr, ssim
from vavae.randomness import torch_generator
from vavae.tokenizer.autoencoder import VAVAE
from vavae.tokenizer.teacher import VisionFoundationTeacher


class Reconstruction(NamedTuple):
    """Measures over a set of images."""

    images: int
    psnr: float
    """Decibels, mean over images."""
    ssim: float
    frechet_distance: float
    """Between originals and reconstructions."""
    alignment: float | None
    """Mean cosine of projected latents and teacher features over images and positions; none without a projection."""
    features: FeatureStatistics
    """Of the originals."""
    pairs: tuple[Tensor, Tensor]
    """The first originals and their reconstructions, uint8 [P, 3, H, W]."""


@torch.inference_mode()
def measure_reconstruction(
    batches: Iterator[LabelledImages],
    tokenizer: VAVAE,
    alignment: VisionFoundationLoss | None,
    teacher: VisionFoundationTeacher | None,
    extractor: FeatureExtractor,
    seed: int,
    pictures: int,
    advance: Callable[[int], None],
) -> Reconstruction:
    """Reconstruct images from one posterior sample each (the released protocol) and measure.

    Args:
        batches: held-out images.
        tokenizer: the autoencoder.
        alignment: its projection; none leaves that measure out.
        teacher: what it was aligned with, if it was.
        extractor: of the Fréchet distance.
        seed: keys the posterior noise, together with the index of the image.
        pictures: pairs to keep.
        advance: told the images done since its last call.
    """
    originals = FeatureStatistics.empty(extractor.num_features)
    reconstructions = FeatureStatistics.empty(extractor.num_features)
    psnrs, ssims, cosines, kept = [], [], [], []
    done = 0
    for batch in batches:
        pixels = to_float(batch.images)
        posterior = tokenizer.encode(pixels)
        z = posterior.at(_noise(posterior.mean.shape, seed, done))
        restored = to_uint8(tokenizer.decode(z))
        psnrs.append(psnr(restored, batch.images))
        ssims.append(ssim(restored, batch.images))
        if alignment is not None and teacher is not None:
            features = teacher(pixels, (z.shape[2], z.shape[3]))
            cosines.append(alignment(z, features).alignment.expand(len(z)))
        originals.update(extractor(batch.images))
        reconstructions.update(extractor(restored))
        if done < pictures:
            kept.append((batch.images, restored))
        done += len(z)
        advance(len(z))
    shown = [torch.cat(side)[:pictures] for side in zip(*kept, strict=True)]
    return Reconstruction(
        images=done,
        psnr=torch.cat(psnrs).mean().item(),
        ssim=torch.cat(ssims).mean().item(),
        frechet_distance=frechet_distance(originals, reconstructions),
        alignment=torch.cat(cosines).mean().item() if cosines else None,
        features=originals,
        pairs=(shown[0], shown[1]),
    )


def _noise(shape: torch.Size, seed: int, first: int) -> Tensor:
    """Standard normal noise, each image's keyed by its index."""
    draws = [
        torch.randn(shape[1:], generator=torch_generator(seed, "reconstruction", first + i)) for i in range(shape[0])
    ]
    return torch.stack(draws)
