"""Checks before any worker starts: inputs, storage access, pretrained weights."""

import importlib.util
import os
from collections.abc import Sequence

from ray_jobs.runtime.sources import missing_sources
from vavae.config import written_path
from vavae.data.prefetch import OrderedShards
from vavae.data.sample_order import assign_lanes, order_of
from vavae.data.shards.manifest import read_manifest
from vavae.data.shards.plan import TRAIN, plan_shards
from vavae.errors import UserError
from vavae.evaluation.config import EvaluateConfig
from vavae.evaluation.evaluator import check_data, find_reference
from vavae.interop.load import fetch_model
from vavae.latents.features import read_features_of, token_grid
from vavae.latents.manifest import read_latent_manifest
from vavae.latents.stream import ShardsWithFeatures
from vavae.losses.feature_discriminator import feature_dims
from vavae.metrics.features import describe
from vavae.metrics.reference import read_reference
from vavae.models.backbones.config import BackboneConfig
from vavae.models.backbones.inception import check_inception
from vavae.models.backbones.weights import check_weights, timm_name
from vavae.models.tokenizer.representation import check_encoder
from vavae.models.tokenizer.teacher import check_teacher, teacher_geometry
from vavae.runs.config import RunConfig
from vavae.runs.jobs import JOBS, TRAININGS, Job
from vavae.runs.run import Run
from vavae.sampling.labels import check_classes
from vavae.storage.storage import Storage
from vavae.tracking.trackers import check_trackers


def preflight(run: Run, jobs: Sequence[Job]) -> list[str]:
    """Check the inputs of jobs, storage access, and pretrained weights; a slow place of the cache is a warning.

    Args:
        run: the run.
        jobs: the jobs that are to do.

    Returns:
        One line for each pretrained network whose weights are missing here, with where to get them.

    Raises:
        UserError: storage can't be written, its cache is too small, or the configuration asks for what can't be.
    """
    config = run.config
    if {*TRAININGS, "evaluate"} & {*jobs}:
        check_trackers(config.tracking)
    features, token = config.latents.features, config.lightningdit.class_token
    if features is not None and token is not None and {"precompute_latents", "train_lightningdit"} & {*jobs}:
        width = teacher_geometry(features.teacher).feature_dim
        if token.width != width:
            raise UserError(
                f"lightningdit.class_token.width={token.width}, but {features.teacher.name} gives {width}: set it so"
            )
    if "evaluate" in jobs:
        if config.shards.validation_source is None and not config.shards.validation_fraction:
            raise UserError("shards.validation_fraction=0 leaves evaluate no held-out images: raise it")
        for field in ("class_agreement", "latent_space"):
            if getattr(config.evaluate, field) and importlib.util.find_spec("sklearn") is None:
                raise UserError(f"evaluate.{field} needs scikit-learn: pip install -e '.[metrics]'")
        _check_reference(config, run.storage)
    _check_images(run, jobs)
    try:
        run.storage.check_writing()
    except OSError as error:
        raise UserError(f"storage.root={written_path(config.storage.root)}: cannot write there ({error})") from error
    run.storage.warn_of_slow_cache()
    for job in TRAININGS:
        if job in jobs and JOBS[job].inputs[0] not in jobs:
            check_cache(run, job)
    start = config.train_vavae.start_from
    if "train_vavae" in jobs and start is not None and not run.storage.at(fetch_model(start, "tokenizer")).exists():
        raise UserError(
            f"train_vavae.start_from={written_path(start)}: nothing there; name a tokenizer/export or a released file"
        )
    if "train_vavae" in jobs or "evaluate" in jobs:
        for grid in {config.grid, config.smallest_grid}:
            check_teacher(config.teacher, grid)
    if "train_vavae" in jobs and config.adversarial and config.losses.adversarial.kind == "features":
        feature_dims(config.losses.adversarial.features)
    for grid in {config.grid, config.smallest_grid}:
        check_encoder(config.tokenizer, grid)
    if _featuring_job(config) in jobs and features is not None:
        check_teacher(features.teacher, token_grid(features, config.grid))
    missing = []
    for section, backbone in _backbones(config, jobs).items():
        timm_name(backbone)  # a network that there is not is a mistake, not something to fetch
        try:
            check_weights(backbone)
        except UserError as error:
            missing.append(f"{section}: {error}")
    return missing + (_missing_evaluation_files(config.evaluate, run.storage) if "evaluate" in jobs else [])


