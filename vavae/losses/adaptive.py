"""The adaptive weight: two losses balanced by the norms of their gradients at one layer."""

import torch
from torch import Tensor

_EPSILON = 1e-4


def adaptive_weight(reference_grad: Tensor, grad: Tensor, maximum: float) -> Tensor:
    """‖∇L_ref‖ / ‖∇L‖, equation 4 of arXiv 2501.01423 with the guards of the released code: scalar, float32, detached.

    Args:
        reference_grad: gradient of the reconstruction loss at the layer.
        grad: gradient of the loss to be weighted at the same layer, same shape.
        maximum: upper bound of the weight.
    """
    assert reference_grad.shape == grad.shape, f"gradients of one layer: {reference_grad.shape}, {grad.shape}"
    ratio = torch.linalg.vector_norm(reference_grad.float()) / (torch.linalg.vector_norm(grad.float()) + _EPSILON)
    return ratio.clamp(0.0, maximum).detach()
