"""The training loop: the order of things, the same for both models. The mathematics is the step object's."""

import logging
import math
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch

from vavae.data.config import StreamConfig
from vavae.data.loading import load_slices
from vavae.data.order import Round
from vavae.data.stream import ImageStream, SliceSource
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.progress import Progress, Rate
from vavae.training.checkpoint import Checkpoints, TrainState
from vavae.training.config import TrainingConfig
from vavae.training.events import Event, Kind
from vavae.training.log import Meter, MetricsLog
from vavae.training.observer import Observer
from vavae.training.schedule import learning_rate
from vavae.training.session import Session
from vavae.training.spikes import SpikeDetector
from vavae.training.step import Step, StepResult
from vavae.training.utilisation import Utilisation
from vavae.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.5
_LOSS = "loss/total"
_HEADLINE = (_LOSS, "data_wait")


class NonFiniteError(UserError):
    """Gradients left the finite numbers again and again, whatever was tried."""


class _Signals(NamedTuple):
    """What the ranks tell each other after a step."""

    stop: bool
    """Some rank was asked to save and leave."""
    listens: bool
    """It is time to ask whether a machine is about to go."""
    loss: float
    """Mean over the global batch."""


class _DivergedError(Exception):
    """Too many steps in a row had gradients that are not finite."""

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self.state = state


def train(
    stage: str,
    step: Step,
    rounds: Sequence[Round],
    span: range,
    config: TrainingConfig,
    reading: StreamConfig,
    checkpoints: Checkpoints,
    log: MetricsLog,
    session: Session,
    world: World,
    observers: Sequence[Observer] = (),
    utilisation: Utilisation | None = None,
) -> TrainState:
    """Train until enough images are seen or the session asks to stop; returns the state at the end.

    Starts from the newest checkpoint where there is one and leaves one behind. A step whose gradients are not finite is
    skipped; after too many in a row the run goes back to its checkpoint, and on behind the images that it met since.
    Every rank calls it.

    Args:
        stage: name of the job, for logs.
        step: the model, its data and its losses.
        rounds: this rank's share of every step.
        span: images seen at which to begin, with the weights that the step has got, and at which to end.
        config: batch, schedule, intervals, and the budget to be shown.
        reading: how slices are read ahead.
        checkpoints: where state is kept.
        log: rows of metrics.
        session: whoever runs this.
        world: the ranks.
        observers: look at the model at their intervals.
        utilisation: what rank 0 adds to the rows, if anything.

    Raises:
        NonFiniteError: there is no checkpoint to go back to, or going back was in vain; every rank raises it.
        UserError: a checkpoint could not be written.
    """
    loop = _Loop(stage, step, rounds, span, config, reading, checkpoints, log, session, world, observers, utilisation)
    with Watchdog(config.hang_seconds) as watchdog:
        watchdog.feed()
        state = checkpoints.restore(step, span.start)
        if span.start < state.images_seen < span.stop:
            loop.note("restored", state.images_seen)
        for rollbacks in count(1):
            try:
                state = loop.go_on(state, watchdog)
                break
            except _DivergedError as diverged:
                checkpoints.settle()
                state = checkpoints.restore(step, span.start)
                seen = diverged.state.images_seen
                if state.images_seen <= span.start or rollbacks > config.rollback_limit:
                    raise NonFiniteError(
                        f"{stage}: gradients are not finite after {seen:,} images, as the log says of each step: lower "
                        f"{stage}.optimizer.learning_rate under another name, or raise {stage}.rollback_limit"
                    ) from None
                logger.warning("%s: back from %s to %s images, and on behind them", stage, seen, state.images_seen)
                loop.note("rollback", seen, back_to=state.images_seen)
                state = state.behind(diverged.state)
        checkpoints.settle()
    log.close()
    return state


