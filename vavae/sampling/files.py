"""Images of given classes and seeds in one file, and how they are asked for."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vavae.data.shards.tar import write_tar
from vavae.errors import UserError
from vavae.sampling.npz import write_npz
from vavae.sampling.sample_shards import add_image


class Wanted(NamedTuple):
    """Every class with every seed, class after class."""

    classes: Sequence[int]
    """Their labels."""
    seeds: Sequence[int]
    """Numbers of noises: image i of a run's samples has noise i."""

    @property
    def labels(self) -> list[int]:
        """Label of each image."""
        return [label for label in self.classes for _ in self.seeds]

    @property
    def indices(self) -> list[int]:
        """Number of the noise of each image."""
        return [seed for _ in self.classes for seed in self.seeds]


def parse_seeds(text: str) -> list[int]:
    """`0-9`, `3`, or several of such, separated by commas.

    Raises:
        UserError: it is none of this.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = [first, last if dash else first]
        if not all(end.isascii() and end.isdecimal() for end in ends) or int(ends[0]) > int(ends[1]):
            raise UserError(f"--seeds={text}: {part!r} is no number and no ascending range, such as 7 or 0-9")
        seeds += range(int(ends[0]), int(ends[1]) + 1)
    return seeds


def write_shard(path: Path, wanted: Wanted, batches: Iterable[Tensor]) -> None:
    """Write images into a WebDataset shard: `png`, `cls`, and the seed in `json`.

    Args:
        path: a local file.
        wanted: what the images are.
        batches: uint8 [B, 3, H, W], as many as are wanted.
    """
    labels, seeds = wanted.labels, wanted.indices
    with write_tar(path) as tar:
        for batch in batches:
            for image in batch:
                seed = json.dumps({"seed": seeds[tar.count]}).encode()
                add_image(tar, tar.count, labels[tar.count], image, json=seed)


def write_array(path: Path, wanted: Wanted, batches: Iterable[Tensor]) -> None:
    """Write images as the evaluator of ADM reads them; arguments as of :func:`write_shard`."""
    images = (image.permute(1, 2, 0).numpy() for batch in batches for image in batch)
    write_npz(path, images, len(wanted.indices))
