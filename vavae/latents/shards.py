"""Latent shards: WebDataset tars of constant record size, so that any reader can stream them and ours can map them.

A record is `<nine digits>.latent.npy`, float16 [moments · (1 + flip), C, H, W] with the posterior's mean and standard
deviation of the image and, where flips are stored, of its mirror image, or with the latents of both where a tokenizer
has no posterior; and `<nine digits>.cls`, the label, which is 0
where there are no classes.

Features of a network lie in shards of their own, in the same order: a record is `<nine digits>.features.npy`, int16
[1 + flip, N, F], the bits of bfloat16 features of the image at N positions, row by row, and of its mirror image.
"""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vavae.data.shards.tar import write_tar
from vavae.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_LABEL_DIGITS = 9
_BFLOAT16_BITS = np.dtype(np.int16)
"""Type of numpy that bfloat16 is stored as, bit by bit; numpy has no bfloat16."""


def write_latents(path: Path, arrays: np.ndarray, labels: Sequence[int], first_index: int) -> None:
    """Write one shard.

    Args:
        path: local file.
        arrays: float16 [N, moments · (1 + flip), C, H, W].
        labels: N class indices.
        first_index: index of the first record in its split; names the members.
    """
    with write_tar(path) as tar:
        for index, (array, label) in enumerate(zip(arrays, labels, strict=True), first_index):
            tar.add(index, latent_members(array, label))


def latent_members(array: np.ndarray, label: int) -> dict[str, bytes]:
    """Members of one record, by extension.

    Args:
        array: float16 [moments · (1 + flip), C, H, W].
        label: class index.
    """
    assert array.dtype == np.float16, f"latents are stored in float16, not {array.dtype}"
    return {"latent.npy": _npy(array), "cls": b"%0*d" % (_LABEL_DIGITS, label)}


def feature_members(bits: np.ndarray) -> dict[str, bytes]:
    """Members of one record of features, by extension.

    Args:
        bits: bits of bfloat16, int16 [1 + flip, N, F].
    """
    assert bits.dtype == _BFLOAT16_BITS, f"features are stored as bits of bfloat16, not {bits.dtype}"
    return {"features.npy": _npy(bits)}


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class MappedLatents:
    """A latent shard in memory: arrays and labels are views, nothing is parsed per record.

    Args:
        path: local file of the shard.
        count: number of records according to the manifest.
        record_shape: shape of one record's array, moments · (1 + flip), C, H, W.

    Raises:
        UserError: the file has another count, shape or layout.
    """

    def __init__(self, path: Path, count: int, record_shape: tuple[int, ...]) -> None:
        # After the array, header and label.
        records, self.arrays = _map_records(path, count, record_shape, np.dtype(np.float16), blocks_after=2)
        """float16 [N, moments · (1 + flip), C, H, W]."""
        digits = records[:, -_BLOCK : -_BLOCK + _LABEL_DIGITS] - ord("0")
        if (digits > 9).any():
            raise _uneven(path, count)
        self.labels = digits.astype(np.int64) @ 10 ** np.arange(_LABEL_DIGITS - 1, -1, -1)
        """int64 [N]."""


def map_features(path: Path, count: int, record_shape: tuple[int, ...]) -> np.ndarray:
    """Map a shard of features, see `feature_members`, into memory; nothing is parsed per record.

    Args:
        path: local file of the shard.
        count: number of records according to the manifest.
        record_shape: shape of one record's array, 1 + flip, N, F.

    Returns:
        Bits of bfloat16, int16 [count, 1 + flip, N, F].

    Raises:
        UserError: the file has another count, shape or layout.
    """
    return _map_records(path, count, record_shape, _BFLOAT16_BITS, blocks_after=0)[1]


def _map_records(
    path: Path, count: int, record_shape: tuple[int, ...], dtype: np.dtype, blocks_after: int
) -> tuple[np.ndarray, np.ndarray]:
    """Map records of one size that begin with an array: uint8 [count, bytes], and the arrays [count, *record_shape]."""
    header = _npy_header_bytes(path, record_shape, dtype)
    npy_blocks = -(-(header + int(np.prod(record_shape)) * dtype.itemsize) // _BLOCK)
    stride = _BLOCK * (1 + npy_blocks + blocks_after)
    size = path.stat().st_size
    expected = -(-(count * stride + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE  # with the end mark
    if size != expected:
        raise UserError(f"{path}: {size} bytes where {count} latents take {expected}; compute the latents again")
    memory = np.memmap(path, np.uint8, "r")
    records = np.ndarray((count, stride), np.uint8, memory)
    strides = (stride, *np.empty(record_shape, dtype).strides)
    headers = records[:, _BLOCK : _BLOCK + header]
    if (headers != headers[0]).any() or memory[count * stride :].any():
        raise _uneven(path, count)
    return records, np.ndarray((count, *record_shape), dtype, memory, offset=_BLOCK + header, strides=strides)


def _uneven(path: Path, count: int) -> UserError:
    return UserError(f"{path}: not {count} records of one size; compute the latents again")


def _npy_header_bytes(path: Path, record_shape: tuple[int, ...], wanted: np.dtype) -> int:
    """Length of the npy header of the first record, bytes; UserError unless it says that shape and dtype."""
    with path.open("rb") as file:
        file.seek(_BLOCK)
        try:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("npy is not of version 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise UserError(f"{path}: not a latent shard ({error}); compute the latents again") from error
        if shape != record_shape or dtype != wanted or fortran:
            raise UserError(
                f"{path}: latents {dtype}{list(shape)}, expected {wanted}{list(record_shape)}; "
                "compute the latents again"
            )
        return file.tell() - _BLOCK
