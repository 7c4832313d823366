"""Both exports → generated images: ``python -m ray_jobs.sample --config FILE``."""

import sys

from ray_jobs.runtime.actor_pool import Advance, Work, work_through
from ray_jobs.runtime.command import main
from vavae.config import digest
from vavae.distributed.world import World
from vavae.runs.run import Run
from vavae.sampling.inputs import open_sampler, sample_set
from vavae.sampling.sample_files import write_sample_files
from vavae.storage.artifact import commit


def work(run: Run) -> None:
    """Generate every shard of images that is missing, then the files beside them."""
    samples, config = sample_set(run), run.config.sample
    work_through(run, "sample", _make_work, samples.shards(), config.images, config.actors)
    files = samples.files()
    content = digest({name: info.sha256 for name, info in files.items()})
    beside = write_sample_files(run)
    commit(run.storage, run.prefix("sample"), run.record("sample", content, files, beside=beside))


def _make_work(run: Run) -> Work:
    samples = sample_set(run)
    generator = open_sampler(run, World.current(run.config.workers.use_gpu).device)

    def do(shard: int, advance: Advance) -> None:
        samples.generate(shard, generator, advance)

    return do


if __name__ == "__main__":
    sys.exit(main("sample", "Generate the images of a configuration.", work))
