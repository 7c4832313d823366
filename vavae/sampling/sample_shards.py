"""The set of samples in shards: each a pure function of its number, done when its record is there."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from threading import Lock

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from vavae.data.ahead import in_turn, map_ahead, threads_of
from vavae.data.config import RGB, PixelFormat
from vavae.data.image import decode_image
from vavae.data.pixels import encode_png
from vavae.data.record import find_image
from vavae.data.shard_reader import LabeledImages, labeled_images, shard_records
from vavae.data.shards.tar import write_tar
from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.latents.manifest import read_latent_manifest
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.config import SampleConfig
from vavae.sampling.labels import check_classes, label_law
from vavae.sampling.sampler import Sampler
from vavae.storage.artifact import FileInfo
from vavae.storage.storage import Storage, sha256_of


class SampleShardRecord(BaseModel):
    """Commit record of one shard of samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: str
    """Digest of the models and settings that it was made with."""
    images: int
    file: FileInfo


class SampleSet:
    """Samples 0 … N - 1 in shards; no batch crosses the end of a shard.

    Args:
        storage: folder of the samples.
        config: number and classes of the samples.
        seed: seed of the run.
        guidance: classifier-free guidance.
        solver: solver of the flow.
        origin: digest of everything that a sample is a function of, besides its index.
        classes: names of the classes, in the order of their labels.
        threads: threads that encode images; their number changes nothing.
        form: channels and depth of the images.

    Raises:
        UserError: a given label is none of the classes.
    """

    def __init__(
        self,
        storage: Storage,
        config: SampleConfig,
        seed: int,
        guidance: GuidanceConfig,
        solver: SolverConfig,
        origin: str,
        classes: Sequence[str],
        threads: int = 1,
        form: PixelFormat = RGB,
    ) -> None:
        self._storage, self.config, self._seed = storage, config, seed
        self._guidance, self._solver, self._origin = guidance, solver, origin
        self._threads, self._form, self._turn = threads, form, Lock()
        self.label = label_law(config, classes, seed)
        """The label of the sample at an index."""

    @classmethod
    def of(cls, inputs: SamplingInputs) -> "SampleSet":
        """The set that a configuration asks for, done or not.

        Raises:
            UserError: `sample.labels` names a class that does not exist, or there is guidance without classes.
        """
        classes = read_latent_manifest(inputs.latents.folder).classes
        check_classes(inputs.config, classes)
        config, folder = inputs.config, inputs.output.folder
        return cls(
            folder,
            config.sample,
            config.seed,
            config.guidance,
            config.solver,
            inputs.origin,
            classes,
            threads_of(config.workers.cpus),
            config.shards.pixel_format,
        )

    def shards(self) -> range:
        """Numbers of all shards, done or not."""
        return range(-(-self.config.images // self.config.shard_images))

    def generate(self, shard: int, sampler: Sampler, advance: Callable[[int], None]) -> SampleShardRecord:
        """Generate one shard, unless it is done.

        While a batch is generated the one before it is encoded and written. Called in two threads, it stores the
        previous shard, up to its record, while the models generate the next: models take turns, shard by shard.

        Args:
            shard: number of the shard.
            sampler: the models.
            advance: called with the number of images done since its last call.

        Returns:
            Its record.
        """
        indices, present = self._indices(shard), self.record(shard)
        if present is not None:
            advance(len(indices))
            return present
        self._storage.delete(_record_path(shard))
        labels = [self.label(index) for index in indices]
        batches = sampler.batches(indices, labels, self._seed, self._guidance, self._solver, self.config.batch_size)
        with self._storage.create(_path(shard)) as local:
            with write_tar(local) as tar, closing(in_turn(self._turn, _each_image(batches, advance))) as images:
                for png in map_ahead(encode_png, images, self.config.batch_size, self._threads):
                    tar.add(indices[tar.count], {"png": png, "cls": b"%d" % labels[tar.count]})
            info = FileInfo(bytes=local.stat().st_size, sha256=sha256_of(local))
        record = SampleShardRecord(origin=self._origin, images=len(indices), file=info)
        self._storage.write_json(_record_path(shard), record.model_dump())
        return record

    def record(self, shard: int) -> SampleShardRecord | None:
        """The record of a shard; None where it is not done with these models and settings."""
        try:
            record = SampleShardRecord.model_validate_json(self._storage.read_bytes(_record_path(shard)))
            size = self._storage.size(_path(shard))
        except (FileNotFoundError, ValidationError):
            return None
        return record if self._is_done(shard, record, size) else None

    def _is_done(self, shard: int, record: SampleShardRecord, size: int | None) -> bool:
        """Return whether a record is of the present models, settings and number, and its shard has the size it says."""
        valid = record.origin == self._origin and record.images == len(self._indices(shard))
        return valid and size == record.file.bytes

    def files(self, records: Sequence[SampleShardRecord]) -> dict[str, FileInfo]:
        """Size and checksum of all shards by name, once they are done.

        Args:
            records: those that `generate` returned for all shards.
        """
        files, sizes = {}, self._storage.sizes()
        for shard, record in zip(self.shards(), records, strict=True):
            path = _path(shard)
            assert self._is_done(shard, record, sizes.get(path)), (
                f"{self._storage.url(path)} is not what its record says"
            )
            files[path] = record.file
        return files

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """Some of the samples, once their shards are done: uint8 or uint16 [B, C, H, W]."""
        wanted = set(indices)
        found = {
            index: pixels
            for shard in sorted({index // self.config.shard_images for index in wanted})
            for index, pixels in self._decode(shard, wanted)
        }
        return torch.from_numpy(np.stack([found[index] for index in indices])).permute(0, 3, 1, 2).contiguous()

    def pixels(self) -> Iterator[np.ndarray]:
        """All samples uint8 or uint16 [H, W, C], one after the other, once their shards are done."""
        for shard in self.shards():
            yield from (pixels for _, pixels in self._decode(shard, set(self._indices(shard))))

    def _decode(self, shard: int, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        for record in shard_records(self._storage.local_file(_path(shard))):
            index = int(record["__key__"])
            if index in wanted:
                yield index, decode_image(record[find_image(record)], form=self._form)

    def _indices(self, shard: int) -> list[int]:
        first = shard * self.config.shard_images
        return list(range(first, min(first + self.config.shard_images, self.config.images)))


def read_samples(
    storage: Storage, files: Iterable[str], threads: int = 1, form: PixelFormat = RGB
) -> Iterator[LabeledImages]:
    """Read samples, a shard at a time.

    Args:
        storage: folder of the samples.
        files: names of the shards.
        threads: threads that decode a shard; their number changes nothing.
        form: channels and depth of the images.
    """
    for name in sorted(files):
        yield labeled_images(shard_records(storage.local_file(name)), threads, form)


def _each_image(batches: Iterable[torch.Tensor], advance: Callable[[int], None]) -> Iterator[torch.Tensor]:
    """Yield the images of batches one by one, and tell of every batch that is there."""
    for batch in batches:
        advance(len(batch))
        yield from batch


def _path(shard: int) -> str:
    return f"{shard:06d}.tar"


def _record_path(shard: int) -> str:
    return f"{shard:06d}.json"
