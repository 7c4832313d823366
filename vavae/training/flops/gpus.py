"""Peak rates of GPUs by name, from NVIDIA's data sheets without sparsity; without torch."""

import difflib
import re
from typing import NamedTuple

from vavae.errors import UserError


class Gpu(NamedTuple):
    """One GPU; rates in FLOP/s."""

    bf16: float
    tf32: float
    fp32: float
    memory_bytes: float
    link: float
    """Bytes/s to the other GPUs of its node, in one direction: NVLink, or PCI Express where there is none."""


_TERA, _GIGA = 1e12, 1e9

GPUS: dict[str, Gpu] = {
    name: Gpu(bf16 * _TERA, tf32 * _TERA, fp32 * _TERA, memory * _GIGA, link * _GIGA)
    for name, (bf16, tf32, fp32, memory, link) in {
        "B200":      (2250.0, 1100.0, 75.0, 180, 900),
        "H200":      (989.4, 494.7, 66.9, 141, 450),
        "H100":      (989.4, 494.7, 66.9,  80, 450),
        "H800":      (989.4, 494.7, 66.9,  80, 200),
        "A100-40GB": (312.0, 156.0, 19.5,  40, 300),
        "A100":      (312.0, 156.0, 19.5,  80, 300),
        "L40S":      (362.0, 183.0, 91.6,  48,  32),
        "L4":        (121.0,  60.5, 30.3,  24,  32),
        "A10G":      ( 70.0,  35.0, 31.5,  24,  32),
    }.items()
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """Look up a GPU of `GPUS` by name, in capitals or not.

    Raises:
        UserError: there is none of that name.
    """
    if name.upper() in GPUS:
        return GPUS[name.upper()]
    near = difflib.get_close_matches(name.upper(), GPUS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"GPU {name!r} is not known; {hint}there are {', '.join(GPUS)}")


def gpu_of_device(device_name: str) -> Gpu | None:
    """Look up a GPU by its name in CUDA, as in `NVIDIA H100 80GB HBM3`; None where it is not in `GPUS`."""
    words = set(re.split(r"[\s-]+", device_name.upper()))
    return next((gpu for name, gpu in GPUS.items() if set(name.split("-")) <= words), None)
