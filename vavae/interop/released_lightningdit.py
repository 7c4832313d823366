"""LightningDiT checkpoints as published: ``{"model", "ema", "opt", "config"}`` or a bare state dict."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from vavae.config import height_and_width
from vavae.errors import UserError
from vavae.interop.checkpoint_file import WeightsFile, read_weights, write_weights
from vavae.interop.conversion import Conversion
from vavae.models.dit.config import SIZES, LightningDiTConfig
from vavae.models.dit.layers import RotaryEmbedding, sincos_position_embedding
from vavae.models.dit.model import LightningDiT

_KIND = "LightningDiT"
_ROTATION = "feat_rope.freqs_cos"
_PER_HEAD = (_ROTATION, "blocks.0.attn.q_norm.weight")
"""Tensors whose last dimension is the width of one head."""
_VELOCITY = "velocity"
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_TABLE_ERROR = 1e-3
"""Tolerance of a table of positions. The published average runs over the embedding as well, though it never
changes; its own rounding moves it by up to 1.7e-4."""


def load_released_lightningdit(path: str | os.PathLike[str], **overrides: Any) -> LightningDiT:
    """Read a released LightningDiT into the class that trains, `ema` before `model`.

    Args:
        path: local path or storage URL of a `.pt`, `.pth`, `.ckpt` or `.safetensors` file.
        overrides: fields of `LightningDiTConfig`, `latent_dim` and `grid`. The tensors determine all of them, except
            `heads` where there is neither RoPE nor QK-norm and the size has no name.

    Returns:
        The model in training mode, its tensors bitwise identical to those of the file.

    Raises:
        UserError: no such file, a damaged or foreign one, or one that contradicts an override; the line names the
            tensor, its shape and the shape expected.
    """
    return convert_lightningdit(read_weights(path), overrides)


def convert_lightningdit(weights: WeightsFile, overrides: Mapping[str, Any], section: str = "") -> LightningDiT:
    """Convert tensors to a LightningDiT, see :func:`load_released_lightningdit`.

    Args:
        weights: the file.
        overrides: as there.
        section: prefix of the names of the overrides in messages.
    """
    model = _LIGHTNINGDIT.load(weights, overrides, section)
    _check_positions(weights.url, model)
    return model


def save_released_lightningdit(path: str | os.PathLike[str], model: LightningDiT) -> None:
    """Write a model as the public inference reads it: ``{"ema": ...}``, or flat where the suffix is `.safetensors`.

    Raises:
        UserError: the public inference has no such parts, or would take what the model predicts for something else.
    """
    if model.config.head is not None:
        raise UserError(f"{os.fspath(path)}: the released layout has no lightningdit.head: take the run's own export")
    if model.config.class_token is not None:
        raise UserError(f"{path}: the released layout has no lightningdit.class_token: take the run's own export")
    if model.config.in_context:
        raise UserError(
            f"{os.fspath(path)}: the released layout has no lightningdit.conditioning=in_context: take the run's own "
            "export"
        )
    if model.config.predicts_data:
        raise UserError(
            f"{os.fspath(path)}: the public inference takes outputs for velocities, and lightningdit.prediction=data: "
            "the run's own export says so, take that"
        )
    if model.length_embedder is not None:
        raise UserError(
            f"{os.fspath(path)}: the public {_KIND} has no lightningdit.average_velocity: take the run's own export"
        )
    if model.fusion is not None:
        raise UserError(f"{path}: the public {_KIND} has no lightningdit.routing.fuse, so it can't take these weights")
    write_weights(path, _LIGHTNINGDIT.state(model), nest="ema")


def _infer(weights: WeightsFile, overrides: Mapping[str, Any]) -> dict[str, Any]:
    width, latent_dim, patch, _ = weights.shape(_KIND, "x_embedder.proj.weight", 4)
    labels, _ = weights.shape(_KIND, "y_embedder.embedding_table.weight", 2)
    modulation, _ = weights.shape(_KIND, "blocks.0.adaLN_modulation.1.weight", 2)
    _, tokens, _ = weights.shape(_KIND, "pos_embed", 3)
    outputs, _ = weights.shape(_KIND, "final_layer.linear.weight", 2)
    if outputs == 2 * patch * patch * latent_dim:
        raise UserError(
            f"{weights.url}: final_layer.linear.weight is {[outputs, width]}, expected {[outputs // 2, width]}: this "
            f"model predicts a variance too (learn_sigma), a {_KIND} the velocity alone"
        )
    if overrides.get("prediction", _VELOCITY) != _VELOCITY:
        raise UserError(
            f"{weights.url}: lightningdit.prediction={overrides['prediction']}, but a published {_KIND} predicts the "
            f"{_VELOCITY}: remove it"
        )
    names = weights.tensors.keys()
    return {
        **_infer_size(weights, overrides, width),
        "patch_size": patch,
        "classes": labels - 1,  # the last label is the null label
        "qk_norm": "blocks.0.attn.q_norm.weight" in names,
        "mlp": "swiglu" if "blocks.0.mlp.w12.weight" in names else "gelu",
        "norm": "rmsnorm" if "blocks.0.norm1.weight" in names else "layernorm",
        "rope": _ROTATION in names,
        "shift": modulation != 4 * width,
        "intermediate_head": _infer_head(weights, overrides),
        "head": None,
        "average_velocity": False,
        "guidance_inputs": False,
        "conditioning": "adaln",
        "class_token": None,
        "latent_dim": latent_dim,
        "grid": _infer_grid(patch, tokens, overrides.get("grid")),
    }


def _infer_head(weights: WeightsFile, overrides: Mapping[str, Any]) -> Any:
    """Return what the overrides say of the intermediate head, which a file has without its place."""
    if "final_layer_xr.linear.weight" not in weights.tensors:
        return None
    if not overrides.get("intermediate_head"):
        raise UserError(
            f"{weights.url}: it has an intermediate head (final_layer_xr), and no tensor tells after which block: pass "
            "intermediate_head.after_block=... (the public LightningDiT-XL: 8)"
        )
    return overrides["intermediate_head"]


def _infer_grid(patch: int, tokens: int, wanted: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the latents: those that are wanted where they have so many tokens, else those of a square."""
    if wanted is not None:
        height, width = height_and_width(wanted)
        if height * width == tokens * patch * patch:
            return height, width
    side = patch * math.isqrt(tokens)
    return side, side


