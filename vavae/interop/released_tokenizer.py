"""Tokenizer checkpoints as published: a Lightning file or bare state dict of the autoencoder (the classes of LDM), the
projection that aligns it (`linear_proj`), the discriminator (`loss.discriminator`) and what else its training held.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vavae.errors import UserError
from vavae.interop.checkpoint_file import WeightsFile, read_weights, write_weights
from vavae.interop.conversion import Conversion
from vavae.latents.statistics import check_statistics
from vavae.losses.adversarial import PatchDiscriminator
from vavae.losses.config import AdversarialLossConfig, VisionFoundationLossConfig
from vavae.losses.vision_foundation import VisionFoundationLoss
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.models.tokenizer.representation import Autoencoder
from vavae.storage.storage import Storage

_ALIGNMENT, _DISCRIMINATOR = "linear_proj.", "loss.discriminator."
_TRAINING_PREFIXES = (_ALIGNMENT, "loss.", "foundation_model.", "model_ema.")
"""Prefixes of what checkpoints of training hold besides the autoencoder; those of SD-VAE have the last."""
_MEAN, _VARIANCE, _BATCH_NORM = "bn.running_mean", "bn.running_var", "bn."
"""Statistics of the latents in the batch normalization that REPA-E puts between autoencoder and transformer."""
_FIRST_OF_DECODER = "decoder.conv_in.weight"
_STATISTICS = "-latents-stats.pt"
"""End of the name of a file of such statistics, beside that of the autoencoder."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedTokenizer:
    """A tokenizer as somebody published it."""

    weights: WeightsFile
    """Tensors by released name."""
    config: TokenizerConfig | None = None
    """The architecture, where a file describes it."""
    statistics: Mapping[str, Tensor] | None = None
    """`mean` and `std` of its latents per channel, float64 [C], where there are any."""
    statistics_source: str = ""
    """Names of the keys or the file that hold the statistics, for messages."""


def read_released_tokenizer(path: str | os.PathLike[str]) -> PublishedTokenizer:
    """Read a released autoencoder, and the statistics of the latents of one that REPA-E tuned end to end.

    These are a mean and a variance under `bn.`, with the autoencoder itself under `vae` in a checkpoint of such a
    training, or a file `NAME-latents-stats.pt` beside `NAME.pt`.

    Args:
        path: as of :func:`load_released_tokenizer`.

    Raises:
        UserError: no such file, a damaged or foreign one, or statistics that are not of its latents.
    """
    stored = weights = read_weights(path)
    if _MEAN in stored.tensors and _FIRST_OF_DECODER not in stored.tensors:
        weights = read_weights(path, nest="vae")
    url = os.path.splitext(weights.url)[0] + _STATISTICS
    if _MEAN in stored.tensors:
        statistics, source = batch_norm_statistics(stored, _latent_dim(weights)), f"{_MEAN} and {_VARIANCE}"
    elif Storage(url).is_file():
        file, shape = read_weights(url), (1, _latent_dim(weights), 1, 1)
        scale, bias = (file.expect("file of statistics", f"latents_{name}", shape) for name in ("scale", "bias"))
        statistics = {"mean": bias.double().flatten(), "std": 1 / scale.double().flatten()}
        check_statistics(**statistics, place=url)
        source = os.path.basename(url)
    else:
        return PublishedTokenizer(weights)
    return PublishedTokenizer(weights.without(_BATCH_NORM), statistics=statistics, statistics_source=source)


def batch_norm_statistics(weights: WeightsFile, latent_dim: int) -> dict[str, Tensor]:
    """Read `mean` and `std`, float64 [C], of a batch normalization of the latents.

    The deviation is the root of the running variance alone, as REPA-E samples and trains with it.

    Raises:
        UserError: they are not of this number of channels, not finite, or the normalization scales and shifts besides.
    """
    mean, variance = (weights.expect("batch normalization", name, (latent_dim,)) for name in (_MEAN, _VARIANCE))
    learned = [name for name in (f"{_BATCH_NORM}weight", f"{_BATCH_NORM}bias") if name in weights.tensors]
    if learned:
        raise UserError(
            f"{weights.url}: {learned[0]}, expected a batch normalization without weights; it can't be used"
        )
    statistics = {"mean": mean.double(), "std": variance.double().sqrt()}
    check_statistics(**statistics, place=f"{weights.url}: {_BATCH_NORM}")
    return statistics


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
    return convert_tokenizer(read_released_tokenizer(path).weights, overrides)


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
    tensors = released_tensors(autoencoder, alignment)
    if discriminator is not None:
        tensors |= _PATCH_DISCRIMINATOR.state(discriminator)
    write_weights(path, tensors, nest="state_dict")


def released_tensors(autoencoder: Autoencoder, alignment: VisionFoundationLoss | None) -> dict[str, Tensor]:
    """Collect the tensors of a tokenizer, and of its projection where it has one, by their released names."""
    tensors = dict(autoencoder.state_dict())
    return tensors if alignment is None else tensors | _PROJECTION.state(alignment)


def _latent_dim(weights: WeightsFile) -> int:
    return weights.shape("tokenizer", _FIRST_OF_DECODER, 4)[1]


def _infer_autoencoder(weights: WeightsFile, overrides: Mapping[str, Any]) -> dict[str, Any]:
    channels, image_channels, *_ = weights.shape("tokenizer", "encoder.conv_in.weight", 4)
    levels = range(_count(weights, r"encoder\.down\.(\d+)\."))
    first_convolutions = [f"encoder.down.{level}.block.0.conv1.weight" for level in levels]
    widths = [weights.shape("tokenizer", name, 4)[0] for name in first_convolutions]
    return {
        "latent_dim": _latent_dim(weights),
        "image_channels": image_channels,
        "channels": channels,
        "channel_multipliers": tuple(width / channels if width % channels else width // channels for width in widths),
        "res_blocks": _count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        "attention_levels": tuple(
            level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in weights.tensors
        ),
        "middle_attention": bool(weights.part("encoder.mid.attn_1.").tensors),
        "quant_conv": bool(weights.part("quant_conv.").tensors),
        "post_quant_conv": bool(weights.part("post_quant_conv.").tensors),
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
