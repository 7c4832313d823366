"""The two trainings as a whole: data, step, loop, export. The same under Ray, torchrun and in a test."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from vavae.config import Config, digest
from vavae.data.latents import LatentStream, read_latent_manifest, read_statistics
from vavae.data.manifest import read_manifest
from vavae.data.order import Round, assign_lanes, order_of
from vavae.data.stream import ImageStream
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.interop.export import (
    ALIGNMENT,
    WEIGHTS,
    LightningDiTDescription,
    TokenizerDescription,
    below,
    save_export,
)
from vavae.storage.artefact import commit, discard
from vavae.tokenizer.normalizer import LatentNormalizer
from vavae.training.checkpoint import Checkpoints, TrainState
from vavae.training.config import TrainingConfig
from vavae.training.diffusion_step import DiffusionStep
from vavae.training.log import MetricsLog
from vavae.training.loop import train
from vavae.training.run import Job, Run
from vavae.training.session import Session
from vavae.training.step import Step
from vavae.training.tokenizer_step import TokenizerStep

SPLIT = "train"


def train_vavae(run: Run, session: Session, world: World) -> None:
    """Train the tokenizer on the run's image shards and export it. Every rank calls it."""
    config, folder = run.config, run.prefix("prepare_shards")
    manifest = read_manifest(run.storage, folder)
    order = order_of([shard.count for shard in manifest.splits[SPLIT]], config.seed, config.stream)
    size = config.train_vavae.batch_size // config.stream.lanes
    stream = ImageStream(run.storage.child(folder), manifest, SPLIT, order, size, config.stream, config.seed)
    step = TokenizerStep(config, stream, _rounds(run, world), world)
    state = _train(run, "train_vavae", step, config.train_vavae, session, world)
    if state.images_seen >= config.train_vavae.images:
        whole = _trained(step, "generator")
        description = TokenizerDescription(
            tokenizer=config.tokenizer,
            teacher=config.teacher,
            vision_foundation=config.losses.vision_foundation,
            feature_dim=step.teacher.feature_dim,
        )
        weights = {
            WEIGHTS: below("autoencoder.", whole),
            ALIGNMENT: below("alignment.", whole),
        }
        _export(run, "train_vavae", description, weights, state, world)


def train_lightningdit(run: Run, session: Session, world: World) -> None:
    """Train the LightningDiT on the run's latents and export it. Every rank calls it."""
    config = run.config
    latents = run.storage.child(run.prefix("precompute_latents"))
    manifest = read_latent_manifest(latents)
    normalizer = LatentNormalizer(*read_statistics(latents))
    model = config.lightningdit.with_classes(len(manifest.classes))
    if manifest.shape != (config.tokenizer.latent_dim, config.grid, config.grid):
        raise UserError(
            f"{latents.url()}: latents {list(manifest.shape)}, but tokenizer.latent_dim={config.tokenizer.latent_dim} "
            f"on a {config.grid} x {config.grid} grid is configured; compute the latents of this tokenizer"
        )
    order = order_of([shard.count for shard in manifest.splits[SPLIT]], config.seed, config.stream)
    size = config.train_lightningdit.batch_size // config.stream.lanes
    stream = LatentStream(latents, manifest, SPLIT, order, size, config.seed, config.stream.open_shards)
    step = DiffusionStep(config, model, stream, normalizer, _rounds(run, world), world)
    state = _train(run, "train_lightningdit", step, config.train_lightningdit, session, world)
    if state.images_seen >= config.train_lightningdit.images:
        description = LightningDiTDescription(
            lightningdit=model, latent_dim=manifest.shape[0], grid=config.grid, tokenizer=manifest.tokenizer
        )
        weights = {WEIGHTS: below("model.", _trained(step, "lightningdit"))}
        _export(run, "train_lightningdit", description, weights, state, world)


TRAININGS: dict[Job, Callable[[Run, Session, World], None]] = {
    "train_vavae": train_vavae,
    "train_lightningdit": train_lightningdit,
}
"""The trainings by the name of their job."""


def _rounds(run: Run, world: World) -> Sequence[Round]:
    return assign_lanes(run.config.stream.lanes, world.rank, world.size)


def _train(run: Run, job: Job, step: Step, config: TrainingConfig, session: Session, world: World) -> TrainState:
    """Run the loop on the run's storage; the state at its end."""
    folder = run.training_prefix(job)
    if world.is_first:
        run.claim(job)
    fresh = TrainState(images_seen=0, config=digest(run.identity(job)), data=digest(run.inputs(job)))
    checkpoints = Checkpoints(run.storage.child(f"{folder}/checkpoints"), fresh, config.keep_checkpoints, world)
    log = MetricsLog(
        job, run.storage.child(f"{folder}/log"), run.storage.child(f"tensorboard/{job}"), active=world.is_first
    )
    rounds = _rounds(run, world)
    return train(job, step, rounds, config, run.config.stream.workers, checkpoints, log, session, world)


def _trained(step: Step, engine: str) -> dict[str, Tensor]:
    """The weights to export: averaged, if the step keeps an average. Every rank calls it."""
    return step.engines[engine].weights() if step.ema is None else step.ema.weights()


def _export(
    run: Run,
    job: Job,
    description: Config,
    weights: Mapping[str, Mapping[str, Tensor]],
    state: TrainState,
    world: World,
) -> None:
    """Write the export and commit it, on rank 0."""
    if world.is_first:
        prefix = run.prefix(job)
        discard(run.storage, prefix)
        files = save_export(run.storage.child(prefix), description, weights)
        content = digest({name: info.sha256 for name, info in files.items()})
        commit(run.storage, prefix, run.record(job, content, files, images_seen=state.images_seen))
    world.barrier()
