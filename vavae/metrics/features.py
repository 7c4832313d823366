"""Features of images that the metrics of a set compare, and their summaries, which add up over parts of the set."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae.finite import require_finite_images
from vavae.metrics.config import ExtractorName, MetricsConfig
from vavae.metrics.frechet import FeatureStatistics
from vavae.metrics.inception_score import ClassSums
from vavae.models.backbones.inception import POOLED_DIM, load_inception
from vavae.models.backbones.load import ImageNormalizer, load_backbone, meta_backbone


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute fp32 products on GPUs in full, as published metrics are, whatever the networks of a run may round."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Features(NamedTuple):
    """Features of a batch of images, float32."""

    pooled: Tensor
    """Pooled features [B, D]."""
    spatial: Tensor | None = None
    """Spatial features [B, S], which keep positions; of Inception alone."""
    logits: Tensor | None = None
    """Logits [B, C] of ImageNet's classes; of Inception alone."""


class Description(NamedTuple):
    """Properties of an extractor that are known without its weights."""

    name: ExtractorName
    num_features: int
    """Length D of a pooled feature vector."""
    protocol: str
    """Protocol of the extractor, in words, for readers of its metrics."""


def describe(name: ExtractorName, config: MetricsConfig) -> Description:
    """Describe an extractor without loading its weights."""
    backbone = config.backbone(name)
    if backbone is None:
        return Description(
            name, POOLED_DIM, f"{name}, pooled features, images resized to 299 px (bilinear, as TensorFlow 1 does)"
        )
    preprocessing = _preprocessing(name)
    model: Any = meta_backbone(backbone)
    resize = f"images resized to {preprocessing.size} px ({preprocessing.mode}, antialiased)"
    if preprocessing.timm_kwargs == _PADDED:
        resize += " and padded to whole patches"
    return Description(name, model.num_features, f"{name}, {preprocessing.output}, {resize}")


class FeatureExtractor(nn.Module):
    """A frozen pretrained network; torchmetrics accepts it as ``feature=``.

    Args:
        description: name, size and protocol; ``num_features`` is taken from it.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self.num_features = description.num_features

    def features(self, images: Tensor) -> Features:
        """Extract all features of images uint8 [B, 3, H, W]."""
        raise NotImplementedError

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, D], float32, of images uint8 [B, 3, H, W]."""
        return self.features(images).pooled


class _Preprocessing(NamedTuple):
    """Preprocessing of images for a network of timm, and the output that is taken."""

    size: int
    """Side in pixels."""
    mode: Literal["bilinear", "bicubic"]
    output: str
    """Output of the network that is taken, in words."""
    timm_kwargs: dict[str, bool]


def _preprocessing(name: ExtractorName) -> _Preprocessing:
    return _PREPROCESSING.get(name, _DINOV2)


# FDr6: a patch of 14 does not divide 256 px, so zeros are appended on the right and below.
_PADDED = {"dynamic_img_size": True, "dynamic_img_pad": True}
_PREPROCESSING: dict[str, _Preprocessing] = {
    # Smaller than in its training, for small images on a CPU.
    "efficientnet_lite0": _Preprocessing(96, "bilinear", "pooled features", {}),
    # As in its training.
    "efficientnet_lite2": _Preprocessing(260, "bicubic", "pooled features", {}),
    "dinov2_large_256": _Preprocessing(256, "bicubic", "class token", _PADDED),
    "convnextv2_base": _Preprocessing(224, "bicubic", "pooled features", {}),
    "mae_large": _Preprocessing(224, "bicubic", "class token", {}),
    "siglip2_so400m": _Preprocessing(224, "bicubic", "attention-pooled features", {}),
    "clip_large": _Preprocessing(256, "bicubic", "class token", _PADDED),
}
# Stein et al. 2023, with the scaling of EDM2; position embeddings are resampled by timm.
_DINOV2 = _Preprocessing(224, "bicubic", "class token", {"dynamic_img_size": True})


class TimmExtractor(FeatureExtractor):
    """A network of timm without its classifier.

    Attributes:
        input_size: side in pixels to which images are resized.
    """

    def __init__(self, name: ExtractorName, config: MetricsConfig) -> None:
        super().__init__(describe(name, config))
        backbone, preprocessing = config.backbone(name), _preprocessing(name)
        assert backbone is not None, f"{name} is no network of timm"
        model: Any = load_backbone(backbone, num_classes=0, **preprocessing.timm_kwargs)
        self.model, self.normalize = model, ImageNormalizer.of(model)
        self.input_size, self._mode = preprocessing.size, preprocessing.mode

    @torch.inference_mode()
    def features(self, images: Tensor) -> Features:
        """Extract all features of images uint8 [B, 3, H, W]."""
        return Features(self.model(self.normalize(preprocess(images, self.input_size, self._mode))).float())


class InceptionExtractor(FeatureExtractor):
    """The network of FID, sFID and the Inception score, which resizes images itself."""

    def __init__(self, config: MetricsConfig) -> None:
        super().__init__(describe("inception", config))
        self.model = load_inception(config.inception)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Features:
        """Extract all features of images uint8 [B, 3, H, W]."""
        return Features(*self.model(images))


def load_extractor(name: ExtractorName, config: MetricsConfig) -> FeatureExtractor:
    """Load the extractor of a name with its weights.

    Raises:
        UserError: its weights or packages cannot be had; the message says what to fetch.
    """
    return InceptionExtractor(config) if name == "inception" else TimmExtractor(name, config)


