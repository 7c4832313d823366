"""Loading of pretrained networks, frozen, and the normalization of images to the statistics that they expect."""

import logging
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import vavae.torchvision_compat  # noqa: F401  (before timm)

# isort: split
import timm
from timm.models import load_state_dict

from vavae.errors import UserError
from vavae.finite import require_finite
from vavae.models.backbones.config import EMBEDDED_WEIGHTS, BackboneConfig
from vavae.models.backbones.weights import timm_name, weights_file

logging.getLogger("timm").setLevel(logging.WARNING)  # it tells of every network that it reads, and not by its name


class ImageNormalizer(nn.Module):
    """Map images [B, 3, H, W] from [-1, 1] to a backbone's zero mean and unit deviation.

    Args:
        mean: mean of each channel of images in [0, 1].
        std: standard deviation of each channel, likewise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # ((x + 1) / 2 - mean) / std, as one multiplication and one addition
        deviation = torch.tensor(std).view(-1, 1, 1)
        self.register_buffer("scale", 0.5 / deviation, persistent=False)
        self.register_buffer("shift", (0.5 - torch.tensor(mean).view(-1, 1, 1)) / deviation, persistent=False)

    @classmethod
    def of(cls, model: Any) -> "ImageNormalizer":
        """The normalizer of a timm model, from the statistics in its ``pretrained_cfg``."""
        return cls(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])

    def forward(self, images: Tensor) -> Tensor:
        """Normalize images [B, 3, H, W] in [-1, 1]; same shape, gradients flow through."""
        return images * self.scale + self.shift


_EMBEDDED_STATISTICS = {"mean": (0.498, 0.498, 0.498), "std": (0.502, 0.502, 0.502)}
_UNREADABLE = (AttributeError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError)
"""Errors of readers on a file that is cut short, a pickle of more than tensors, or no checkpoint at all."""
_MISMATCH = (AssertionError, AttributeError, IndexError, RuntimeError)
"""Errors of torch on tensors of another network, and of timm when it converts their publisher's names."""


LoadBackbone = Callable[..., nn.Module]
"""Loader of the network of a configuration: (config, **timm_kwargs) -> timm model."""


def load_backbone(config: BackboneConfig, **timm_kwargs: Any) -> nn.Module:
    """Load the timm model of a configuration with its pretrained weights, frozen and in evaluation mode for good.

    Its images are normalized by :meth:`ImageNormalizer.of`.

    Args:
        config: the network and its weights.
        timm_kwargs: passed to ``timm.create_model``, such as ``dynamic_img_size=True``; ``num_classes=0`` drops the
            classifier after loading.

    Raises:
        UserError: the network is unknown, its weights cannot be had, or they are not its weights.
    """
    assert "features_only" not in timm_kwargs, "timm would load it without checking names: use forward_intermediates"
    file = weights_file(config)
    place = config.weights or file
    try:
        tensors = load_state_dict(str(file), weights_only=True)
    except _UNREADABLE as error:
        raise UserError(
            f"the weights at {place} cannot be read ({_first_sentence(error)}): give a whole "
            "checkpoint, as safetensors or as a pickle of tensors alone"
        ) from error
    found = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    require_finite(found, f"the weights at {place}", "take a whole checkpoint of that network")
    # With another number of classes timm would load without checking names, so the classifier goes afterwards.
    num_classes = timm_kwargs.pop("num_classes", None)
    build = _embedded if config.name in EMBEDDED_WEIGHTS else _published
    try:
        model: Any = build(timm_name(config), tensors, **timm_kwargs)
    except _MISMATCH as error:
        complaint = _complaint(error, tensors, meta_backbone(config).state_dict())
        raise UserError(
            f"the weights at {place} are not those of {config.name}: {complaint}; take the checkpoint of that network"
        ) from error
    if num_classes is not None:
        model.reset_classifier(num_classes)
    return freeze(model)


def meta_backbone(config: BackboneConfig, **timm_kwargs: Any) -> nn.Module:
    """Build the architecture alone, on the meta device: sizes and names without weights or memory.

    Args:
        config: the network.
        timm_kwargs: passed to ``timm.create_model``.

    Raises:
        UserError: timm does not know the network.
    """
    with torch.device("meta"):
        return timm.create_model(timm_name(config), **timm_kwargs)


def freeze(module: nn.Module) -> nn.Module:
    """Take a module out of training: no gradients to its parameters, and ``train()`` of a parent leaves it as it is."""
    module.requires_grad_(False).eval()
    module.train = partial(_stay, module)  # type: ignore[method-assign]
    return module


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _published(name: str, tensors: dict[str, Tensor], **timm_kwargs: Any) -> nn.Module:
    """Build a model with a published checkpoint, whose tensor names timm converts."""
    # timm reads files by itself, but its older versions unpickle anything. The other sources are emptied: it would
    # turn to them where there are no tensors at all.
    source = {"state_dict": tensors, "file": None, "url": None, "hf_hub_id": None, "custom_load": False}
    model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **timm_kwargs)
    del model.pretrained_cfg["state_dict"]
    return model


def _embedded(name: str, tensors: dict[str, Tensor], **timm_kwargs: Any) -> nn.Module:
    """Build an embedded model; its package names the tensors otherwise than timm, but keeps their order."""
    model = timm.create_model(name, pretrained=False, pretrained_cfg_overlay=_EMBEDDED_STATISTICS, **timm_kwargs)
    expected = model.state_dict()
    if tensors.keys() != expected.keys():
        names = [*expected, *tensors][: len(tensors)]  # of a surplus tensor its own, which loading then refuses
        tensors = dict(zip(names, tensors.values(), strict=True))
    model.load_state_dict(tensors)
    return model


def _first_sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].partition('. ')[0]}"


def _complaint(error: Exception, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str:
    """Name the first tensor that does not fit, its shape and the shape expected, from the message of torch."""
    message = str(error)
    if not found:
        return "they hold no tensors"
    if mismatch := re.search(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)", message):
        name, shape, wanted = mismatch.groups()
        return f"tensor {name} is {shape}, {wanted} expected"
    if missing := re.search(r'Missing key\(s\) in state_dict: "(.+?)"', message):
        return f"there is no tensor {missing[1]}, {list(expected[missing[1]].shape)} expected"
    if surplus := re.search(r'Unexpected key\(s\) in state_dict: "(.+?)"', message):
        return f"it has no tensor {surplus[1]}"
    # timm failed before torch compared any tensor.
    for name, tensor in expected.items():
        shape, wanted = list(getattr(found.get(name), "shape", ())), list(tensor.shape)
        if name in found and len(shape) != len(wanted):
            return f"tensor {name} is {shape}, {wanted} expected"
    return _first_sentence(error)
