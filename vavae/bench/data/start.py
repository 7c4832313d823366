"""Benchmarks of starting: time and memory until the first batch of a set as large as ImageNet, and over an epoch of it.

All shards of the set are one file under many names, so that a manifest of thousands needs no disk. Every turn has a
process to itself. Memory is what the process alone holds (anonymous pages); mapped shards are the page cache's.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vavae.bench.benchmark import VAVAE_SIDE, Benchmark, Measurement, Skipped
from vavae.bench.data.shards import SPLIT, labels_of, make_latents, write_latent_shard
from vavae.bench.process import STATUS, anonymous_mebibytes, run_in_process
from vavae.data.config import StreamConfig
from vavae.data.image_stream import MicroBatchKey
from vavae.data.sample_order import SampleOrder, order_of
from vavae.latents.manifest import MANIFEST, read_latent_manifest
from vavae.latents.stream import LatentStream
from vavae.storage.storage import Storage

_CONFIG, _MICRO_BATCH = StreamConfig(), 32


class _Set(NamedTuple):
    """Set of latents: a folder with its manifest for vavae; files for the baseline, here one that stands for all."""

    folder: str
    file: str
    shards: int


class _Started(NamedTuple):
    """Reader after its first batch, with all that it keeps."""

    batch: Tensor
    kept: object


class _Cost(NamedTuple):
    seconds: float
    mebibytes: float


class _Reader(NamedTuple):
    order: SampleOrder
    stream: LatentStream


def start_benchmarks(folder: Path, latents: int, shards: int) -> Iterator[Benchmark | Measurement | Skipped]:
    """Benchmarks until the first batch, against an entry per latent as the public reader keeps it; an epoch of vavae.

    Args:
        folder: for the files.
        latents: in a shard.
        shards: how many.
    """
    if not STATUS.exists():
        yield Skipped("start-up", f"there is no {STATUS}, where Linux tells the memory of a process")
        return
    latent_set = _write_set(folder, latents, shards)
    order = order_of([latents] * shards, 0, _CONFIG)
    places = [place for lane in range(_CONFIG.lanes) for place in order.micro_batch(lane, 0, _MICRO_BATCH)]
    expected = _gather(_list_entries(latent_set), [place.shard * latents + place.record for place in places])
    assert torch.equal(expected, _start_vavae(latent_set).batch), "an entry per latent leads to other latents"
    sides = {"an entry each": _start_with_entries, VAVAE_SIDE: _start_vavae}
    for unit, part in (("s of processor", 0), ("MiB", 1)):
        turns = {side: partial(_turn, start, latent_set, part) for side, start in sides.items()}
        yield Benchmark(f"start, {latents * shards:,} latents", unit, turns, less_is_better=True)
    yield Measurement("memory over an epoch", "MiB more", {VAVAE_SIDE: (run_in_process(_growth, latent_set),)})


def _turn(start: Callable[[_Set], _Started], latent_set: _Set, part: int) -> float:
    return run_in_process(_cost, start, latent_set)[part]


def _cost(start: Callable[[_Set], _Started], latent_set: _Set) -> _Cost:
    memory, clock = anonymous_mebibytes(), time.process_time()
    started = start(latent_set)
    cost = _Cost(time.process_time() - clock, anonymous_mebibytes() - memory)
    assert len(started.batch) == _CONFIG.lanes * _MICRO_BATCH
    return cost


def _growth(latent_set: _Set) -> float:
    """Excess of the peak memory in an epoch over that in its first tenth, MiB."""
    order, stream = _open_vavae(latent_set)
    steps = order.records_per_lane // _MICRO_BATCH
    memory = []
    for step in range(steps):
        for lane in range(_CONFIG.lanes):
            stream[MicroBatchKey(lane, step)]
        memory.append(anonymous_mebibytes())
    return max(memory) - max(memory[: max(1, steps // 10)])


def _start_vavae(latent_set: _Set) -> _Started:
    reader = _open_vavae(latent_set)
    batch = torch.cat([reader.stream[MicroBatchKey(lane, 0)].mean for lane in range(_CONFIG.lanes)])
    return _Started(batch, reader)


def _open_vavae(latent_set: _Set) -> _Reader:
    storage = Storage(latent_set.folder)
    manifest = read_latent_manifest(storage)
    order = order_of(manifest.splits[SPLIT].counts, 0, _CONFIG)
    stream = LatentStream(storage, manifest, SPLIT, order, _MICRO_BATCH, seed=0, open_shards=_CONFIG.open_shards)
    return _Reader(order, stream)


def _start_with_entries(latent_set: _Set) -> _Started:
    entries = _list_entries(latent_set)
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0)).tolist()
    return _Started(_gather(entries, order[: _CONFIG.lanes * _MICRO_BATCH]), (entries, order))


def _list_entries(latent_set: _Set) -> dict[int, dict[str, Any]]:
    entries: dict[int, dict[str, Any]] = {}
    for _ in range(latent_set.shards):
        with safe_open(latent_set.file, "pt") as file:
            (count,) = file.get_slice("labels").get_shape()
        for place in range(count):
            entries[len(entries)] = {"file": latent_set.file, "place": place}
    return entries


def _gather(entries: dict[int, dict[str, Any]], indices: list[int]) -> Tensor:
    latents = []
    for entry in map(entries.__getitem__, indices):
        with safe_open(entry["file"], "pt") as file:
            latents.append(file.get_slice("latents")[entry["place"]])
    return torch.stack(latents)


def _write_set(folder: Path, latents: int, shards: int) -> _Set:
    storage, arrays = Storage(str(folder)), make_latents(latents)
    manifest = write_latent_shard(storage, arrays)
    (shard,) = manifest.splits[SPLIT]
    url = storage.url(f"{SPLIT}/{shard.name}")
    many = tuple(shard.model_copy(update={"name": f"{number:06d}.tar", "url": url}) for number in range(shards))
    storage.write_json(MANIFEST, manifest.model_copy(update={"splits": {SPLIT: many}}).model_dump(mode="json"))
    file = folder / "latents.safetensors"
    means = torch.from_numpy(arrays[:, 0]).float().contiguous()
    save_file({"latents": means, "labels": torch.tensor(labels_of(latents))}, file)
    return _Set(str(folder), str(file), shards)
