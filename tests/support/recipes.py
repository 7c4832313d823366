"""Recipes beyond the paper, as sections of a configuration of two blocks on random latents."""

from collections.abc import Mapping
from typing import Any

from support.training_steps import LANES, tiny_config

from vavae.runs.config import RunConfig

RECIPES: dict[str, dict[str, Any]] = {
    # First: DeepSpeed's stage 3 replaces linear maps for the rest of a process by some without forward mode.
    "average velocities": {
        "lightningdit": {"average_velocity": True},
        "objective": {"direction_weight": 0, "mean_flow": {"equal_fraction": 0.5, "mix": 0.5}},
        "train_lightningdit": {"lanes_at_once": 2},
    },
    "improved average velocities": {
        "lightningdit": {"average_velocity": True, "guidance_inputs": True},
        "objective": {"direction_weight": 0, "mean_flow": {"equal_fraction": 0.5, "max_scale": 4}},
        "train_lightningdit": {"lanes_at_once": 2},
    },
    "internal guidance": {"lightningdit": {"intermediate_head": {"after_block": 1}}},
    "prediction of data": {
        "lightningdit": {"prediction": "data", "intermediate_head": {"after_block": 1}},
        "timesteps": {"shift": "by_dimension"},
    },
    "wide head": {"lightningdit": {"head": {"depth": 1, "width": 48, "heads": 3}}},
    "in-context conditioning": {
        "lightningdit": {"conditioning": "in_context", "time_tokens": 2, "label_tokens": 3},
        "train_lightningdit": {"lanes_at_once": 2},
    },
    # All tokens in the last of the four steps.
    "routing": {
        "lightningdit": {"routing": {"first_block": 1, "last_block": 1, "until_images": 3 * LANES}},
        "train_lightningdit": {"lanes_at_once": 2},
    },
    # A path dropout that drops some of 32 images, and not all.
    "routing with fusion": {
        "lightningdit": {
            "depth": 3,
            "routing": {
                "first_block": 1,
                "last_block": 1,
                "drop": 0.75,
                "until_images": 3 * LANES,
                "fuse": {"path_dropout": 0.3},
            },
        },
        "train_lightningdit": {"lanes_at_once": 2},
    },
    "class token": {
        "lightningdit": {"class_token": {"width": 112}},
        "latents": {"features": {"teacher": {"name": "efficientnet_lite0"}, "class_token": True}},
    },
    "representation alignment": {
        # It falls and stops within the steps that tests take.
        "objective": {
            "representation": {"after_block": 1, "projector_width": 16, "decay_from_images": 8, "stop_images": 24}
        },
        "latents": {"features": {"teacher": {"name": "efficientnet_lite0"}}},
    },
}
"""By name: what each writes into the configuration."""
OPTIONS = {
    **RECIPES,
    "Muon": {"train_lightningdit": {"optimizer": {"muon": {}}}},
    "averages": {"train_lightningdit": {"averages": [{"name": "wide", "std": 0.1}, {"name": "slow", "decay": 0.9}]}},
}
"""The recipes, and what changes the training around the model."""


APART = (
    {"routing", "routing with fusion"},
    {"in-context conditioning", "routing with fusion"},
    *({"class token", name} for name in ("wide head", "routing with fusion")),
    {"average velocities", "improved average velocities"},
    *(
        {kind, name}
        for kind in ("average velocities", "improved average velocities")
        for name in ("internal guidance", "prediction of data", "routing with fusion", "class token")
    ),
)
"""Pairs of options that are refused."""


def recipe_config(*names: str, **training: Any) -> RunConfig:
    """The tiny configuration with recipes or options, and some fields of the trainings replaced."""
    plain = tiny_config(**training).model_dump(exclude_unset=True)
    for name in names:
        plain = _merged(plain, OPTIONS[name])
    return RunConfig.model_validate(plain)


def _merged(plain: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested sections; the second wins where both write a value."""
    return {**plain} | {
        name: _merged(plain[name], value)
        if isinstance(value, Mapping) and isinstance(plain.get(name), Mapping)
        else value
        for name, value in more.items()
    }
