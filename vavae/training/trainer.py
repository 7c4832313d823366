"""The training loop: the order of things, the same for both models. The mathematics is the step object's."""

import logging
import math
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch

from vavae.data.config import StreamConfig
from vavae.data.image_stream import ImageStream
from vavae.data.loader import load_micro_batches
from vavae.data.sample_order import AccumulationStep
from vavae.distributed.world import World
from vavae.errors import CommonError
from vavae.progress import Progress, Rate
from vavae.runs.config import TrainingConfig
from vavae.runs.events import Event, Kind
from vavae.training.callbacks.callback import Callback
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.state import TrainState
from vavae.training.logging.log import MetricsLog
from vavae.training.logging.throughput import ThroughputMeter
from vavae.training.logging.utilization import Utilization
from vavae.training.schedule import learning_rate
from vavae.training.session import Session
from vavae.training.spikes import SpikeDetector
from vavae.training.step import Step, StepResult
from vavae.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.5
_LOSS = "loss/total"
_HEADLINE = (_LOSS, "data_wait")


class NonFiniteError(CommonError):
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
    accumulation_steps: Sequence[AccumulationStep],
    span: range,
    config: TrainingConfig,
    reading: StreamConfig,
    checkpoints: Checkpoints,
    log: MetricsLog,
    session: Session,
    world: World,
    callbacks: Sequence[Callback] = (),
    utilization: Utilization | None = None,
) -> TrainState:
    """Train until enough images are seen or the session asks to stop; returns the state at the end.

    Starts from the newest checkpoint where there is one and leaves one behind. A step whose gradients are not finite is
    skipped; after too many in a row the run goes back to its checkpoint, and on behind the images that it met since.
    Every rank calls it.

    Args:
        stage: name of the job, for logs.
        step: the model, its data and its losses.
        accumulation_steps: this rank's share of every step.
        span: images seen at which to begin, with the weights that the step has got, and at which to end.
        config: batch, schedule, intervals, and the budget to be shown.
        reading: how micro-batches are read ahead.
        checkpoints: where state is kept.
        log: rows of metrics.
        session: whoever runs this.
        world: the ranks.
        callbacks: look at the model at their intervals.
        utilization: what rank 0 adds to the rows, if anything.

    Raises:
        NonFiniteError: there is no checkpoint to go back to, or going back was in vain; every rank raises it.
        CommonError: a checkpoint could not be written.
    """
    loop = _Loop(
        stage, step, accumulation_steps, span, config, reading, checkpoints, log, session, world, callbacks, utilization
    )
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
                checkpoints.wait_for_pending_save()
                state = checkpoints.restore(step, span.start)
                seen = diverged.state.images_seen
                if state.images_seen <= span.start or rollbacks > config.rollback_limit:
                    raise NonFiniteError(
                        f"{stage}: gradients are not finite after {seen:,} images, as the log says of each step: lower "
                        f"{stage}.optimizer.learning_rate under another name, or raise {stage}.rollback_limit"
                    ) from None
                logger.warning("%s: back from %s to %s images, and on behind them", stage, seen, state.images_seen)
                loop.note("rollback", seen, back_to=state.images_seen)
                state = state.skip_past(diverged.state)
        checkpoints.wait_for_pending_save()
    log.close()
    return state


@dataclass(frozen=True)
class _Loop:
    """What `train` is given."""

    stage: str
    step: Step
    accumulation_steps: Sequence[AccumulationStep]
    span: range
    config: TrainingConfig
    reading: StreamConfig
    checkpoints: Checkpoints
    log: MetricsLog
    session: Session
    world: World
    callbacks: Sequence[Callback]
    utilization: Utilization | None

    def go_on(self, state: TrainState, watchdog: Watchdog) -> TrainState:
        """Train from a state on until the end, a stop, or divergence."""
        if state.images_seen >= self.span.stop:
            return state
        self.log.rewind(state.images_seen)
        return _Way(self, state).go(watchdog)

    def note(self, kind: Kind, images_seen: int, **details: Any) -> None:
        """Have rank 0 remember what happened."""
        if self.world.is_first:
            self.session.event(Event(kind, self.stage, images_seen, details))

    def report(self, kind: Kind, what: str, result: StepResult, images_seen: int) -> None:
        """Say what a remarkable step was like. Every rank calls it."""
        terms = self.world.sum_terms(result.terms)
        if self.world.is_first:
            figures = ", ".join(f"{name} {value:g}" for name, value in {**result.gradient_norms, **terms}.items())
            logger.warning("%s: the step at %s images %s: %s", self.stage, f"{images_seen:,}", what, figures)
            self.note(kind, images_seen, figures=figures)

    def exchange(self, result: StepResult) -> _Signals:
        """What all ranks have to know after a step, in one reduction. Every rank calls it."""
        flags = {"stop": self.session.stop_requested(), "listens": self.session.listens()}
        total = self.world.sum_terms(
            {_LOSS: result.terms[_LOSS], **{name: torch.tensor(float(flag)) for name, flag in flags.items()}}
        )
        return _Signals(total["stop"] > 0, total["listens"] > 0, total[_LOSS])


