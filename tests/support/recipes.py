"""Recipes beyond the paper, as sections of a configuration of two blocks on random latents."""

from typing import Any

from support.training_steps import LANES, tiny_config

from vavae.runs.config import RunConfig

RECIPES: dict[str, dict[str, Any]] = {
    "internal guidance": {"lightningdit": {"intermediate_head": {"after_block": 1}}},
    "prediction of data": {
        "lightningdit": {"prediction": "data", "intermediate_head": {"after_block": 1}},
        "timesteps": {"shift": "by_dimension"},
    },
    "wide head": {"lightningdit": {"head": {"depth": 1, "width": 48, "heads": 3}}},
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
    "representation alignment": {
        # It falls and stops within the steps that tests take.
        "objective": {
            "representation": {"after_block": 1, "projector_width": 16, "decay_from_images": 8, "stop_images": 24}
        },
        "latents": {"features": {"teacher": {"name": "efficientnet_lite0"}}},
    },
}
"""By name: what each writes into the configuration."""


def recipe_config(name: str, **training: Any) -> RunConfig:
    """The tiny configuration with a recipe, and some fields of the trainings replaced."""
    plain = tiny_config(**training).model_dump(exclude_unset=True)
    for section, fields in RECIPES[name].items():
        plain[section] = {**plain.get(section, {}), **fields}
    return RunConfig.model_validate(plain)
