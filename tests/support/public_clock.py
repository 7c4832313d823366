"""The embedding of the noise level in the public networks with a wide head."""

import torch
from torch import Tensor, nn


class PublicClock(nn.Module):
    """Sinusoids of frequencies that were drawn, and a perceptron."""

    W: nn.Parameter

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(256), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, noise_level: Tensor) -> Tensor:
        """Embeddings [B, D] of noise levels [B]."""
        angle = noise_level[:, None] * self.W * 2 * torch.pi
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))
