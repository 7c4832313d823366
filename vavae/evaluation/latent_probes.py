"""Probes of the latents and decodings of some held-out images, taken while a tokenizer is evaluated."""

import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vavae.metrics.config import LatentProbesConfig
from vavae.metrics.equivariance import EquivarianceErrors, SquaredErrors, equivariance_errors
from vavae.metrics.latent_space import LatentProbes, probe_latents

_log = logging.getLogger(__name__)


class ProbedImages:
    """Choice of the images that are probed: the first of each of some classes, which lie evenly among all.

    Args:
        config: numbers of classes and of images of each.
        classes: number of classes of the images; 0 makes one of all.
    """

    def __init__(self, config: LatentProbesConfig, classes: int) -> None:
        chosen = range(0, max(1, classes), max(1, math.ceil(classes / config.classes)))
        self._left = dict.fromkeys(chosen, config.images_per_class)

    def take(self, labels: Tensor) -> Tensor:
        """Indices of the images of the next batch that are probed, int64 [b].

        Args:
            labels: classes of its images, int64 [B].
        """
        taken = []
        for index, label in enumerate(labels.tolist()):
            if self._left.get(label, 0) > 0:
                self._left[label] -= 1
                taken.append(index)
        return torch.tensor(taken, dtype=torch.int64)


class ProbedBatch(NamedTuple):
    """Latents of probed images, and how their decodings differ."""

    latents: Tensor
    """[b, C, h, w]."""
    labels: Tensor
    """Classes, int64 [b]."""
    errors: SquaredErrors

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a file."""
        errors = {f"{_PREFIX}{name}": error for name, error in self.errors._asdict().items()}
        return {f"{_PREFIX}latents": self.latents, f"{_PREFIX}labels": self.labels, **errors}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ProbedBatch | None":
        """Restore from :meth:`tensors`, among others; None where no image was probed."""
        found = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if is_probed(name)}
        if not found:
            return None
        errors = SquaredErrors(*(found[name] for name in SquaredErrors._fields))
        return cls(found["latents"], found["labels"], errors)


def is_probed(name: str) -> bool:
    """Return whether a tensor's name is of `ProbedBatch.tensors`."""
    return name.startswith(_PREFIX)


_PREFIX = "probed."


class ProbeResults(NamedTuple):
    """Probes of a tokenizer."""

    images: int
    """Probed images."""
    classes: int
    """Classes that the variance of the velocity is a mean over: those with enough images."""
    latents: LatentProbes
    equivariance: EquivarianceErrors


def probe_results(batch: ProbedBatch, config: LatentProbesConfig, classes: int) -> ProbeResults:
    """Compute the probes of a set.

    Args:
        batch: the probed images of its parts, in order; each part may have as many of a class as the set.
        config: numbers of classes and of images of each.
        classes: number of classes of the images; 0 makes one of all.
    """
    kept = ProbedImages(config, classes).take(batch.labels)
    labels = batch.labels[kept]
    groups = [(labels == label).nonzero().flatten() for label in labels.unique()]
    whole = [group for group in groups if len(group) == config.images_per_class]
    if not whole:
        _log.warning(
            "no variance of the velocity: no class has %s held-out images (evaluate.latent_probes.images_per_class)",
            f"{config.images_per_class:,}",
        )
    errors = SquaredErrors(*(error[kept] for error in batch.errors))
    probes = probe_latents(batch.latents[kept], whole)
    return ProbeResults(len(kept), len(whole), probes, equivariance_errors(errors))
