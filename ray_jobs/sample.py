"""Both exports → generated images: ``python -m ray_jobs.sample --config FILE``."""

import sys

from ray_jobs._command import main
from ray_jobs._pool import Advance, Work, work_through
from vavae.config import digest
from vavae.distributed.world import World
from vavae.report.results import write_samples_picture
from vavae.sampling.generate import Generator
from vavae.sampling.sample_shards import SampleSet
from vavae.storage.artefact import commit
from vavae.training.run import Run


def work(run: Run) -> None:
    """Generate every shard of images that is missing, then the picture."""
    samples, config = _samples(run), run.config.sample
    work_through(run, "sample", _make_work, samples.shards(), config.images, config.actors)
    files = samples.files()
    content = digest({name: info.sha256 for name, info in files.items()})
    beside = write_samples_picture(run)
    commit(run.storage, run.prefix("sample"), run.record("sample", content, files, beside=beside))


def _samples(run: Run) -> SampleSet:
    config = run.config
    origin = digest({"config": run.identity("sample"), "inputs": run.inputs("sample")})
    storage = run.storage.child(run.prefix("sample"))
    return SampleSet(storage, config.sample, config.seed, config.guidance, config.solver, origin)


def _make_work(run: Run) -> Work:
    samples = _samples(run)
    generator = Generator.load(
        run.storage.child(run.prefix("train_vavae")),
        run.require("train_vavae").digest,
        run.storage.child(run.prefix("precompute_latents")),
        run.storage.child(run.prefix("train_lightningdit")),
        World.current(run.config.workers.use_gpu).device,
    )

    def do(shard: int, advance: Advance) -> None:
        samples.generate(shard, generator, advance)

    return do


if __name__ == "__main__":
    sys.exit(main("sample", "Generate a class-balanced set of images.", work))
