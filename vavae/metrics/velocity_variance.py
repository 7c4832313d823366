"""Irreducible variance of the velocity (VIV, arXiv 2606.03578): the loss that no velocity network can go below.

Between noise N(0, I) and a class of latents N(mu, Sigma), the velocity given x_t = (1 - t) noise + t latent has the
variance I(t) = sum_i lambda_i / ((1 - t)^2 + t^2 lambda_i) over the eigenvalues of Sigma, whose integral over t is
pi / 2 times the sum of their square roots. Shapes: n latents, C channels, a grid of H x W positions.
"""

import math

import torch
from torch import Tensor

_ROUNDS = 5


def velocity_variance(latents: Tensor) -> float:
    """Integral over t of the velocity's irreducible variance, per dimension.

    Args:
        latents: of one class, float64 [n, C, H, W], n at least 2; each channel of all classes together has a standard
            deviation of 1.

    Returns:
        pi / 2 for white noise, less the more the latents lie in few directions.
    """
    return math.pi / 2 * kronecker_eigenvalues(latents).sqrt().mean().item()


def kronecker_eigenvalues(latents: Tensor) -> Tensor:
    """Eigenvalues of the covariance, taken as one of positions times one of channels (flip-flop algorithm).

    Either is estimated in turn from the latents whitened by the other. Their scale is that of the total variance.

    Args:
        latents: float64 [n, C, H, W], n at least 2.

    Returns:
        float64 [C · H · W], not sorted; directions that the latents do not have are 0.
    """
    x = (latents - latents.mean(0)).flatten(2)  # [n, C, H · W]
    count, channels, positions = x.shape
    of_channels = torch.eye(channels, dtype=x.dtype, device=x.device)
    for _ in range(_ROUNDS):
        whitened = torch.linalg.pinv(of_channels, hermitian=True) @ x
        of_positions = torch.tensordot(x, whitened, ([0, 1], [0, 1])) / (count * channels)
        whitened = x @ torch.linalg.pinv(of_positions, hermitian=True)
        of_channels = torch.tensordot(x, whitened, ([0, 2], [0, 2])) / (count * positions)
    found = [torch.linalg.eigvalsh(each).clamp_min(0) for each in (of_channels, of_positions)]
    eigenvalues = torch.outer(*found).flatten()
    total = x.square().sum() / (count - 1)
    return eigenvalues * (total / eigenvalues.sum().clamp_min(torch.finfo(x.dtype).tiny))
