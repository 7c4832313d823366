"""Published reference moments: the npz files of ADM's evaluation and of pytorch-fid."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vavae.errors import UserError
from vavae.metrics.features import Description
from vavae.metrics.frechet import Gaussian

_IMAGES = "arr_0"


class ReferenceFile(NamedTuple):
    """Content of a reference file."""

    pooled: Gaussian
    spatial: Gaussian | None
    """Moments of the features of sFID; in ADM's files alone."""
    images: int
    """Number of images in ADM's files, for precision and recall; 0 where there are none."""


def read_reference(path: Path, place: str, extractor: Description, size: tuple[int, int]) -> ReferenceFile:
    """Read `mu` and `sigma`, `mu_s` and `sigma_s`, and check the images.

    Args:
        path: the file.
        place: name of the file in messages.
        extractor: the extractor of the images that will be compared with it.
        size: height and width in pixels of the images that will be compared with it.

    Raises:
        UserError: it is no such file, or of another extractor or image size.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pooled = _gaussian(arrays, "mu", "sigma")
            spatial = _gaussian(arrays, "mu_s", "sigma_s") if "mu_s" in arrays.files else None
        shape = _images_shape(path)
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{place} is no reference ({type(error).__name__}: {error}): give an npz file with mu and sigma"
        ) from error
    dimensions = extractor.num_features
    if pooled.mean.shape != (dimensions,) or pooled.covariance.shape != (dimensions, dimensions):
        raise UserError(
            f"{place} has moments of {len(pooled.mean):,} features, but {extractor.name} gives {dimensions:,}: it was "
            "made with another extractor; set evaluate.metrics.extractor to that one, or give the reference of this one"
        )
    if shape and shape[1:] != (*size, 3):
        height, width = size
        raise UserError(
            f"{place} is of images of {' x '.join(map(str, shape[1:3]))} pixels, the run's have {height} x {width}: "
            "give the reference of this size"
        )
    return ReferenceFile(pooled, spatial, shape[0] if shape else 0)


def reference_images(path: Path, span: range, batch_size: int) -> Iterator[Tensor]:
    """Yield the images of a reference file whose positions are in the span, uint8 [B, 3, H, W]."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{_IMAGES}.npy") as stream:
        shape = _header(stream)
        size = int(np.prod(shape[1:]))
        stream.seek(span.start * size, 1)
        for start in range(span.start, span.stop, batch_size):
            count = min(batch_size, span.stop - start)
            pixels = np.frombuffer(bytearray(stream.read(count * size)), np.uint8).reshape(count, *shape[1:])
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # [B, H, W, 3] → [B, 3, H, W]


def _gaussian(arrays: Any, mean: str, covariance: str) -> Gaussian:
    return Gaussian(torch.from_numpy(arrays[mean]).double(), torch.from_numpy(arrays[covariance]).double())


def _images_shape(path: Path) -> tuple[int, ...]:
    """Shape [N, H, W, 3] of the images; empty where there are none."""
    with zipfile.ZipFile(path) as archive:
        if f"{_IMAGES}.npy" not in archive.namelist():
            return ()
        with archive.open(f"{_IMAGES}.npy") as stream:
            return _header(stream)


def _header(stream: Any) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, column_major, dtype = read(stream)
    if column_major or dtype != np.uint8 or len(shape) != 4:
        raise ValueError(f"{_IMAGES} is {dtype} {shape}, not images in uint8 [N, H, W, 3]")
    return shape
