"""What ``vavae sample`` does: images of given classes from a trained run, in this process, into one file."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from vavae.data.grid import enlargement, image_grid, png_bytes
from vavae.distributed.torch_settings import configure_torch
from vavae.errors import UserError
from vavae.latents.manifest import read_latent_manifest
from vavae.progress import Progress, Rate, show
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.files import SampleRequest, parse_seeds, write_array, write_shard
from vavae.sampling.labels import find_classes
from vavae.sampling.sampler import Sampler

_PICTURE_IMAGES = 10_000

Writer = Callable[[Path, SampleRequest, Iterable[Tensor]], None]
"""Writes batches of images, uint8 [B, 3, H, W], into a local file."""


def sample(inputs: SamplingInputs, classes: str, seeds: str, out: str) -> None:
    """Generate an image of every class with every seed.

    Args:
        inputs: those of a trained run.
        classes: names or numbers, separated by commas.
        seeds: such as `0-9`.
        out: path or URL of a file: .png for a picture with a class a row, .tar for a shard, .npz for one array.

    Raises:
        UserError: there is no such class, seed or kind of file, or a model is missing.
    """
    config, names = inputs.config, [name.strip() for name in classes.split(",")]
    known = read_latent_manifest(inputs.latents.folder).classes
    request = SampleRequest(find_classes(names, known, "--classes"), parse_seeds(seeds))
    write = _writer(out, len(request.indices))
    # Nothing else runs here, so the threads are not those of one worker among many.
    configure_torch(config.workers.model_copy(update={"threads": torch.get_num_threads()}))
    batches = Sampler.load(inputs).batches(
        request.indices, request.labels, config.seed, config.guidance, config.solver, config.sample.batch_size
    )
    folder, slash, name = out.rpartition("/")
    with inputs.output.run.at(folder or slash or ".").create(name) as local:
        write(local, request, _shown(batches, len(request.indices)))
    of = f"{len(request.classes)} classes with {len(request.seeds)} seeds"
    print(f"{out}: {of}, {config.solver.summary}, {config.guidance.summary}")


def _writer(out: str, images: int) -> Writer:
    """What writes a file of this name.

    Raises:
        UserError: there is no such kind of file, or it can't hold so many images.
    """
    writers: dict[str, Writer] = {".png": _write_picture, ".tar": write_shard, ".npz": write_array}
    kind = PurePosixPath(out).suffix
    if kind not in writers:
        raise UserError(f"--out={out}: name a file that ends in {', '.join(writers)}")
    if kind == ".png" and images > _PICTURE_IMAGES:
        raise UserError(f"--out={out}: {images:,} images are too many for one picture; take .tar or .npz")
    return writers[kind]


def _write_picture(path: Path, request: SampleRequest, batches: Iterable[Tensor]) -> None:
    images = torch.cat(list(batches))
    picture = image_grid(images, len(request.seeds), scale=enlargement(images.shape[-1]))
    path.write_bytes(png_bytes(picture))


def _shown(batches: Iterable[Tensor], total: int) -> Iterator[Tensor]:
    """The batches, with a line of progress for each."""
    rate, done = Rate(), 0
    rate.update(done)
    for batch in batches:
        done += len(batch)
        show(Progress("sample", done, total, rate=rate.update(done)))
        yield batch
