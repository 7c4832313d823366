"""Files of generated images: a WebDataset shard, one array, a picture; and the images that are asked for."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

from vavae.data.ahead import map_ahead
from vavae.data.image import png_bytes
from vavae.data.pixels import encode_png, enlargement, image_grid
from vavae.data.shards.tar import write_tar
from vavae.errors import UserError
from vavae.runs.files import NPZ, SAMPLES
from vavae.sampling.request import SampleRequest
from vavae.sampling.sample_shards import SampleSet
from vavae.storage.storage import Storage

PICTURE_ROWS = 20
"""Most classes that are a row each in a picture."""
_PICTURE_IMAGES = 10_000


Writer = Callable[[Path, SampleRequest, Iterable[Tensor]], None]
"""Writes batches of images, uint8 [B, 3, H, W] each, into a local file."""


def writer_of(out: str, images: int) -> Writer:
    """Writer of the kind of file that a name asks for.

    Args:
        out: path or URL: .png for a picture with a class a row, .tar for a shard, .npz for one array.
        images: how many there are to write.

    Raises:
        UserError: there is no such kind of file, or it can't hold so many images.
    """
    writers: dict[str, Writer] = {".png": write_picture, ".tar": write_shard, ".npz": write_array}
    kind = PurePosixPath(out).suffix
    if kind not in writers:
        raise UserError(f"--out={out}: name a file that ends in {', '.join(writers)}")
    if kind == ".png" and images > _PICTURE_IMAGES:
        raise UserError(f"--out={out}: {images:,} images are too many for one picture; take .tar or .npz")
    return writers[kind]


def write_picture(path: Path, request: SampleRequest, batches: Iterable[Tensor]) -> None:
    """Write images into a PNG file with a class a row, those of one seed into a square; see :func:`write_shard`."""
    images, columns = torch.cat(list(batches)), len(request.seeds)
    if columns == 1:
        columns = math.isqrt(len(images) - 1) + 1
    picture = image_grid(images, columns, scale=enlargement(images.shape[-2:]))
    path.write_bytes(png_bytes(picture))


def write_shard(path: Path, request: SampleRequest, batches: Iterable[Tensor]) -> None:
    """Write images into a WebDataset shard: `png`, `cls`, and the seed in `json`; each batch while the next is made.

    Args:
        path: local file.
        request: classes and seeds of the images.
        batches: all images, uint8 or uint16 [B, C, H, W] each.
    """
    labels, seeds = request.labels, request.indices
    encoded = map_ahead(lambda batch: [encode_png(image) for image in batch], batches, ahead=1)
    with write_tar(path) as tar:
        for png in chain.from_iterable(encoded):
            seed = json.dumps({"seed": seeds[tar.count]}).encode()
            tar.add(tar.count, {"png": png, "cls": b"%d" % labels[tar.count], "json": seed})


def write_array(path: Path, request: SampleRequest, batches: Iterable[Tensor]) -> None:
    """Write images as the evaluator of ADM reads them; arguments as of :func:`write_shard`."""
    images = (image.permute(1, 2, 0).numpy() for batch in batches for image in batch)
    write_npz(path, images, len(request.indices))


def write_npz(path: Path, images: Iterable[np.ndarray], count: int) -> None:
    """Write images uint8 or uint16 [H, W, C] as `arr_0` [N, H, W, C], holding one of them at a time.

    Args:
        path: local file.
        images: all of one size, at least one.
        count: N, which comes first in the file.
    """
    written = 0
    # An entry of NumPy's own would hold the array as a whole; its time would change the file.
    with ZipFile(path, "w") as archive, archive.open(ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
        for image in images:
            if not written:
                header = {
                    "descr": np.lib.format.dtype_to_descr(image.dtype),
                    "fortran_order": False,
                    "shape": (count, *image.shape),
                }
                np.lib.format.write_array_header_1_0(member, header)
            member.write(image.tobytes())
            written += 1
    assert written == count, f"{written} images came where {count} were announced"


def write_sample_files(samples: SampleSet, run: Storage) -> dict[str, int]:
    """Draw the picture of a complete set of samples, and write its array where the configuration asks for it.

    Args:
        samples: the set, all shards of which are done.
        run: folder of the run.

    Returns:
        Size of each file by its name, bytes.
    """
    config = samples.config
    rows = picture_rows([samples.label(index) for index in range(config.images)], config.picture_columns)
    pixels = samples.images([index for row in rows for index in row])
    run.write_bytes(SAMPLES, png_bytes(image_grid(pixels, len(rows[0]), scale=enlargement(pixels.shape[-2:]))))
    run.delete(NPZ)  # of other images, where it is not asked for
    if config.npz:
        with run.create(NPZ) as local:
            write_npz(local, samples.pixels(), config.images)
    return {name: run.size(name) for name in (SAMPLES, *([NPZ] if config.npz else []))}


def picture_rows(labels: Sequence[int], columns: int) -> list[list[int]]:
    """Indices of the images in a picture, in rows of one length: a class a row, the lowest labels that occur.

    Images of one label alone, as those without classes are, fill as many rows as columns, as far as they go; so does
    the first image of each class where there are too many classes for rows of their own.
    """
    shown = sorted({*labels})
    if len(shown) == 1 or len(shown) > PICTURE_ROWS:
        square = range(len(labels)) if len(shown) == 1 else [labels.index(each) for each in shown]
        rows = [[*square[start : start + columns]] for start in range(0, len(square), columns)][:columns]
        return [row for row in rows if len(row) == len(rows[0])]
    rows = [[index for index, label in enumerate(labels) if label == each][:columns] for each in shown]
    length = min(map(len, rows))
    return [row[:length] for row in rows]
