"""The set of generated images as shards: each a pure function of its number, done when its record is there."""

from collections.abc import Callable, Iterable, Iterator

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from vavae.data.image import encode_image
from vavae.data.passes import LabelledImages, labelled_images, shard_records
from vavae.data.tar import write_tar
from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.sampling.config import SampleConfig
from vavae.sampling.generate import Generator
from vavae.storage.artefact import FileInfo
from vavae.storage.storage import Storage, sha256_of


class SampleShardRecord(BaseModel):
    """The commit record of one shard of generated images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: str
    """Digest of the models and the settings that it was made with."""
    file: FileInfo


class SampleSet:
    """Images 0 … N - 1, image i of class i mod (number of classes), in shards.

    Args:
        storage: the folder of the samples.
        config: how many.
        seed: of the run.
        guidance: classifier-free guidance.
        solver: of the flow.
        origin: digest of everything that the images are a function of.
    """

    def __init__(
        self,
        storage: Storage,
        config: SampleConfig,
        seed: int,
        guidance: GuidanceConfig,
        solver: SolverConfig,
        origin: str,
    ) -> None:
        self._storage, self._config, self._seed = storage, config, seed
        self._guidance, self._solver, self._origin = guidance, solver, origin

    def shards(self) -> range:
        """Numbers of all shards, done or not."""
        return range(-(-self._config.images // self._config.shard_images))

    def generate(self, shard: int, generator: Generator, advance: Callable[[int], None]) -> None:
        """Make one shard, unless it is done; `advance` is told the images done since its last call."""
        first = shard * self._config.shard_images
        indices = list(range(first, min(first + self._config.shard_images, self._config.images)))
        if self.record(shard) is not None:
            advance(len(indices))
            return
        self._storage.delete(_record_path(shard))
        classes = generator.lightningdit.null_label
        with self._storage.create(_path(shard)) as local:
            with write_tar(local) as tar:
                for start in range(0, len(indices), self._config.batch_size):
                    batch = indices[start : start + self._config.batch_size]
                    labels = [index % classes for index in batch]
                    images = generator.images(batch, labels, self._seed, self._guidance, self._solver)
                    for index, label, image in zip(batch, labels, images.permute(0, 2, 3, 1).numpy(), strict=True):
                        tar.add(index, {"png": encode_image(Image.fromarray(image), "png").data, "cls": b"%d" % label})
                    advance(len(batch))
            info = FileInfo(bytes=local.stat().st_size, sha256=sha256_of(local))
        record = SampleShardRecord(origin=self._origin, file=info)
        self._storage.write_json(_record_path(shard), record.model_dump())

    def record(self, shard: int) -> SampleShardRecord | None:
        """The record of a shard that is done with these models and settings."""
        try:
            record = SampleShardRecord.model_validate_json(self._storage.read_bytes(_record_path(shard)))
            intact = self._storage.size(_path(shard)) == record.file.bytes
        except (FileNotFoundError, ValidationError):
            return None
        return record if intact and record.origin == self._origin else None

    def files(self) -> dict[str, FileInfo]:
        """All shards once they are done."""
        files = {}
        for shard in self.shards():
            record = self.record(shard)
            assert record is not None, f"samples of shard {shard} are missing: generate every shard first"
            files[_path(shard)] = record.file
        return files


def read_samples(storage: Storage, files: Iterable[str]) -> Iterator[LabelledImages]:
    """The generated images, a shard at a time, from a folder of samples.

    Args:
        storage: the folder.
        files: names of the shards.
    """
    for name in sorted(files):
        yield labelled_images(shard_records(storage.local_file(name)))


def _path(shard: int) -> str:
    return f"{shard:06d}.tar"


def _record_path(shard: int) -> str:
    return f"{shard:06d}.json"
