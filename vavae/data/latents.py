"""Latent shards: WebDataset tars of constant record size, so that any reader can stream them and ours can map them.

A record is `<nine digits>.latent.npy`, float16 [2 · (1 + flip), C, H, W] with the posterior's mean and standard
deviation of the image and, where flips are stored, of its mirror image; and `<nine digits>.cls`, the label.
"""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vavae.data.ahead import OrderedShards
from vavae.data.manifest import Manifest, ShardInfo, read_manifest
from vavae.data.mapped import ShardCache
from vavae.data.order import SampleOrder
from vavae.data.stream import ShardStream, SliceKey
from vavae.data.tar import write_tar
from vavae.errors import UserError
from vavae.randomness import numpy_generator
from vavae.storage.storage import Storage

_BLOCK = tarfile.BLOCKSIZE
_LABEL_DIGITS = 9


class LatentManifest(BaseModel):
    """What a set of latents is: its shards, the size of a latent, the classes, and the tokenizer that made it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer: str
    """Digest of the tokenizer's export."""
    shape: tuple[int, int, int]
    """C, H, W of one latent."""
    flip: bool
    """Whether mirror images are stored too."""
    classes: tuple[str, ...]
    splits: dict[str, tuple[ShardInfo, ...]]

    @property
    def record_shape(self) -> tuple[int, int, int, int]:
        """Shape of one record's array."""
        return (2 * (1 + self.flip), *self.shape)


def write_latents(path: Path, arrays: np.ndarray, labels: Sequence[int], first_index: int) -> None:
    """Write one shard to a local file.

    Args:
        path: the file.
        arrays: float16 [N, 2 · (1 + flip), C, H, W].
        labels: N class indices.
        first_index: index of the first record in its split; names the members.
    """
    assert arrays.dtype == np.float16, f"latents are stored in float16, not {arrays.dtype}"
    with write_tar(path) as tar:
        for index, (array, label) in enumerate(zip(arrays, labels, strict=True), first_index):
            npy = io.BytesIO()
            np.save(npy, array)
            tar.add(index, {"latent.npy": npy.getvalue(), "cls": b"%0*d" % (_LABEL_DIGITS, label)})


