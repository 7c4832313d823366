"""A worker may take several lanes in one pass: the same draws, the same mean, up to the order of sums."""

import pytest
from support.engine_parity import TORCH, ZERO, History, Setup, error, train_job
from support.gloo import GlooLauncher

from vavae.distributed.world import World

pytestmark = pytest.mark.gloo

_SETUPS = [Setup(TORCH, smooth=True), Setup(ZERO[2], smooth=True)]


def steps_with(world: World) -> list[list[History]]:
    """The LightningDiT's steps with one to four of the four lanes at once, by engine."""
    at_once = range(1, 5) if world.size == 1 else (1, 2)
    return [
        [train_job(world, "train_lightningdit", setup._replace(lanes_at_once=count)) for count in at_once]
        for setup in _SETUPS
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_lanes_at_once_change_only_the_order_of_sums(gloo: GlooLauncher, world_size: int) -> None:
    for single, *grouped in gloo.run(world_size, steps_with)[0]:
        for history in grouped:
            for ours, theirs in zip(history.figures, single.figures, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
            assert max(error(history.after[name], single.after[name]) for name in single.after) < 1e-6
