"""Uniformity of the latents that a diffusion model trains on, as in Table 6 of the VA-VAE paper."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from vavae.data.shards.manifest import ShardInfo, ShardList, open_shard
from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.latents.manifest import LatentManifest, read_latent_manifest
from vavae.latents.shards import MappedLatents
from vavae.latents.statistics import read_statistics
from vavae.metrics.config import LatentSpaceConfig
from vavae.metrics.latent_space import FEWEST_TOKENS, DensityUniformity, LatentMap, density_uniformity, map_latents
from vavae.randomness import numpy_generator
from vavae.storage.storage import Storage

_SPLIT = "train"


class LatentSpace(NamedTuple):
    """Maps of several samplings of tokens, and the metrics of their density."""

    maps: Sequence[LatentMap]
    """One map for each sampling."""

    @property
    def tokens(self) -> int:
        """Number of tokens of one sampling."""
        return len(self.maps[0].points)

    @property
    def samplings(self) -> list[DensityUniformity]:
        """Metrics of each sampling."""
        return [density_uniformity(found.densities) for found in self.maps]

    @property
    def mean(self) -> DensityUniformity:
        """Mean of each metric over the samplings."""
        return DensityUniformity(*np.mean(self.samplings, axis=0).tolist())

    @property
    def spread(self) -> DensityUniformity | None:
        """Standard deviation of each metric over the samplings; None where there is only one."""
        if len(self.maps) == 1:
            return None
        return DensityUniformity(*np.std(self.samplings, axis=0, ddof=1).tolist())

    def tensors(self) -> dict[str, Tensor]:
        """The maps as tensors by name, with the samplings in the first dimension."""
        stacked = (np.stack(arrays) for arrays in zip(*self.maps, strict=True))
        return {name: torch.from_numpy(array) for name, array in zip(LatentMap._fields, stacked, strict=True)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Restore maps from :meth:`tensors`."""
        arrays = (tensors[name].numpy() for name in LatentMap._fields)
        return cls([LatentMap(*pair) for pair in zip(*arrays, strict=True)])


def evaluate_latent_space(
    latents: Storage,
    config: LatentSpaceConfig,
    seed: int,
    mapped: Callable[[int, int], None] = lambda done, total: None,
) -> LatentSpace:
    """Map the latents of the training images.

    Args:
        latents: folder of the latents.
        config: number of tokens and of samplings.
        seed: keys the draws, together with the number of the sampling.
        mapped: called with the number of maps that are done, of all.

    Raises:
        UserError: there are too few latents, or scikit-learn is not installed.
    """
    try:
        from joblib import Parallel, delayed
    except ImportError as error:
        raise UserError(
            "evaluate.latent_space needs scikit-learn, which is not installed: pip install -e '.[metrics]'"
        ) from error
    tokens = [draw_tokens(latents, config, seed, sampling) for sampling in range(config.samplings)]
    maps: list[LatentMap] = []
    mapped(0, len(tokens))
    for found in Parallel(n_jobs=config.processes, return_as="generator")(
        delayed(map_latents)(each) for each in tokens
    ):
        maps.append(found)
        mapped(len(maps), len(tokens))
    return LatentSpace(maps)


def draw_tokens(latents: Storage, config: LatentSpaceConfig, seed: int, sampling: int) -> np.ndarray:
    """Draw one token from each of N random images: float32 [N, C], normalized as the diffusion model sees it.

    The image or its mirror image, a position and a sample of the posterior are drawn too. Images are drawn from as many
    leading shards as hold enough for all samplings: shards hold their images in a shuffled order.

    Args:
        latents: folder of the latents.
        config: number of tokens and of samplings.
        seed: keys the draws, together with `sampling`.
        sampling: number of the sampling.
    """
    manifest = read_latent_manifest(latents)
    infos = _leading(manifest.splits[_SPLIT], config.tokens * config.samplings)
    bounds = np.cumsum([0, *(info.count for info in infos)])
    count = min(config.tokens, int(bounds[-1]))
    if count < FEWEST_TOKENS:
        raise UserError(
            f"{latents.url()}: latents of {count} training images, and a map takes {FEWEST_TOKENS}: "
            "set evaluate.latent_space=null"
        )
    channels, height, width = manifest.shape
    rng = numpy_generator(seed, "latent tokens", sampling)
    images = rng.choice(bounds[-1], count, replace=False)
    views = rng.integers(1 + manifest.flip, size=count)
    rows, columns = rng.integers(height, size=count), rng.integers(width, size=count)
    posteriors = np.zeros((count, 2, channels), np.float32)
    for number, info in enumerate(infos):
        mine = np.flatnonzero((images >= bounds[number]) & (images < bounds[number + 1]))
        arrays = _open(latents, manifest, info).arrays
        found = arrays[images[mine] - bounds[number], :, :, rows[mine], columns[mine]]  # [n, moments · (1 + flip), C]
        of_views = found.reshape(len(mine), 1 + manifest.flip, manifest.moments, channels)
        posteriors[mine, : manifest.moments] = of_views[np.arange(len(mine)), views[mine]]
    z = posteriors[:, 0] + posteriors[:, 1] * rng.standard_normal((count, channels), np.float32)
    require_finite({"latents": torch.from_numpy(z)}, latents.url(), "compute the latents again")
    mean, std = (statistic.float().numpy() for statistic in read_statistics(latents))
    if mean.ndim == 3:
        mean, std = mean[:, rows, columns].T, std[:, rows, columns].T
    return (z - mean) / std


def _leading(infos: ShardList, wanted: int) -> list[ShardInfo]:
    """The first shards that hold `wanted` images together, or all."""
    before = np.cumsum(infos.counts) - infos.counts
    return [infos[at] for at in np.flatnonzero(before < wanted).tolist()]


def _open(latents: Storage, manifest: LatentManifest, info: ShardInfo) -> MappedLatents:
    return open_shard(latents, _SPLIT, info, lambda path: MappedLatents(path, info.count, manifest.record_shape))
