"""Names of the trackers that a configuration can ask for."""

from typing import Literal

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
