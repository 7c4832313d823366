"""Progress of a long operation, and the line or the bar that shows it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that show no progress need no rich
    from rich.console import Console

NAME_WIDTH = 18
"""Width of the name of a job, characters."""
LINE_SECONDS = 10.0
"""Shortest time between two lines of progress where there is no terminal."""


@dataclass(frozen=True)
class Progress:
    """Progress of a job at one moment."""

    job: str
    done: int
    total: int | None
    unit: str = "images"
    rate: float | None = None
    """Recent rate, units per second."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """A few metrics worth seeing, such as the loss."""
    doing: str = ""
    """Activity that is counted, where it is not the job's own; one without a total is named alone."""

    def line(self) -> str:
        """Line such as `train_vavae  1,280/19,200 images  61 images/s  4:53 left  loss 0.123`."""
        return f"{self.job:<{NAME_WIDTH}} {self.summary()}"

    def summary(self) -> str:
        """Line without the job."""
        if self.doing and self.total is None:
            return self.doing
        total = "" if self.total is None else f"/{self.total:,}"
        parts = [*([self.doing] if self.doing else []), f"{self.done:,}{total} {self.unit}"]
        if self.rate:
            parts.append(f"{self.rate:{',.0f' if self.rate >= 100 else '.3g'}} {self.unit}/s")
            if self.total is not None:
                # Whole steps may go beyond the total.
                parts.append(f"{clock(max(0, self.total - self.done) / self.rate)} left")
        return "  ".join([*parts, *(_term(name, value) for name, value in self.terms.items())])


class Rate:
    """Units per second over a sliding window, so that a slow start does not spoil the time left.

    Where two updates lie further apart than the window, it spans just the two.
    """

    def __init__(self, window_seconds: float = 20.0) -> None:
        self._window = window_seconds
        self._marks: list[tuple[float, int]] = []

    def update(self, done: int) -> float | None:
        """Note how much is done now, and return the rate once there are two marks."""
        now = time.monotonic()
        recent = [mark for mark in self._marks if now - mark[0] <= self._window]
        self._marks = [*(recent or self._marks[-1:]), (now, done)]
        (first_time, first_done), (last_time, last_done) = self._marks[0], self._marks[-1]
        return (last_done - first_done) / (last_time - first_time) if last_time > first_time else None


def clock(seconds: float) -> str:
    """Format seconds as `4:53` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressLines:
    """Prints moments of a job as lines, seldom enough for a file: at most one in ten seconds, and none twice.

    Args:
        job: its name.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._printed: tuple[str, str, int] | None = None
        self._printed_at = -math.inf

    def show(self, moment: Progress | str) -> None:
        """Print the line of a moment, unless it is too early for another one, or nothing was done since the last."""
        if isinstance(moment, str):
            moment = Progress(self._job, 0, None, doing=moment)
        what = (moment.job, moment.doing, moment.done)
        if what != self._printed and time.monotonic() - self._printed_at >= LINE_SECONDS:
            self._printed, self._printed_at = what, time.monotonic()
            print(moment.line(), flush=True)


@contextmanager
def display(job: str, console: "Console | None" = None) -> Iterator[Callable[[Progress | str], None]]:
    """Show a job: as a bar that moves on a terminal and vanishes at the end, elsewhere as a line from time to time.

    Args:
        job: its name.
        console: where; standard output by default.

    Yields:
        Function that shows a moment of the job, or a word about it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as MovingBar

    console = console or Console()
    if not console.is_terminal:
        yield ProgressLines(job).show
        return
    columns = TextColumn(f"{{task.description:<{NAME_WIDTH}}}"), BarColumn(20), TaskProgressColumn()
    with MovingBar(*columns, TextColumn("{task.fields[summary]}"), console=console, transient=True) as bar:
        task = bar.add_task(job, total=None, summary="")

        def move(moment: Progress | str) -> None:
            if isinstance(moment, str):
                bar.update(task, summary=moment)
            elif moment.doing and moment.total is None:
                bar.update(task, summary=moment.summary())
            else:
                bar.update(task, completed=moment.done, total=moment.total, summary=moment.summary())

        yield move


def _term(name: str, value: float) -> str:
    """Format a term as `loss/total 0.1235`, a share of the time waited as a percentage."""
    return f"{name} {value:.1%}" if name.endswith("_wait") else f"{name} {value:.4g}"
