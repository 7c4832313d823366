"""Probes and previews of the tokenizer during its training, on the same few images with the same noise."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from vavae.data.pixels import difference_image, enlargement, image_grid, to_float, to_pixels, to_rgb
from vavae.data.shard_reader import gather, read_images
from vavae.data.shards.manifest import Manifest
from vavae.distributed.world import World
from vavae.metrics.equivariance import equivariance_errors, squared_errors
from vavae.metrics.latent_space import probe_latents
from vavae.models.tokenizer.representation import Autoencoder, RepresentationEncoder, build_autoencoder
from vavae.randomness import torch_generator
from vavae.runs.config import RunConfig
from vavae.storage.storage import Storage
from vavae.training.callbacks.callback import exported_module
from vavae.training.logging.log import MetricsLog
from vavae.training.step import Step

logger = logging.getLogger(__name__)

PROBED, SHOWN = 64, 8
"""Images whose latents are probed, and whose reconstructions are drawn."""
_BATCH = 16


class LatentProbe:
    """Encodes images at intervals, decodes the first of them, and logs statistics of their latents and equivariance.

    The variance of the velocity is that of all images as one class: of the few there are, classes have too few each.

    Args:
        config: configuration of the run.
        images: uint8 or uint16 [N, C, H, W], see `held_out_images`.
        every_images: images of the training between two calls.
        world: the ranks.
        encoder: the frozen encoder of a representation autoencoder, on rank 0.
    """

    def __init__(
        self,
        config: RunConfig,
        images: Tensor,
        every_images: int,
        world: World,
        encoder: RepresentationEncoder | None = None,
    ) -> None:
        self.every_images, self._encoder = every_images, encoder
        self._config, self._images, self._world = config, images[:PROBED], world

    @torch.inference_mode()
    def on_interval(self, step: Step, images_seen: int, log: MetricsLog) -> None:
        """See `Callback.on_interval`."""
        model = _autoencoder(step, self._config, self._world, self._encoder)
        if model is None:
            return
        latents = torch.cat([z.cpu() for z in _latents(model, self._images, self._config.seed, self._world)])
        z, images = latents[:_BATCH].to(self._world.device), to_float(self._images[:_BATCH].to(self._world.device))
        errors = equivariance_errors(squared_errors(model.decode, z, images, model.decode(z)))
        probes = {f"latent/{name}": value for name, value in probe_latents(latents)._asdict().items()}
        log.add(images_seen, probes | {f"equivariance_error/{name}": value for name, value in errors._asdict().items()})


class ReconstructionPreview:
    """Reconstructs images at intervals; a picture shows both, and four times their difference.

    Args:
        config: configuration of the run.
        images: uint8 or uint16 [N, C, H, W], see `held_out_images`.
        every_images: images of the training between two calls.
        folder: where pictures go.
        world: the ranks.
        encoder: the frozen encoder of a representation autoencoder, on rank 0.
    """

    def __init__(
        self,
        config: RunConfig,
        images: Tensor,
        every_images: int,
        folder: Storage,
        world: World,
        encoder: RepresentationEncoder | None = None,
    ) -> None:
        self.every_images, self._encoder = every_images, encoder
        self._config, self._images, self._folder, self._world = config, images[:SHOWN], folder, world

    @torch.inference_mode()
    def on_interval(self, step: Step, images_seen: int, log: MetricsLog) -> None:
        """See `Callback.on_interval`."""
        model = _autoencoder(step, self._config, self._world, self._encoder)
        if model is None:
            return
        latents = _latents(model, self._images, self._config.seed, self._world)
        decoded = torch.cat([model.decode(z) for z in latents])
        if not decoded.isfinite().all():
            logger.warning("no preview at %s images: the reconstructions are not finite", images_seen)
            return
        images, restored = to_rgb(self._images), to_rgb(to_pixels(decoded, self._images.dtype).cpu())
        triplets = torch.cat([images, restored, difference_image(restored, images)])
        grid = image_grid(triplets, len(self._images), scale=enlargement(triplets.shape[-2:]))
        log.picture(images_seen, "reconstructions", grid, self._folder)


def held_out_images(shards: Storage, manifest: Manifest) -> Tensor:
    """Read the first held-out images, uint8 or uint16 [N, C, H, W]; training images where none are held out."""
    split = "validation" if manifest.splits.get("validation") else "train"
    return gather(read_images(shards, manifest, split, PROBED, _BATCH)).images


def _autoencoder(
    step: Step, config: RunConfig, world: World, encoder: RepresentationEncoder | None
) -> Autoencoder | None:
    return exported_module(
        step, "generator", "autoencoder.", lambda: build_autoencoder(config.tokenizer, encoder), world
    )


@torch.inference_mode()
def _latents(model: Autoencoder, images: Tensor, seed: int, world: World) -> Iterator[Tensor]:
    """Sample the posteriors of images, uint8 or uint16 [N, C, H, W], in batches [b, C, h, w]."""
    rng = torch_generator(seed, "observed posterior")
    for batch in images.split(_BATCH):
        posterior = model.encode(to_float(batch.to(world.device)))
        noise = torch.randn(posterior.mean.shape, generator=rng)
        yield posterior.at(noise.to(world.device))
