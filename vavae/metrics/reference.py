"""Reference files: published moments (pytorch-fid), images (samples of ADM's evaluation), or both (its references)."""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.metrics.config import ExtractorName, MetricsConfig
from vavae.metrics.features import Description, describe
from vavae.metrics.frechet import Gaussian

_IMAGES = "arr_0"
_POOLED, _SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")
_WANTED = f"give an npz file with mu and sigma, or with images as {_IMAGES}"
_ROUNDING = 1e-6
"""Rounding of a covariance that is always forgiven, as a share of its trace: of sums in float32."""
_DAMAGE = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions of NumPy for a file that is cut off, has wrong bytes in it or is no archive at all."""


class ReferenceFile(NamedTuple):
    """Content of a reference file."""

    pooled: Gaussian | None
    """Moments of the features; None in a file of images alone."""
    spatial: Gaussian | None
    """Moments of the features of sFID; in ADM's files alone."""
    images: int
    """Number of images, at least two where there are no moments; 0 where there are none."""


def read_reference(path: Path, place: str, extractor: Description, size: tuple[int, int]) -> ReferenceFile:
    """Read `mu` and `sigma`, `mu_s` and `sigma_s`, and check them and the images.

    Args:
        path: the file.
        place: name of the file in messages.
        extractor: the extractor of the images that will be compared with it.
        size: height and width in pixels of the images that will be compared with it.

    Raises:
        UserError: it is no such file, or of another extractor or image size; or its moments are not finite, of another
            shape, or no covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            _check_kind(arrays, place)
            pooled = _gaussian(arrays, place, _POOLED, extractor) if _POOLED[0] in arrays else None
            spatial = _gaussian(arrays, place, _SPATIAL, None) if _SPATIAL[0] in arrays else None
        shape = _images_shape(path)
    except UserError:
        raise
    except _DAMAGE as error:
        reason = _other_kind(path) or f"{type(error).__name__}: {error}"
        raise UserError(f"{place} is no reference ({reason}): {_WANTED}") from error
    if shape and shape[1:] != (*size, 3):
        height, width = size
        raise UserError(
            f"{place} is of images of {' x '.join(map(str, shape[1:3]))} pixels, the run's have {height} x {width}: "
            "give the reference of this size"
        )
    count = shape[0] if shape else 0
    if pooled is None and count < 2:
        raise UserError(f"{place} has {count} images and no moments: {_WANTED}, two or more")
    return ReferenceFile(pooled, spatial, count)


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


def _check_kind(arrays: Mapping[str, np.ndarray], place: str) -> None:
    """Refuse an archive that has neither moments nor images."""
    has = [name in arrays for name in _POOLED]
    if all(has) or (_IMAGES in arrays and not any(has)):
        return
    if any(name.endswith("/data.pkl") for name in arrays):
        held = "a file of torch.save, as weights and statistics of latents are"
    else:
        held = ", ".join(f"{name} {list(arrays[name].shape)}" for name in [*arrays][:5]) or "nothing"
        held += ", statistics of latents or of another library" if "mean" in arrays else ""
    raise UserError(f"{place} is no reference (it holds {held}): {_WANTED}")


def _other_kind(path: Path) -> str | None:
    """Kind of file that somebody might take for a reference, in words; None where it is not known."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"version h"):
        return "it is a pointer of Git LFS, and not the file itself"
    if head.startswith(b"\x93NUMPY"):
        return "it is a single array"
    try:
        with safe_open(path, "pt") as tensors:
            names = ", ".join([*tensors.keys()][:5])
        return f"it is a safetensors file with {names}, as weights and statistics of latents are"
    except SafetensorError:
        return None


