"""The benchmark of checkpoints holds its contest."""

from vavae.bench.benchmark import compete
from vavae.bench.checkpoint import stall_contest


def test_a_checkpoint_is_compared_with_writing_it_at_once_and_with_the_copy() -> None:
    with stall_contest(parameters=2_000_000) as contest:
        rows = compete(contest, accumulation_steps=2)
    assert contest.name == "checkpoint of 22 MiB"
    assert [row.rival for row in rows] == ["writing at once", "the copy alone"]
    assert all(row.ours > 0 and len(row.ratios) == 2 for row in rows)
