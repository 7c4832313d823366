"""Which pretrained network, and where its weights are."""

from vavae.config import Config

EMBEDDED = "efficientnet_lite0"
"""The backbone whose ImageNet weights come as a package of the extra `quickstart`: no download beside installation."""


class BackboneConfig(Config):
    """A pretrained network of timm."""

    name: str
    """A timm model with its tag, as in `vit_large_patch14_dinov2.lvd142m`, or the embedded `efficientnet_lite0`."""

    weights: str | None = None
    """A checkpoint, as a path or a storage URL; none means the package's own or the Hugging Face hub's."""