class MappedLatents:
    """A latent shard in memory: arrays and labels are views, nothing is parsed per record.

    Args:
        path: the shard.
        count: records that the manifest promises.
        record_shape: shape of one record's array.

    Raises:
        UserError: the file has another count, shape or layout.
    """

    def __init__(self, path: Path, count: int, record_shape: tuple[int, ...]) -> None:
        header = _npy_header_bytes(path, record_shape)
        npy_blocks = -(-(header + int(np.prod(record_shape)) * 2) // _BLOCK)
        stride = _BLOCK * (1 + npy_blocks + 2)  # header, array; header, label
        size = path.stat().st_size
        expected = -(-(count * stride + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE  # with the end mark
        if size != expected:
            raise UserError(f"{path}: {size} bytes where {count} latents take {expected}; compute the latents again")
        memory = np.memmap(path, np.uint8, "r")
        records = np.ndarray((count, stride), np.uint8, memory)
        strides = (stride, *np.empty(record_shape, np.float16).strides)
        self.arrays = np.ndarray((count, *record_shape), np.float16, memory, offset=_BLOCK + header, strides=strides)
        """float16 [N, 2 · (1 + flip), C, H, W]."""
        digits = records[:, stride - _BLOCK : stride - _BLOCK + _LABEL_DIGITS] - ord("0")
        headers = records[:, _BLOCK : _BLOCK + header]
        if (digits > 9).any() or (headers != headers[0]).any() or memory[count * stride :].any():
            raise UserError(f"{path}: not {count} records of one size; compute the latents again")
        self.labels = digits.astype(np.int64) @ 10 ** np.arange(_LABEL_DIGITS - 1, -1, -1)
        """int64 [N]."""


def _npy_header_bytes(path: Path, record_shape: tuple[int, ...]) -> int:
    """Length of the npy header of the first record, once it is found to promise float16 of that shape."""
    with path.open("rb") as file:
        file.seek(_BLOCK)
        try:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("npy is not of version 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise UserError(f"{path}: not a latent shard ({error}); compute the latents again") from error
        if shape != record_shape or dtype != np.float16 or fortran:
            raise UserError(
                f"{path}: latents {dtype}{list(shape)}, expected float16{list(record_shape)}; compute the latents again"
            )
        return file.tell() - _BLOCK


class LatentSlice(NamedTuple):
    """Posteriors of one slice, each of the image or of its mirror image."""

    lane: int
    step: int
    mean: Tensor
    """float32 [S, C, H, W]."""
    std: Tensor
    """float32 [S, C, H, W]."""
    labels: Tensor
    """int64 [S]."""


class LatentStream(ShardStream[LatentSlice]):
    """Slices of one split of latent shards, in the same order as images would come.

    Args:
        storage: the folder of the latents.
        manifest: what there is.
        split: `train` or `validation`.
        order: which record comes where.
        slice_size: latents of one slice.
        seed: keys the choice between an image and its mirror image.
        open_shards: shards mapped at a time.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: LatentManifest,
        split: str,
        order: SampleOrder,
        slice_size: int,
        seed: int,
        open_shards: int,
    ) -> None:
        shards = OrderedShards(storage, split, manifest.splits[split], order, slice_size)
        super().__init__(shards, slice_bytes=slice_size * 2 * int(np.prod(manifest.shape)) * np.float32().itemsize)
        self._manifest, self._size, self._seed = manifest, slice_size, seed
        self._open: ShardCache[MappedLatents] = ShardCache(open_shards)

    def __getitem__(self, key: SliceKey) -> LatentSlice:
        locations = self.shards.order.slice(key.lane, key.step, self._size)
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
        return LatentSlice(key.lane, key.step, posterior[:, 0], posterior[:, 1], torch.from_numpy(labels))

    def _map(self, shard: int) -> MappedLatents:
        def open_file(path: Path) -> MappedLatents:
            count, classes = self.shards.infos[shard].count, len(self._manifest.classes)
            mapped = MappedLatents(path, count, self._manifest.record_shape)
            if mapped.labels.max(initial=0) >= classes:
                raise UserError(
                    f"{path}: label {mapped.labels.max()}, but the manifest has {classes} classes; "
                    "compute the latents again"
                )
            return mapped

        return self.shards.open(shard, open_file)


class LatentStatistics:
    """Exact mean and standard deviation per channel of latents drawn from their posteriors.

    Sums in float64 over all positions: E z = E μ and Var z = E (μ² + σ²) − (E μ)². Partial sums merge by addition.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum = np.zeros(channels)
        self.sum_squares = np.zeros(channels)

    def update(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Add posteriors; two arrays [N, C, H, W]."""
        mean, std = mean.astype(np.float64), std.astype(np.float64)
        self.count += mean.size // mean.shape[1]
        self.sum += mean.sum((0, 2, 3))
        self.sum_squares += (mean**2 + std**2).sum((0, 2, 3))

    def merge(self, other: "LatentStatistics") -> None:
        """Add another's sums."""
        self.count += other.count
        self.sum += other.sum
        self.sum_squares += other.sum_squares

    @property
    def mean(self) -> np.ndarray:
        """float64 [C]."""
        return self.sum / self.count

    @property
    def std(self) -> np.ndarray:
        """float64 [C]."""
        return np.sqrt(self.sum_squares / self.count - self.mean**2)

    def to_json(self) -> dict[str, object]:
        """The sums as plain values; floats survive JSON exactly."""
        return {"count": self.count, "sum": self.sum.tolist(), "sum_squares": self.sum_squares.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, object]) -> "LatentStatistics":
        """The inverse of `to_json`."""
        statistics = cls(0)
        statistics.count = int(values["count"])  # type: ignore[call-overload]
        statistics.sum, statistics.sum_squares = np.array(values["sum"]), np.array(values["sum_squares"])
        return statistics


MANIFEST, STATISTICS = "manifest.json", "statistics.safetensors"


def read_latent_manifest(storage: Storage) -> LatentManifest:
    """The manifest in a folder of latents."""
    try:
        return LatentManifest.model_validate_json(storage.read_bytes(MANIFEST))
    except (FileNotFoundError, ValidationError) as error:
        raise UserError(f"{storage.url(MANIFEST)}: no manifest of latents there; run precompute_latents") from error


def read_any_manifest(storage: Storage) -> Manifest | LatentManifest:
    """The manifest in a folder of images or of latents; UserError where there is neither."""
    found = storage.read_json(MANIFEST) if storage.is_file(MANIFEST) else None
    is_of_latents = isinstance(found, dict) and "tokenizer" in found
    return read_latent_manifest(storage) if is_of_latents else read_manifest(storage)


def read_latents_of(storage: Storage, tokenizer: str, shape: tuple[int, int, int]) -> LatentManifest:
    """The manifest of the latents that a model is to be trained on.

    Args:
        storage: their folder.
        tokenizer: digest of the tokenizer whose latents they must be.
        shape: C, H, W of one latent as the model takes it.

    Raises:
        UserError: there are none, or they are another tokenizer's or of another size.
    """
    manifest = read_latent_manifest(storage)
    if manifest.tokenizer != tokenizer:
        raise UserError(
            f"{storage.url()}: latents of the tokenizer {manifest.tokenizer[:12]}, but the run's is {tokenizer[:12]}; "
            "run precompute_latents"
        )
    if manifest.shape != shape:
        raise UserError(
            f"{storage.url()}: latents {list(manifest.shape)}, but tokenizer.latent_dim={shape[0]} on a "
            f"{shape[1]} x {shape[2]} grid is configured; compute the latents of this tokenizer"
        )
    return manifest


def read_statistics(storage: Storage) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C], float64, of the latents of the training split in a folder."""
    try:
        tensors = load_file(storage.local_file(STATISTICS))
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(
            f"{storage.url(STATISTICS)}: no statistics of the latents there; run precompute_latents"
        ) from error
    return tensors["mean"], tensors["std"]
