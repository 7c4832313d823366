"""Start-up with many shards: requests to a store, and the costs of a manifest as columns and as a tuple of objects.

    python tests/start_up.py 10 1000 100000

A hundred thousand shards take some minutes, and half a million small files meanwhile. Requests are those of S3, which
lists 1,000 names at a time; a training's are those before its first micro-batch. Times are of the processor.
"""

import argparse
import gc
import pickle
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from support import many_shards
from support.counting_store import CountingStore, counted
from support.gloo import GlooLauncher

from vavae.data.shards.manifest import MANIFEST, Manifest, ShardInfo
from vavae.data.shards.write import finish
from vavae.runs.jobs import TRAININGS
from vavae.storage.storage import Storage

_CONFIG = Path(__file__).parents[1] / "configs" / "tiny.yaml"
_ROUNDS = 5


def count_requests(gloo: GlooLauncher, folder: str, shards: int) -> dict[str, int]:
    """Leave a run with its shards in a folder, and count the requests of each part of that."""
    run = many_shards.make_run(_CONFIG, f"counting://{folder}", shards, f"storage.cache={folder}/cache")
    found: dict[str, int] = {}
    plan, records = many_shards.written_shards(run, shards)
    found["finish shards"] = _requests(lambda: finish(run.storage, "shards", plan, records))
    many_shards.commit_tokenizer(run)
    extraction, inputs, encoded = many_shards.written_latents(run)
    latents: list[Any] = []
    found["finish latents"] = _requests(lambda: latents.extend(extraction.finish(inputs.config.latent_shape, encoded)))
    inputs.output.commit(*latents)
    many_shards.commit_lightningdit(run)
    samples, outputs, generated = many_shards.written_samples(run)
    files: dict[str, Any] = {}
    found["finish samples"] = _requests(lambda: files.update(samples.files(generated)))
    outputs.output.commit("d" * 64, files)
    found["plan a run"] = _requests(run.plans)
    for job in TRAININGS:
        arguments = (_CONFIG, f"counting://{folder}", shards, job, CountingStore.page)
        first, *others = gloo.run(3, many_shards.requests_of_rank, *arguments)
        found[f"begin {job}, rank 0"] = sum(first.values())
        found[f"begin {job}, any other rank"] = max(sum(other.values()) for other in others)
    return found


def _requests(work: Callable[[], object]) -> int:
    return counted(work)[1].total()


def measure_manifest(data: bytes) -> dict[str, str]:
    """Costs of the shards of a manifest, as objects and as columns: processor time, memory, and bytes of a pickle."""
    objects = TypeAdapter(tuple[ShardInfo, ...])
    entries = TypeAdapter(Any).dump_json(TypeAdapter(dict[str, Any]).validate_json(data)["splits"]["train"])
    sides: dict[str, Callable[[], Any]] = {
        "objects": lambda: objects.validate_json(entries),
        "columns": lambda: Manifest.model_validate_json(data).splits["train"],
    }
    assert [*sides["objects"]()] == [*sides["columns"]()]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(_ROUNDS):
        for side, read in sides.items():
            gc.collect()
            start = time.process_time()
            read()
            seconds[side].append(time.process_time() - start)
    found = {"file, MiB": f"{len(data) / 2**20:.3f}"}
    for side, read in sides.items():
        tracemalloc.start()
        shards = read()
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        start = time.process_time()
        pickled = pickle.dumps(shards)
        pickle.loads(pickled)
        handed = time.process_time() - start
        found |= {
            f"{side}: read, ms": f"{statistics.median(seconds[side]) * 1e3:.2f}",
            f"{side}: kept, MiB": f"{kept / 2**20:.3f}",
            f"{side}: pickle, MiB": f"{len(pickled) / 2**20:.3f}",
            f"{side}: pickled and back, ms": f"{handed * 1e3:.2f}",
        }
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards", type=int, nargs="+")
    arguments, gloo, columns = parser.parse_args(), GlooLauncher(), dict[str, dict[str, str]]()
    for shards in arguments.shards:
        with tempfile.TemporaryDirectory(prefix="vavae-") as folder:
            requests = {
                f"requests: {what}": f"{count:,}" for what, count in count_requests(gloo, folder, shards).items()
            }
            manifest = Storage(f"{folder}/tiny/shards").read_bytes(MANIFEST)
            columns[f"{shards:,} shards"] = requests | measure_manifest(manifest)
    gloo.close()
    print(f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for what in next(iter(columns.values())):
        print(f"| {what} | {' | '.join(column[what] for column in columns.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
