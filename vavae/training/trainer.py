"""The training loop: the order of a step, the same for both models. The mathematics is the step object's."""

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
from vavae.distributed.world import PendingSums, World
from vavae.errors import CommonError
from vavae.progress import Progress, Rate
from vavae.runs.events import Event, Kind
from vavae.runs.training_config import ScheduleConfig, TrainingConfig
from vavae.runs.training_inputs import resolve_once
from vavae.training.callbacks.callback import Callback
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.state import TrainState
from vavae.training.collapse import HISTORY_ROWS, WARNING_ROWS, Collapse, CollapseDetector, CollapseError
from vavae.training.ema import ramp_limit
from vavae.training.logging.log import MetricsLog
from vavae.training.logging.throughput import ThroughputMeter
from vavae.training.logging.utilization import Utilization
from vavae.training.session import Session
from vavae.training.spikes import SpikeDetector
from vavae.training.step import Step, StepResult
from vavae.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.5
_LOSS = "loss/total"
_SKIPPED, _STOP, _CHECK_DUE = "skipped", "stop", "check_due"
_PROGRESS_TERMS = (_LOSS, "data_wait")


class NonFiniteError(CommonError):
    """Gradients that are not finite again and again, in spite of every rollback."""


class _DivergedError(Exception):
    """Too many steps in a row with gradients that are not finite."""


class _PendingStep(NamedTuple):
    """A step of which the host does not know yet what came of it."""

    images_seen: int
    """Before the step."""
    result: StepResult
    sums: PendingSums
    """Mean loss over the global batch, and how many ranks say that it was skipped, ask to stop or want a check."""


def learning_rate(peak: float, config: ScheduleConfig, images_seen: int) -> float:
    """Learning rate at so many images seen: linear warm-up, constant, then a half cosine or a line down."""
    if images_seen < config.warmup_images:
        return peak * (images_seen + 1) / (config.warmup_images + 1)
    start = config.constant_until_images
    if config.decay_images is None or images_seen < start:
        return peak
    progress = min(1.0, (images_seen - start) / (config.decay_images - start))
    remaining = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.final_factor + (1 - config.final_factor) * remaining)


