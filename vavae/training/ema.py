"""Exponential moving average of weights, in fp32."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """shadow ← decay · shadow + (1 - decay) · weights, once a step, for every floating-point entry of a state dict."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self.shadow = {name: tensor.clone() for name, tensor in self._weights().items()}
        """fp32 copies by the names of the module's state dict."""

    def _weights(self) -> dict[str, Tensor]:
        state = self._module.state_dict()
        return {name: tensor.float() for name, tensor in state.items() if tensor.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights in."""
        weights = self._weights()
        torch._foreach_lerp_(list(self.shadow.values()), [weights[name] for name in self.shadow], 1 - self._decay)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Restore a saved shadow, strictly."""
        assert shadow.keys() == self.shadow.keys(), "the saved average is of another module"
        for name, tensor in self.shadow.items():
            tensor.copy_(shadow[name])
