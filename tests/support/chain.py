"""From digits to the report in this process, without Ray: every stage reads what the one before has left on storage."""

from pathlib import Path

from vavae.config import digest, load
from vavae.data.shards.manifest import read_manifest
from vavae.data.shards.write import write_shards
from vavae.distributed.world import World
from vavae.interop.export import load_tokenizer
from vavae.latents.extract import Extraction
from vavae.report.write_report import write_evaluation
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.runs.training_inputs import begin_training
from vavae.sampling.inputs import open_sampler, sample_set
from vavae.sampling.sample_files import write_sample_files
from vavae.storage.artifact import commit
from vavae.training.session import LocalSession
from vavae.training.train import train

_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


class ImpatientSession(LocalSession):
    """Asks to stop at the first step."""

    def stop_requested(self) -> bool:
        return True


def _ignore(*_: object) -> None:
    pass


def whole_chain(root: Path, *overrides: str) -> Run:
    """A run below a folder that has gone through all its stages, the trainings in two attempts each."""
    engines = [f"{job}.engine.backend=torch" for job in ("train_vavae", "train_lightningdit")]
    measure = "train_lightningdit.measure={every_images: 128, images: 40, when: after}"
    run = Run(load(RunConfig, _CONFIG, [f"storage.root={root}", measure, *engines, *overrides]))
    write_shards(run.storage, run.prefix("prepare_shards"), run.config.shards, _ignore)
    for session in (ImpatientSession(), LocalSession()):
        train(begin_training(run, "train_vavae", World()), session, World())
        assert (run.artifact("train_vavae") is None) == isinstance(session, ImpatientSession)
    _extract(run)
    for session in (ImpatientSession(), LocalSession()):
        train(begin_training(run, "train_lightningdit", World()), session, World())
        assert (run.artifact("train_lightningdit") is None) == isinstance(session, ImpatientSession)
    _sample(run)
    write_evaluation(run, _ignore)
    return run


def _extract(run: Run) -> None:
    config, images = run.config, run.prefix("prepare_shards")
    extraction = Extraction(
        run.storage.child(images),
        read_manifest(run.storage, images),
        run.storage.child(run.prefix("precompute_latents")),
        run.require("train_vavae").digest,
        config.latents,
    )
    tokenizer, _ = load_tokenizer(run.storage.child(run.prefix("train_vavae")))
    for task in extraction.tasks():
        extraction.encode(task, tokenizer, World().device, _ignore)
    content, files = extraction.finish((config.tokenizer.latent_dim, config.grid, config.grid))
    commit(run.storage, run.prefix("precompute_latents"), run.record("precompute_latents", content, files))


def _sample(run: Run) -> None:
    generator, samples = open_sampler(run, World().device), sample_set(run)
    for shard in samples.shards():
        samples.generate(shard, generator, _ignore)
    files = samples.files()
    beside = write_sample_files(run)
    commit(run.storage, run.prefix("sample"), run.record("sample", digest(list(files)), files, beside=beside))
