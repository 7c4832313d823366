"""Preview samples of the LightningDiT during its training, always from the same noise."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from vavae.data.pixels import enlargement, image_grid
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.latents.statistics import LatentNormalizer
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.representation import Autoencoder
from vavae.runs.config import RunConfig
from vavae.sampling.labels import label_law
from vavae.sampling.sampler import Sampler
from vavae.storage.storage import Storage
from vavae.training.callbacks.callback import exported_module
from vavae.training.logging.log import MetricsLog
from vavae.training.step import Step

logger = logging.getLogger(__name__)

SHOWN, _COLUMNS = 16, 8


class SamplePreview:
    """Samples the first images that the `sample` job would make with the present average, at intervals.

    Rank 0 does it alone, in single precision, with the run's solver and guidance but for that by a weaker
    model: the other ranks wait.

    Args:
        config: configuration of the run.
        model: sizes of the LightningDiT.
        tokenizer: decodes the latents; None on the other ranks.
        normalizer: of the latents.
        classes: names of the classes.
        every_images: images of the training between two previews.
        folder: where pictures go.
        world: the ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LightningDiTConfig,
        tokenizer: Autoencoder | None,
        normalizer: LatentNormalizer,
        classes: Sequence[str],
        every_images: int,
        folder: Storage,
        world: World,
    ) -> None:
        self.every_images = every_images
        self._config, self._model, self._folder, self._world = config, model, folder, world
        self._tokenizer, self._normalizer = tokenizer, normalizer
        label = label_law(config.sample, classes, config.seed)
        self._labels = [label(index) for index in range(SHOWN)]

    def on_interval(self, step: Step, images_seen: int, log: MetricsLog) -> None:
        """See `Callback.on_interval`."""
        config = self._config
        try:
            model = exported_module(
                step,
                "lightningdit",
                "model.",
                lambda: LightningDiT(self._model, config.tokenizer.latent_dim, config.grid),
                self._world,
            )
            if model is None:
                return
            images = self._generate(model)
        except torch.OutOfMemoryError:
            logger.warning(
                "no preview at %s images: no memory beside the training; lower sample.batch_size", images_seen
            )
            return
        except UserError as error:  # a picture is no reason to end a training
            logger.warning("no preview at %s images: %s", images_seen, error)
            return
        grid = image_grid(images, _COLUMNS, scale=enlargement(images.shape[-2:]))
        log.picture(images_seen, "samples", grid, self._folder)

    def _generate(self, model: LightningDiT) -> Tensor:
        """Sample the images, uint8 or uint16 [N, C, H, W]."""
        config, device = self._config, self._world.device
        assert self._tokenizer is not None, "rank 0 has the tokenizer"
        sampler = Sampler(self._tokenizer.to(device), model, self._normalizer.to(device), depth=config.shards.depth)
        guidance = config.guidance.model_copy(update={"weak": None})  # there may be no memory for a second model
        batches = sampler.batches(
            range(SHOWN), self._labels, config.seed, guidance, config.solver, config.sample.batch_size
        )
        return torch.cat([*batches])
