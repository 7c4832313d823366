"""Height and width, written as one number where they are the same."""

from typing import Any


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else size


def as_one_number(size: Any) -> Any:
    """One number in place of two that are the same, so that both have one digest; anything else as it is."""
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        return size[0]
    return size


def describe_size(size: int | tuple[int, int]) -> str:
    """A size for people: `256`, or `32 x 64`, height first."""
    return str(size) if isinstance(size, int) else f"{size[0]} x {size[1]}"
