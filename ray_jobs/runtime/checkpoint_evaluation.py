"""Evaluation of the LightningDiT's checkpoints, by a Ray task beside its training or after it."""

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from ray_jobs.runtime.resources import Resources
from vavae.distributed.torch_settings import configure_torch
from vavae.evaluation.checkpoints import evaluate_checkpoint, prune_evaluated_checkpoints
from vavae.runs.evaluation_inputs import CheckpointEvaluationInputs
from vavae.runs.events import Event, EventLog
from vavae.runs.jobs import Job
from vavae.runs.run import Run
from vavae.runs.training_config import CheckpointEvaluationConfig
from vavae.training.checkpoints.metrics import CheckpointMetrics

logger = logging.getLogger(__name__)

JOB: Job = "train_lightningdit"
_LOCAL_POLL_SECONDS, _POLL_SECONDS = 2.0, 15.0


@contextmanager
def evaluate_checkpoints_beside(run: Run) -> Iterator[None]:
    """Evaluate the checkpoints that the training in the block leaves; those of an interrupted one stay pending."""
    config, metrics = run.config.train_lightningdit.measure, _checkpoint_metrics(run)
    if config is None or metrics is None:
        yield
        return
    ended, evaluation = threading.Event(), _CheckpointEvaluation(run, config, metrics)
    thread = threading.Thread(target=evaluation.poll_until, args=(ended,), daemon=True)
    if config.when == "beside":
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
            evaluation.cancel()
    evaluation.evaluate_pending()
    prune_evaluated_checkpoints(run.training_folder(JOB), run.config.train_lightningdit)


def evaluate_pending_checkpoints(run: Run) -> None:
    """Evaluate the checkpoints that an interrupted job has left pending; for a training that has ended."""
    config, metrics = run.config.train_lightningdit.measure, _checkpoint_metrics(run)
    if config is not None and metrics is not None:
        _CheckpointEvaluation(run, config, metrics).evaluate_pending()
        prune_evaluated_checkpoints(run.training_folder(JOB), run.config.train_lightningdit)


def _checkpoint_metrics(run: Run) -> CheckpointMetrics | None:
    """Metrics of the checkpoints of a run's LightningDiT; None where they are not evaluated."""
    config = run.config.train_lightningdit
    return None if config.measure is None else CheckpointMetrics.of(run.training_folder(JOB), config)


class _CheckpointEvaluation:
    """Evaluates one checkpoint at a time, and skips those that come meanwhile.

    Args:
        run: the run whose LightningDiT is trained.
        config: resources and time of an evaluation.
        metrics: the checkpoints that are due, and the metrics of those evaluated.
    """

    def __init__(self, run: Run, config: CheckpointEvaluationConfig, metrics: CheckpointMetrics) -> None:
        self._run, self._metrics, self._events = run, metrics, EventLog(run.storage)
        self._timeout_seconds = config.timeout_seconds
        resources = Resources.of(run.config.workers, config.cpus, config.gpus)
        self._task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)(_evaluate)
        self._running: tuple[int, Any] | None = None
        self._ends_at = math.inf

    def poll_until(self, ended: threading.Event) -> None:
        """Evaluate checkpoints as they come until the training has ended."""
        seconds = _LOCAL_POLL_SECONDS if self._run.storage.is_local else _POLL_SECONDS
        while not ended.wait(seconds):
            try:
                self._poll()
            except OSError as error:
                logger.warning("checkpoints are not evaluated for now: %s", error)

    def cancel(self) -> None:
        """Cancel the task; its checkpoint stays pending."""
        if self._running is not None:
            ray.cancel(self._running[1], force=True)

    def evaluate_pending(self) -> None:
        """Evaluate all pending checkpoints, one after another."""
        self._finish(wait=True)
        for images_seen in self._metrics.waiting():
            print(f"{JOB:<18} evaluates its checkpoint at {images_seen:,} images", flush=True)
            self._start(images_seen)
            self._finish(wait=True)

    def _poll(self) -> None:
        self._finish(wait=False)
        pending = self._metrics.waiting()
        if self._running is None and pending:
            self._start(pending.pop())
        for images_seen in pending:
            if self._running is not None and images_seen != self._running[0]:
                self._skip(images_seen, "another one was being evaluated")

    def _start(self, images_seen: int) -> None:
        self._running = (images_seen, self._task.remote(self._run, images_seen))
        self._ends_at = time.monotonic() + self._timeout_seconds

    def _finish(self, wait: bool) -> None:
        """Record how the task came out, if it has ended or timed out.

        Args:
            wait: wait for that.
        """
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
            self._events.add(Event("measured", JOB, images_seen, self._metrics.values()[images_seen]))
            self._running = None

    def _skip(self, images_seen: int, why: str) -> None:
        self._metrics.write(images_seen, {})
        self._events.add(Event("measure_skipped", JOB, images_seen, {"why": why}))
        if self._running is not None and self._running[0] == images_seen:
            self._running = None


def _evaluate(run: Run, images_seen: int) -> None:
    configure_torch(run.config.workers)
    evaluate_checkpoint(CheckpointEvaluationInputs.of(run), images_seen)
