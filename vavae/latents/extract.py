"""Extraction of latents: one image shard in, one latent shard of the same name out, its record written last."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from vavae.config import digest
from vavae.data.image import UnreadableImage, prepare_image
from vavae.data.image_stream import image_bytes, label_of
from vavae.data.pixels import to_float
from vavae.data.shard_reader import shard_records
from vavae.data.shards.manifest import Manifest, ShardInfo, shard_file
from vavae.errors import UserError
from vavae.latents.config import LatentsConfig
from vavae.latents.manifest import MANIFEST, LatentManifest
from vavae.latents.shards import write_latents
from vavae.latents.statistics import STATISTICS, LatentStatistics
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.runs.extraction_inputs import ExtractionInputs
from vavae.storage.artifact import FileInfo, read_records
from vavae.storage.storage import Storage, sha256_of

_log = logging.getLogger(__name__)


class LatentShardRecord(BaseModel):
    """Commit record of one latent shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: str
    """Digest of everything that the latents are a function of: image shard, tokenizer and settings."""
    shard: ShardInfo
    statistics: dict[str, object]
    """Partial sums, see `LatentStatistics`."""
    keys: tuple[str, ...]
    """Names of the images, in order, as their source calls them."""
    skipped: tuple[str, ...] = ()
    """Names of the unreadable images, which have no latent."""


class ShardTask(NamedTuple):
    """One shard to encode."""

    split: str
    number: int
    """Position of the shard in its split."""
    first_index: int
    """Index within the split of its first record."""