def _check_images(run: Run, jobs: Sequence[Job]) -> None:
    """List the sources of image shards that are to be made, and refuse what the classes and images do not allow.

    Raises:
        UserError: sources that no shards can be made of; guidance or given labels without classes, or an evaluation
            that needs more classes or images.
    """
    config, evaluate = run.config, run.config.evaluate
    samples = "sample" in jobs or "train_lightningdit" in jobs
    asked = samples and (config.guidance.scale != 1 or not isinstance(config.sample.labels, str))
    measured = "evaluate" in jobs and (evaluate.class_agreement or evaluate.latent_space is not None)
    if run.artifact("prepare_shards") is not None:
        manifest = read_manifest(run.storage, run.prefix("prepare_shards"))
        classes, images = manifest.classes, manifest.count(TRAIN)
    elif "prepare_shards" in jobs and not missing_sources(config.shards, run.storage):
        plan = plan_shards(config.shards, run.storage)
        classes, images = plan.classes, plan.train_images
    else:
        return
    if asked:
        check_classes(config, classes)
    if measured:
        check_data(evaluate, len(classes), images)


def check_cache(run: Run, job: Job) -> None:
    """Refuse a cache that can't hold the shards that the lanes of one machine read from a store at a time.

    Shards that are not there pass. Of a cluster it is not known which workers share a machine: one alone counts.

    Raises:
        UserError: it can't.
    """
    source, config = JOBS[job].inputs[0], run.config
    if run.artifact(source) is None:
        return
    folder = run.storage.child(run.prefix(source))
    manifest = read_manifest(folder) if job == "train_vavae" else read_latent_manifest(folder)
    infos, reads_latents = manifest.splits[TRAIN], job == "train_lightningdit" and not config.latents.online
    if not reads_latents:
        folder = run.folder("prepare_shards")
    order = order_of(infos.counts, config.seed, config.stream)
    shards = OrderedShards(folder, TRAIN, infos, order, micro_batch_size=1)
    if reads_latents and config.reads_features:
        features = read_features_of(folder, config.latents, config.grid).shards
        shards = ShardsWithFeatures(folder, TRAIN, infos, order, 1, features)
    if shards.are_local:
        return
    machines = config.workers.count if "RAY_ADDRESS" in os.environ else 1
    lanes = {turn.lane for turn in assign_lanes(config.stream.lanes, 0, machines)}
    needed, limit = shards.open_bytes(lanes), config.storage.cache_bytes
    if needed > limit:
        raise UserError(
            f"storage.cache_bytes={limit:,}, but the lanes of a machine ({len(lanes)}) draw from {needed:,} bytes of "
            f"shards at a time in {job}: raise it"
        )


def _featuring_job(config: RunConfig) -> Job:
    """The job that computes `latents.features`."""
    return "train_lightningdit" if config.latents.online else "precompute_latents"


def _backbones(config: RunConfig, jobs: Sequence[Job]) -> dict[str, BackboneConfig]:
    """Pretrained networks of jobs, by the section of the configuration that names them."""
    backbones: dict[str, BackboneConfig] = {}
    if "train_vavae" in jobs or "evaluate" in jobs:
        backbones["teacher"] = config.teacher.backbone
    encoding: set[Job] = {"train_vavae", "precompute_latents", "evaluate"}
    if config.latents.online:
        encoding.add("train_lightningdit")
    if config.tokenizer.encoder is not None and encoding & {*jobs}:
        backbones["tokenizer.encoder"] = config.tokenizer.encoder.backbone
    if _featuring_job(config) in jobs and config.latents.features is not None:
        backbones["latents.features.teacher"] = config.latents.features.teacher.backbone
    if "train_vavae" in jobs and config.losses.perceptual.kind == "lpips" and config.losses.perceptual.weight > 0:
        backbones["losses.perceptual"] = config.losses.perceptual.backbone
    if "train_vavae" in jobs and config.adversarial and config.losses.adversarial.kind == "features":
        backbones["losses.adversarial.features"] = config.losses.adversarial.features.backbone
    if "evaluate" in jobs:
        if config.evaluate.lpips:
            backbones["losses.perceptual"] = config.losses.perceptual.backbone
        for name in config.evaluate.metrics.extractors:
            backbone = config.evaluate.metrics.backbone(name)
            if backbone is not None:
                backbones[f"extractor {name} of evaluate.metrics"] = backbone
    return backbones


def _check_reference(config: RunConfig, storage: Storage) -> None:
    """Refuse a reference file on a local disk that can't be compared with; one in a store waits until it is fetched."""
    place = config.evaluate.reference_file
    if place is None:
        return
    file = storage.at(place)
    if file.is_local and file.is_file():
        metrics = config.evaluate.metrics
        read_reference(file.local_file(), place, describe(metrics.extractor, metrics), config.shards.height_and_width)


def _missing_evaluation_files(evaluate: EvaluateConfig, storage: Storage) -> list[str]:
    """List which of Inception and the reference file are needed and missing here, one line each."""
    missing = []
    try:
        if "inception" in evaluate.metrics.extractors:
            check_inception(evaluate.metrics.inception)
    except UserError as error:
        missing.append(f"evaluate.metrics: {error}")
    try:
        if evaluate.reference_file is not None:
            find_reference(storage, evaluate.reference_file)
    except UserError as error:
        missing.append(str(error))
    return missing
