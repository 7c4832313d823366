"""Images that somebody asks for: classes and seeds."""

from collections.abc import Sequence
from typing import NamedTuple

from vavae.errors import UserError


class SampleRequest(NamedTuple):
    """Images of every class with every seed, class after class."""

    classes: Sequence[int]
    """Labels of the classes."""
    seeds: Sequence[int]
    """Indices of the noise: sample i of a run has noise i."""

    @property
    def labels(self) -> list[int]:
        """Label of each image."""
        return [label for label in self.classes for _ in self.seeds]

    @property
    def indices(self) -> list[int]:
        """Index of the noise of each image."""
        return [seed for _ in self.classes for seed in self.seeds]


def parse_seeds(text: str) -> list[int]:
    """Parse `0-9`, `3`, or several of such, separated by commas.

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
