"""Which pretrained network, and where its weights are."""

import re

from pydantic import field_validator

from vavae.config import Config

EMBEDDED = "efficientnet_lite0"
"""The backbone whose ImageNet weights come as a package of the extra `quickstart`: no download beside installation."""

HUB_PREFIX = "hf-hub:"
"""What tells a repository of the Hugging Face hub apart from a path, which may look the same; timm writes it so too."""


class BackboneConfig(Config):
    """A pretrained network of timm."""

    name: str
    """A timm model with its tag, as in `vit_large_patch14_dinov2.lvd142m`, or the embedded `efficientnet_lite0`."""

    weights: str | None = None
    """A checkpoint in the names of timm or of its publisher: a path, a storage URL, or `hf-hub:owner/model[@revision]`;
    none means the package's own or timm's repository on the hub."""

    @field_validator("weights")
    @classmethod
    def _repository(cls, weights: str | None) -> str | None:
        if weights and weights.startswith(HUB_PREFIX):
            repository = weights.removeprefix(HUB_PREFIX)
            if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", repository):
                raise ValueError(
                    f"weights {weights!r}: write {HUB_PREFIX}owner/model or {HUB_PREFIX}owner/model@revision"
                )
        return weights
