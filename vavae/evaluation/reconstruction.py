"""Metrics of a tokenizer on held-out images: its reconstructions, and the alignment of its latents with the teacher."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vavae.data.pixels import to_float, to_pixels
from vavae.data.shard_reader import LabeledImages
from vavae.evaluation.latent_probes import ProbedBatch, ProbedImages
from vavae.latents.pictures import posterior_noise
from vavae.losses.perceptual import LPIPS
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.metrics.equivariance import squared_errors
from vavae.metrics.features import Summaries, without_tf32
from vavae.metrics.frechet import frechet_distance
from vavae.metrics.reconstruction import psnr, ssim
from vavae.models.tokenizer.representation import Autoencoder
from vavae.models.tokenizer.teacher import VisionFoundationTeacher


class Reconstructor(NamedTuple):
    """A tokenizer and the networks of the metrics of each image; metrics whose network is None are left out."""

    tokenizer: Autoencoder
    alignment: VisionFoundationLoss | None
    """The projection of its latents."""
    teacher: VisionFoundationTeacher | None
    """The teacher that it was aligned with."""
    lpips: LPIPS | None

    def to(self, device: torch.device) -> "Reconstructor":
        """Move all networks to a device."""
        for part in self:
            if part is not None:
                part.to(device)
        return self


class ReconstructedBatch(NamedTuple):
    """Some images, their reconstructions, and the metrics of each."""

    originals: Tensor
    """uint8 or uint16 [B, C, H, W]."""
    reconstructions: Tensor
    """uint8 or uint16 [B, C, H, W]."""
    metrics: dict[str, Tensor]
    """Metrics by name, float [B]: `psnr` in decibels, `ssim`; and where their networks are there `lpips` and
    `alignment`, the mean cosine of projected latents and teacher features over positions and batch."""
    finite: Tensor
    """True where the decoder's output was finite, bool [B]; a reconstruction that was not is black."""
    probed: ProbedBatch | None = None
    """Those of the images that are probed; None where none is."""


@torch.inference_mode()
def reconstruct(
    batches: Iterable[LabeledImages],
    reconstructor: Reconstructor,
    seed: int,
    first: int,
    device: torch.device,
    probed_images: ProbedImages | None = None,
) -> Iterator[ReconstructedBatch]:
    """Reconstruct images from one posterior sample each (the released protocol).

    LPIPS sees the decoder's own output, not rounded or clamped to 8 bits, as in the released code.

    Args:
        batches: held-out images, uint8 or uint16 [B, C, H, W] each.
        reconstructor: the networks, on the device.
        seed: keys the posterior noise, together with the index of the image.
        first: index of the first image.
        device: where to reconstruct.
        probed_images: chooses those that are probed; None probes none.
    """
    tokenizer, alignment, teacher, lpips = reconstructor
    for batch in batches:
        with without_tf32():
            images = batch.images.to(device)
            pixels = to_float(images)
            posterior = tokenizer.encode(pixels)  # mean and deviation [B, C, h, w]
            z = posterior.at(posterior_noise(posterior.mean.shape, seed, first).to(device))
            decoded = tokenizer.decode(z)
            restored = to_pixels(decoded, images.dtype)
            metrics = {"psnr": psnr(restored, images), "ssim": ssim(restored, images)}
            if lpips is not None:
                metrics["lpips"] = lpips(pixels, decoded)
            if alignment is not None and teacher is not None:
                features = teacher(pixels, (z.shape[2], z.shape[3]))
                metrics["alignment"] = alignment(z, features).alignment.expand(len(z))
            probed = None
            if probed_images is not None and len(chosen := probed_images.take(batch.labels)):
                errors = squared_errors(tokenizer.decode, z[chosen], pixels[chosen], decoded[chosen])
                probed = ProbedBatch(z[chosen], batch.labels[chosen], errors)
        first += len(z)
        yield ReconstructedBatch(images, restored, metrics, decoded.isfinite().flatten(1).all(1), probed)


class Reconstruction(NamedTuple):
    """Metrics over a set of images."""

    images: int
    """Number of images."""
    exact: int
    """Number of images without any difference, whose `psnr` is infinite and stays out of its mean."""
    means: dict[str, float]
    """Means over the images by name, see `ReconstructedBatch`; no `psnr` where all are exact."""
    frechet_distances: dict[str, float]
    """Fréchet distance between originals and reconstructions by the name of the extractor."""
    pairs: tuple[Tensor, Tensor]
    """The first originals and their reconstructions, uint8 or uint16 [P, C, H, W] each."""

    @classmethod
    def of(
        cls,
        metrics: Mapping[str, Tensor],
        originals: Summaries,
        reconstructions: Summaries,
        pairs: tuple[Tensor, Tensor],
    ) -> "Reconstruction":
        """Aggregate the metrics of a set.

        Args:
            metrics: metrics of every image by name, float [N].
            originals: features of the originals.
            reconstructions: features of the reconstructions.
            pairs: as of the class.
        """
        exact = metrics["psnr"].isposinf()
        averaged = {**metrics, "psnr": metrics["psnr"][~exact]}
        return cls(
            images=len(exact),
            exact=int(exact.sum()),
            means={name: values.mean().item() for name, values in averaged.items() if len(values)},
            frechet_distances={
                name: frechet_distance(originals[name].pooled, summary.pooled)
                for name, summary in reconstructions.items()
            },
            pairs=pairs,
        )
