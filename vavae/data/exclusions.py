"""Files and images that a set of shards leaves out, counted and named by the reason."""

from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

EXAMPLES = 5


class Exclusion(BaseModel):
    """Files or images that are left out for one reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str
    """The reason and what it is about, such as `files of .heic, which nothing here decodes`."""
    count: int
    examples: tuple[str, ...]
    """Names of the first ones."""

    def __str__(self) -> str:
        return f"{self.count:,} {self.reason}, such as {self.examples[0]}"


def exclusion(reason: str, names: Sequence[str]) -> list[Exclusion]:
    """The exclusion of some names for a reason; none where there are no names."""
    return [Exclusion(reason=reason, count=len(names), examples=tuple(names[:EXAMPLES]))] if names else []


def exclusions(names: Mapping[str, Sequence[str]]) -> list[Exclusion]:
    """Exclusions of names by their reasons, in the order of the reasons."""
    return [found for reason in sorted(names) for found in exclusion(reason, names[reason])]


def in_words(excluded: Iterable[Exclusion]) -> str:
    """One line on all that is left out; empty where nothing is."""
    return "; ".join(map(str, excluded))
