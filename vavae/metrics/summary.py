"""Summaries of a set of images for the metrics: sums that add up over its parts, and first features."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vavae.metrics.features import FeatureExtractor
from vavae.metrics.frechet import FeatureStatistics
from vavae.metrics.inception_score import ClassSums

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
    """

    def __init__(
        self, extractors: Mapping[str, FeatureExtractor], keep: int, device: torch.device | str = "cpu"
    ) -> None:
        self._extractors, self._keep, self._device = extractors, keep, device
        self._pooled = {
            name: FeatureStatistics.empty(extractor.num_features, device) for name, extractor in extractors.items()
        }
        self._spatial: dict[str, FeatureStatistics] = {}
        self._classes: dict[str, ClassSums] = {}
        self._kept: dict[str, list[Tensor]] = {name: [] for name in extractors}
        self.count = 0

    def update(self, images: Tensor) -> None:
        """Take in images [B, 3, H, W] in uint8."""
        images = images.to(self._device)
        for name, extractor in self._extractors.items():
            features = extractor.features(images)
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
        """Summaries of all images so far."""
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
) -> Summaries:
    """Summarize one part, given as batches of images uint8 [B, 3, H, W]; see :class:`Summarizer`."""
    summarizer = Summarizer(extractors, keep, device)
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
