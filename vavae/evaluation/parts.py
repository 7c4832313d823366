"""Parts of a set of images: each becomes a file of tensors once it is evaluated, so that actors can share the work."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from vavae.metrics.features import FeatureSummary, Summaries
from vavae.metrics.inception_score import SPLIT_IMAGES
from vavae.storage.storage import Storage

SetName = Literal["held_out", "train", "file", "real", "probe", "reconstructions", "samples"]
"""Sets of images: real ones (held-out, of training, of a reference file, those whose distance divides that of generated
ones, those that a linear probe is fitted to), reconstructions and samples."""

Tensors = dict[str, Tensor]
"""Tensors of a part by name: metrics of its images [B] and pictures, and "extractor/sum" for features."""

_MAX_PARTS = 64
"""Limit for sets that are not cut into splits of the Inception score."""


class Part(NamedTuple):
    """Some images of a set; the same whatever the number of actors."""

    set_name: SetName
    span: range
    """Indices of the images in the set."""


def spans(set_name: SetName, count: int) -> list[range]:
    """Cut a set into spans: each a split of the Inception score, or several of real images, which have no score.

    A part is a file of up to 100 MB, and ImageNet's training images would be 257 of them.

    Args:
        set_name: the set.
        count: number of its images.
    """
    splits = 1 if set_name == "samples" else max(1, math.ceil(count / (_MAX_PARTS * SPLIT_IMAGES)))
    size = splits * SPLIT_IMAGES
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class PartFiles:
    """Files of the parts of one set, and the whole once they have been joined.

    Args:
        storage: folder of the run.
        folder: folder of the parts, named by a digest of all that they are a function of.
        spans: spans of all parts.
    """

    def __init__(self, storage: Storage, folder: str, spans: list[range]) -> None:
        self._storage, self._folder, self._spans = storage, folder, spans

    def missing(self) -> list[range]:
        """Spans of the parts that have no file."""
        if self._storage.is_file(self.whole):
            return []
        there = {path.rpartition("/")[2] for path in self._storage.list(self._folder)}
        return [span for span in self._spans if self._name(span) not in there]

    def write(self, span: range, tensors: Mapping[str, Tensor]) -> None:
        """Write the file of one part."""
        self._storage.write_bytes(f"{self._folder}/{self._name(span)}", _to_bytes(tensors))

    def read(self) -> Iterator[Tensors]:
        """Read all parts, in order."""
        for span in self._spans:
            yield load(self._storage.read_bytes(f"{self._folder}/{self._name(span)}"))

    def join(self, joined: Callable[[Iterator[Tensors]], Tensors]) -> Tensors:
        """Read the whole, which is made of the parts the first time and takes their place.

        Args:
            joined: makes the whole of the parts.
        """
        if not self._storage.is_file(self.whole):
            self._storage.write_bytes(self.whole, _to_bytes(joined(self.read())))
            self._storage.delete(self._folder)
        return load(self._storage.read_bytes(self.whole))

    @property
    def whole(self) -> str:
        """Path of the file of the whole."""
        return f"{self._folder}.safetensors"

    def _name(self, span: range) -> str:
        return f"{span.start:09d}.safetensors"


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def pack(summaries: Summaries) -> Tensors:
    """Flatten summaries to tensors whose names begin with the extractor's."""
    return {
        f"{extractor}/{name}": tensor
        for extractor, summary in summaries.items()
        for name, tensor in summary.tensors().items()
    }


def unpack(tensors: Mapping[str, Tensor]) -> Summaries:
    """Restore summaries from :func:`pack`; other tensors, whose names have no extractor, are passed over."""
    found: dict[str, Tensors] = {}
    for path, tensor in tensors.items():
        extractor, slash, name = path.partition("/")
        if slash:
            found.setdefault(extractor, {})[name] = tensor
    return {extractor: FeatureSummary.from_tensors(named) for extractor, named in found.items()}


def concatenate(parts: Iterator[Tensors]) -> Tensors:
    """Concatenate the tensors of parts by name."""
    lists: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in part.items():
            lists.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in lists.items()}
