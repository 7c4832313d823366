"""Numbers at a boundary: what is not finite is refused by name, or written as no number."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vavae.errors import UserError

if TYPE_CHECKING:  # rows of figures need no torch, which takes seconds to import
    from torch import Tensor


def finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Put None, which files hold as null, in place of each figure of a row that is not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def require_finite(tensors: Mapping[str, "Tensor"], place: str, remedy: str) -> None:
    """Refuse tensors with a value that is not finite.

    Args:
        tensors: tensors of any type and device by name.
        place: file or network that holds them, for the error.
        remedy: how to mend it, for the error.

    Raises:
        UserError: one of them holds such a value.
    """
    for name, tensor in tensors.items():
        found = _first_not_finite(tensor)
        if found is not None:
            raise UserError(f"{place}: {name}{found}: {remedy}")


def require_finite_images(flags: "Tensor", image: str, first: int, what: str) -> None:
    """Refuse a set of images where something that was made of one of them is not finite.

    Args:
        flags: whether it is finite, bool [N].
        image: word for one of them, such as "sample".
        first: index of the first.
        what: what was made of it and how to mend that, for the error.

    Raises:
        UserError: a flag is not set.
    """
    bad = flags.logical_not().nonzero().flatten().tolist()
    if bad:
        others = f" (the first of {len(bad):,} such)" if len(bad) > 1 else ""
        raise UserError(f"{image} {first + bad[0]}{others}: {what}")


def _first_not_finite(tensor: "Tensor") -> str | None:
    """Place and value of the first value that is not finite, such as `[3, 0] is nan`; None where there is none."""
    if not tensor.is_floating_point():
        return None
    if tensor.itemsize == 1:  # torch has no sums of eight-bit floats
        tensor = tensor.float()
    # A sum takes no memory, and all values are finite where it is; where it is not it may have overflowed.
    if tensor.sum().isfinite():
        return None
    places = tensor.isfinite().logical_not().nonzero()
    if not len(places):
        return None
    first = places[0].tolist()
    others = f" (the first of {len(places):,} values that are not finite)" if len(places) > 1 else ""
    return f"{first if first else ''} is {tensor[tuple(first)].item():g}{others}"
