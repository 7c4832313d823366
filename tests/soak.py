"""Minutes of training under kills, stops, refusing stores and changing numbers of workers: what must hold, holds.

    python tests/soak.py --minutes 60 --seed 7

Rounds follow each other until the time is over. Each is one training from its beginning to its end, through one trouble
of every kind; it then equals a training that nothing disturbed. In every other round the number of workers and the
engine change with each attempt. Ends with status 1 where something differs, or some kind of kill never landed.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from support.engine_parity import TORCH, ZERO
from support.gloo import GlooLauncher
from support.training_faults import (
    KILLS,
    STEPS,
    STEPS_PER_CHECKPOINT,
    Attempt,
    Outcome,
    Trouble,
    outcome_of,
    try_training,
)
from support.training_steps import JOBS, without_signs

from vavae.errors import UserError
from vavae.runs.jobs import Job

_ENGINES = [TORCH, *ZERO]
FATAL = (*KILLS, "step")
_KINDS = (*FATAL, "stop", "store")


class Report(NamedTuple):
    """Faults and restarts that a soak went through."""

    rounds: int
    attempts: int
    landed: Counter[str]

    @property
    def missed(self) -> list[str]:
        """Kinds of kills that never landed."""
        return [kind for kind in FATAL if not self.landed[kind]]


def soak(launcher: GlooLauncher, folder: Path, seed: int, seconds: float) -> Report:
    """Go through rounds until the time is over, two at least; AssertionError where one does not end as it must."""
    draw, end = random.Random(seed), time.monotonic() + seconds
    rounds = attempts = 0
    landed: Counter[str] = Counter()
    while rounds < 2 or time.monotonic() < end:
        place = folder / str(rounds)
        attempts += _round(launcher, place, draw, JOBS[rounds // 2 % 2], resizes=rounds % 2 == 1)
        landed.update(mark.name.rpartition("-")[0] for mark in place.glob("disturbed/landed/*"))
        rounds += 1
    return Report(rounds, attempts, landed)


def _round(launcher: GlooLauncher, folder: Path, draw: random.Random, job: Job, resizes: bool) -> int:
    """One training with all troubles and one without; how many attempts the former took."""
    plan = Attempt(job, draw.choice([2, 3]), draw.choice(_ENGINES))
    expected = _train(launcher, folder / "undisturbed", plan)
    troubles = draw.sample(_KINDS, len(_KINDS))
    for number, kind in enumerate(troubles):
        attempt = plan
        if resizes:
            attempt = plan._replace(world_size=draw.randint(1, 4), engine=draw.choice(_ENGINES))
        rank = 0 if kind in ("commit", "start-up") else draw.randrange(attempt.world_size)
        turn = draw.randrange(STEPS_PER_CHECKPOINT) if kind in ("step", "stop") else draw.randrange(2)
        # The first to come to where a checkpoint is read must find one.
        attempt = attempt._replace(trouble=Trouble(kind, 0 if kind in ("start-up", "conversion") else turn, rank))
        _try(launcher, folder / "disturbed", attempt)
        print(f"  {number + 1}/{len(troubles)} {attempt}", flush=True)
    found = _train(launcher, folder / "disturbed", plan)
    _compare(found, expected, exact=not resizes)
    return len(troubles) + 1


def _try(launcher: GlooLauncher, folder: Path, attempt: Attempt) -> None:
    """An attempt that may die."""
    try:
        launcher.run(attempt.world_size, try_training, attempt, folder)
    except (RuntimeError, UserError) as error:
        known = ("died", "Connection", "gloo", "no checkpoint could be written")
        if not any(word in str(error) for word in known):
            raise


def _train(launcher: GlooLauncher, folder: Path, attempt: Attempt) -> Outcome:
    launcher.run(attempt.world_size, try_training, attempt, folder)
    return outcome_of(folder)


def _compare(found: Outcome, expected: Outcome, exact: bool) -> None:
    assert len(expected.rows) == STEPS
    assert found.seen.keys() == expected.seen.keys()
    assert all(len(digests) == 1 for digests in expected.seen.values())
    assert found.seen == expected.seen, "the same samples with the same noise, whatever happened"
    if exact:
        assert found.rows == expected.rows
        assert found.checkpoint == expected.checkpoint, "weights, optimizers and average are bitwise identical"
        return
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        assert without_signs(ours) == pytest.approx(without_signs(theirs), rel=1e-5, abs=1e-7)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    launcher = GlooLauncher()
    with tempfile.TemporaryDirectory(prefix="vavae-") as folder:
        report = soak(launcher, Path(folder), arguments.seed, 60 * arguments.minutes)
    launcher.close()
    print(f"{report.rounds} rounds, {report.attempts} attempts; landed: {dict(sorted(report.landed.items()))}")
    if report.missed:
        print(f"no kill landed in: {', '.join(report.missed)}")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
