"""Load a pretrained network and freeze it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vavae.torchvision_remedy  # noqa: F401  (before timm)

# isort: split
import timm

from vavae.backbones.config import EMBEDDED, BackboneConfig
from vavae.backbones.weights import check_weights, embedded_file, timm_name
from vavae.errors import UserError
from vavae.storage.storage import Storage

_EMBEDDED_MEAN = (0.498, 0.498, 0.498)
_EMBEDDED_STD = (0.502, 0.502, 0.502)


def load_backbone(config: BackboneConfig, **timm_kwargs: Any) -> nn.Module:
    """The timm model of a configuration with its pretrained weights, frozen and in evaluation mode for good.

    Its images are normalised by :meth:`ImageNormalizer.of`.

    Args:
        config: the network and its weights.
        timm_kwargs: passed to ``timm.create_model``, such as ``dynamic_img_size=True``; ``num_classes=0`` drops the
            classifier after loading.

    Raises:
        UserError: the network is unknown or its weights cannot be had.
    """
    assert "features_only" not in timm_kwargs, "timm would load it without checking names: use forward_intermediates"
    check_weights(config)
    name = timm_name(config)
    # With another number of classes timm would load without checking names, so the classifier goes afterwards.
    num_classes = timm_kwargs.pop("num_classes", None)
    model: Any
    if config.name == EMBEDDED:
        model = _load_embedded(name, config.weights or embedded_file(), **timm_kwargs)
    elif config.weights is not None:
        # Not `custom_load`: that is for checkpoints of other frameworks.
        source = {"file": str(Storage(config.weights).local_file()), "custom_load": False}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **timm_kwargs)
    else:
        model = timm.create_model(name, pretrained=True, **timm_kwargs)
    if num_classes is not None:
        model.reset_classifier(num_classes)
    return freeze(model)


def meta_backbone(config: BackboneConfig) -> nn.Module:
    """The architecture alone, on the meta device: sizes and names without weights or memory.

    Raises:
        UserError: timm does not know the network.
    """
    with torch.device("meta"):
        return timm.create_model(timm_name(config))


def freeze(module: nn.Module) -> nn.Module:
    """Take a module out of training: no gradients to its parameters, and ``train()`` of a parent leaves it as it is."""
    module.requires_grad_(False).eval()
    module.train = partial(_stay, module)  # type: ignore[method-assign]
    return module


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _load_embedded(name: str, url: str, **timm_kwargs: Any) -> nn.Module:
    """The package names the tensors otherwise than timm, but keeps their order."""
    statistics = {"mean": _EMBEDDED_MEAN, "std": _EMBEDDED_STD}
    model = timm.create_model(name, pretrained=False, pretrained_cfg_overlay=statistics, **timm_kwargs)
    found: dict[str, Tensor] = torch.load(Storage(url).local_file(), map_location="cpu", weights_only=True)
    expected = model.state_dict()
    if [tensor.shape for tensor in found.values()] != [tensor.shape for tensor in expected.values()]:
        raise UserError(
            f"{url} does not hold the tensors of {EMBEDDED}: take the file of the package or set no `weights`"
        )
    model.load_state_dict(dict(zip(expected, found.values(), strict=True)))
    return model
