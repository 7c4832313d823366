"""Recipes beyond the paper, as sections of a configuration of two blocks on random latents."""

from typing import Any

from support.training_steps import tiny_config

from vavae.runs.config import RunConfig

RECIPES: dict[str, dict[str, Any]] = {
    "internal guidance": {"lightningdit": {"intermediate_head": {"after_block": 1}}},
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
