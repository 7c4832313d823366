"""The two trainings as a whole: data, step, loop, export. The same under Ray, torchrun and in a test."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from vavae.config import Config
from vavae.data.image_stream import ImageStream
from vavae.data.sample_order import order_of
from vavae.distributed.world import World
from vavae.interop.export import (
    ALIGNMENT,
    WEIGHTS,
    LightningDiTDescription,
    TokenizerDescription,
    commit_export,
    load_exported_tokenizer,
    strip_prefix,
)
from vavae.latents.features import read_features_of
from vavae.latents.manifest import LatentManifest, read_latents_of
from vavae.latents.online import OnlineEncoder
from vavae.latents.statistics import LatentNormalizer, read_statistics
from vavae.latents.stream import EncodedImageStream, FeaturesToRead, LatentStream
from vavae.models.tokenizer.representation import RepresentationEncoder, load_encoder
from vavae.models.tokenizer.teacher import teacher_geometry
from vavae.progress import Progress
from vavae.runs.config import RunConfig
from vavae.runs.output import JobOutput
from vavae.runs.training_inputs import (
    LightningDiTTrainingInputs,
    TokenizerTrainingInputs,
    TrainingInputs,
    resolve_once,
)
from vavae.sampling.labels import check_classes
from vavae.tracking.tracker import Tracker
from vavae.tracking.trackers import open_trackers
from vavae.training.callbacks.callback import PREVIEWS, Callback, exported_weights
from vavae.training.callbacks.diffusion import SamplePreview
from vavae.training.callbacks.tokenizer import LatentProbe, ReconstructionPreview, held_out_images
from vavae.training.checkpoints.checkpoint import Checkpoints, EarlierCheckpointError
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import TrainState
from vavae.training.diffusion_step import DiffusionStep
from vavae.training.ema import initial_share_warning
from vavae.training.hardware import HARDWARE, Hardware
from vavae.training.logging.log import MetricsLog
from vavae.training.logging.utilization import Utilization
from vavae.training.session import Session
from vavae.training.step import Step, compiles
from vavae.training.tokenizer_step import TokenizerStep
from vavae.training.trainer import Trainer
from vavae.training.warm_start import starting_lightningdit, starting_weights

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

SPLIT = "train"
_OFFLOAD_THREADS = 4
"""Threads of a worker below which an update in the host's memory keeps its GPU waiting."""


class _Attempt:
    """One attempt at a training: it alone may write checkpoints and the export until another one begins.

    Args:
        inputs: configuration and folders.
        session: runner of the training.
        world: the ranks; each makes one.
        trackers: what shows the training, on rank 0.
    """

    def __init__(self, inputs: TrainingInputs, session: Session, world: World, trackers: Sequence[Tracker]) -> None:
        self._inputs, self.session, self.world, self._trackers = inputs, session, world, trackers
        fresh = TrainState(images_seen=0, config=inputs.config_digest, data=inputs.data_digest)
        retention = Retention.of(inputs.folder, inputs.training)
        self.checkpoints = Checkpoints(inputs.folder, fresh, retention, world, session.owner)

    def fit(self, step: Step, span: range, callbacks: Sequence[Callback]) -> TrainState:
        """Train a step from the newest checkpoint over a span of images seen; returns the state at the end."""
        inputs, world = self._inputs, self.world
        if world.is_first:
            inputs.folder.write_json(HARDWARE, Hardware.of(world, _lanes_at_once(inputs)).model_dump())
        log = MetricsLog(
            inputs.job,
            inputs.folder.child("log"),
            self._trackers,
            active=world.is_first,
            show=self.session.row,
        )
        if world.is_first and compiles(inputs.training, inputs.config.workers, world.device):
            doing = "compiling in the first step, which takes a minute or more"
            self.session.progress(Progress(inputs.job, 0, None, doing=doing))
        trainer = Trainer(
            job=inputs.job,
            step=step,
            config=inputs.training,
            stream=inputs.config.stream,
            checkpoints=self.checkpoints,
            log=log,
            session=self.session,
            world=world,
            callbacks=callbacks,
            utilization=Utilization(inputs.config, inputs.job, world) if world.is_first else None,
        )
        return trainer.fit(span)

    def export(
        self,
        description: Config,
        weights: Mapping[str, Mapping[str, Tensor]],
        state: TrainState,
        output: JobOutput | None = None,
    ) -> None:
        """Write the export, or another output, and commit it, on rank 0. Every rank calls it."""
        self.checkpoints.check_lease()
        if self.world.is_first:
            self.session.progress(Progress(self._inputs.job, 0, None, doing="writing the export"))
            commit_export(output or self._inputs.output, description, weights, state.images_seen)
        self.world.barrier()