class _Way:
    """The steps from one state on, and what was counted of them."""

    def __init__(self, loop: _Loop, state: TrainState) -> None:
        self._loop, self._state, self._source = loop, state, loop.step.source()
        unreadable = self._source.quarantine.names if isinstance(self._source, ImageStream) else ()
        self._meter = ThroughputMeter(loop.world, loop.step.stopwatch, unreadable)
        self._rate, self._spikes = Rate(), SpikeDetector(loop.config.spike_deviations)
        self._row: dict[str, float] = {}
        self._shown, self._skipped = -math.inf, 0

    def go(self, watchdog: Watchdog) -> TrainState:
        """Step after step; the state behind the last."""
        stop = False
        with closing(self._micro_batches()) as stream:
            while not stop:
                watchdog.feed()
                before = self._state.images_seen
                signals = self._step(stream)
                self._run_callbacks(before)
                done = self._state.images_seen >= self._loop.span.stop
                stop = signals.stop or done
                asked = signals.listens and self._loop.session.must_save()
                self._keep(before, save=stop or asked, done=done)
        return self._state

    def _micro_batches(self) -> Generator[list[Any], None, None]:
        """What this rank reads from the state on."""
        loop = self._loop
        return load_micro_batches(
            self._source,
            loop.accumulation_steps,
            self._state.position // loop.config.batch_size,
            loop.reading.workers,
            pin_memory=loop.world.device.type == "cuda",
            prefetch_bytes=loop.reading.prefetch_bytes,
            ranks=int(os.environ.get("LOCAL_WORLD_SIZE", loop.world.size)),
        )

    def _step(self, stream: Iterator[list[Any]]) -> _Signals:
        """One step, which moves the state on.

        Raises:
            _DivergedError: as those before it, it has gradients that are not finite.
        """
        loop, before = self._loop, self._state.images_seen
        with self._meter.waiting("data_wait"):
            micro_batches = next(stream)
        result = loop.step.run(micro_batches, before, self._learning_rate(before))
        self._state = self._state.after(loop.config.batch_size)
        signals = loop.exchange(result)
        if not all(map(math.isfinite, result.gradient_norms.values())):
            self._skip(result, before)
            return signals
        self._skipped = 0
        self._meter.add(result, loop.config.batch_size)
        if loop.step.ema is not None:
            with loop.step.stopwatch("optimizer"):
                loop.step.ema.update()
        if self._spikes.is_spike(signals.loss):
            self._meter.spike()
            loop.report("loss_spike", "has a loss far above those before it", result, before)
        return signals

    def _learning_rate(self, images_seen: int) -> float:
        config = self._loop.config
        return learning_rate(config.optimizer.learning_rate, config.schedule, images_seen)

    def _skip(self, result: StepResult, images_seen: int) -> None:
        """Count a step that no engine has applied."""
        self._skipped += 1
        self._meter.skip(self._loop.config.batch_size)
        self._loop.report("skipped_step", "is skipped", result, images_seen)
        if self._skipped > self._loop.config.skip_limit:
            raise _DivergedError(self._state)

    def _run_callbacks(self, before: int) -> None:
        for callback in self._loop.callbacks:
            if _crosses(before, self._state.images_seen, callback.every_images):
                with self._meter.waiting("observe_wait"):
                    callback.on_interval(self._loop.step, self._state.images_seen, self._loop.log)

    def _keep(self, before: int, save: bool, done: bool) -> None:
        """Log, show and save what is due after a step.

        Args:
            before: images seen before it.
            save: whether a checkpoint is due whatever the interval says.
            done: whether it was the last.
        """
        loop, seen = self._loop, self._state.images_seen
        save = save or _crosses(before, seen, loop.config.checkpoint_images) or loop.checkpoints.is_due(seen)
        if save or _crosses(before, seen, loop.config.log_images):
            self._row = self._meter.row() | {"learning_rate": self._learning_rate(before)}
            if loop.utilization is not None:
                self._row |= loop.utilization.figures(before, self._row["images_per_second"])
            loop.log.add(seen, self._row)
        if loop.world.is_first and (done or time.monotonic() - self._shown > _PROGRESS_SECONDS):
            self._shown = time.monotonic()
            terms = {name: self._row[name] for name in _HEADLINE if name in self._row}
            loop.session.progress(
                Progress(loop.stage, seen, loop.config.images, rate=self._rate.update(seen), terms=terms)
            )
        if save:
            with self._meter.waiting("checkpoint_wait"):
                self._meter.saved(
                    loop.checkpoints.save(loop.step, self._state, self._row, loop.log.flush_segment(seen))
                )
            loop.session.checkpoint(seen, self._row)
            loop.note("checkpoint", seen)


def _crosses(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of the interval lies in (before, after]."""
    return before // interval < after // interval
