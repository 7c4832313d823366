"""A set of images is measured in parts, each a file of tensors when it is done, so that actors can share the work."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from vavae.metrics.inception_score import SPLIT_IMAGES
from vavae.metrics.summary import FeatureSummary, Summaries
from vavae.storage.storage import Storage

SetName = Literal["held_out", "train", "file", "reconstructions", "samples"]
"""Real images (held-out ones, training images, those of a reference file) and our own."""

Tensors = dict[str, Tensor]

_MOST_PARTS = 64
"""Of a set that is not cut into splits of the Inception score."""


class Part(NamedTuple):
    """Some images of a set, whatever the number of actors."""

    of: SetName
    span: range


def spans(of: SetName, count: int) -> list[range]:
    """A set of so many images in parts: each a split of the Inception score, or some of real images, which have none.

    A part is a file of up to 100 MB, and ImageNet's training images would be 257 of them.
    """
    splits = 1 if of == "samples" else max(1, math.ceil(count / (_MOST_PARTS * SPLIT_IMAGES)))
    size = splits * SPLIT_IMAGES
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class PartFiles:
    """The parts of one set on storage, and the whole once they have been joined.

    Args:
        storage: of the run.
        folder: for the parts; named by a digest of all that they are a function of.
        spans: of all parts.
    """

    def __init__(self, storage: Storage, folder: str, spans: list[range]) -> None:
        self._storage, self._folder, self._spans = storage, folder, spans

    def missing(self) -> list[range]:
        """Spans of the parts that are not there."""
        if self._storage.is_file(self.whole):
            return []
        there = {path.rpartition("/")[2] for path in self._storage.list(self._folder)}
        return [span for span in self._spans if self._name(span) not in there]

    def write(self, span: range, tensors: Mapping[str, Tensor]) -> None:
        """Put one part."""
        self._storage.write_bytes(f"{self._folder}/{self._name(span)}", _bytes(tensors))

    def read(self) -> Iterator[Tensors]:
        """All parts, in order."""
        for span in self._spans:
            yield load(self._storage.read_bytes(f"{self._folder}/{self._name(span)}"))

    def join(self, joined: Callable[[Iterator[Tensors]], Tensors]) -> Tensors:
        """The whole, which is made of the parts the first time and takes their place."""
        if not self._storage.is_file(self.whole):
            self._storage.write_bytes(self.whole, _bytes(joined(self.read())))
            self.delete()
        return load(self._storage.read_bytes(self.whole))

    def delete(self) -> None:
        """Drop the parts."""
        self._storage.delete(self._folder)

    @property
    def whole(self) -> str:
        """Path of the whole."""
        return f"{self._folder}.safetensors"

    def _name(self, span: range) -> str:
        return f"{span.start:09d}.safetensors"


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def pack(summaries: Summaries) -> Tensors:
    """Summaries as tensors, whose names begin with the extractor's."""
    return {
        f"{extractor}/{name}": tensor
        for extractor, summary in summaries.items()
        for name, tensor in summary.tensors().items()
    }


def unpack(tensors: Mapping[str, Tensor]) -> Summaries:
    """The inverse of :func:`pack`; other tensors, whose names have no extractor, are passed over."""
    found: dict[str, Tensors] = {}
    for path, tensor in tensors.items():
        extractor, slash, name = path.partition("/")
        if slash:
            found.setdefault(extractor, {})[name] = tensor
    return {extractor: FeatureSummary.from_tensors(named) for extractor, named in found.items()}


def concatenate(parts: Iterator[Tensors]) -> Tensors:
    """Tensors of every image, by name, one after the other."""
    lists: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in part.items():
            lists.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in lists.items()}
