"""Latents that are not stored: a training encodes the images that it reads, see `latents.online`."""

import torch

from vavae.data.image_stream import ImageMicroBatch
from vavae.data.pixels import to_float
from vavae.latents.encoding import encode_moments, place_tokenizer
from vavae.latents.features import compute_features, load_feature_teacher, resize_for, token_grid
from vavae.latents.stream import LatentMicroBatch
from vavae.models.tokenizer.representation import Autoencoder
from vavae.runs.config import RunConfig


class OnlineEncoder:
    """The frozen networks that turn micro-batches of images into those that would be read from storage.

    Latents are rounded to float16 and features to bfloat16, as those in storage are. Each micro-batch is encoded by
    itself, so that the number of workers changes nothing.

    Args:
        tokenizer: the run's, with its encoder.
        config: of the run.
        device: where to encode.
    """

    def __init__(self, tokenizer: Autoencoder, config: RunConfig, device: torch.device) -> None:
        self._tokenizer = place_tokenizer(tokenizer, config, device).requires_grad_(False)
        del self._tokenizer.decoder  # a representation autoencoder's may be larger than the LightningDiT
        self._config, self._grid, self._device = config.latents, config.grid, device
        self._feature_steps = config.feature_steps
        self._teacher = (
            None if self._feature_steps is None else load_feature_teacher(config.latents, config.workers, device)
        )

    def encode(self, batch: ImageMicroBatch) -> LatentMicroBatch:
        """Encode a micro-batch of images; means, deviations and features are on the device."""
        images = to_float(batch.images.to(self._device, non_blocking=True))
        mean, *std = encode_moments(self._tokenizer, images, self._config.precision).float().unbind(1)
        features = None
        if self._teacher is not None and self._feature_steps is not None and batch.step < self._feature_steps:
            assert self._config.features is not None, "validated by the configuration"
            resized = resize_for(self._teacher, images, token_grid(self._config.features, self._grid))
            features = compute_features(self._teacher, resized, self._config, self._grid)
        return LatentMicroBatch(batch.lane, batch.step, mean, std[0] if std else None, batch.labels, features)
