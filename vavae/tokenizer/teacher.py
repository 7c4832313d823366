"""The vision foundation model as a frozen map from images to one feature per latent position."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae.backbones.load import freeze, load_backbone, meta_backbone
from vavae.backbones.normalize import ImageNormalizer
from vavae.errors import UserError
from vavae.tokenizer.config import TeacherConfig

_DEFAULT_STAGE_STRIDE = 16


class TeacherGeometry(NamedTuple):
    """What of a teacher is looked at; known without its weights."""

    stage: int
    """Index of the intermediate output that gives the features."""
    stride: int
    """Pixels per feature along one side: the patch of a transformer."""
    feature_dim: int
    """Channels of a feature."""
    isotropic: bool
    """One resolution throughout (a plain transformer), whose features pass the final normalisation."""
    any_size: bool
    """The model has to be told that images may have another size than in pretraining."""


def teacher_geometry(config: TeacherConfig) -> TeacherGeometry:
    """Find the stage of a teacher from its architecture alone.

    Raises:
        UserError: timm does not know the teacher, or it has no stage of the stride asked for.
    """
    model: Any = meta_backbone(config.backbone)
    stages = list(model.feature_info)
    strides = [stage["reduction"] for stage in stages]
    isotropic = len(set(strides)) == 1
    stride = config.stage_stride or (strides[-1] if isotropic else _DEFAULT_STAGE_STRIDE)
    if stride not in strides:
        raise UserError(
            f"teacher {config.name} has no stage of stride {stride}: stage_stride is one of {sorted(set(strides))}"
        )
    stage = len(stages) - 1 if isotropic else strides.index(stride)
    feature_dim = model.num_features if isotropic else stages[stage]["num_chs"]
    return TeacherGeometry(stage, stride, feature_dim, isotropic, any_size=hasattr(model, "dynamic_img_size"))


class VisionFoundationTeacher(nn.Module):
    """A frozen pretrained network that gives one feature vector per latent position; no gradient to its parameters.

    The image is resized so that the teacher's own grid equals the latent grid; feature maps are never interpolated.
    """

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.geometry = teacher_geometry(config)
        sizes = {"dynamic_img_size": True} if self.geometry.any_size else {}
        self.model: Any = load_backbone(config.backbone, **sizes)
        self.normalizer = ImageNormalizer.of(self.model)
        freeze(self)

    @property
    def feature_dim(self) -> int:
        """Channels of the features."""
        return self.geometry.feature_dim

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of images [B, 3, H, W] in [-1, 1] on a grid (h, w): [B, feature_dim, h, w].

        Transformers give their patch tokens after the final norm, without class and register tokens; convolutional
        networks the output of one stage.
        """
        size = (grid[0] * self.geometry.stride, grid[1] * self.geometry.stride)
        if images.shape[2:] != size:
            # Bilinear without antialiasing, as the released code feeds a 256 px image to a patch-14 teacher.
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        if self.config.normalize:
            images = self.normalizer(images)
        (features,) = self._intermediates(images, [self.geometry.stage])
        assert features.shape[1:] == (self.feature_dim, *grid), f"teacher gave {tuple(features.shape)} for grid {grid}"
        return features

    def early_features(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C_i, H_i, W_i] of all stages before the teacher's own, from images [B, 3, H, W] in [-1, 1].

        Gradients flow to the images. For a distance between images; it always uses the teacher's image statistics.

        Raises:
            UserError: the teacher has no such stages.
        """
        if self.geometry.isotropic or self.geometry.stage == 0:
            raise UserError(f"teacher {self.config.name} has no early stages of features: take {TeacherConfig().name}")
        return self._intermediates(self.normalizer(images), list(range(self.geometry.stage)))

    def _intermediates(self, images: Tensor, stages: list[int]) -> list[Tensor]:
        return self.model.forward_intermediates(
            images, indices=stages, norm=self.geometry.isotropic, stop_early=True, intermediates_only=True
        )
