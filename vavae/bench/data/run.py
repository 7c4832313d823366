"""All benchmarks of reading, one after the other."""

import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from vavae.bench.benchmark import Benchmark, Measurement, Skipped, run_interleaved
from vavae.bench.data.local import image_benchmarks, latent_benchmarks
from vavae.bench.data.start import start_benchmarks
from vavae.bench.data.store import store_benchmarks


class Sizes(NamedTuple):
    """Sizes of what the sides read."""

    images: int = 1536
    """Images of 256 x 256 pixels in the shards; a multiple of 128."""
    latents: int = 1024
    """Latents of 32 x 16 x 16 in a shard."""
    shards: int = 1250
    """Shards of latents, where starting is measured."""


def run(rounds: int, sizes: Sizes) -> Iterator[Measurement | Skipped]:
    """Run every benchmark; torch has one thread meanwhile.

    Args:
        rounds: how often each side has its turn.
        sizes: of what is read.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="vavae-") as name:
            folder = Path(name)
            for found in chain(
                image_benchmarks(folder / "images", sizes.images),
                latent_benchmarks(folder / "latents", sizes.latents),
                store_benchmarks(folder / "store", sizes.images),
                start_benchmarks(folder / "start", sizes.latents, sizes.shards),
            ):
                if isinstance(found, Benchmark):
                    yield run_interleaved(found, rounds)
                else:
                    yield found
    finally:
        torch.set_num_threads(threads)
