"""The vision foundation model as a frozen map from images to one feature per latent position."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae.errors import UserError
from vavae.models.backbones.color import as_color
from vavae.models.backbones.config import EMBEDDED
from vavae.models.backbones.load import ImageNormalizer, LoadBackbone, freeze, load_backbone, meta_backbone
from vavae.models.tokenizer.config import TeacherConfig

_DEFAULT_STRIDE = 16


class TeacherGeometry(NamedTuple):
    """Feature level of a teacher and its sizes; known without its weights."""

    level: int
    """Feature level: index of the intermediate output that gives the features."""
    stride: int
    """Pixels per feature along one side: the patch of a transformer."""
    feature_dim: int
    """Channels of a feature."""
    isotropic: bool
    """True for a plain transformer: one resolution at all levels, and features that pass the final normalization."""
    timm_kwargs: dict[str, bool]
    """Arguments of timm that let the model take images of another size than in pretraining."""

    def image_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of the image that gives one feature per position of a grid (h, w)."""
        return grid[0] * self.stride, grid[1] * self.stride


def check_teacher(config: TeacherConfig, grid: tuple[int, int]) -> None:
    """Check before workers start, and without its weights, that a teacher can give features on a grid (h, w).

    Raises:
        UserError: it is unknown, has no such feature level or projection, or refuses images of the size.
    """
    geometry = teacher_geometry(config)
    height, width = geometry.image_size(grid)
    model: Any = meta_backbone(config.backbone, **geometry.timm_kwargs)
    try:
        model.eval().forward_intermediates(torch.empty(1, 3, height, width, device="meta"), intermediates_only=True)
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"teacher {config.name} takes no images of {height} x {width} pixels, but "
            f"{' x '.join(map(str, model.pretrained_cfg['input_size'][1:]))} alone: choose another teacher"
        ) from error


def teacher_geometry(config: TeacherConfig) -> TeacherGeometry:
    """Find the feature level of a teacher from its architecture alone.

    Raises:
        UserError: timm does not know the teacher, or it has no feature level of the requested stride.
    """
    model: Any = meta_backbone(config.backbone)
    levels = list(model.feature_info)
    strides = [level["reduction"] for level in levels]
    isotropic = len(set(strides)) == 1
    stride = config.stage_stride or (strides[-1] if isotropic else _DEFAULT_STRIDE)
    if stride not in strides:
        raise UserError(
            f"teacher {config.name} has no feature level of stride {stride}: stage_stride is one of "
            f"{sorted(set(strides))}"
        )
    level = len(levels) - 1 if isotropic else strides.index(stride)
    feature_dim = model.num_features if isotropic else levels[level]["num_chs"]
    if config.project:
        # Only with a pooled token: the head follows the final norm of all tokens, so it can be applied to each of them.
        if not isinstance(getattr(model, "head", None), nn.Linear) or model.global_pool != "token":
            raise UserError(f"teacher {config.name} has no projection of its tokens, as CLIP has: set project=false")
        feature_dim = model.head.out_features
    timm_kwargs = {"dynamic_img_size": True} if hasattr(model, "dynamic_img_size") else {}
    return TeacherGeometry(level, stride, feature_dim, isotropic, timm_kwargs)


class FrozenNetwork(nn.Module):
    """A frozen pretrained network, in evaluation mode for good, whose features lie on a grid; base of its uses.

    Args:
        config: the network and its feature level.
        load: loads the network; another than `load_backbone` where its sizes alone matter.
    """

    def __init__(self, config: TeacherConfig, load: LoadBackbone = load_backbone) -> None:
        super().__init__()
        self.config = config
        self.geometry = teacher_geometry(config)
        self.model: Any = load(config.backbone, **self.geometry.timm_kwargs)
        self.normalizer = ImageNormalizer.of(self.model)
        freeze(self)

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks of a transformer, or stages of a convolutional network, in which nearly all work is done."""
        found: Any = getattr(self.model, "blocks", None) or getattr(self.model, "stages", ())
        return [*found]


class VisionFoundationTeacher(FrozenNetwork):
    """A frozen pretrained network that gives one feature vector per latent position; no gradient to its parameters.

    The image is resized so that the teacher's own grid equals the latent grid; feature maps are never interpolated.
    """

    @property
    def feature_dim(self) -> int:
        """Channels of the features."""
        return self.geometry.feature_dim

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features [B, feature_dim, h, w] on a grid (h, w), of images [B, C, H, W] in [-1, 1], seen in color.

        Transformers give their patch tokens after the final norm, without class, distillation or register tokens and
        before any pooling, as the released code has it of DINOv2 and MAE; position embeddings are resampled by timm. Of
        SAM, which has no such norm, they are the image embeddings after its neck: what timm, too, calls its features,
        and what SAM was trained to give (the paper does not say which it took). Convolutional networks give the output
        of one feature level.
        """
        (features,) = self._intermediates(self._prepared(images, grid), [self.geometry.level])
        return self._checked(features, grid)

    @torch.no_grad()
    def tokens(self, images: Tensor, grid: tuple[int, int], class_token: bool) -> Tensor:
        """Features [B, N, feature_dim] row by row, see `forward`; before them the class token, where it is asked for.

        It has passed the final norm, too. Of a network that has none it is the mean of the features.
        """
        if not class_token:
            return self(images, grid).flatten(2).transpose(1, 2)
        if getattr(self.model, "cls_token", None) is None:
            features = self(images, grid).flatten(2).transpose(1, 2)
            return torch.cat([features.mean(1, keepdim=True), features], dim=1)
        ((features, prefix),) = self._intermediates(
            self._prepared(images, grid), [self.geometry.level], return_prefix_tokens=True
        )
        features, token = self._checked(features, grid).flatten(2).transpose(1, 2), prefix[:, :1]
        return torch.cat([self.model.head(token) if self.config.project else token, features], dim=1)

    def _prepared(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images as the network takes them."""
        size, images = self.geometry.image_size(grid), as_color(images)
        if images.shape[2:] != size:
            # Bilinear without antialiasing, as the released code feeds a 256 px image to a patch-14 teacher.
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return self.normalizer(images) if self.config.normalize else images

    def _checked(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of the network as they are given, [B, feature_dim, h, w]."""
        if self.config.project:
            features = self.model.head(features.movedim(1, -1)).movedim(-1, 1)
        assert features.shape[1:] == (self.feature_dim, *grid), f"teacher gave {tuple(features.shape)} for grid {grid}"
        return features

    def early_features(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C_i, H_i, W_i] of all levels before the teacher's own, from images [B, C, H, W] in [-1, 1].

        Gradients flow to the images. For a distance between images; it always uses the teacher's image statistics.

        Raises:
            UserError: the teacher has no such levels.
        """
        if self.geometry.isotropic or self.geometry.level == 0:
            raise UserError(
                f"teacher {self.config.name} has no early feature levels to compare images by: take a convolutional "
                f"one, such as {EMBEDDED}, or another perceptual distance"
            )
        return self._intermediates(self.normalizer(as_color(images)), list(range(self.geometry.level)))

    def _intermediates(self, images: Tensor, levels: list[int], **more: bool) -> list[Any]:
        return self.model.forward_intermediates(
            images, indices=levels, norm=self.geometry.isotropic, stop_early=True, intermediates_only=True, **more
        )
