"""Metrics of a latent space: densities by the published procedure (Table 6 of the paper), and cheap probes.

A token is the latent vector of one image at one position. Tokens are mapped to the plane by t-SNE, their density there
is estimated with Gaussian kernels, and three numbers say how far the densities at the points are from being equal. A
space that is filled evenly is easier to learn for a diffusion model.

The probes show a latent space going wrong from a handful of latents, in milliseconds.
Shapes: N images, C channels, a grid of H x W positions (tokens).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.fft import dctn
from scipy.stats import gaussian_kde
from torch import Tensor

from vavae.metrics.velocity_variance import velocity_variance

PERPLEXITY = 30
"""Perplexity of the published map."""
FEWEST_TOKENS = 3 * PERPLEXITY + 2
"""Fewest tokens that can be mapped: t-SNE uses three times the perplexity of neighbors."""
_SEED = 42
"""Seed of the published map; with its start from principal components nothing is drawn from it."""
_HIGH = 0.5
"""Share of the highest frequency, along a row and a column together, from which on one is high."""
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


class LatentProbes(NamedTuple):
    """Probes of a latent space from a few of its latents: all but rank and deviations are of latents whitened per
    channel."""

    spectrum_slope: float
    """Exponent of the power spectrum over spatial frequency: 0 is white noise, -2 what photographs have. A slope that
    rises towards 0 means noise at high frequencies, which a diffusion model must learn (arXiv 2502.14831). NaN on a
    grid with fewer than two frequencies."""
    effective_rank: float
    """Directions that the channels make use of, 1 to C: the exponential of the entropy of the eigenvalues of their
    covariance (Roy and Vetterli, 2007)."""
    channel_std_min: float
    """Standard deviation of the channel that varies least: a dead channel is blown up by whitening."""
    channel_std_max: float
    """Standard deviation of the channel that varies most."""
    local_to_global: float
    """Cosine similarity of tokens that are near each other, minus that of distant ones of the same image, -2 to 2: how
    much spatial structure there is (LDS in arXiv 2512.10794). NaN on a grid without distant tokens."""
    high_frequency_share: float
    """Share of the energy at high frequencies, 0 to 1 (SEC in arXiv 2606.03578): of the coefficients (u, v) of the
    cosine transform of a channel with u + v > (H + W - 2) / 2. White noise has the share of such coefficients."""
    velocity_variance: float
    """Variance of the velocity that no network can predict, see `vavae.metrics.velocity_variance`: mean over classes.
    NaN where there is no class of two latents."""


def probe_latents(latents: Tensor, classes: Sequence[Tensor] | None = None) -> LatentProbes:
    """Probe latents; all is NaN where one is not finite.

    Args:
        latents: [N, C, H, W].
        classes: indices of the latents of each class, int64 [n]; None takes all latents for one class.
    """
    latents = latents.double().cpu()
    if not latents.isfinite().all():
        return LatentProbes(*[float("nan")] * len(LatentProbes._fields))
    std = latents.std((0, 2, 3), correction=0)
    centered = latents - latents.mean((0, 2, 3), keepdim=True)
    whitened = centered / std.clamp_min(torch.finfo(std.dtype).tiny)[:, None, None]
    of_classes = [whitened] if classes is None else [whitened[each] for each in classes]
    variances = [velocity_variance(each) for each in of_classes if len(each) > 1]
    return LatentProbes(
        spectrum_slope(whitened),
        effective_rank(centered),
        std.min().item(),
        std.max().item(),
        local_to_global(whitened),
        high_frequency_share(whitened),
        float(np.mean(variances)) if variances else float("nan"),
    )


def spectrum_slope(latents: Tensor) -> float:
    """Slope of log power over log frequency, power being the mean over images, channels and directions [N, C, H, W].

    Frequencies are rounded to whole cycles per grid, from one to the highest that every direction has.
    """
    height, width = latents.shape[2:]
    power = torch.fft.fft2(latents).abs().square().mean((0, 1))  # [H, W]
    rows, columns = (torch.fft.fftfreq(size, 1 / size) for size in (height, width))
    radius = torch.hypot(rows[:, None], columns).round().long()
    frequencies = range(1, min(height, width) // 2 + 1)
    if len(frequencies) < 2:
        return float("nan")
    means = [power[radius == frequency].mean().clamp_min(torch.finfo(power.dtype).tiny) for frequency in frequencies]
    return float(np.polyfit(np.log(frequencies), torch.stack(means).log().numpy(), 1)[0])


def effective_rank(centered: Tensor) -> float:
    """Effective rank, see `LatentProbes`; latents [N, C, H, W] whose channels have mean zero."""
    tokens = centered.movedim(1, -1).flatten(0, 2)  # [N · H · W, C]
    eigenvalues = torch.linalg.eigvalsh(tokens.T @ tokens).clamp_min(0)
    shares = eigenvalues / eigenvalues.sum().clamp_min(torch.finfo(eigenvalues.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()


def local_to_global(latents: Tensor) -> float:
    """Near minus distant similarity of latents [N, C, H, W], see `LatentProbes`.

    Near are fewer steps along the grid than half of its side.
    """
    height, width = latents.shape[2:]
    rows, columns = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    distance = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()  # [H · W, H · W]
    limit = min(height, width) / 2
    near, distant = (distance > 0) & (distance < limit), distance >= limit
    if not near.any() or not distant.any():
        return float("nan")
    tokens = torch.nn.functional.normalize(latents.flatten(2).mT, dim=-1)  # [N, H · W, C]
    similarity = torch.stack([image @ image.T for image in tokens]).mean(0)
    return (similarity[near].mean() - similarity[distant].mean()).item()


def high_frequency_share(latents: Tensor) -> float:
    """Share of the energy at high frequencies of latents [N, C, H, W], see `LatentProbes`; 0 where there is none."""
    height, width = latents.shape[2:]
    energy = torch.from_numpy(dctn(latents.numpy(), axes=(2, 3), norm="ortho")).square().sum((0, 1))  # [H, W]
    frequency = torch.arange(height)[:, None] + torch.arange(width)
    high = energy[frequency > _HIGH * (height + width - 2)]
    return (high.sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)).item()
