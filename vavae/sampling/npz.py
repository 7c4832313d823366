"""Generated images as one array in a file, which the evaluator of ADM (guided-diffusion) reads."""

from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import numpy as np


def write_npz(path: Path, images: Iterable[np.ndarray], count: int) -> None:
    """Write images uint8 [H, W, 3] as `arr_0` uint8 [N, H, W, 3], holding one of them at a time.

    Args:
        path: a local file.
        images: all of one size, at least one.
        count: how many there will be, for that comes first in the file.
    """
    written = 0
    # An entry of NumPy's own would hold the array as a whole; its time would change the file.
    with ZipFile(path, "w") as archive, archive.open(ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
        for image in images:
            if not written:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *image.shape)}
                np.lib.format.write_array_header_1_0(member, header)
            member.write(image.tobytes())
            written += 1
    assert written == count, f"{written} images came where {count} were announced"
