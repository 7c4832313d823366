"""MLflow, on the server that `MLFLOW_TRACKING_URI` names, or in a file beside the runs of this machine."""

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient
from PIL.Image import Image

from vavae.config.credentials import has_credentials
from vavae.tracking.tracker import TrackedJob

_IDENTITY, _GROUP, _STEP = "vavae.id", "vavae.run", "vavae.images_seen"
_PARAMS_PER_CALL, _PARAM_LENGTH = 100, 6_000


class MlflowRun:
    """A `TrackerRun` of MLflow, in the experiment `MLFLOW_EXPERIMENT_NAME` or `vavae`.

    Args:
        job: the job.
        identity: its identity, a tag by which another attempt finds it.
    """

    def __init__(self, job: TrackedJob, identity: str) -> None:
        uri, pictures = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:  # one database for all runs, whatever the folder of the process
            if not job.storage.is_local:
                raise ValueError("set MLFLOW_TRACKING_URI on the machines of the workers: the run is in a bucket")
            root = job.storage.url().rstrip("/").rpartition("/")[0]
            uri, pictures = f"sqlite:///{root}/mlflow.db", f"{root}/mlflow"
        self._client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vavae")
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            where = self._client.create_experiment(name, artifact_location=pictures)
        else:
            where = experiment.experiment_id
        found = self._client.search_runs([where], f"tags.`{_IDENTITY}` = '{identity}'", max_results=1)
        self.last_step = -1
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            self.last_step = int(found[0].data.tags.get(_STEP, -1))
        else:
            run = self._client.create_run(where, tags={_IDENTITY: identity, _GROUP: job.run}, run_name=job.name)
            self._id = run.info.run_id
            params = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in _flat(job.config)]
            for start in range(0, len(params), _PARAMS_PER_CALL):  # they can't be changed by a later attempt
                self._client.log_batch(self._id, params=params[start : start + _PARAMS_PER_CALL])
        shown = uri.startswith(("http://", "https://")) and not has_credentials(uri)
        self.link = f"{uri.rstrip('/')}/#/experiments/{where}/runs/{self._id}" if shown else None

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """See `TrackerRun.metrics`."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in row.items()]
        self._client.log_batch(self._id, metrics=metrics, tags=[RunTag(_STEP, str(step))])

    def picture(self, step: int, name: str, picture: Image) -> None:
        """See `TrackerRun.picture`."""
        self._client.log_image(self._id, picture.convert("RGB"), key=name, step=step)

    def finish(self, failed: bool) -> None:
        """See `TrackerRun.finish`."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _flat(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values of a configuration by dotted key."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
