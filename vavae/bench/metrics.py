"""Benchmarks of the moments of a set and the distance between two: vavae, torch-fidelity, and scipy's ``sqrtm``.

Features are drawn batch by batch, as a network would give them. torch-fidelity gathers them and takes the moments at
the end; those of vavae are running sums. Every turn over a set has a process to itself.
"""

import importlib.util
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vavae.bench.benchmark import VAVAE_SIDE, Benchmark
from vavae.bench.process import peak_mebibytes, run_in_process
from vavae.errors import UserError
from vavae.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from vavae.randomness import torch_generator

_BATCH, _CHECKED = 64, 1_000
_SHIFT = 0.1
"""Added to the features of one of two sets."""
_PAGE_MEBIBYTES = resource.getpagesize() / 2**20
"""Least growth that the system tells: a ratio needs more than nothing."""


class _Cost(NamedTuple):
    seconds: float
    mebibytes: float


def benchmarks(images: int, dimensions: int) -> Iterator[Benchmark]:
    """Benchmarks of moments, in time and memory, then of a distance between two sets of moments.

    Args:
        images: in a set.
        dimensions: of their features.

    Raises:
        UserError: torch-fidelity is not installed.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError("the other side is torch-fidelity, which is not installed: pip install -e '.[fidelity]'")
    streamed, gathered = _streamed_moments(_CHECKED, dimensions), _gathered_moments(_CHECKED, dimensions)
    torch.testing.assert_close(streamed.mean, gathered.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(streamed.covariance, gathered.covariance, rtol=1e-5, atol=1e-6)
    moments = {"torch-fidelity": _gathered_moments, VAVAE_SIDE: _streamed_moments}
    sides = {name: _Side(moments_of, images, dimensions) for name, moments_of in moments.items()}
    name = f"moments of {images:,}"
    yield Benchmark(name, "s of processor", {side: turns.seconds for side, turns in sides.items()}, less_is_better=True)
    yield Benchmark(name, "MiB more", {side: turns.mebibytes for side, turns in sides.items()}, less_is_better=True)

    sets = _moments(2 * dimensions, dimensions, 0), _moments(2 * dimensions, dimensions, 1)
    distances = {"torch-fidelity": _fidelity_distance, "scipy sqrtm": _sqrtm_distance, VAVAE_SIDE: frechet_distance}
    expected = frechet_distance(*sets)
    for side, distance in distances.items():
        assert abs(distance(*sets) / expected - 1) < 1e-6, f"{side} comes to another distance"
    turns = {side: partial(_processor_seconds, partial(distance, *sets)) for side, distance in distances.items()}
    yield Benchmark(f"distance in {dimensions:,}", "s of processor", turns, less_is_better=True)


class _Side:
    """Timed turns of one side over a set; the memory of each is returned afterwards, turn by turn."""

    def __init__(self, moments_of: Callable[[int, int], Gaussian], images: int, dimensions: int) -> None:
        self._turn = partial(run_in_process, _cost, moments_of, images, dimensions)
        self._memory: list[float] = []

    def seconds(self) -> float:
        cost = self._turn()
        self._memory.append(cost.mebibytes)
        return cost.seconds

    def mebibytes(self) -> float:
        return self._memory.pop(0)


def _cost(moments_of: Callable[[int, int], Gaussian], images: int, dimensions: int) -> _Cost:
    moments_of(_BATCH, 2)  # imports, and what libraries set up at their first call
    before = peak_mebibytes()
    seconds = _processor_seconds(lambda: moments_of(images, dimensions))
    return _Cost(seconds, max(peak_mebibytes() - before, _PAGE_MEBIBYTES))


def _processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _features(images: int, dimensions: int, shift: float = 0.0) -> Iterator[Tensor]:
    """Features float32 [B, D], positive as behind an activation."""
    for first in range(0, images, _BATCH):
        batch = torch.randn(min(_BATCH, images - first), dimensions, generator=torch_generator(0, "bench", first))
        yield batch.abs_().add_(shift)


def _streamed_moments(images: int, dimensions: int) -> Gaussian:
    return _accumulated_moments(_features(images, dimensions), dimensions)


def _moments(images: int, dimensions: int, number: int) -> Gaussian:
    return _accumulated_moments(_features(images, dimensions, number * _SHIFT), dimensions)


def _accumulated_moments(batches: Iterator[Tensor], dimensions: int) -> Gaussian:
    statistics = FeatureStatistics.empty(dimensions)
    for batch in batches:
        statistics.update(batch)
    return Gaussian(statistics.mean, statistics.covariance)


def _gathered_moments(images: int, dimensions: int) -> Gaussian:
    import vavae.torchvision_compat  # noqa: F401  (before torch-fidelity)

    # isort: split
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(torch.cat(list(_features(images, dimensions))))
    return Gaussian(torch.from_numpy(found["mu"]).double(), torch.from_numpy(found["sigma"]))


def _fidelity_distance(a: Gaussian, b: Gaussian) -> float:
    import vavae.torchvision_compat  # noqa: F401  (before torch-fidelity)

    # isort: split
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    first, second = ({"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in (a, b))
    return fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"]


def _sqrtm_distance(a: Gaussian, b: Gaussian) -> float:
    """Formula of the paper's code, with the square root of a matrix that is not symmetric."""
    from scipy.linalg import sqrtm

    first, second = a.covariance.numpy(), b.covariance.numpy()
    root = np.real(sqrtm(first @ second))
    shift = a.mean.numpy() - b.mean.numpy()
    return float(shift @ shift + np.trace(first) + np.trace(second) - 2 * np.trace(root))
