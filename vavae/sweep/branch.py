"""Tokenizers whose trainings are the same up to a stage: the common part is trained once, and all go on from it."""

from vavae.config import digest
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.storage.artifact import Artifact, commit, read
from vavae.storage.storage import Storage

_LOG = "log"


def prefix_of(config: RunConfig, stage: int) -> RunConfig | None:
    """The configuration of the training up to a stage of the tokenizer's; None where it can't be trained by itself.

    That is where there is no training before the stage, where the stage begins after the budget, and where only later
    stages have an adversary: its first weights are then drawn before them.
    """
    training = config.train_vavae
    if not 0 <= stage < len(training.stages):
        return None
    images = training.stages[stage].from_images
    if not 0 < images < training.images:
        return None
    shorter = training.model_copy(update={"stages": training.stages[:stage], "images": images})
    prefix = config.model_copy(update={"train_vavae": shorter})
    return prefix if prefix.adversarial == config.adversarial else None


def branch(prefix: Run, run: Run) -> None:
    """Let a tokenizer's training go on from the end of its prefix: the same to the last bit as if trained whole.

    Puts the prefix's last checkpoint where the run looks for one, with its log; nothing where the run has checkpoints.

    Args:
        prefix: a finished training of `prefix_of(run.config, ...)`, on the same shards.
        run: has the shards and no tokenizer yet.
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
    commit(target, name, _continued(record, digest(run.identity("train_vavae"))))


def _checkpoints(training: Storage) -> dict[str, Artifact]:
    """The committed checkpoints of a training by their folders, whose names rise with the images seen."""
    folders = [name for name in training.list("checkpoints") if not training.is_file(name)]
    return {name: record for name in folders if (record := read(training, name)) is not None}


def _continued(record: Artifact, config: str) -> Artifact:
    """The record of a checkpoint as that of a training that goes on from it under another configuration."""
    state = record.details["state"]
    assert isinstance(state, dict), "a checkpoint's record holds its state"
    return record.model_copy(
        update={
            "config": config,
            "inputs": {**record.inputs, "prefix": record.digest},
            "details": {**record.details, "state": {**state, "config": config}},
        }
    )