def _infer_size(weights: WeightsFile, overrides: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Infer the name of the size, or where it has none depth, width and heads; none where the overrides name a size."""
    blocks = [int(block[1]) for block in map(_BLOCK.match, weights.tensors) if block]
    depth, head_dims = (
        max(blocks) + 1,
        [weights.tensors[name].shape[-1] for name in _PER_HEAD if name in weights.tensors],
    )
    named = next((size for size, shape in SIZES.items() if (shape.depth, shape.width) == (depth, width)), None)
    if named and (not head_dims or SIZES[named].head_dim == head_dims[0]):
        return {"size": named, "depth": None, "width": None, "heads": None}
    if overrides.get("size"):
        return {"size": None, "depth": None, "width": None, "heads": None}
    if not head_dims and "heads" not in overrides:
        raise UserError(
            f"{weights.url}: no tensor tells the number of heads without {' or '.join(_PER_HEAD)}, and depth={depth} "
            f"with width={width} is none of {', '.join(SIZES)}: pass heads=..."
        )
    return {"size": None, "depth": depth, "width": width, "heads": width // head_dims[0] if head_dims else None}


def _check_positions(url: str, model: LightningDiT) -> None:
    """Refuse a model whose tables of positions are not those of its grid."""
    tables = {"pos_embed": sincos_position_embedding(model.config.shape.width, model.tokens)}
    if model.config.rope:
        rotation = RotaryEmbedding(model.config.shape.head_dim, model.tokens)
        tables |= {f"feat_rope.{name}": table for name, table in rotation.state_dict().items()}
    state = model.state_dict()
    for name, table in tables.items():
        error = (state[name].double() - table).abs().max().item()
        if not error <= _TABLE_ERROR + torch.finfo(state[name].dtype).eps:
            height, width = model.tokens
            raise UserError(
                f"{url}: {name} {list(table.shape)} differs by {error:.2g} from the published positions of {height} x "
                f"{width} tokens: another model"
            )


_LIGHTNINGDIT = Conversion(LightningDiTConfig, LightningDiT, _infer)
