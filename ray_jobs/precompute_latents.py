"""Image shards → latent shards and their statistics: ``python -m ray_jobs.precompute_latents --config FILE``."""

import sys
from functools import partial

from ray_jobs.runtime.actor_pool import Work, work_through
from ray_jobs.runtime.command import main
from ray_jobs.runtime.progress_actor import ProgressActor
from ray_jobs.runtime.resources import Resources
from vavae.distributed.world import World
from vavae.interop.export import load_exported_tokenizer
from vavae.latents.encoding import place_tokenizer
from vavae.latents.extract import Extraction, LatentShardRecord, ShardTask
from vavae.runs.extraction_inputs import ExtractionInputs
from vavae.runs.run import Run


def work(run: Run) -> None:
    """Encode every shard that has no latents yet, then commit the whole."""
    inputs, latents = ExtractionInputs.of(run), run.config.latents
    extraction = Extraction.of(inputs)
    resources = Resources.of(run.config.workers, latents.cpus, latents.gpus)
    tasks, images, make_work = extraction.tasks(), extraction.images, partial(_make_work, inputs)
    records = work_through(
        run, "precompute_latents", make_work, tasks, images, latents.actors, resources, items_of_an_actor=2
    )
    inputs.output.commit(*extraction.finish(inputs.config.latent_shape, records))


def _make_work(inputs: ExtractionInputs) -> Work[ShardTask, LatentShardRecord]:
    extraction, device = Extraction.of(inputs), World.current(inputs.config.workers.use_gpu).device
    tokenizer, _ = load_exported_tokenizer(inputs.tokenizer.folder)
    place_tokenizer(tokenizer, inputs.config, device)

    def do(task: ShardTask, progress: ProgressActor) -> LatentShardRecord:
        return extraction.encode(task, tokenizer, device, progress.advance)

    return do


if __name__ == "__main__":
    sys.exit(main("precompute_latents", "Encode image shards with the trained tokenizer.", work))
