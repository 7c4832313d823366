"""Both exports → generated images: ``python -m ray_jobs.sample --config FILE``."""

import sys
from functools import partial

from ray_jobs.runtime.actor_pool import Work, work_through
from ray_jobs.runtime.command import main
from ray_jobs.runtime.progress_actor import ProgressActor
from vavae.config import digest
from vavae.distributed.world import World
from vavae.runs.run import Run
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.sampling.files import write_sample_files
from vavae.sampling.sample_shards import SampleSet, SampleShardRecord
from vavae.sampling.sampler import Sampler


def work(run: Run) -> None:
    """Generate every shard of samples that is missing, then the files beside them."""
    inputs, config = SamplingInputs.of(run), run.config.sample
    samples = SampleSet.of(inputs)
    make_work, shards = partial(_make_work, inputs), samples.shards()
    records = work_through(run, "sample", make_work, shards, config.images, config.actors, items_of_an_actor=2)
    files = samples.files(records)
    content = digest({name: info.sha256 for name, info in files.items()})
    inputs.output.commit(content, files, beside={**write_sample_files(samples, run.storage)})


def _make_work(inputs: SamplingInputs) -> Work[int, SampleShardRecord]:
    samples = SampleSet.of(inputs)
    sampler = Sampler.load(inputs, World.current(inputs.config.workers.use_gpu).device)

    def do(shard: int, progress: ProgressActor) -> SampleShardRecord:
        return samples.generate(shard, sampler, progress.advance)

    return do


if __name__ == "__main__":
    sys.exit(main("sample", "Generate the images of a configuration.", work))