def _lanes_at_once(inputs: TrainingInputs) -> int:
    if not isinstance(inputs, LightningDiTTrainingInputs):
        return 1
    lanes = inputs.config.train_lightningdit.lanes_at_once
    assert lanes != "auto", "lanes_at_once is resolved before the training"
    return lanes


def train(inputs: TokenizerTrainingInputs | LightningDiTTrainingInputs, session: Session, world: World) -> None:
    """Train the model of these inputs and export it. Every rank calls it."""
    threads = inputs.config.workers.threads
    if world.is_first and inputs.training.engine.offload_optimizer and threads < _OFFLOAD_THREADS:
        logger.warning(
            "%s.engine.offload_optimizer=true updates the weights with workers.threads=%d, which is slow; "
            "set workers.threads and workers.cpus to %d or more",
            inputs.job,
            threads,
            _OFFLOAD_THREADS,
        )
    warning = initial_share_warning(inputs.job, inputs.training)
    if world.is_first and warning is not None:
        logger.warning(warning)
    names = inputs.config.tracking if world.is_first else ()
    with open_trackers(names, inputs.tracked) as trackers:
        if isinstance(inputs, TokenizerTrainingInputs):
            _train_vavae(inputs, session, world, trackers)
        else:
            _train_lightningdit(inputs, session, world, trackers)


def _train_vavae(inputs: TokenizerTrainingInputs, session: Session, world: World, trackers: Sequence[Tracker]) -> None:
    """Train the tokenizer on image shards and export it. Every rank calls it."""
    config, manifest = inputs.config, inputs.manifest
    order = order_of(manifest.splits[SPLIT].counts, config.seed, config.stream)
    size = config.train_vavae.batch_size // config.stream.lanes
    stream = ImageStream(inputs.shards, manifest, SPLIT, order, size, config.stream, config.seed)
    encoder = load_encoder(config.tokenizer)
    if encoder is not None:
        encoder.to(world.device)
    attempt, callbacks = _Attempt(inputs, session, world, trackers), _tokenizer_callbacks(inputs, world, encoder)
    trained = _until_restored(lambda: _train_phases(attempt, config, stream, callbacks, encoder))
    if trained is None:
        return
    step, state = trained
    description = TokenizerDescription(
        tokenizer=config.tokenizer,
        teacher=config.teacher,
        vision_foundation=config.losses.vision_foundation,
        feature_dim=teacher_geometry(config.teacher).feature_dim,
        encoder_weights=None if encoder is None else encoder.weights_digest(),
    )
    exported = exported_weights(step, "generator")
    weights = {WEIGHTS: strip_prefix("autoencoder.", exported)}
    if step.model.alignment is not None:
        weights[ALIGNMENT] = strip_prefix("alignment.", exported)
    attempt.export(description, weights, state)


def _train_phases(
    attempt: _Attempt,
    config: RunConfig,
    stream: ImageStream,
    callbacks: Sequence[Callback],
    encoder: RepresentationEncoder | None,
) -> tuple[TokenizerStep, TrainState] | None:
    """Train the tokenizer in its phases; returns the last step and its state, None where the training was stopped.

    Raises:
        EarlierCheckpointError: see `Checkpoints.restore`.
    """
    world, seen = attempt.world, attempt.checkpoints.images_seen()
    start = None if seen else starting_weights(config, teacher_geometry(config.teacher).feature_dim)
    step: TokenizerStep | None = None
    for phase in config.tokenizer_phases(seen):
        if phase.until_images < seen:
            continue
        if phase.from_images and world.any(attempt.session.stop_requested()):
            return None
        awaits_checkpoint = seen > 0 and step is None
        begin = start if step is None else step.weights()
        step = TokenizerStep(config, phase, begin, stream, world, awaits_checkpoint, encoder)
        state = attempt.fit(step, range(phase.from_images, phase.until_images), callbacks)
        if state.images_seen < phase.until_images:
            return None
    assert step is not None, "a budget has at least one phase"
    return step, state


def _until_restored(train: Callable[[], Result]) -> Result:
    """Call a training again where its newest checkpoint is damaged, which it knows then: from the one before."""
    while True:
        try:
            return train()
        except EarlierCheckpointError:
            pass