@dataclass(frozen=True)
class _Loop:
    """What `train` is given."""

    stage: str
    step: Step
    rounds: Sequence[Round]
    span: range
    config: TrainingConfig
    reading: StreamConfig
    checkpoints: Checkpoints
    log: MetricsLog
    session: Session
    world: World
    observers: Sequence[Observer]
    utilisation: Utilisation | None

    def go_on(self, state: TrainState, watchdog: Watchdog) -> TrainState:
        """Train from a state on until the end, a stop, or divergence."""
        if state.images_seen >= self.span.stop:
            return state
        step, config, world = self.step, self.config, self.world
        self.log.rewind(state.images_seen)
        source = step.source()
        meter = Meter(world, step.stopwatch, source.quarantine.names if isinstance(source, ImageStream) else ())
        rate, shown, skipped = Rate(), -math.inf, 0
        spikes = SpikeDetector(config.spike_deviations)
        row: dict[str, float] = {}
        stop = False
        with closing(self._slices(source, state)) as stream:
            while not stop:
                watchdog.feed()
                with meter.waiting("data_wait"):
                    slices = next(stream)
                lr = learning_rate(config.optimizer.learning_rate, config.schedule, state.images_seen)
                result = step.run(slices, state.images_seen, lr)
                before, state = state.images_seen, state.advanced(config.batch_size)
                signals = self._exchange(result)
                if all(map(math.isfinite, result.gradient_norms.values())):
                    skipped = 0
                    meter.add(result, config.batch_size)
                    if step.ema is not None:
                        with step.stopwatch("optimizer"):
                            step.ema.update()
                    if spikes.is_spike(signals.loss):
                        meter.spike()
                        self._report("loss_spike", "has a loss far above those before it", result, before)
                else:
                    skipped += 1
                    meter.skip(config.batch_size)
                    self._report("skipped_step", "is skipped", result, before)
                    if skipped > config.skip_limit:
                        raise _DivergedError(state)

                for observer in self.observers:
                    if _crosses(before, state.images_seen, observer.every_images):
                        with meter.waiting("observe_wait"):
                            observer.observe(step, state.images_seen, self.log)

                done = state.images_seen >= self.span.stop
                stop = signals.stop or done
                save = stop or _crosses(before, state.images_seen, config.checkpoint_images)
                save = (signals.listens and self.session.must_save()) or save
                if save or _crosses(before, state.images_seen, config.log_images):
                    row = meter.row() | {"learning_rate": lr}
                    if self.utilisation is not None:
                        row |= self.utilisation.figures(before, row["images_per_second"])
                    self.log.add(state.images_seen, row)
                if world.is_first and (done or time.monotonic() - shown > _PROGRESS_SECONDS):
                    shown = time.monotonic()
                    self._show(state.images_seen, rate, row)
                if save:
                    with meter.waiting("checkpoint_wait"):
                        meter.saved(self.checkpoints.save(step, state, row, self.log.seal(state.images_seen)))
                    self.session.checkpoint(state.images_seen, row)
                    self.note("checkpoint", state.images_seen)
        return state

    def note(self, kind: Kind, images_seen: int, **details: Any) -> None:
        """Have rank 0 remember what happened."""
        if self.world.is_first:
            self.session.event(Event(kind, self.stage, images_seen, details))

    def _slices(self, source: SliceSource[Any], state: TrainState) -> Generator[list[Any], None, None]:
        """What this rank reads from a state on."""
        return load_slices(
            source,
            self.rounds,
            state.position // self.config.batch_size,
            self.reading.workers,
            pin_memory=self.world.device.type == "cuda",
            prefetch_bytes=self.reading.prefetch_bytes,
            ranks=int(os.environ.get("LOCAL_WORLD_SIZE", self.world.size)),
        )

    def _exchange(self, result: StepResult) -> "_Signals":
        """What all ranks have to know after a step, in one reduction. Every rank calls it."""
        flags = {"stop": self.session.stop_requested(), "listens": self.session.listens()}
        total = self.world.sum_terms(
            {_LOSS: result.terms[_LOSS], **{name: torch.tensor(float(flag)) for name, flag in flags.items()}}
        )
        return _Signals(total["stop"] > 0, total["listens"] > 0, total[_LOSS])

    def _report(self, kind: Kind, what: str, result: StepResult, images_seen: int) -> None:
        """Say what a remarkable step was like. Every rank calls it."""
        terms = self.world.sum_terms(result.terms)
        if self.world.is_first:
            figures = ", ".join(f"{name} {value:g}" for name, value in {**result.gradient_norms, **terms}.items())
            logger.warning("%s: the step at %s images %s: %s", self.stage, f"{images_seen:,}", what, figures)
            self.note(kind, images_seen, figures=figures)

    def _show(self, seen: int, rate: Rate, row: Mapping[str, float]) -> None:
        terms = {name: row[name] for name in _HEADLINE if name in row}
        self.session.progress(Progress(self.stage, seen, self.config.images, rate=rate.update(seen), terms=terms))


def _crosses(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of the interval lies in (before, after]."""
    return before // interval < after // interval
