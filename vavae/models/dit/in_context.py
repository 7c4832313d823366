"""In-context conditioning: time and label as tokens beside those of the latent, in place of modulations (RAEv2).

Shapes: B batch, N tokens of the latent, M further ones, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vavae.models.dit.config import LightningDiTConfig


class ContextEmbedding(nn.Module):
    """Tokens that tell the time and the label: each the sum of a vector of its own and one of both embeddings."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        self.time_tokens = nn.Parameter(torch.empty(config.time_tokens, config.shape.width))
        self.label_tokens = nn.Parameter(torch.empty(config.label_tokens, config.shape.width))

    def forward(self, tokens: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Tokens [B, N + M, D]: those of latents [B, N, D], then those of embeddings of time and label [B, D]."""
        of_time, of_label = self.time_tokens + time[:, None], self.label_tokens + label[:, None]
        return torch.cat([tokens, of_time.to(tokens.dtype), of_label.to(tokens.dtype)], dim=1)


def condition_of_tokens(tokens: Tensor, time: Tensor) -> Tensor:
    """Condition [B, N, D] of each token: silu(time + tokens), of tokens [B, N, D] after a block and the time [B, D]."""
    return F.silu(time[:, None] + tokens)
