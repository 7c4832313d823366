"""Tokenizer checkpoints as published: a Lightning file or bare state dict of the autoencoder (the classes of LDM), the
projection that aligns it (`linear_proj`), the discriminator (`loss.discriminator`) and what else its training held.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vavae.interop.checkpoint_file import WeightsFile, read_weights, write_weights
from vavae.interop.conversion import Conversion
from vavae.losses.adversarial import PatchDiscriminator
from vavae.losses.config import AdversarialLossConfig, VisionFoundationLossConfig
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig

_ALIGNMENT, _DISCRIMINATOR = "linear_proj.", "loss.discriminator."
_TRAINING_PREFIXES = (_ALIGNMENT, "loss.", "foundation_model.", "model_ema.")
"""Prefixes of what checkpoints of training hold besides the autoencoder; those of SD-VAE have the last."""

_log = logging.getLogger(__name__)


def load_released_tokenizer(path: str | os.PathLike[str], **overrides: Any) -> VAVAE:
    """Read a released autoencoder into the class that trains, and log what else the file holds.

    Args:
        path: local path or storage URL of a `.pt`, `.pth`, `.ckpt` or `.safetensors` file.
        overrides: fields of `TokenizerConfig`; the tensors determine all sizes, so those can only be confirmed.

    Returns:
        The model in training mode, its tensors bitwise identical to those of the file.

    Raises:
        UserError: no such file, a damaged or foreign one, or one that contradicts an override; the line names the
            tensor, its shape and the shape expected.
    """
    return convert_tokenizer(read_weights(path), overrides)


def load_released_alignment(path: str | os.PathLike[str], **overrides: Any) -> VisionFoundationLoss:
    """Read the projection of a released tokenizer into the loss that it is trained by.

    Overrides are fields of `VisionFoundationLossConfig` (its weights and margins are in no checkpoint), `latent_dim`
    and `feature_dim`. Everything else is as for :func:`load_released_tokenizer`.
    """
    return convert_alignment(read_weights(path), overrides)


def load_released_discriminator(path: str | os.PathLike[str], **overrides: Any) -> PatchDiscriminator:
    """Read the discriminator of a released tokenizer.

    Overrides are fields of `AdversarialLossConfig`. Everything else is as for :func:`load_released_tokenizer`.
    """
    return convert_discriminator(read_weights(path), overrides)


def convert_tokenizer(weights: WeightsFile, overrides: Mapping[str, Any], section: str = "") -> VAVAE:
    """Convert tensors to the autoencoder, see :func:`load_released_tokenizer`.

    Args:
        weights: the file.
        overrides: as there.
        section: prefix of the names of the overrides in messages.
    """
    dropped = Counter(prefix for name in weights.tensors for prefix in _TRAINING_PREFIXES if name.startswith(prefix))
    autoencoder = _AUTOENCODER.load(weights.without(*_TRAINING_PREFIXES), overrides, section)
    if dropped:
        counts = ", ".join(f"{count} under {prefix.rstrip('.')}" for prefix, count in dropped.items())
        _log.warning("%s: dropped %d tensors besides the autoencoder: %s", weights.url, dropped.total(), counts)
    return autoencoder


def convert_alignment(weights: WeightsFile, overrides: Mapping[str, Any], section: str = "") -> VisionFoundationLoss:
    """Convert tensors to the projection; arguments as of :func:`convert_tokenizer`."""
    return _PROJECTION.load(weights, overrides, section)


def holds_alignment(weights: WeightsFile) -> bool:
    """Return whether a file holds a tokenizer's projection."""
    return any(name.startswith(_ALIGNMENT) for name in weights.tensors)


def convert_discriminator(weights: WeightsFile, overrides: Mapping[str, Any], section: str = "") -> PatchDiscriminator:
    """Convert tensors to the discriminator; arguments as of :func:`convert_tokenizer`."""
    return _PATCH_DISCRIMINATOR.load(weights, overrides, section)


def holds_discriminator(weights: WeightsFile) -> bool:
    """Return whether a file holds a tokenizer's discriminator."""
    return any(name.startswith(_DISCRIMINATOR) for name in weights.tensors)


def save_released_tokenizer(
    path: str | os.PathLike[str],
    autoencoder: VAVAE,
    alignment: VisionFoundationLoss | None = None,
    discriminator: PatchDiscriminator | None = None,
) -> None:
    """Write a tokenizer as the public code reads it: ``{"state_dict": ...}``, or flat for the suffix `.safetensors`."""
    tensors = _AUTOENCODER.state(autoencoder)
    if alignment is not None:
        tensors |= _PROJECTION.state(alignment)
    if discriminator is not None:
        tensors |= _PATCH_DISCRIMINATOR.state(discriminator)
    write_weights(path, tensors, nest="state_dict")


def _infer_autoencoder(weights: WeightsFile, overrides: Mapping[str, Any]) -> dict[str, Any]:
    channels, image_channels, *_ = weights.shape("tokenizer", "encoder.conv_in.weight", 4)
    _, latent_dim, *_ = weights.shape("tokenizer", "post_quant_conv.weight", 4)
    levels = range(_count(weights, r"encoder\.down\.(\d+)\."))
    first_convolutions = [f"encoder.down.{level}.block.0.conv1.weight" for level in levels]
    widths = [weights.shape("tokenizer", name, 4)[0] for name in first_convolutions]
    return {
        "latent_dim": latent_dim,
        "image_channels": image_channels,
        "channels": channels,
        "channel_multipliers": tuple(width // channels for width in widths),
        "res_blocks": _count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        "attention_levels": tuple(
            level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in weights.tensors
        ),
    }


def _count(weights: WeightsFile, pattern: str) -> int:
    """Number of different values of the pattern's group among the names."""
    return len({match[1] for match in map(re.compile(pattern).match, weights.tensors) if match})


def _infer_projection(weights: WeightsFile, overrides: Mapping[str, Any]) -> dict[str, Any]:
    outputs, inputs, *_ = weights.shape("aligned tokenizer", f"{_ALIGNMENT}weight", 4)
    if f"{_ALIGNMENT}bias" in weights.tensors:  # the released code has one from teacher to latent alone
        return {"projection": "teacher_to_latent", "latent_dim": outputs, "feature_dim": inputs}
    return {"projection": "latent_to_teacher", "latent_dim": inputs, "feature_dim": outputs}


def _infer_discriminator(weights: WeightsFile, overrides: Mapping[str, Any]) -> dict[str, Any]:
    first = f"{_DISCRIMINATOR}main.0.weight"
    channels, image_channels, *_ = weights.shape("tokenizer with discriminator", first, 4)
    own = weights.part(_DISCRIMINATOR).tensors
    convolutions = sum(tensor.ndim == 4 for tensor in own.values())
    has_statistics = any(name.endswith("running_mean") for name in own)
    return {
        "channels": channels,
        "layers": convolutions - 2,
        "norm": "batch" if has_statistics else "group",
        "image_channels": image_channels,
    }


_AUTOENCODER = Conversion(TokenizerConfig, VAVAE, _infer_autoencoder)
_PROJECTION = Conversion(
    VisionFoundationLossConfig, VisionFoundationLoss, _infer_projection, released=_ALIGNMENT, ours="projection."
)
_PATCH_DISCRIMINATOR = Conversion(
    AdversarialLossConfig, PatchDiscriminator, _infer_discriminator, released=_DISCRIMINATOR
)