class Extraction:
    """The latents of one set of image shards under one tokenizer.

    Args:
        images: folder of the image shards.
        manifest: manifest of the image shards.
        latents: folder of the latents.
        tokenizer: digest of the tokenizer's export.
        config: batch size, flips and scale.
    """

    def __init__(
        self, images: Storage, manifest: Manifest, latents: Storage, tokenizer: str, config: LatentsConfig
    ) -> None:
        self._images, self._manifest, self._latents = images, manifest, latents
        self._tokenizer, self._config = tokenizer, config

    @classmethod
    def of(cls, inputs: ExtractionInputs) -> "Extraction":
        """The latents of a run."""
        tokenizer, config = inputs.tokenizer.digest, inputs.config.latents
        return cls(inputs.images, inputs.manifest, inputs.output.folder, tokenizer, config)

    @property
    def images(self) -> int:
        """Number of images in all shards."""
        return sum(self._manifest.count(split) for split in self._manifest.splits)

    def tasks(self) -> list[ShardTask]:
        """All shards, in order, done or not."""
        tasks = []
        for split, shards in self._manifest.splits.items():
            first = 0
            for number, shard in enumerate(shards):
                tasks.append(ShardTask(split, number, first))
                first += shard.count
        return tasks

    def record(self, task: ShardTask) -> LatentShardRecord | None:
        """The record of a shard; None where it is not done, or was made from something else."""
        source = self._manifest.splits[task.split][task.number]
        try:
            record = LatentShardRecord.model_validate_json(self._latents.read_bytes(_record_path(task.split, source)))
            size = self._latents.size(f"{task.split}/{record.shard.name}")
        except (FileNotFoundError, ValidationError):
            return None
        return record if self._is_done(task, record, size) else None

    def _records(self) -> Iterator[tuple[ShardTask, LatentShardRecord | None]]:
        """Yield every shard with its record as `record` returns it, with one listing for the sizes of all."""
        tasks = self.tasks()
        paths = [_record_path(task.split, self._manifest.splits[task.split][task.number]) for task in tasks]
        sizes = self._latents.sizes()
        for task, record in zip(tasks, read_records(self._latents, paths, LatentShardRecord), strict=True):
            size = None if record is None else sizes.get(f"{task.split}/{record.shard.name}")
            yield task, record if record is not None and self._is_done(task, record, size) else None

    def _is_done(self, task: ShardTask, record: LatentShardRecord, size: int | None) -> bool:
        """Whether a record is of the present inputs, and its shard has the size that it says."""
        return size == record.shard.bytes and record.origin == self._origin(task)

    def _origin(self, task: ShardTask) -> str:
        return digest(
            {
                "source": self._manifest.splits[task.split][task.number].sha256,
                "image_size": self._manifest.image_size,
                "first_index": task.first_index,
                "tokenizer": self._tokenizer,
                "config": {"flip": self._config.flip, "batch_size": self._config.batch_size},
            }
        )

    def encode(self, task: ShardTask, model: VAVAE, device: torch.device, advance: Callable[[int], None]) -> None:
        """Encode one shard, unless it is done.

        Args:
            task: the shard.
            model: the tokenizer, on the device.
            device: where to encode.
            advance: called with the number of images done since its last call.
        """
        source = self._manifest.splits[task.split][task.number]
        if self.record(task) is not None:
            advance(source.count)
            return
        path = f"{task.split}/{source.name}"
        self._latents.delete(_record_path(task.split, source))
        records = shard_records(shard_file(self._images, task.split, source), source.count, source.dropped)
        images = _ReadableImages(records, path, self._manifest.image_size, len(self._manifest.classes))
        statistics = LatentStatistics(model.config.latent_dim)
        arrays, labels, keys = [], [], []
        for batch in images.batches(self._config.batch_size):
            array = self._posteriors(model, batch.images.to(device))
            for view in range(0, array.shape[1], 2):
                statistics.update(array[:, view], array[:, view + 1])
            arrays.append(array)
            labels += batch.labels
            keys += batch.keys
            advance(len(batch.labels))
        if not labels:
            raise UserError(f"{self._images.url(path)}: no readable image in the whole shard; make the shards again")
        if images.skipped:
            advance(len(images.skipped))
        with self._latents.create(path) as local:
            write_latents(local, np.concatenate(arrays), labels, task.first_index)
            size, sha256 = local.stat().st_size, sha256_of(local)
        info = ShardInfo(name=source.name, count=len(labels), bytes=size, sha256=sha256)
        record = LatentShardRecord(
            origin=self._origin(task),
            shard=info,
            statistics=statistics.to_json(),
            keys=tuple(keys),
            skipped=tuple(images.skipped),
        )
        self._latents.write_json(_record_path(task.split, source), record.model_dump(mode="json"))

    def _posteriors(self, model: VAVAE, images: Tensor) -> np.ndarray:
        """Encode uint8 [B, 3, H, W] to float16 [B, 2 · (1 + flip), C, h, w], a short batch padded to the full size."""
        count = len(images)
        padded = torch.cat([images, images[-1:].expand(self._config.batch_size - count, -1, -1, -1)])
        views = [padded, padded.flip(-1)] if self._config.flip else [padded]
        parts = []
        with torch.inference_mode():
            for view in views:
                posterior = model.encode(to_float(view))
                parts += [posterior.mean[:count], posterior.std[:count]]
        return torch.stack(parts, dim=1).half().cpu().numpy()

    def finish(self, shape: tuple[int, int, int]) -> tuple[str, dict[str, FileInfo]]:
        """Write manifest and statistics once all shards are done.

        Args:
            shape: C, H, W of one latent.

        Returns:
            Digest of the content; size and checksum of every file.
        """
        splits: dict[str, list[ShardInfo]] = {split: [] for split in self._manifest.splits}
        total = LatentStatistics(shape[0])
        for task, record in self._records():
            assert record is not None, f"latents of {task} are missing: encode every shard before finishing"
            splits[task.split].append(record.shard)
            if task.split == "train":
                total.merge(LatentStatistics.from_json(record.statistics))
        manifest = LatentManifest(
            tokenizer=self._tokenizer,
            shape=shape,
            flip=self._config.flip,
            classes=self._manifest.classes,
            splits={split: tuple(shards) for split, shards in splits.items()},
        )
        self._latents.write_json(MANIFEST, manifest.model_dump(mode="json"))
        files = {
            f"{split}/{shard.name}": FileInfo(bytes=shard.bytes, sha256=shard.sha256)
            for split, shards in splits.items()
            for shard in shards
        }
        with tempfile.TemporaryDirectory(prefix="vavae-") as scratch:
            local = Path(scratch) / STATISTICS
            save_file(self._normalization(total), local)
            self._latents.put_file(local, STATISTICS)
            files[STATISTICS] = FileInfo(bytes=local.stat().st_size, sha256=sha256_of(local))
        text = self._latents.read_bytes(MANIFEST)
        files[MANIFEST] = FileInfo(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
        return digest({path: info.sha256 for path, info in files.items()}), files

    def _normalization(self, total: LatentStatistics) -> dict[str, Tensor]:
        """Mean and deviation that the diffusion normalizes by, per channel: float64 [C]."""
        mean, std, scale = torch.from_numpy(total.mean), torch.from_numpy(total.std), self._config.scale
        if scale is not None:
            mean, std = torch.zeros_like(mean), torch.full_like(std, 1 / scale)
        return {"mean": mean, "std": std}


class _Batch(NamedTuple):
    images: Tensor
    """uint8 [B, 3, H, W]."""
    labels: list[int]
    keys: list[str]


class _ReadableImages:
    """Batches of the readable images of a shard, full but for the last.

    Args:
        records: records of the shard.
        place: name of the shard.
        image_size: side of ADM's center crop, pixels.
        classes: number of classes.
    """

    def __init__(self, records: Iterable[dict[str, Any]], place: str, image_size: int, classes: int) -> None:
        self._records, self._place, self._size, self._classes = records, place, image_size, classes
        self.skipped: list[str] = []
        """Names of the images that were left out so far."""

    def batches(self, batch_size: int) -> Iterator[_Batch]:
        """Read all images, in order."""
        samples = self._samples()
        while chosen := list(islice(samples, batch_size)):
            images, labels, keys = zip(*chosen, strict=True)
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # [B, H, W, 3] → [B, 3, H, W]
            yield _Batch(pixels, list(labels), list(keys))

    def _samples(self) -> Iterator[tuple[np.ndarray, int, str]]:
        for record in self._records:
            key = json.loads(record["json"])["key"] if "json" in record else record["__key__"]
            try:
                pixels = prepare_image(image_bytes(record), self._size)
            except UnreadableImage as error:
                _log.warning("%s: left out %s: %s", self._place, key, error)
                self.skipped.append(key)
            else:
                yield pixels, label_of(record, self._classes, f"{self._place}#{record['__key__']}"), key


def _record_path(split: str, shard: ShardInfo) -> str:
    return f"{split}/{shard.name.removesuffix('.tar')}.json"
