"""What is put beside a run's shards of generated images: a picture, and one file of all of them."""

from collections.abc import Sequence

from vavae.data.grid import enlargement, image_grid, png_bytes
from vavae.runs.files import NPZ, SAMPLES
from vavae.runs.run import Run
from vavae.sampling.inputs import sample_set
from vavae.sampling.npz import write_npz

_PICTURE_CLASSES = 20


def write_sample_files(run: Run) -> dict[str, int]:
    """Draw the picture, and write the array where the configuration asks for it, once all shards are done.

    Returns:
        Name and size of each file.
    """
    samples, config, storage = sample_set(run), run.config.sample, run.storage
    rows = picture_rows([samples.label(index) for index in range(config.images)], config.picture_columns)
    pixels = samples.images([index for row in rows for index in row])
    storage.write_bytes(SAMPLES, png_bytes(image_grid(pixels, len(rows[0]), scale=enlargement(pixels.shape[-1]))))
    storage.delete(NPZ)  # of other images, where it is not asked for
    if config.npz:
        with storage.create(NPZ) as local:
            write_npz(local, samples.pixels(), config.images)
    return {name: storage.size(name) for name in (SAMPLES, *([NPZ] if config.npz else []))}


def picture_rows(labels: Sequence[int], columns: int) -> list[list[int]]:
    """Indices of the images in a picture: a class a row, the lowest labels that occur, rows of one length."""
    rows = [
        [index for index, label in enumerate(labels) if label == shown][:columns]
        for shown in sorted({*labels})[:_PICTURE_CLASSES]
    ]
    length = min(map(len, rows))
    return [row[:length] for row in rows]
