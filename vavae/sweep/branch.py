"""Branches of a tokenizer's training: what several share up to a phase is trained once, and all resume from it."""

from vavae.config import digest
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.storage.artifact import Artifact, commit, read
from vavae.storage.storage import Storage

_LOG = "log"


def prefix_of(config: RunConfig, phase: int) -> RunConfig | None:
    """The configuration of a tokenizer's training up to a phase; None where that can't be trained by itself.

    It can't where there is no training before the phase, where the phase begins after the budget, and where only later
    phases have an adversary: its first weights are then drawn before them.

    Args:
        config: of the whole training.
        phase: index in `train_vavae.stages`.
    """
    training = config.train_vavae
    if not 0 <= phase < len(training.stages):
        return None
    images = training.stages[phase].from_images
    if not 0 < images < training.images:
        return None
    shorter = training.model_copy(update={"stages": training.stages[:phase], "images": images})
    prefix = config.model_copy(update={"train_vavae": shorter})
    return prefix if prefix.adversarial == config.adversarial else None


def branch(prefix: Run, run: Run) -> None:
    """Let a tokenizer's training resume from the end of its prefix: bitwise identical to training it whole.

    Copies the prefix's last checkpoint and log to where the run looks for them, unless the run has checkpoints.

    Args:
        prefix: a run with a finished training of `prefix_of(run.config, ...)`, on the same shards.
        run: a run with the shards and no tokenizer yet.
    """
    source = prefix.storage.child(prefix.training_prefix("train_vavae"))
    target = run.storage.child(run.training_prefix("train_vavae"))
    if _checkpoints(target):
        return
    name, record = max(_checkpoints(source).items())
    assert record.images_seen == prefix.require("train_vavae").images_seen, "a finished training keeps its last state"
    for path in record.files:
        target.copy_from(source, f"{name}/{path}")
    for path in source.list(_LOG):
        target.copy_from(source, path)
    commit(target, name, _reassign(record, digest(run.identity("train_vavae"))))


def _checkpoints(training: Storage) -> dict[str, Artifact]:
    """The committed checkpoints of a training by folder; names of folders rise with the images seen."""
    folders = [name for name in training.list("checkpoints") if not training.is_file(name)]
    return {name: record for name in folders if (record := read(training, name)) is not None}


def _reassign(record: Artifact, config: str) -> Artifact:
    """The record of a checkpoint for a training with another configuration that resumes from it.

    Args:
        record: of the prefix's checkpoint.
        config: digest of the other configuration.
    """
    state = record.details["state"]
    assert isinstance(state, dict), "a checkpoint's record holds its state"
    return record.model_copy(
        update={
            "config": config,
            "inputs": {**record.inputs, "prefix": record.digest},
            "details": {**record.details, "state": {**state, "config": config}},
        }
    )
