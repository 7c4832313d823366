"""Images → WebDataset shards with a manifest: ``python -m ray_jobs.prepare_shards --config FILE``."""

import sys

from ray_jobs.runtime.actor_pool import work_through
from ray_jobs.runtime.command import main
from ray_jobs.runtime.progress_actor import ProgressActor
from ray_jobs.runtime.resources import Resources
from vavae.data.shards.plan import PlannedShard, plan_shards
from vavae.data.shards.write import ShardRecord, claim, finish, write_shard
from vavae.runs.run import Run


def work(run: Run) -> None:
    """Write the missing shards, unless others made them, then the manifest."""
    storage, prefix = run.storage, run.prefix("prepare_shards")
    plan = plan_shards(run.config.shards, storage)
    claim(storage, prefix, run.config.shards, plan.sources)
    records: list[ShardRecord] = []
    if plan.shards:
        actors, resources = run.config.workers.count, Resources.of(run.config.workers, gpus=0)

        def write(shard: PlannedShard, progress: ProgressActor) -> ShardRecord:
            return write_shard(storage, prefix, shard, progress.advance)

        records = work_through(run, "prepare_shards", lambda: write, plan.shards, plan.images, actors, resources)
    manifest = finish(storage, prefix, plan, records)
    if manifest.left_out:
        print(f"left out: {manifest.left_out}", flush=True)


if __name__ == "__main__":
    sys.exit(main("prepare_shards", "Make image shards from a folder, an archive or a data set.", work))