def _gaussian(
    arrays: Mapping[str, np.ndarray], place: str, names: tuple[str, str], extractor: Description | None
) -> Gaussian:
    """Moments of these names; UserError unless they are those of a set of features, of the extractor if it is given."""
    stored = {name: arrays[name] for name in names}
    found = {name: torch.from_numpy(_real(place, name, array)) for name, array in stored.items()}
    mean, covariance = found.values()
    dimensions = (mean.shape[-1] if mean.ndim else 0) or 1
    for (name, tensor), shape in zip(found.items(), ([dimensions], [dimensions, dimensions]), strict=True):
        if list(tensor.shape) != shape:
            raise UserError(f"{place}: {name} is {list(tensor.shape)}, expected {shape}: {_WANTED}")
    if extractor is not None and dimensions != extractor.num_features:
        fitting = [n for n in get_args(ExtractorName) if describe(n, MetricsConfig()).num_features == dimensions]
        others = f" ({' or '.join(fitting)} gives as many)" if fitting else ""
        raise UserError(
            f"{place} has moments of {dimensions:,} features, but {extractor.name} gives {extractor.num_features:,}: "
            f"it was made with another extractor{others}; set evaluate.metrics.extractor to that one, or give the "
            "reference of this one"
        )
    require_finite(found, place, "these are no moments; make the file again")
    kept = stored[names[1]].dtype
    _check_covariance(place, names[1], covariance, np.finfo(kept).eps if kept.kind == "f" else 0.0)
    return Gaussian(mean, covariance)


def _real(place: str, name: str, array: np.ndarray) -> np.ndarray:
    """An array of numbers as float64; complex ones without an imaginary part are real."""
    if array.dtype.kind not in "fiuc" or (array.dtype.kind == "c" and array.imag.any()):
        raise UserError(f"{place}: {name} holds {array.dtype}, expected real numbers: {_WANTED}")
    return np.array(array.real, np.float64)


def _check_covariance(place: str, name: str, covariance: Tensor, eps: float) -> None:
    """Refuse a matrix that is no covariance within the rounding of the type that it was stored in.

    Args:
        place: name of the file in messages.
        name: name of the array.
        covariance: the matrix [D, D], float64.
        eps: distance of 1 to the next number in that type.
    """
    # Entries of a covariance are at most its trace, so rounding each moves no eigenvalue by more than this.
    tolerance = max(eps, _ROUNDING) * covariance.diagonal().abs().sum().item()
    asymmetry = (covariance - covariance.T).abs().max().item()
    if asymmetry > tolerance:
        raise UserError(
            f"{place}: {name} is not symmetric, entries differ by {asymmetry:.4g} from those across the diagonal, so "
            "it is no covariance; make the file again"
        )
    shifted = covariance + tolerance * torch.eye(len(covariance), dtype=covariance.dtype)
    if torch.linalg.cholesky_ex(shifted).info.item() == 0:  # in a tenth of the time of eigenvalues
        return
    smallest = torch.linalg.eigvalsh(covariance)[0].item()
    if smallest < -tolerance:
        raise UserError(
            f"{place}: {name} has the eigenvalue {smallest:.4g}, below 0 by more than rounding ({tolerance:.2g}), so "
            "it is no covariance; make the file again"
        )


def _images_shape(path: Path) -> tuple[int, ...]:
    """Shape [N, H, W, 3] of the images; empty where there are none."""
    with zipfile.ZipFile(path) as archive:
        if f"{_IMAGES}.npy" not in archive.namelist():
            return ()
        with archive.open(f"{_IMAGES}.npy") as stream:
            shape = _header(stream)
            found, wanted = archive.getinfo(f"{_IMAGES}.npy").file_size - stream.tell(), int(np.prod(shape))
            if found != wanted:
                raise ValueError(f"{_IMAGES} has {found:,} bytes, {list(shape)} has {wanted:,}")
            return shape


def _header(stream: Any) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, column_major, dtype = read(stream)
    if column_major or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        order = " in Fortran's order" if column_major else ""
        raise ValueError(f"{_IMAGES} is {dtype} {list(shape)}{order}, expected uint8 [N, H, W, 3]")
    return shape
