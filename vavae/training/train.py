"""The two trainings as a whole: data, step, loop, export. The same under Ray, torchrun and in a test."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vavae.config import Config, digest
from vavae.data.image_stream import ImageStream
from vavae.data.sample_order import AccumulationStep, assign_lanes, order_of
from vavae.data.shards.manifest import Manifest, read_manifest
from vavae.distributed.world import World
from vavae.interop.export import (
    ALIGNMENT,
    WEIGHTS,
    LightningDiTDescription,
    TokenizerDescription,
    load_tokenizer,
    save_export,
    strip_prefix,
)
from vavae.latents.manifest import read_latents_of
from vavae.latents.statistics import read_statistics
from vavae.latents.stream import LatentStream
from vavae.models.tokenizer.normalizer import LatentNormalizer
from vavae.models.tokenizer.teacher import teacher_geometry
from vavae.runs.config import TrainingConfig
from vavae.runs.run import Job, Run
from vavae.storage.artifact import commit, discard
from vavae.storage.storage import Storage
from vavae.training.callbacks.callback import PREVIEWS, Callback, exported_weights
from vavae.training.callbacks.diffusion import SamplePreview
from vavae.training.callbacks.tokenizer import LatentProbe, ReconstructionPreview, held_out_images
from vavae.training.checkpoints.checkpoint import Checkpoints
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.diffusion_step import DiffusionStep
from vavae.training.hardware import HARDWARE, Hardware
from vavae.training.logging.log import MetricsLog
from vavae.training.logging.utilization import Utilization
from vavae.training.session import Session
from vavae.training.step import Step
from vavae.training.tokenizer_step import TokenizerStep
from vavae.training.trainer import train
from vavae.training.warm_start import starting_weights

SPLIT = "train"


def train_vavae(run: Run, session: Session, world: World) -> None:
    """Train the tokenizer on the run's image shards and export it. Every rank calls it."""
    config, folder = run.config, run.prefix("prepare_shards")
    manifest = read_manifest(run.storage, folder)
    order = order_of([shard.count for shard in manifest.splits[SPLIT]], config.seed, config.stream)
    size = config.train_vavae.batch_size // config.stream.lanes
    stream = ImageStream(run.storage.child(folder), manifest, SPLIT, order, size, config.stream, config.seed)
    checkpoints = _checkpoints(run, "train_vavae", session, world)
    seen = checkpoints.images_seen()
    start = None if seen else starting_weights(config, teacher_geometry(config.teacher).feature_dim)
    callbacks = _tokenizer_callbacks(run, manifest, world)
    for stage in config.tokenizer_phases(seen):
        if stage.until_images < seen:
            continue
        if stage.from_images and world.any(session.stop_requested()):
            return
        step = TokenizerStep(config, stage, start, stream, _accumulation_steps(run, world), world)
        span = range(stage.from_images, stage.until_images)
        state = _train(run, "train_vavae", step, span, checkpoints, session, world, callbacks)
        if state.images_seen < stage.until_images:
            return
        start = step.weights()
    assert start is not None, "a budget has at least one stage"
    description = TokenizerDescription(
        tokenizer=config.tokenizer,
        teacher=config.teacher,
        vision_foundation=config.losses.vision_foundation,
        feature_dim=step.teacher.feature_dim,
    )
    whole = start.engines["generator"] if start.average is None else start.average
    weights = {WEIGHTS: strip_prefix("autoencoder.", whole), ALIGNMENT: strip_prefix("alignment.", whole)}
    _export(run, "train_vavae", description, weights, state, checkpoints, world)


