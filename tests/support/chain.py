"""From digits to the report in this process, without Ray: every stage reads what the one before has left on storage."""

from pathlib import Path

from support import in_process

from vavae.config import load
from vavae.data.shards.write import write_shards
from vavae.distributed.world import World
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.runs.training_inputs import begin_training
from vavae.training.session import LocalSession
from vavae.training.train import train

_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


class ImpatientSession(LocalSession):
    """Asks to stop at the first step, which is heard during the second."""

    def stop_requested(self) -> bool:
        return True


def whole_chain(root: Path, *overrides: str) -> Run:
    """A run below a folder that has gone through all its stages, the trainings in two attempts each."""
    engines = [f"{job}.engine.backend=torch" for job in ("train_vavae", "train_lightningdit")]
    measure = "train_lightningdit.measure={every_images: 128, images: 40, when: after}"
    run = Run(load(RunConfig, _CONFIG, [f"storage.root={root}", measure, *engines, *overrides]))
    write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, in_process.ignore)
    for session in (ImpatientSession(), LocalSession()):
        train(begin_training(run, "train_vavae", World()), session, World())
        assert (run.artifact("train_vavae") is None) == isinstance(session, ImpatientSession)
    in_process.precompute_latents(run)
    for session in (ImpatientSession(), LocalSession()):
        train(begin_training(run, "train_lightningdit", World()), session, World())
        assert (run.artifact("train_lightningdit") is None) == isinstance(session, ImpatientSession)
    in_process.sample(run)
    in_process.evaluate_and_report(run)
    return run
