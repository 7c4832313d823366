"""The smallest representation autoencoder: the embedded network and a transformer of two blocks."""

from typing import Any

from support.training_steps import tiny_config

from vavae.models.tokenizer.config import TokenizerConfig
from vavae.runs.config import RunConfig

DIM = 112
"""Channels that `efficientnet_lite0` gives at a stride of 16."""
TOKENIZER: dict[str, Any] = {
    "kind": "representation",
    "latent_dim": DIM,
    "encoder": {"name": "efficientnet_lite0"},
    "decoder": {"size": None, "width": 32, "depth": 2, "heads": 2, "patch_size": 8},
}
NO_ENCODER: dict[str, Any] = {"kl_weight": 0, "vision_foundation": {"weight": 0}}
"""Losses without those of an encoder."""


def tokenizer_config(**changes: Any) -> TokenizerConfig:
    """The configuration of the tokenizer, with some fields replaced."""
    return TokenizerConfig.model_validate({**TOKENIZER, **changes})


def representation_config(
    losses: dict[str, Any] | None = None, tokenizer: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    """The tiny configuration with this tokenizer, and some fields of its losses and further sections replaced."""
    plain = tiny_config(losses={**NO_ENCODER, **(losses or {})}).model_dump(exclude_unset=True)
    written = {name: {**plain.get(name, {}), **section} for name, section in sections.items()}
    return RunConfig.model_validate({**plain, "tokenizer": {**TOKENIZER, **(tokenizer or {})}, **written})
