"""The set of generated images as shards: each a pure function of its number, done when its record is there."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from vavae.data.image import decode_image, encode_image
from vavae.data.image_stream import image_bytes
from vavae.data.shard_reader import LabeledImages, labeled_images, shard_records
from vavae.data.shards.tar import ShardWriter, write_tar
from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.sampling.config import SampleConfig
from vavae.sampling.labels import label_law
from vavae.sampling.sampler import Sampler
from vavae.storage.artifact import FileInfo
from vavae.storage.storage import Storage, sha256_of


class SampleShardRecord(BaseModel):
    """The commit record of one shard of generated images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: str
    """Digest of the models and the settings that it was made with."""
    images: int
    file: FileInfo


class SampleSet:
    """Images 0 … N - 1 in shards; no batch crosses the end of a shard.

    Args:
        storage: the folder of the samples.
        config: how many, of which classes.
        seed: of the run.
        guidance: classifier-free guidance.
        solver: of the flow.
        origin: digest of everything that an image is a function of, beside its index.
        classes: names of the classes, in the order of their labels.

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
    ) -> None:
        self._storage, self._config, self._seed = storage, config, seed
        self._guidance, self._solver, self._origin = guidance, solver, origin
        self.label = label_law(config, classes, seed)
        """The label of the image at an index."""

    def shards(self) -> range:
        """Numbers of all shards, done or not."""
        return range(-(-self._config.images // self._config.shard_images))

    def generate(self, shard: int, generator: Sampler, advance: Callable[[int], None]) -> None:
        """Make one shard, unless it is done; `advance` is told the images done since its last call."""
        indices = self._indices(shard)
        if self.record(shard) is not None:
            advance(len(indices))
            return
        self._storage.delete(_record_path(shard))
        labels = [self.label(index) for index in indices]
        batches = generator.batches(indices, labels, self._seed, self._guidance, self._solver, self._config.batch_size)
        with self._storage.create(_path(shard)) as local:
            with write_tar(local) as tar:
                for batch in batches:
                    for image in batch:
                        add_image(tar, indices[tar.count], labels[tar.count], image)
                    advance(len(batch))
            info = FileInfo(bytes=local.stat().st_size, sha256=sha256_of(local))
        record = SampleShardRecord(origin=self._origin, images=len(indices), file=info)
        self._storage.write_json(_record_path(shard), record.model_dump())

    def record(self, shard: int) -> SampleShardRecord | None:
        """The record of a shard that is done with these models and settings."""
        try:
            record = SampleShardRecord.model_validate_json(self._storage.read_bytes(_record_path(shard)))
            intact = self._storage.size(_path(shard)) == record.file.bytes
        except (FileNotFoundError, ValidationError):
            return None
        valid = record.origin == self._origin and record.images == len(self._indices(shard))
        return record if intact and valid else None

    def files(self) -> dict[str, FileInfo]:
        """All shards once they are done."""
        files = {}
        for shard in self.shards():
            record = self.record(shard)
            assert record is not None, f"samples of shard {shard} are missing: generate every shard first"
            files[_path(shard)] = record.file
        return files

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """Some of the images, once their shards are done: uint8 [B, 3, H, W]."""
        wanted = set(indices)
        found = {
            index: pixels
            for shard in sorted({index // self._config.shard_images for index in wanted})
            for index, pixels in self._decode(shard, wanted)
        }
        return torch.from_numpy(np.stack([found[index] for index in indices])).permute(0, 3, 1, 2).contiguous()

    def pixels(self) -> Iterator[np.ndarray]:
        """All images uint8 [H, W, 3], one after the other, once their shards are done."""
        for shard in self.shards():
            yield from (pixels for _, pixels in self._decode(shard, set(self._indices(shard))))

    def _decode(self, shard: int, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        for record in shard_records(self._storage.local_file(_path(shard))):
            index = int(record["__key__"])
            if index in wanted:
                yield index, decode_image(image_bytes(record))

    def _indices(self, shard: int) -> list[int]:
        first = shard * self._config.shard_images
        return list(range(first, min(first + self._config.shard_images, self._config.images)))


def add_image(tar: ShardWriter, index: int, label: int, image: torch.Tensor, **members: bytes) -> None:
    """Append an image uint8 [3, H, W] and its label to a shard, and what else belongs to it by extension."""
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    tar.add(index, {"png": encode_image(pixels, "png").data, "cls": b"%d" % label, **members})


def read_samples(storage: Storage, files: Iterable[str]) -> Iterator[LabeledImages]:
    """The generated images, a shard at a time, from a folder of samples.

    Args:
        storage: the folder.
        files: names of the shards.
    """
    for name in sorted(files):
        yield labeled_images(shard_records(storage.local_file(name)))


def _path(shard: int) -> str:
    return f"{shard:06d}.tar"


def _record_path(shard: int) -> str:
    return f"{shard:06d}.json"
