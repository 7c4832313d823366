"""Images → WebDataset shards with a manifest: ``python -m ray_jobs.prepare_shards --config FILE``."""

import sys

from ray_jobs.runtime.actor_pool import Advance, Resources, work_through
from ray_jobs.runtime.command import main
from vavae.data.shards.plan import PlannedShard, plan_shards
from vavae.data.shards.write import claim, finish, write_shard
from vavae.runs.run import Run


def work(run: Run) -> None:
    """Write the missing shards, unless others made them, then the manifest."""
    storage, prefix = run.storage, run.prefix("prepare_shards")
    plan = plan_shards(run.config.shards, storage)
    claim(storage, prefix, run.config.shards, plan.sources)
    if plan.shards:
        actors, resources = run.config.workers.count, Resources.of(run.config.workers, gpus=0)

        def write(shard: PlannedShard, advance: Advance) -> None:
            write_shard(storage, prefix, shard, advance)

        work_through(run, "prepare_shards", lambda: write, plan.shards, plan.images, actors, resources)
    manifest = finish(storage, prefix, plan)
    if manifest.left_out:
        print(f"left out: {manifest.left_out}", flush=True)


if __name__ == "__main__":
    sys.exit(main("prepare_shards", "Make image shards from a folder, an archive or a data set.", work))
