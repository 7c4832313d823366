"""Pretrained networks with random weights: they compute as long, and there is nothing to download."""

from pathlib import Path

import vavae.torchvision_compat  # noqa: F401  (before timm)

# isort: split
import timm
from safetensors.torch import save_file

from vavae.models.backbones.config import BackboneConfig
from vavae.models.backbones.weights import timm_name
from vavae.runs.config import RunConfig
from vavae.training.initialize import initialized


def with_random_backbones(config: RunConfig, folder: Path) -> RunConfig:
    """Configuration whose teacher, LPIPS and discriminator's network have random weights.

    Args:
        config: configuration of a run.
        folder: for the weights, which must stay there until the networks are built.
    """
    teacher = config.teacher.model_copy(update={"weights": _write_random(config.teacher.backbone, folder)})
    perceptual = config.losses.perceptual
    if perceptual.kind == "lpips":
        perceptual = perceptual.model_copy(update={"weights": _write_random(perceptual.backbone, folder)})
    adversarial = config.losses.adversarial
    if adversarial.kind == "features":
        weights = _write_random(adversarial.features.backbone, folder)
        features = adversarial.features.model_copy(update={"weights": weights})
        adversarial = adversarial.model_copy(update={"features": features})
    losses = config.losses.model_copy(update={"perceptual": perceptual, "adversarial": adversarial})
    return config.model_copy(update={"teacher": teacher, "losses": losses})


def _write_random(backbone: BackboneConfig, folder: Path) -> str:
    model = initialized(0, backbone.name, lambda: timm.create_model(timm_name(backbone), pretrained=False))
    file = folder / f"{backbone.name}.safetensors"
    save_file(model.state_dict(), file)
    return str(file)
