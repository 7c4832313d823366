"""The stream of latents that the LightningDiT trains on: micro-batches in the sample order of the images."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vavae.data.config import StreamConfig
from vavae.data.image_stream import ImageMicroBatch, ImageStream, MicroBatchKey, ShardStream
from vavae.data.prefetch import OrderedShards
from vavae.data.sample_order import SampleOrder
from vavae.data.shards.manifest import Manifest, ShardList, open_shard
from vavae.data.shards.mapped_shard import ShardCache
from vavae.errors import UserError
from vavae.latents.manifest import FEATURES, FeatureManifest, LatentManifest
from vavae.latents.shards import MappedLatents, map_features
from vavae.randomness import numpy_generator
from vavae.storage.storage import Storage

T = TypeVar("T")


class LatentMicroBatch(NamedTuple):
    """Posteriors of one micro-batch, each of the image or of its mirror image."""

    lane: int
    step: int
    mean: Tensor
    """float32 [S, C, H, W]."""
    std: Tensor | None
    """float32 [S, C, H, W]; None of latents without a posterior."""
    labels: Tensor
    """int64 [S]; all 0, the null label, where there are no classes."""
    features: Tensor | None = None
    """Features of the same views, bfloat16 [S, N, F]; None where none are read."""


class FeaturesToRead(NamedTuple):
    """Features that a stream reads with its latents."""

    manifest: FeatureManifest
    steps: float
    """Steps that need them; later ones read none."""


@dataclass(frozen=True)
class ShardsWithFeatures(OrderedShards):
    """Shards of latents, each with the shard of the features of its images."""

    features: ShardList
    feature_steps: float = math.inf
    """Steps that read features; later ones read latents alone."""

    def fetch(self, shard: int, step: int) -> None:
        """Bring the shards of an index that a step reads into the cache, where they are not in it yet."""
        super().fetch(shard, step)
        if step < self.feature_steps:
            self.open_features(shard, lambda path: None)

    def open_features(self, shard: int, open_file: Callable[[Path], T]) -> T:
        """Open the local file of a shard of features, see `open`."""
        return open_shard(self.storage, f"{FEATURES}/{self.split}", self.features[shard], open_file)

    def bytes_of(self, shards: Iterable[int], step: int) -> int:
        """Total size of what a step reads of some shards and of their features, bytes."""
        indices = [*shards]
        of_features = int(self.features.sizes[indices].sum()) if step < self.feature_steps else 0
        return super().bytes_of(indices, step) + of_features


def draw_mirrored(seed: int, key: MicroBatchKey, count: int) -> np.ndarray:
    """Draw which images of a micro-batch are seen as their mirror images, bool [count]."""
    return numpy_generator(seed, "mirror", key.lane, key.step).random(count) < 0.5


class EncodedImageStream(ImageStream):
    """The images of one split whose latents are not stored, for a training that encodes them: the images, or their
    mirror images, of the latents that `LatentStream` would bring, in the same order.

    Args:
        storage: folder of the image shards.
        images: their manifest.
        latents: manifest of the latents.
        split: `train` or `validation`.
        order: the sample order.
        micro_batch_size: images of one micro-batch.
        config: limits of reading.
        seed: keys the choice between an image and its mirror image.
    """

    def __init__(
        self,
        storage: Storage,
        images: Manifest,
        latents: LatentManifest,
        split: str,
        order: SampleOrder,
        micro_batch_size: int,
        config: StreamConfig,
        seed: int,
    ) -> None:
        readable = images.model_copy(update={"splits": latents.splits})
        whole = config.model_copy(update={"crop": "center", "flip": False})
        super().__init__(storage, readable, split, order, micro_batch_size, whole, seed)
        self._mirrors = latents.flip

    def __getitem__(self, key: MicroBatchKey) -> ImageMicroBatch:
        found = super().__getitem__(key)
        if not self._mirrors:
            return found
        mirrored = torch.from_numpy(draw_mirrored(self._seed, key, len(found.images)))
        return found._replace(images=torch.where(mirrored[:, None, None, None], found.images.flip(-1), found.images))


class LatentStream(ShardStream[LatentMicroBatch]):
    """Micro-batches of one split of latent shards, in the sample order of the images.

    Args:
        storage: folder of the latents.
        manifest: manifest of the latents.
        split: `train` or `validation`.
        order: the sample order.
        micro_batch_size: latents of one micro-batch.
        seed: keys the choice between an image and its mirror image.
        open_shards: shards mapped at a time.
        features: those to read with the latents; None reads none.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: LatentManifest,
        split: str,
        order: SampleOrder,
        micro_batch_size: int,
        seed: int,
        open_shards: int,
        features: FeaturesToRead | None = None,
    ) -> None:
        of_an_image = manifest.moments * int(np.prod(manifest.shape)) * np.float32().itemsize
        latents = (storage, split, manifest.splits[split], order, micro_batch_size)
        shards = OrderedShards(*latents)
        if features is not None:
            of_an_image += int(np.prod(features.manifest.shape)) * torch.bfloat16.itemsize
            shards = ShardsWithFeatures(*latents, features.manifest.shards, features.steps)
        super().__init__(shards, micro_batch_bytes=micro_batch_size * of_an_image)
        self._features = features
        self._open_features: ShardCache[np.ndarray] = ShardCache(open_shards)
        self._manifest, self._size, self._seed = manifest, micro_batch_size, seed
        self._open: ShardCache[MappedLatents] = ShardCache(open_shards)

    def __getitem__(self, key: MicroBatchKey) -> LatentMicroBatch:
        locations = self.shards.order.micro_batch(key.lane, key.step, self._size)
        records = np.empty((self._size, *self._manifest.record_shape), np.float16)
        labels = np.empty(self._size, np.int64)
        shards = np.array([location.shard for location in locations])
        rows = np.array([location.record for location in locations])
        for shard in np.unique(shards):
            mine = shards == shard
            mapped = self._open.get(int(shard), self._map)
            records[mine], labels[mine] = mapped.arrays[rows[mine]], mapped.labels[rows[mine]]
        mirrored = np.zeros(self._size, bool)
        if self._manifest.flip:
            mirrored = draw_mirrored(self._seed, key, self._size)
            moments = self._manifest.moments
            records = np.where(mirrored[:, None, None, None, None], records[:, moments:], records[:, :moments])
        mean, *std = torch.from_numpy(records).float().unbind(1)  # [S, C, H, W] each
        features = None
        if self._features is not None and key.step < self._features.steps:
            features = self._read_features(shards, rows, mirrored.astype(int))
        deviation = std[0] if std else None
        return LatentMicroBatch(key.lane, key.step, mean, deviation, torch.from_numpy(labels), features)

    def _read_features(self, shards: np.ndarray, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """Features bfloat16 [S, N, F] of images, given by shard and record, and of these views of them."""
        assert self._features is not None, "a stream with features"
        bits = np.empty((self._size, *self._features.manifest.shape), np.int16)
        for index, (shard, row, view) in enumerate(zip(shards.tolist(), rows, views, strict=True)):
            bits[index] = self._open_features.get(shard, self._map_features)[row, view]
        return torch.from_numpy(bits).view(torch.bfloat16)

    def _map_features(self, shard: int) -> np.ndarray:
        assert isinstance(self.shards, ShardsWithFeatures), "a stream with features"
        assert self._features is not None, "a stream with features"
        count, shape = self.shards.features[shard].count, self._features.manifest.record_shape
        return self.shards.open_features(shard, lambda path: map_features(path, count, shape))

    def _map(self, shard: int) -> MappedLatents:
        def open_file(path: Path) -> MappedLatents:
            count, classes = self.shards.infos[shard].count, len(self._manifest.classes)
            mapped = MappedLatents(path, count, self._manifest.record_shape)
            if mapped.labels.max(initial=0) >= max(1, classes):
                raise UserError(
                    f"{path}: label {mapped.labels.max()}, but the manifest has {classes} classes; "
                    "compute the latents again"
                )
            return mapped

        return self.shards.open(shard, open_file)