@dataclass
class Trainer:
    """Trains one step object from its newest checkpoint to the end of its span. Every rank makes one."""

    job: str
    """Name of the training, in logs and events."""
    step: Step
    """The model, its data and its losses."""
    config: TrainingConfig
    """Batch, schedule, intervals, and the budget that is shown."""
    stream: StreamConfig
    """How micro-batches are read ahead."""
    checkpoints: Checkpoints
    log: MetricsLog
    session: Session
    """Whoever runs the training."""
    world: World
    callbacks: Sequence[Callback] = ()
    """Called at their intervals."""
    utilization: Utilization | None = None
    """Further metrics of rank 0's rows."""

    def fit(self, span: range) -> TrainState:
        """Train until the span is covered or the session asks to stop, and leave a checkpoint. Every rank calls it.

        A step whose gradients are not finite is skipped. After too many in a row the training is rolled back to its
        last checkpoint, and skips the data that it met since.

        Args:
            span: images seen at which to begin, with the weights that the step has, and at which to end.

        Returns:
            The state at the end.

        Raises:
            NonFiniteError: there is no checkpoint to roll back to, or rolling back was in vain; on every rank.
            CollapseError: the training has collapsed, see `collapse_limit`; there is a checkpoint.
            CommonError: a checkpoint could not be written.
        """
        with Watchdog(self.config.hang_seconds) as self._watchdog:
            self._watchdog.feed()
            state = self.checkpoints.restore(self.step, span.start)
            if span.start < state.images_seen < span.stop:
                self._record_event("restored", state.images_seen)
            for rollbacks in count(1):
                try:
                    state = self._train_from(state, span)
                    break
                except _DivergedError:
                    state = self._roll_back(span.start, rollbacks)
            self.checkpoints.wait_for_pending_save()
        return state

    def _train_from(self, state: TrainState, span: range) -> TrainState:
        """Train from a state until the span is covered or a stop is requested; returns the state then.

        Raises:
            _DivergedError: see `_step`; `self._state` is the state then.
            CollapseError: see `fit`.
        """
        self._collapse_detector = self._resume_collapse_detector(state.images_seen, span.start)
        if state.images_seen >= span.stop:
            return state
        self.log.rewind(state.images_seen)
        self._state, self._source = state, self.step.source()
        unreadable = self._source.quarantine.names if isinstance(self._source, ImageStream) else ()
        self._meter = ThroughputMeter(self.world, self.step.stopwatch, unreadable)
        self._rate, self._spikes = Rate(), SpikeDetector(self.config.spike_deviations)
        self._row: dict[str, float] = {}
        self._shown_at, self._skipped_in_a_row = -math.inf, 0
        self._pending: _PendingStep | None = None
        self._stop = self._check_due = self._diverged = False
        with closing(self._load_micro_batches()) as stream:
            while not self._stop:
                self._watchdog.feed()
                before = self._state.images_seen
                self._step(stream)
                done = self._state.images_seen >= span.stop
                if done or self._stop or self._check_due or self._is_shown(before):
                    self._read_outcome()
                    self._raise_if_diverged()
                self._run_callbacks(before)
                self._stop |= done
                must_save = self._check_due and self.session.must_save()
                self._check_due = False
                self._log_and_checkpoint(before, save=self._stop or must_save, done=done)
        return self._state

    def _resume_collapse_detector(self, images_seen: int, begin: int) -> CollapseDetector:
        """Make a detector that knows the last rows of the log, as if there had been no interruption.

        Args:
            images_seen: of the state from which the training resumes.
            begin: images seen at which the span begins: rows before it are of other losses.

        Raises:
            CollapseError: the training had collapsed by then.
        """
        detector, fatal = CollapseDetector(max(begin, self.config.schedule.warmup_images)), None
        count = HISTORY_ROWS + (self.config.collapse_limit or WARNING_ROWS)
        for row in resolve_once(self.world, lambda: self.log.last_rows(count, images_seen)):
            fatal = self._fatal(detector.add(row["images"], row))
        if fatal is not None:
            raise self._collapse_error(fatal)
        return detector

    def _fatal(self, collapses: Sequence[Collapse]) -> Collapse | None:
        """Return the first collapse that has lasted for the limit, or for longer; None where there is none."""
        limit = math.inf if self.config.collapse_limit is None else self.config.collapse_limit
        return next((collapse for collapse in collapses if collapse.rows >= limit), None)

    def _collapse_error(self, collapse: Collapse) -> CollapseError:
        return CollapseError(
            f"{self.job} has collapsed: {collapse}; its checkpoints are kept; {collapse.remedy(self.job)}, or train on "
            f"with {self.job}.collapse_limit=null"
        )

    def _load_micro_batches(self) -> Generator[list[Any], None, None]:
        return load_micro_batches(
            self._source,
            self.step.accumulation_steps,
            self._state.position // self.config.batch_size,
            self.stream.workers,
            pin_memory=self.world.device.type == "cuda",
            prefetch_bytes=self.stream.prefetch_bytes,
            ranks=int(os.environ.get("LOCAL_WORLD_SIZE", self.world.size)),
        )

    def _step(self, stream: Iterator[list[Any]]) -> None:
        """Load and run one optimizer step, which meanwhile tells what came of the one before.

        Raises:
            _DivergedError: the one before was skipped, like too many before it. This one is dropped with the weights.
        """
        before = self._state.images_seen
        with self._meter.waiting("data_wait"):
            micro_batches = next(stream)
        result = self.step.run(micro_batches, before, self._learning_rate(before), before_update=self._read_outcome)
        self._raise_if_diverged()
        self._state = self._state.after(self.config.batch_size)
        self._pending = _PendingStep(before, result, self._begin_exchange(result))

    def _learning_rate(self, images_seen: int) -> float:
        return learning_rate(self.config.optimizer.learning_rate, self.config.schedule, images_seen)

    def _begin_exchange(self, result: StepResult) -> PendingSums:
        """Share the loss, the outcome and the session's requests among all ranks, in the one reduction of a step."""
        norms = [norm.to(self.world.device, non_blocking=True) for norm in result.gradient_norms.values()]
        flags = {_STOP: self.session.stop_requested(), _CHECK_DUE: self.session.save_check_due()}
        return self.world.begin_sum(
            {
                _LOSS: result.terms[_LOSS],
                _SKIPPED: torch.stack(norms).isfinite().logical_not().any(),
                **{name: torch.tensor(float(flag)) for name, flag in flags.items()},
            }
        )

    def _read_outcome(self) -> None:
        """Account for the last step, if that has not been done yet: whether it was applied, and what its exchange says.

        The host learns it during the step after, so that a GPU always has work; or when somebody is to see the result.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        total = pending.sums.read()
        self._stop |= total[_STOP] > 0
        self._check_due |= total[_CHECK_DUE] > 0
        if total[_SKIPPED] > 0:
            self._count_skipped(pending)
            return
        self._skipped_in_a_row = 0
        self._meter.add(pending.result, self.config.batch_size)
        self._update_averages(pending.images_seen + self.config.batch_size)
        if self._spikes.is_spike(total[_LOSS]):
            self._meter.spike()
            self._report_step("loss_spike", "has a loss far above those before it", pending)

    def _update_averages(self, images_seen: int) -> None:
        """Update the averages with the weights of a step; the images seen are counted with its own."""
        with self.step.stopwatch("optimizer"):
            if self.step.ema is not None:
                self.step.ema.update(ramp_limit(self.config, images_seen))
            for average in self.step.averages.values():
                average.update_after(images_seen)

    def _raise_if_diverged(self) -> None:
        if self._diverged:
            raise _DivergedError

    def _is_shown(self, before: int) -> bool:
        """Return whether the result of a step is logged, saved or handed to a callback."""
        intervals = [self.config.log_images, self.config.checkpoint_images]
        intervals += [callback.every_images for callback in self.callbacks]
        seen = self._state.images_seen
        return any(_crosses(before, seen, interval) for interval in intervals) or self.checkpoints.is_due(seen)

    def _count_skipped(self, pending: _PendingStep) -> None:
        """Count a step that no engine has applied."""
        self._skipped_in_a_row += 1
        self._meter.skip(self.config.batch_size)
        self._report_step("skipped_step", "is skipped", pending)
        self._diverged = self._skipped_in_a_row > self.config.skip_limit

    def _report_step(self, kind: Kind, what: str, pending: _PendingStep) -> None:
        """Log a remarkable step in detail, and record it as an event."""
        terms, seen = self.world.sum_terms(pending.result.terms), pending.images_seen
        if self.world.is_first:
            norms = {name: norm.item() for name, norm in pending.result.gradient_norms.items()}
            figures = ", ".join(f"{name} {value:g}" for name, value in {**norms, **terms}.items())
            logger.warning("%s: the step at %s images %s: %s", self.job, f"{seen:,}", what, figures)
            self._record_event(kind, seen, figures=figures)

    def _run_callbacks(self, before: int) -> None:
        for callback in self.callbacks:
            if _crosses(before, self._state.images_seen, callback.every_images):
                with self._meter.waiting("observe_wait"):
                    callback.on_interval(self.step, self._state.images_seen, self.log)

    def _log_and_checkpoint(self, before: int, save: bool, done: bool) -> None:
        """Log a row, show progress and save a checkpoint, each where it is due.

        Args:
            before: images seen before the step.
            save: save whatever the interval says.
            done: the step was the last.

        Raises:
            CollapseError: the row shows a collapse that has lasted for too long; after a checkpoint.
        """
        seen, collapse = self._state.images_seen, None
        save = save or _crosses(before, seen, self.config.checkpoint_images) or self.checkpoints.is_due(seen)
        if save or _crosses(before, seen, self.config.log_images):
            self._row = self._meter.row() | {"learning_rate": self._learning_rate(before)}
            if self.utilization is not None:
                self._row |= self.utilization.metrics(before, self._row["images_per_second"])
            self.log.add(seen, self._row)
            collapse = self._detect_collapse(seen)
            save = save or collapse is not None
        if self.world.is_first and (done or time.monotonic() - self._shown_at > _PROGRESS_SECONDS):
            self._shown_at = time.monotonic()
            terms = {name: self._row[name] for name in _PROGRESS_TERMS if name in self._row}
            rate = self._rate.update(seen)
            self.session.progress(Progress(self.job, seen, self.config.images, rate=rate, terms=terms))
        if save:
            with self._meter.waiting("checkpoint_wait"):
                segment = self.log.flush_segment(seen)
                self._meter.saved(self.checkpoints.save(self.step, self._state, self._row, segment))
            self.session.checkpoint(seen, self._row)
            self._record_event("checkpoint", seen)
        if collapse is not None:
            self.checkpoints.wait_for_pending_save()
            raise self._collapse_error(collapse)

    def _detect_collapse(self, seen: int) -> Collapse | None:
        """Report a collapse that the last row shows, once; returns one that ends the training."""
        collapses = self._collapse_detector.add(seen, self._row)
        reported = min(WARNING_ROWS, self.config.collapse_limit or WARNING_ROWS)
        for collapse in collapses:
            if collapse.rows == reported and self.world.is_first:
                logger.warning("%s may have collapsed: %s; %s", self.job, collapse, collapse.remedy(self.job))
                self._record_event("collapse", seen, metric=collapse.metric, figures=str(collapse))
        return self._fatal(collapses)

    def _roll_back(self, begin: int, rollbacks: int) -> TrainState:
        """Restore the last checkpoint, and skip the data that the training met since.

        Args:
            begin: images seen at which the span begins.
            rollbacks: how many there are with this one.

        Raises:
            NonFiniteError: there is no checkpoint, or there were too many rollbacks.
        """
        diverged = self._state
        self.checkpoints.wait_for_pending_save()
        state = self.checkpoints.restore(self.step, begin)
        if state.images_seen <= begin or rollbacks > self.config.rollback_limit:
            raise NonFiniteError(
                f"{self.job}: gradients are not finite after {diverged.images_seen:,} images, as the log says of each "
                f"step: lower {self.job}.optimizer.learning_rate under another name, or raise {self.job}.rollback_limit"
            ) from None
        logger.warning(
            "%s: rolled back to %s images, skipping the data range up to %s",
            self.job,
            f"{state.images_seen:,}",
            f"{diverged.images_seen:,}",
        )
        self._record_event("rollback", diverged.images_seen, back_to=state.images_seen)
        return state.skip_past(diverged)

    def _record_event(self, kind: Kind, images_seen: int, **details: Any) -> None:
        if self.world.is_first:
            self.session.event(Event(kind, self.job, images_seen, details))


def _crosses(before: int, after: int, interval: int) -> bool:
    """Return whether a multiple of the interval lies in (before, after]."""
    return before // interval < after // interval
