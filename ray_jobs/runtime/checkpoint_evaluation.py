"""Checkpoints of the LightningDiT are measured by a task of their own, beside its training or when that has ended."""

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from ray_jobs.runtime.actor_pool import Share
from vavae.distributed.torch_settings import configure_torch
from vavae.evaluation.checkpoints import evaluate_checkpoint, prune_evaluated_checkpoints
from vavae.runs.config import CheckpointEvaluationConfig
from vavae.runs.evaluation_inputs import CheckpointEvaluationInputs
from vavae.runs.events import Event, EventLog
from vavae.runs.run import Job, Run
from vavae.training.checkpoints.metrics import CheckpointMetrics

logger = logging.getLogger(__name__)

JOB: Job = "train_lightningdit"
_LOCAL_POLL_SECONDS, _POLL_SECONDS = 2.0, 15.0


@contextmanager
def measured(run: Run) -> Iterator[None]:
    """Have the checkpoints measured that the block's training leaves; those of one that is interrupted wait."""
    training = run.config.train_lightningdit
    measure = training.measure
    measures = None if measure is None else CheckpointMetrics.of(run.training_folder(JOB), training)
    if measure is None or measures is None:
        yield
        return
    ended, measuring = threading.Event(), _Measuring(run, measure, measures)
    thread = threading.Thread(target=measuring.until, args=(ended,), daemon=True)
    if measure.when == "beside":
        thread.start()
    done = False
    try:
        yield
        done = True
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
        if not done:
            measuring.leave()
    measuring.rest()
    prune_evaluated_checkpoints(run.training_folder(JOB), run.config.train_lightningdit)


def evaluate_pending_checkpoints(run: Run) -> None:
    """Have the checkpoints measured that wait, as an interrupted job leaves them; the block's training has ended."""
    training = run.config.train_lightningdit
    measure = training.measure
    measures = None if measure is None else CheckpointMetrics.of(run.training_folder(JOB), training)
    if measure is not None and measures is not None:
        _Measuring(run, measure, measures).rest()
        prune_evaluated_checkpoints(run.training_folder(JOB), run.config.train_lightningdit)


class _Measuring:
    """One task at a time, and what becomes of the checkpoints that come meanwhile.

    Args:
        run: whose LightningDiT is trained.
        measure: how.
        measures: what is due, and what came out.
    """

    def __init__(self, run: Run, measure: CheckpointEvaluationConfig, measures: CheckpointMetrics) -> None:
        self._run, self._measures, self._events = run, measures, EventLog(run.storage)
        self._timeout_seconds = measure.timeout_seconds
        share = Share.of(run, measure.cpus, measure.gpus)
        self._task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0)(_measure)
        self._running: tuple[int, Any] | None = None
        self._ends_at = math.inf

    def until(self, ended: threading.Event) -> None:
        """Measure what comes until the training has ended."""
        seconds = _LOCAL_POLL_SECONDS if self._run.storage.is_local else _POLL_SECONDS
        while not ended.wait(seconds):
            try:
                self._look()
            except OSError as error:
                logger.warning("nothing is measured for now: %s", error)

    def leave(self) -> None:
        """End the task; its checkpoint goes on waiting."""
        if self._running is not None:
            ray.cancel(self._running[1], force=True)

    def rest(self) -> None:
        """Measure all that still waits."""
        self._finish(wait=True)
        for images_seen in self._measures.waiting():
            print(f"{JOB:<18} measures its checkpoint at {images_seen:,} images", flush=True)
            self._start(images_seen)
            self._finish(wait=True)

    def _look(self) -> None:
        self._finish(wait=False)
        waiting = self._measures.waiting()
        if self._running is None and waiting:
            self._start(waiting.pop())
        for images_seen in waiting:
            if self._running is not None and images_seen != self._running[0]:
                self._skip(images_seen, "another one was being measured")

    def _start(self, images_seen: int) -> None:
        self._running = (images_seen, self._task.remote(self._run, images_seen))
        self._ends_at = time.monotonic() + self._timeout_seconds

    def _finish(self, wait: bool) -> None:
        """Take note of a task that has ended, or has had its time."""
        if self._running is None:
            return
        images_seen, task = self._running
        left = self._ends_at - time.monotonic()
        try:
            ray.get(task, timeout=max(0, left) if wait else 0)
        except GetTimeoutError:
            if wait or left < 0:
                ray.cancel(task, force=True)
                self._skip(images_seen, f"longer than {self._timeout_seconds:g} s: raise {JOB}.measure.timeout_seconds")
        except RayError as error:
            self._skip(images_seen, str(error).strip().rpartition("\n")[2])
        else:
            figures = self._measures.values()[images_seen]
            self._events.add(Event("measured", JOB, images_seen, figures))
            self._running = None

    def _skip(self, images_seen: int, why: str) -> None:
        self._measures.write(images_seen, {})
        self._events.add(Event("measure_skipped", JOB, images_seen, {"why": why}))
        if self._running is not None and self._running[0] == images_seen:
            self._running = None


def _measure(run: Run, images_seen: int) -> None:
    configure_torch(run.config.workers)
    evaluate_checkpoint(CheckpointEvaluationInputs.of(run), images_seen)
