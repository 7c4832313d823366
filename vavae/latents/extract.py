"""Extraction of latents: one image shard in, one latent shard of the same name out, its record written last.

With `latents.online` no latents come out, but their statistics and the readable images alone.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from vavae.config import digest, identity
from vavae.data.ahead import in_turn, map_ahead, threads_of
from vavae.data.pixels import pixel_dtype, to_float
from vavae.data.shard_reader import ReadableImage, ReadableImages, batched, open_records
from vavae.data.shards.manifest import Manifest, ShardInfo
from vavae.data.shards.tar import ShardWriter, write_tar
from vavae.errors import UserError
from vavae.latents.config import LatentsConfig
from vavae.latents.encoding import encode_moments
from vavae.latents.features import SPLIT, FeatureExtraction
from vavae.latents.manifest import MANIFEST, LatentManifest
from vavae.latents.shards import latent_members
from vavae.latents.statistics import STATISTICS, LatentStatistics, check_statistics, read_statistics
from vavae.models.tokenizer.representation import Autoencoder
from vavae.runs.extraction_inputs import ExtractionInputs
from vavae.storage.artifact import FileInfo
from vavae.storage.storage import Storage, sha256_of


class LatentShardRecord(BaseModel):
    """Commit record of one latent shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: str
    """Digest of everything that the latents are a function of: image shard, tokenizer and settings."""
    shard: ShardInfo
    """The shard of latents; the image shard, less the unreadable images, where none are stored."""
    statistics: dict[str, object]
    """Partial sums, see `LatentStatistics`; empty where they are in a file."""
    keys: tuple[str, ...]
    """Names of the images, in order, as their source calls them."""
    captions: FileInfo | None = None
    """Size and checksum of the file of their captions, where they have any."""
    sums: FileInfo | None = None
    """Size and checksum of the file of the partial sums of positions; null where sums are of channels."""
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
        config: batch size, flips, precision and scale.
        threads: threads that decode images; their number changes nothing.
        features: those to be stored beside the latents; None for none.
        given: folder with the statistics that take the place of measured ones; None for measured ones.
        kind: of the tokenizer.
    """

    def __init__(
        self,
        images: Storage,
        manifest: Manifest,
        latents: Storage,
        tokenizer: str,
        config: LatentsConfig,
        threads: int = 1,
        features: FeatureExtraction | None = None,
        given: Storage | None = None,
        kind: Literal["kl", "representation"] = "kl",
    ) -> None:
        self._features, self._given, self._kind = features, given, kind
        self._images, self._manifest, self._latents = images, manifest, latents
        self._tokenizer, self._config, self._threads = tokenizer, config, threads
        self._turn = Lock()

    @classmethod
    def of(cls, inputs: ExtractionInputs) -> "Extraction":
        """The latents of a run.

        Raises:
            UserError: the tokenizer came without the statistics that the configuration asks for.
        """
        tokenizer, config = inputs.tokenizer.digest, inputs.config.latents
        given = inputs.tokenizer.folder if config.normalization == "tokenizer" else None
        if given is not None and STATISTICS not in inputs.tokenizer.files:
            raise UserError(
                "latents.normalization=tokenizer, but the tokenizer came without statistics of latents: take measured"
            )
        threads = threads_of(config.cpus or inputs.config.workers.cpus)
        features = FeatureExtraction.of(inputs)
        kind, place = inputs.config.tokenizer.kind, inputs.output.folder
        return cls(inputs.images, inputs.manifest, place, tokenizer, config, threads, features, given, kind)

    @property
    def images(self) -> int:
        """Number of images in all shards, those that have features counted twice."""
        count = sum(self._manifest.count(split) for split in self._manifest.splits)
        return count if self._features is None else count + self._features.images

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
            size = None if self._config.online else self._latents.size(f"{task.split}/{record.shard.name}")
        except (FileNotFoundError, ValidationError):
            return None
        if record.sums is not None and not self._latents.is_file(sums_path(f"{task.split}/{record.shard.name}")):
            return None
        return record if self._is_done(task, record, size) else None

    def _is_done(self, task: ShardTask, record: LatentShardRecord, size: int | None) -> bool:
        """Return whether a record is of the present inputs, and its shard, if any, has the size that it says."""
        return (self._config.online or size == record.shard.bytes) and record.origin == self._origin(task)

    def _origin(self, task: ShardTask) -> str:
        # The normalization changes no latent, nor do features.
        beside = ("scale", "normalization", "features")
        config = {key: value for key, value in identity(self._config).items() if key not in beside}
        return digest(
            {
                "source": self._manifest.splits[task.split][task.number].sha256,
                "image_size": self._manifest.image_size,
                "first_index": task.first_index,
                "tokenizer": self._tokenizer,
                "config": config,
            }
        )

    def encode(
        self, task: ShardTask, model: Autoencoder, device: torch.device, advance: Callable[[int], None]
    ) -> LatentShardRecord:
        """Encode one shard, unless it is done, and compute its features, where they are stored, unless they are.

        While a batch is encoded the next one is decoded and the one before it written; of every shard, at most two
        batches of images and three of posteriors are in memory. Called in two threads, it reads the next shard and
        stores the previous one, up to its record, while the model encodes one: models take turns, shard by shard.

        Args:
            task: the shard.
            model: the tokenizer, on the device.
            device: where to encode.
            advance: called with the number of images done since its last call.

        Returns:
            Its record, without the names of the images.
        """
        record = self._encode_latents(task, model, device, advance)
        if self._features is not None and task.split == SPLIT:
            self._features.encode(self._manifest.splits[SPLIT][task.number], task.first_index, device, advance)
        return record

    def _encode_latents(
        self, task: ShardTask, model: Autoencoder, device: torch.device, advance: Callable[[int], None]
    ) -> LatentShardRecord:
        source = self._manifest.splits[task.split][task.number]
        present = self.record(task)
        if present is not None:
            advance(source.count)
            return _without_names(present)
        path = f"{task.split}/{source.name}"
        self._latents.delete(_record_path(task.split, source))
        records = open_records(self._images, task.split, source)
        images = ReadableImages(records, self._manifest, self._config.batch_size, self._threads)
        batches = batched(images, self._config.batch_size)
        first = next(batches, None)
        if first is None:
            raise UserError(f"{self._images.url(path)}: no readable image in the whole shard; make the shards again")
        height, width = (side // model.config.downsample for side in first[0].pixels.shape[:2])
        shape = (model.config.latent_dim, height, width)
        statistics = LatentStatistics(shape[0] if self._config.statistics == "channel" else shape)
        shard = _LatentShard(task.first_index, statistics, 2 if self._kind == "kl" else 1)
        encoded = in_turn(self._turn, self._encode(model, chain([first], batches), device))
        if self._config.online:
            self._latents.delete(path)
            shard.add_all(encoded, advance)
            info = source.without(images.skipped_records)
        else:
            with self._latents.create(path) as local:
                with write_tar(local) as shard.tar:
                    shard.add_all(encoded, advance)
                size, sha256 = local.stat().st_size, sha256_of(local)
            info = ShardInfo(name=source.name, count=len(shard.keys), bytes=size, sha256=sha256)
        if images.skipped:
            advance(len(images.skipped))
        sums = None
        if self._config.statistics == "position":
            sums = shard.statistics.write(self._latents, sums_path(path))
        record = LatentShardRecord(
            origin=self._origin(task),
            shard=info,
            statistics=shard.statistics.to_json() if sums is None else {},
            keys=tuple(shard.keys),
            sums=sums,
            captions=self._write_captions(captions_path(path), shard.captions),
            skipped=tuple(images.skipped),
        )
        without = {"sums"} if record.sums is None else set()
        self._latents.write_json(_record_path(task.split, source), record.model_dump(mode="json", exclude=without))
        return _without_names(record)

    def _write_captions(self, path: str, captions: Sequence[str | None]) -> FileInfo | None:
        """Write the captions of a shard beside it, as they are; None where no image has one."""
        if not any(caption is not None for caption in captions):
            return None
        data = json.dumps(captions, ensure_ascii=False, indent=0).encode()
        self._latents.write_bytes(path, data)
        return FileInfo(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def _encode(
        self, model: Autoencoder, batches: Iterable[list[ReadableImage]], device: torch.device
    ) -> Iterator["_EncodedBatch"]:
        """Encode batches; on a GPU, the copies to it and back are under way while the caller goes on."""
        for batch in batches:
            images = _stack([image.pixels for image in batch], pinned=device.type == "cuda")
            posteriors = self._posteriors(model, images.to(device, non_blocking=True)).to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            labels, keys, captions = ([getattr(image, name) for image in batch] for name in ("label", "key", "caption"))
            yield _EncodedBatch(posteriors, copied, labels, keys, captions)

    def _posteriors(self, model: Autoencoder, images: Tensor) -> Tensor:
        """Encode pixels [B, c, H, W] to float16 [B, moments · (1 + flip), C, h, w], a short batch padded to the full
        size.
        """
        count = len(images)
        padded = torch.cat([images, images[-1:].expand(self._config.batch_size - count, -1, -1, -1)])
        pixels = to_float(padded)
        views = [pixels, pixels.flip(-1)] if self._config.flip else [pixels]
        return torch.cat([encode_moments(model, view, self._config.precision)[:count] for view in views], dim=1)

    def finish(
        self, shape: tuple[int, int, int], records: Sequence[LatentShardRecord]
    ) -> tuple[str, dict[str, FileInfo]]:
        """Write manifest and statistics once all shards are done.

        Args:
            shape: C, H, W of one latent.
            records: those that `encode` returned for all tasks.

        Returns:
            Digest of the content; size and checksum of every file.

        Raises:
            UserError: the latents can't be normalized, as where a channel does not vary.
        """
        splits, captions = self._shards_done(records)
        total = self._total(shape, records)
        normalization = self._normalization(total)
        check_statistics(**normalization, place=self._latents.url(STATISTICS))
        manifest = LatentManifest(
            tokenizer=self._tokenizer,
            shape=shape,
            flip=self._config.flip,
            classes=self._manifest.classes,
            splits={split: tuple(shards) for split, shards in splits.items()},
            kind=self._kind,
            statistics=self._config.statistics,
            online=self._config.online,
        )
        self._latents.write_json(MANIFEST, manifest.to_json())
        stored = {} if self._config.online else splits
        files = {
            f"{split}/{shard.name}": FileInfo(bytes=shard.bytes, sha256=shard.sha256)
            for split, shards in stored.items()
            for shard in shards
        } | captions
        if self._features is not None:
            files |= self._features.finish()
        files[STATISTICS] = self._write_statistics(normalization)
        text = self._latents.read_bytes(MANIFEST)
        files[MANIFEST] = FileInfo(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
        return digest({path: info.sha256 for path, info in files.items()}), files

    def _shards_done(
        self, records: Sequence[LatentShardRecord]
    ) -> tuple[dict[str, list[ShardInfo]], dict[str, FileInfo]]:
        """Shards by split, and the files of their captions by path, once all of them are what their records say."""
        splits: dict[str, list[ShardInfo]] = {split: [] for split in self._manifest.splits}
        captions: dict[str, FileInfo] = {}
        sizes = self._latents.sizes()
        for task, record in zip(self.tasks(), records, strict=True):
            path = f"{task.split}/{record.shard.name}"
            assert self._is_done(task, record, sizes.get(path)), (
                f"{self._latents.url(path)} is not what its record says"
            )
            splits[task.split].append(record.shard)
            if record.captions is not None:
                captions[captions_path(path)] = record.captions
        return splits, captions

    def _total(self, shape: tuple[int, int, int], records: Sequence[LatentShardRecord]) -> LatentStatistics:
        """Statistics of the training images, merged in the order of the shards."""
        total = LatentStatistics(shape[0] if self._config.statistics == "channel" else shape)
        for task, record in zip(self.tasks(), records, strict=True):
            if task.split != SPLIT:
                continue
            if record.sums is None:
                total.merge(LatentStatistics.from_json(record.statistics))
            else:
                path = sums_path(f"{task.split}/{record.shard.name}")
                total.merge(LatentStatistics.read(self._latents, path, record.sums))
        return total

    def _write_statistics(self, normalization: dict[str, Tensor]) -> FileInfo:
        with tempfile.TemporaryDirectory(prefix="vavae-") as scratch:
            local = Path(scratch) / STATISTICS
            save_file(normalization, local)
            self._latents.put_file(local, STATISTICS)
            return FileInfo(bytes=local.stat().st_size, sha256=sha256_of(local))

    def _normalization(self, total: LatentStatistics) -> dict[str, Tensor]:
        """Mean and deviation that the diffusion normalizes by: float64 [C], or [C, h, w]."""
        mean, std, scale = torch.from_numpy(total.mean), torch.from_numpy(total.std), self._config.scale
        if scale is not None:
            mean, std = torch.zeros_like(mean), torch.full_like(std, 1 / scale)
        elif self._given is not None:
            mean, std = read_statistics(self._given)
        return {"mean": mean, "std": std}


class _EncodedBatch(NamedTuple):
    posteriors: Tensor
    """float16 [B, moments · (1 + flip), C, h, w] on the host, complete once `copied` has happened."""
    copied: torch.cuda.Event | None
    labels: list[int]
    keys: list[str]
    captions: list[str | None]


class _LatentShard:
    """Writer of one shard: its latents, their statistics, and the names of the images.

    Args:
        first_index: index within the split of its first record.
        statistics: empty, of channels or of positions.
        moments: arrays of one view of an image.
    """

    def __init__(self, first_index: int, statistics: LatentStatistics, moments: int) -> None:
        self._first, self.statistics, self._moments = first_index, statistics, moments
        self.tar: ShardWriter | None = None
        """The open shard; None where no latents are stored."""
        self.keys: list[str] = []
        self.captions: list[str | None] = []

    def add_all(self, batches: Generator[_EncodedBatch, None, None], advance: Callable[[int], None]) -> None:
        """Append batches, each while the next one is encoded; `advance` is called with the images of each."""
        with closing(batches), closing(map_ahead(self._add, batches, ahead=1)) as written:
            for count in written:
                advance(count)

    def _add(self, batch: _EncodedBatch) -> int:
        """Append a batch, and return its number of images."""
        if batch.copied is not None:
            batch.copied.synchronize()
        arrays = batch.posteriors.numpy()
        for view in range(0, arrays.shape[1], self._moments):
            self.statistics.update(arrays[:, view], arrays[:, view + 1] if self._moments == 2 else None)
        if not np.isfinite(self.statistics.sum_squares).all():  # the sums tell of every latent, for nothing
            bad = np.isfinite(arrays).all((1, 2, 3, 4)).argmin()
            raise UserError(
                f"{batch.keys[bad]}: its latent is not finite in float16; set latents.precision=fp32, or train the "
                "tokenizer again: its weights overflow"
            )
        if self.tar is not None:
            for array, label in zip(arrays, batch.labels, strict=True):
                self.tar.add(self._first + self.tar.count, latent_members(array, label))
        self.keys += batch.keys
        self.captions += batch.captions
        return len(arrays)


def _stack(images: Sequence[np.ndarray], pinned: bool) -> Tensor:
    """Stack pixels [H, W, C] to [B, C, H, W], in which the channels of a pixel stay together."""
    stacked = torch.empty((len(images), *images[0].shape), dtype=pixel_dtype(8 * images[0].itemsize), pin_memory=pinned)
    np.stack(images, out=stacked.numpy())
    return stacked.permute(0, 3, 1, 2)


def _without_names(record: LatentShardRecord) -> LatentShardRecord:
    return record.model_copy(update={"keys": (), "skipped": ()})


def captions_path(shard: str) -> str:
    """Path of the captions of a shard of latents: a list of JSON in the order of its records, null for none."""
    return f"{shard.removesuffix('.tar')}.captions.json"


def sums_path(shard: str) -> str:
    """Path of the partial sums of the positions of a shard of latents."""
    return f"{shard.removesuffix('.tar')}.sums.safetensors"


def _record_path(split: str, shard: ShardInfo) -> str:
    return f"{split}/{shard.name.removesuffix('.tar')}.json"