def train_lightningdit(run: Run, session: Session, world: World) -> None:
    """Train the LightningDiT on the run's latents and export it. Every rank calls it."""
    config = run.config
    latents = run.storage.child(run.prefix("precompute_latents"))
    shape = (config.tokenizer.latent_dim, config.grid, config.grid)
    manifest = read_latents_of(latents, run.require("train_vavae").digest, shape)
    normalizer = LatentNormalizer(*read_statistics(latents))
    model = config.lightningdit.with_classes(len(manifest.classes))
    order = order_of([shard.count for shard in manifest.splits[SPLIT]], config.seed, config.stream)
    size = config.train_lightningdit.batch_size // config.stream.lanes
    stream = LatentStream(latents, manifest, SPLIT, order, size, config.seed, config.stream.open_shards)
    step = DiffusionStep(config, model, stream, normalizer, _accumulation_steps(run, world), world)
    training = config.train_lightningdit
    checkpoints = _checkpoints(run, "train_lightningdit", session, world)
    callbacks: list[Callback] = []
    if training.preview_images is not None:
        tokenizer, _ = load_tokenizer(run.storage.child(run.prefix("train_vavae")))
        folder, classes = _previews(run, "train_lightningdit"), manifest.classes
        callbacks.append(
            SamplePreview(config, model, tokenizer, normalizer, classes, training.preview_images, folder, world)
        )
    state = _train(run, "train_lightningdit", step, range(training.images), checkpoints, session, world, callbacks)
    if state.images_seen < training.images:
        return
    description = LightningDiTDescription(
        lightningdit=model, latent_dim=manifest.shape[0], grid=config.grid, tokenizer=manifest.tokenizer
    )
    weights = strip_prefix("model.", exported_weights(step, "lightningdit"))
    _export(run, "train_lightningdit", description, {WEIGHTS: weights}, state, checkpoints, world)


TRAININGS: dict[Job, Callable[[Run, Session, World], None]] = {
    "train_vavae": train_vavae,
    "train_lightningdit": train_lightningdit,
}
"""The trainings by the name of their job."""


def _accumulation_steps(run: Run, world: World) -> Sequence[AccumulationStep]:
    return assign_lanes(run.config.stream.lanes, world.rank, world.size)


def _checkpoints(run: Run, job: Job, session: Session, world: World) -> Checkpoints:
    """The checkpoints of a training, which is claimed for this configuration."""
    if world.is_first:
        run.claim(job)
    fresh = TrainState(images_seen=0, config=digest(run.identity(job)), data=digest(run.inputs(job)))
    storage = run.storage.child(run.training_prefix(job))
    return Checkpoints(storage, fresh, Retention.of(run, job), world, session.owner)


def _tokenizer_callbacks(run: Run, manifest: Manifest, world: World) -> list[Callback]:
    """All that looks at the tokenizer while it trains."""
    training = run.config.train_vavae
    if training.probe_images is None and training.preview_images is None:
        return []
    images = held_out_images(run, manifest) if world.is_first else torch.empty(0)  # the others look at nothing
    callbacks: list[Callback] = []
    if training.probe_images is not None:
        callbacks.append(LatentProbe(run.config, images, training.probe_images, world))
    if training.preview_images is not None:
        folder = _previews(run, "train_vavae")
        callbacks.append(ReconstructionPreview(run.config, images, training.preview_images, folder, world))
    return callbacks


def _previews(run: Run, job: Job) -> Storage:
    return run.storage.child(f"{run.training_prefix(job)}/{PREVIEWS}")


def _train(
    run: Run,
    job: Job,
    step: Step,
    span: range,
    checkpoints: Checkpoints,
    session: Session,
    world: World,
    callbacks: Sequence[Callback] = (),
) -> TrainState:
    """Run the loop on the run's storage; the state at its end."""
    if world.is_first:
        run.storage.write_json(f"{run.training_prefix(job)}/{HARDWARE}", Hardware.of(world).model_dump())
    log = MetricsLog(
        job,
        run.storage.child(f"{run.training_prefix(job)}/log"),
        run.storage.child(f"tensorboard/{job}"),
        active=world.is_first,
        show=session.row,
    )
    config: TrainingConfig = getattr(run.config, job)
    accumulation_steps, reading = _accumulation_steps(run, world), run.config.stream
    utilization = Utilization(run.config, job, world) if world.is_first else None
    return train(
        job, step, accumulation_steps, span, config, reading, checkpoints, log, session, world, callbacks, utilization
    )


def _export(
    run: Run,
    job: Job,
    description: Config,
    weights: Mapping[str, Mapping[str, Tensor]],
    state: TrainState,
    checkpoints: Checkpoints,
    world: World,
) -> None:
    """Write the export and commit it, on rank 0."""
    checkpoints.check_lease()
    if world.is_first:
        prefix = run.prefix(job)
        discard(run.storage, prefix)
        files = save_export(run.storage.child(prefix), description, weights)
        content = digest({name: info.sha256 for name, info in files.items()})
        commit(run.storage, prefix, run.record(job, content, files, images_seen=state.images_seen))
    world.barrier()
