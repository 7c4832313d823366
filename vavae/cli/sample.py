"""``vavae sample``: images of given classes from a trained run, made in this process, into one file."""

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from vavae.cli.arguments import add_overrides
from vavae.progress import Progress, Rate, display

if TYPE_CHECKING:
    from torch import Tensor


def add_commands(commands: Any) -> None:
    """Add ``vavae sample``; ``act`` of its arguments returns the exit status."""
    sample = commands.add_parser("sample", help="make images of given classes from a trained run")
    sample.add_argument(
        "--run", required=True, metavar="FOLDER", help="path or URL of the folder of the run, or hf-hub:owner/name"
    )
    sample.add_argument(
        "--classes", metavar="LIST", help="names or numbers, such as 207,360; needed where there are any"
    )
    sample.add_argument(
        "--seeds",
        required=True,
        metavar="LIST",
        help="such as 0-9 or 0,3,8: every class with each; seed i gives the noise of image i of the run's samples",
    )
    sample.add_argument("--guidance", metavar="SCALE", help="short for guidance.scale=SCALE; default: the run's")
    sample.add_argument(
        "--out",
        default="samples.png",
        metavar="FILE",
        help="path or URL ending in .png (a class a row; a square of one seed), .tar (WebDataset) or .npz (one array); "
        "default: %(default)s",
    )
    add_overrides(sample)
    sample.set_defaults(act=_sample)


def _sample(arguments: argparse.Namespace) -> int:
    import torch

    from vavae.distributed.torch_settings import configure_torch
    from vavae.latents.manifest import read_latent_manifest
    from vavae.runs.sampling_inputs import SamplingInputs
    from vavae.sampling.files import writer_of
    from vavae.sampling.labels import wanted_labels
    from vavae.sampling.request import SampleRequest, parse_seeds
    from vavae.sampling.sampler import Sampler

    guidance = [] if arguments.guidance is None else [f"guidance.scale={arguments.guidance}"]
    inputs = SamplingInputs.at(arguments.run, [*arguments.overrides, *guidance])
    config, known = inputs.config, read_latent_manifest(inputs.latents.folder).classes
    names = None if arguments.classes is None else [name.strip() for name in arguments.classes.split(",")]
    request = SampleRequest(wanted_labels(names, known, "--classes"), parse_seeds(arguments.seeds))
    out, count = arguments.out, len(request.indices)
    write = writer_of(out, count)
    # Nothing else runs here, so the threads are not those of one worker among many.
    configure_torch(config.workers.model_copy(update={"threads": torch.get_num_threads()}))
    batches = Sampler.load(inputs).generate(request)
    folder, slash, name = out.rpartition("/")
    with inputs.output.run.at(folder or slash or ".").create(name) as local:
        write(local, request, _with_progress(batches, count))
    made = f"{len(request.classes)} classes with {len(request.seeds)} seeds" if known else f"{count} images"
    made += config.sample.weights_in_words
    print(f"{out}: {made}, {config.solver.summary}, {config.guidance.summary}")
    return 0


def _with_progress(batches: Iterable["Tensor"], total: int) -> Iterator["Tensor"]:
    """Yield the batches, and show the progress."""
    rate, done = Rate(), 0
    rate.update(done)
    with display("sample") as show:
        for batch in batches:
            done += len(batch)
            show(Progress("sample", done, total, rate=rate.update(done)))
            yield batch
