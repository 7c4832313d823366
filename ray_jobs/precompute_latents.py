"""Image shards → latent shards and their statistics: ``python -m ray_jobs.precompute_latents --config FILE``."""

import sys

from ray_jobs.runtime.actor_pool import Advance, Resources, Work, work_through
from ray_jobs.runtime.command import main
from vavae.data.shards.manifest import read_manifest
from vavae.distributed.world import World
from vavae.interop.export import load_tokenizer
from vavae.latents.extract import Extraction, ShardTask
from vavae.runs.run import Run
from vavae.storage.artifact import commit


def work(run: Run) -> None:
    """Encode every shard that has no latents yet, then commit the whole."""
    extraction = _extraction(run)
    tasks = extraction.tasks()
    config, latents = run.config, run.config.latents
    resources = Resources.of(config.workers, latents.cpus, latents.gpus)
    work_through(run, "precompute_latents", _make_work, tasks, extraction.images, latents.actors, resources)
    content, files = extraction.finish((config.tokenizer.latent_dim, config.grid, config.grid))
    commit(run.storage, run.prefix("precompute_latents"), run.record("precompute_latents", content, files))


def _extraction(run: Run) -> Extraction:
    images, latents = run.prefix("prepare_shards"), run.prefix("precompute_latents")
    return Extraction(
        run.storage.child(images),
        read_manifest(run.storage, images),
        run.storage.child(latents),
        run.require("train_vavae").digest,
        run.config.latents,
    )


def _make_work(run: Run) -> Work:
    extraction, device = _extraction(run), World.current(run.config.workers.use_gpu).device
    tokenizer, _ = load_tokenizer(run.storage.child(run.prefix("train_vavae")))
    tokenizer.to(device)

    def do(task: ShardTask, advance: Advance) -> None:
        extraction.encode(task, tokenizer, device, advance)

    return do


if __name__ == "__main__":
    sys.exit(main("precompute_latents", "Encode image shards with the trained tokenizer.", work))