def preprocess(images: Tensor, size: int, mode: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """Resize images for a network of timm: uint8 [B, 3, H, W] to float32 [B, 3, size, size] in [-1, 1].

    With antialiasing and not rounded to 8 bits afterwards: both are known to shift Fréchet distances (Parmar et al.
    2022).
    """
    assert images.dtype == torch.uint8, f"images are uint8, not {images.dtype}"
    pixels = images.float() / 127.5 - 1
    return F.interpolate(pixels, (size, size), mode=mode, align_corners=False, antialias=True)


Summaries = dict[str, "FeatureSummary"]
"""Summaries of one set, by the name of the extractor."""


@dataclass
class FeatureSummary:
    """Summary of the features of one set by one extractor.

    Args:
        pooled: sums over pooled features.
        spatial: sums over spatial features, where the extractor has them.
        splits: sums over class probabilities, one entry for each part, where the extractor has them.
        kept: pooled features of the first images in their order, float32 [K, D].
    """

    pooled: FeatureStatistics
    spatial: FeatureStatistics | None
    splits: tuple[ClassSums, ...]
    kept: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a file."""
        parts = {"pooled": self.pooled.tensors()}
        if self.spatial is not None:
            parts["spatial"] = self.spatial.tensors()
        parts |= {f"split{number}": split.tensors() for number, split in enumerate(self.splits)}
        named = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        return {"kept": self.kept, **named}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "FeatureSummary":
        """The inverse of :meth:`tensors`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, field = name.rpartition(".")
            parts.setdefault(part, {})[field] = tensor
        spatial = FeatureStatistics.from_tensors(parts["spatial"]) if "spatial" in parts else None
        splits = sum(part.startswith("split") for part in parts)
        return cls(
            FeatureStatistics.from_tensors(parts["pooled"]),
            spatial,
            tuple(ClassSums.from_tensors(parts[f"split{number}"]) for number in range(splits)),
            tensors["kept"],
        )


class Summarizer:
    """Accumulator of the summaries of one part of a set, batch by batch.

    Args:
        extractors: extractors by name.
        keep: number of first features that are kept.
        device: device of the sums.
        image: word for one of the images, for errors.
        first: index of the first image, for errors.
    """

    def __init__(
        self,
        extractors: Mapping[str, FeatureExtractor],
        keep: int,
        device: torch.device | str = "cpu",
        image: str = "image",
        first: int = 0,
    ) -> None:
        self._extractors, self._keep, self._device = extractors, keep, device
        self._image, self._first = image, first
        self._pooled = {
            name: FeatureStatistics.empty(extractor.num_features, device) for name, extractor in extractors.items()
        }
        self._spatial: dict[str, FeatureStatistics] = {}
        self._classes: dict[str, ClassSums] = {}
        self._kept: dict[str, list[Tensor]] = {name: [] for name in extractors}
        self._finite: dict[str, list[Tensor]] = {name: [] for name in extractors}
        self.count = 0

    @without_tf32()
    def update(self, images: Tensor) -> None:
        """Take in images [B, 3, H, W] in uint8."""
        images = images.to(self._device)
        for name, extractor in self._extractors.items():
            features = extractor.features(images)
            # Looked at with the sums: the host would have to wait for it now.
            finite = [part.isfinite().all(1) for part in features if part is not None]
            self._finite[name].append(torch.stack(finite).all(0))
            self._pooled[name].update(features.pooled)
            self._kept[name].append(features.pooled[: max(0, self._keep - self.count)].cpu())
            if features.spatial is not None:
                if name not in self._spatial:
                    self._spatial[name] = FeatureStatistics.empty(features.spatial.shape[1], self._device)
                self._spatial[name].update(features.spatial)
            if features.logits is not None:
                if name not in self._classes:
                    self._classes[name] = ClassSums.empty(features.logits.shape[1], self._device)
                self._classes[name].update(features.logits)
        self.count += len(images)

    def summaries(self) -> Summaries:
        """Summaries of all images so far.

        Raises:
            UserError: the features of an image are not finite.
        """
        for name, flags in self._finite.items():
            if flags:
                what = f"its features through {name} are not finite; give whole weights of that network"
                require_finite_images(torch.cat(flags), self._image, self._first, what)
        return {
            name: FeatureSummary(
                self._pooled[name],
                self._spatial.get(name),
                (self._classes[name],) if name in self._classes else (),
                torch.cat([torch.empty(0, self._extractors[name].num_features), *self._kept[name]]),
            )
            for name in self._extractors
        }


def summarize(
    batches: Iterable[Tensor],
    extractors: Mapping[str, FeatureExtractor],
    keep: int,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda _: None,
    image: str = "image",
    first: int = 0,
) -> Summaries:
    """Summarize one part, given as batches of images uint8 [B, 3, H, W]; see :class:`Summarizer`."""
    summarizer = Summarizer(extractors, keep, device, image, first)
    for images in batches:
        summarizer.update(images)
        advance(len(images))
    return summarizer.summaries()


def join(parts: Iterable[Summaries]) -> Summaries:
    """Join the summaries of all parts of a set, in their order: bitwise identical whoever made them."""
    joined: Summaries = {}
    for part in parts:
        for name, summary in part.items():
            joined[name] = _joined(joined[name], summary) if name in joined else summary
    return joined


def _joined(first: FeatureSummary, second: FeatureSummary) -> FeatureSummary:
    spatial = first.spatial
    if spatial is not None and second.spatial is not None:
        spatial = spatial.merge(second.spatial)
    kept = torch.cat([first.kept, second.kept])
    return FeatureSummary(first.pooled.merge(second.pooled), spatial, first.splits + second.splits, kept)
