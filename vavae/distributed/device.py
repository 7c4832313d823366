"""The device that somebody asks for."""

import torch

from vavae.errors import UserError


def choose_device(asked: torch.device | str | None = None) -> torch.device:
    """Return a device that there is.

    Args:
        asked: the device or its name, such as `cuda:1`; None takes a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without GPUs
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"device={asked}: no such device here ({reason}): leave it out, or take cpu") from None