def _train_lightningdit(
    inputs: LightningDiTTrainingInputs, session: Session, world: World, trackers: Sequence[Tracker]
) -> None:
    """Train the LightningDiT on latents and export it. Every rank calls it."""
    config, training = inputs.config, inputs.config.train_lightningdit
    manifest, normalizer, stream, encoder = open_latents(inputs, world)
    check_classes(config, manifest.classes)
    model = config.lightningdit.with_classes(len(manifest.classes))
    attempt = _Attempt(inputs, session, world, trackers)
    callbacks: list[Callback] = []
    if training.preview_images is not None:
        tokenizer = (
            load_exported_tokenizer(inputs.tokenizer, encodes=False)[0] if world.is_first else None
        )  # only rank 0 decodes
        folder, classes = inputs.folder.child(PREVIEWS), manifest.classes
        callbacks.append(
            SamplePreview(config, model, tokenizer, normalizer, classes, training.preview_images, folder, world)
        )

    def train() -> tuple[DiffusionStep, TrainState]:
        awaits_checkpoint = attempt.checkpoints.images_seen() > 0
        start = None if awaits_checkpoint else starting_lightningdit(inputs.start, model)
        step = DiffusionStep(config, model, stream, normalizer, world, awaits_checkpoint, start, encoder)
        return step, attempt.fit(step, range(training.images), callbacks)

    step, state = _until_restored(train)
    if state.images_seen < training.images:
        return
    description = LightningDiTDescription(
        lightningdit=model,
        latent_dim=manifest.shape[0],
        grid=config.grid,
        tokenizer=manifest.tokenizer,
        statistics=manifest.statistics,
    )
    for name, output in inputs.averages.items():
        attempt.export(description, {WEIGHTS: strip_prefix("model.", step.averages[name].weights())}, state, output)
    weights = strip_prefix("model.", exported_weights(step, "lightningdit"))
    attempt.export(description, {WEIGHTS: weights}, state)


class Latents(NamedTuple):
    """The latents that a LightningDiT is trained on."""

    manifest: LatentManifest
    normalizer: LatentNormalizer
    stream: LatentStream | EncodedImageStream
    """Micro-batches of them, or of the images."""
    encoder: OnlineEncoder | None
    """Encodes the images; None where latents are read."""


def open_latents(inputs: LightningDiTTrainingInputs, world: World) -> Latents:
    """Open the latents of a training, stored ones or its own. Every rank calls it.

    Raises:
        CommonError: there are none, or others than the configuration says.
    """
    config = inputs.config
    manifest, normalizer, features = resolve_once(world, lambda: _read_latents(inputs, config.latent_shape))
    order = order_of(manifest.splits[SPLIT].counts, config.seed, config.stream)
    size = inputs.training.batch_size // config.stream.lanes
    if inputs.images is None or inputs.image_manifest is None:
        open_shards = config.stream.open_shards
        stream = LatentStream(inputs.latents, manifest, SPLIT, order, size, config.seed, open_shards, features)
        return Latents(manifest, normalizer, stream, None)
    images = EncodedImageStream(
        inputs.images, inputs.image_manifest, manifest, SPLIT, order, size, config.stream, config.seed
    )
    encoder = OnlineEncoder(load_exported_tokenizer(inputs.tokenizer)[0], config, world.device)
    return Latents(manifest, normalizer, images, encoder)


def _read_latents(
    inputs: LightningDiTTrainingInputs, shape: tuple[int, int, int]
) -> tuple[LatentManifest, LatentNormalizer, FeaturesToRead | None]:
    config, features, steps = inputs.config, None, inputs.config.feature_steps
    kind, statistics, online = config.tokenizer.kind, config.latents.statistics, config.latents.online
    manifest = read_latents_of(inputs.latents, inputs.tokenizer_digest, shape, kind, statistics, online)
    if steps is not None and not online:
        features = FeaturesToRead(read_features_of(inputs.latents, config.latents, config.grid), steps)
    return manifest, LatentNormalizer(*read_statistics(inputs.latents)), features


def _tokenizer_callbacks(
    inputs: TokenizerTrainingInputs, world: World, encoder: RepresentationEncoder | None
) -> list[Callback]:
    config, training = inputs.config, inputs.config.train_vavae
    if training.probe_images is None and training.preview_images is None:
        return []
    # Only rank 0 needs the images.
    images = held_out_images(inputs.shards, inputs.manifest) if world.is_first else torch.empty(0)
    callbacks: list[Callback] = []
    if training.probe_images is not None:
        callbacks.append(LatentProbe(config, images, training.probe_images, world, encoder))
    if training.preview_images is not None:
        folder = inputs.folder.child(PREVIEWS)
        callbacks.append(ReconstructionPreview(config, images, training.preview_images, folder, world, encoder))
    return callbacks
