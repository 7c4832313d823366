"""The tokenizer during its training, seen through a fixed set of images."""

import torch
from torch import Tensor

from vavae.data.manifest import Manifest
from vavae.data.passes import gather, read_images
from vavae.data.pixels import to_float
from vavae.distributed.world import World
from vavae.interop.export import below
from vavae.metrics.latent_probes import probe_latents
from vavae.randomness import torch_generator
from vavae.tokenizer.autoencoder import VAVAE
from vavae.training.log import MetricsLog
from vavae.training.observer import exported_weights
from vavae.training.run import Run
from vavae.training.step import Step

_IMAGES = 64
_BATCH = 16


class TokenizerObserver:
    """Encodes the same held-out images, with the same noise, at intervals, and logs what their latents are like.

    The weights are those that would be exported. They are copied into an autoencoder of its own, so that this works
    with any engine; rank 0 looks alone.

    Args:
        run: its configuration, and its image shards.
        manifest: of the shards. Without held-out images it is training images that are looked at.
        every_images: images between two looks.
        world: the ranks.
    """

    def __init__(self, run: Run, manifest: Manifest, every_images: int, world: World) -> None:
        self.every_images = every_images
        self._config, self._world = run.config, world
        self._images: Tensor | None = None
        if world.is_first:
            split = "validation" if manifest.splits.get("validation") else "train"
            shards = run.storage.child(run.prefix("prepare_shards"))
            self._images = gather(read_images(shards, manifest, split, _IMAGES, _BATCH)).images

    def observe(self, step: Step, images_seen: int, log: MetricsLog) -> None:
        """See `Observer.observe`."""
        weights = exported_weights(step, "generator")
        if self._images is None:
            return
        probes = probe_latents(self._latents(self._autoencoder(weights), self._images))
        log.add(images_seen, {f"latent/{name}": value for name, value in probes._asdict().items()})

    def _autoencoder(self, weights: dict[str, Tensor]) -> VAVAE:
        """The autoencoder with these weights. On the meta device nothing is initialised, so nothing is drawn."""
        with torch.device("meta"):
            model = VAVAE(self._config.tokenizer)
        model.load_state_dict(below("autoencoder.", weights), assign=True)
        return model.eval().requires_grad_(False).to(self._world.device)

    @torch.inference_mode()
    def _latents(self, model: VAVAE, images: Tensor) -> Tensor:
        """A sample of the posterior of each image [N, C, h, w], on the CPU."""
        generator = torch_generator(self._config.seed, "observed posterior")
        samples = []
        for batch in images.split(_BATCH):
            posterior = model.encode(to_float(batch.to(self._world.device)))
            noise = torch.randn(posterior.mean.shape, generator=generator)
            samples.append(posterior.at(noise.to(self._world.device)).cpu())
        return torch.cat(samples)
