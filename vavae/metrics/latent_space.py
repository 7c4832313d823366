"""Density metrics of a latent space, Table 6 of the paper, by the published procedure.

A token is the latent vector of one image at one position. Tokens are mapped to the plane by t-SNE, their density there
is estimated with Gaussian kernels, and three numbers say how far the densities at the points are from being equal. A
space that is filled evenly is easier to learn for a diffusion model.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import gaussian_kde

PERPLEXITY = 30
"""Perplexity of the published map."""
FEWEST_TOKENS = 3 * PERPLEXITY + 2
"""Fewest tokens that can be mapped: t-SNE uses three times the perplexity of neighbors."""
_SEED = 42
"""Seed of the published map; with its start from principal components nothing is drawn from it."""
_TINY = 1e-10
"""Offset that keeps the logarithm finite, as published."""


class DensityUniformity(NamedTuple):
    """Three measures of how equal densities are."""

    cv: float
    """Coefficient of variation: standard deviation over mean; 0 where all are equal."""
    gini: float
    """Gini coefficient: 0 where all are equal, (N - 1) / N where one has everything."""
    entropy: float
    """Entropy of the densities as shares of their sum, over that of equal ones: 1 where all are equal, else less."""


class LatentMap(NamedTuple):
    """Tokens in the plane."""

    points: np.ndarray
    """Positions in the plane, float64 [N, 2]."""
    densities: np.ndarray
    """Densities at the points, float64 [N]."""


def density_uniformity(densities: np.ndarray) -> DensityUniformity:
    """Coefficient of variation, Gini coefficient and normalized entropy of positive densities [N]."""
    count = len(densities)
    shares = np.sort(densities.astype(np.float64)) / densities.sum(dtype=np.float64)
    ranks = 2 * np.arange(1, count + 1) - count - 1
    return DensityUniformity(
        cv=float(shares.std() * count),
        gini=float(ranks @ shares / count),
        entropy=float(-(shares @ np.log2(shares + _TINY)) / np.log2(count)),
    )


def kernel_densities(points: np.ndarray) -> np.ndarray:
    """Density of points [N, D] at each of them: Gaussian kernels with Scott's bandwidth."""
    return gaussian_kde(points.T)(points.T)


def map_latents(tokens: np.ndarray) -> LatentMap:
    """Map tokens to the plane, with scikit-learn. One thread, because the sums of several depend on their number.

    Args:
        tokens: float32 [N, C], each channel with zero mean and unit deviation; N at least `FEWEST_TOKENS`.
    """
    assert len(tokens) >= FEWEST_TOKENS, f"{len(tokens)} tokens are too few for a perplexity of {PERPLEXITY}"
    from sklearn.manifold import TSNE  # no dependency of the package itself, and it takes a second to import
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        points = TSNE(2, perplexity=PERPLEXITY, init="pca", random_state=_SEED).fit_transform(tokens)
        points = points.astype(np.float64)
        return LatentMap(points, kernel_densities(points))
