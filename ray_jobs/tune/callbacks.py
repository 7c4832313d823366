"""Callbacks of Ray Tune: the ledger of a sweep, standard output, and the trackers that the sweep file names."""

import math
import os
import time
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune import Callback
from ray.tune.experiment import Trial

from ray_jobs.tune.search import POINT, last_line, name_of
from vavae.errors import UserError
from vavae.progress import clock
from vavae.sweep.results import write_sweep
from vavae.sweep.rows import write_rows
from vavae.sweep.sweep import Sweep
from vavae.sweep.trial import IMAGES, Entry, read_ledger, write_entry
from vavae.tracking.trackers import check_trackers

_WRITE_SECONDS = 60.0


class LedgerCallback(Callback):
    """Keeps the ledger and the results up to date, and prints a line for whatever happens to a trial.

    Args:
        sweep: the sweep.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep, self._written = sweep, -math.inf

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `tune.Callback`."""
        print(f"{name_of(trial)}  begins", flush=True)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """See `tune.Callback`."""
        metrics = [f"{one.measure} {result[one.measure]:.4g}" for one in self._sweep.config.objectives]
        print(f"{name_of(trial)}  {result[IMAGES]:,.0f} images  {'  '.join(metrics)}", flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `tune.Callback`."""
        entry = read_ledger(self._sweep)[name_of(trial)]
        if entry.state == "running":  # Tune ended it at a rung
            entry = entry._replace(state="stopped", why=f"by {self._sweep.config.early_stopping.rule}")
            write_entry(self._sweep, entry)
        seconds = clock(trial.last_result.get("time_total_s", 0))
        print(f"{name_of(trial)}  {entry.state}  {entry.why}  {seconds}", flush=True)
        write_rows(self._sweep)
        self._write()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `tune.Callback`."""
        why = self._why(trial)
        write_entry(self._sweep, Entry(trial.config[POINT], "failed", why))
        print(f"{name_of(trial)}  failed  {why}", flush=True)
        if not _is_user_error(trial):
            print(f"{name_of(trial)}  traceback in {trial.error_file}", flush=True)
        self._write()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `tune.Callback`."""
        print(f"{name_of(trial)}  is retried  {self._why(trial)}", flush=True)

    def _why(self, trial: Trial) -> str:
        """Reason of a failure as the trial wrote it down, or as Ray gives it where the process was lost."""
        entry = read_ledger(self._sweep).get(name_of(trial))
        return entry.why if entry and entry.why else last_line(Path(trial.error_file).read_text())

    def _write(self) -> None:
        """Write the results so far, unless that was done within the last minute: in a store it takes many requests."""
        if time.monotonic() - self._written > _WRITE_SECONDS:
            write_sweep(self._sweep)
            self._written = time.monotonic()


def _is_user_error(trial: Trial) -> bool:
    """Return whether a trial ended with an error that its user can mend."""
    # Tune's file on this machine: Tune itself would read the copy in storage, which is not there yet.
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes()) if trial.pickled_error_file else None
    return isinstance(getattr(error, "cause", None), UserError)


def tune_callbacks(sweep: Sweep) -> list[Callback]:
    """The callbacks of a sweep, besides Tune's own for TensorBoard, JSON and CSV.

    Raises:
        UserError: a tracker of the sweep file is not installed.
    """
    callbacks: list[Callback] = [LedgerCallback(sweep)]
    check_trackers(sweep.config.tracking)
    for tool in sweep.config.tracking:
        if tool == "mlflow":
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            callbacks.append(MLflowLoggerCallback(experiment_name=sweep.config.name))
        else:
            from ray.air.integrations.wandb import WandbLoggerCallback

            callbacks.append(WandbLoggerCallback(project=os.environ.get("WANDB_PROJECT", sweep.config.name)))
    return callbacks
