"""The stream of latents that the LightningDiT trains on: micro-batches in the sample order of the images."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vavae.data.image_stream import MicroBatchKey, ShardStream
from vavae.data.prefetch import OrderedShards
from vavae.data.sample_order import SampleOrder
from vavae.data.shards.mapped_shard import ShardCache
from vavae.errors import UserError
from vavae.latents.manifest import LatentManifest
from vavae.latents.shards import MappedLatents
from vavae.randomness import numpy_generator
from vavae.storage.storage import Storage


class LatentMicroBatch(NamedTuple):
    """Posteriors of one micro-batch, each of the image or of its mirror image."""

    lane: int
    step: int
    mean: Tensor
    """float32 [S, C, H, W]."""
    std: Tensor
    """float32 [S, C, H, W]."""
    labels: Tensor
    """int64 [S]; all 0, the null label, where there are no classes."""


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
    ) -> None:
        shards = OrderedShards(storage, split, manifest.splits[split], order, micro_batch_size)
        super().__init__(
            shards, micro_batch_bytes=micro_batch_size * 2 * int(np.prod(manifest.shape)) * np.float32().itemsize
        )
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
        if self._manifest.flip:
            mirrored = numpy_generator(self._seed, "mirror", key.lane, key.step).random(self._size) < 0.5
            records = np.where(mirrored[:, None, None, None, None], records[:, 2:], records[:, :2])
        posterior = torch.from_numpy(records).float()  # [S, 2, C, H, W]
        return LatentMicroBatch(key.lane, key.step, posterior[:, 0], posterior[:, 1], torch.from_numpy(labels))

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
