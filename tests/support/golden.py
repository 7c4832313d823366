"""Fixtures made with the public implementation: what is in their files, and the configurations behind them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vavae.losses.config import AdversarialLossConfig, TokenizerLossConfig, VisionFoundationLossConfig
from vavae.models.tokenizer.config import TokenizerConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    """Spec and tensors of a fixture; `state.*` is its checkpoint."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["spec"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def golden_state(tensors):
    return {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}


def vavae_configs(spec: Mapping[str, Any]) -> tuple[TokenizerConfig, TokenizerLossConfig]:
    """Configurations of `vavae_tiny`, from the metadata of the file."""
    sizes, loss = spec["ddconfig"], spec["loss"]
    tokenizer = TokenizerConfig(
        latent_dim=spec["embed_dim"],
        channels=sizes["ch"],
        channel_multipliers=tuple(sizes["ch_mult"]),
        res_blocks=sizes["num_res_blocks"],
        attention_levels=tuple(
            level
            for level in range(len(sizes["ch_mult"]))
            if sizes["resolution"] // 2**level in sizes["attn_resolutions"]
        ),
    )
    losses = TokenizerLossConfig(
        vision_foundation=VisionFoundationLossConfig(
            weight=loss["vf_weight"],
            adaptive=loss["adaptive_vf"],
            distmat_margin=loss["distmat_margin"],
            cos_margin=loss["cos_margin"],
        ),
        # The fixture's discriminator is the smaller one of two layers.
        adversarial=AdversarialLossConfig(weight=loss["disc_weight"], layers=2),
        kl_weight=loss["kl_weight"],
    )
    return tokenizer, losses
