"""Everything that can be checked before a worker starts."""

import importlib.util
import os
from collections.abc import Sequence

from vavae.data.prefetch import OrderedShards
from vavae.data.sample_order import assign_lanes, order_of
from vavae.data.shards.manifest import read_manifest
from vavae.data.shards.plan import TRAIN
from vavae.data.sources.opening import open_source
from vavae.errors import UserError
from vavae.evaluation.evaluator import find_reference
from vavae.latents.manifest import read_latent_manifest
from vavae.models.backbones.config import BackboneConfig
from vavae.models.backbones.inception import check_inception
from vavae.models.backbones.weights import check_weights, timm_name
from vavae.models.tokenizer.teacher import check_teacher
from vavae.runs.config import RunConfig
from vavae.runs.run import JOBS, TRAININGS, Job, Run
from vavae.sampling.labels import label_law


def preflight(run: Run, jobs: Sequence[Job]) -> list[str]:
    """Check what the jobs need of each other, storage access, and pretrained weights.

    Returns:
        One line for each pretrained network whose weights can't be had from here, with where to get them.

    Raises:
        UserError: storage can't be written, its cache is too small, or the configuration asks for what can't be.
    """
    config = run.config
    if "evaluate" in jobs:
        if config.shards.validation_source is None and not config.shards.validation_fraction:
            raise UserError("shards.validation_fraction=0 leaves evaluate no held-out images: raise it")
        for field in ("class_agreement", "latent_space"):
            if getattr(config.evaluate, field) and importlib.util.find_spec("sklearn") is None:
                raise UserError(f"evaluate.{field} needs scikit-learn: pip install -e '.[metrics]'")
    try:
        run.storage.write_bytes(".access", b"")
        run.storage.delete(".access")
    except OSError as error:
        raise UserError(f"storage.root={config.storage.root}: cannot write there ({error})") from error
    for job in TRAININGS:
        if job in jobs and JOBS[job].inputs[0] not in jobs:
            check_cache(run, job)
    if "sample" in jobs and run.artifact("prepare_shards") is not None:
        label_law(config.sample, read_manifest(run.storage, run.prefix("prepare_shards")).classes, config.seed)
    start = config.train_vavae.start_from
    if "train_vavae" in jobs and start is not None and not run.storage.at(start).exists():
        raise UserError(f"train_vavae.start_from={start}: nothing there; name a tokenizer/export or a released file")
    if "train_vavae" in jobs or "evaluate" in jobs:
        check_teacher(config.teacher, (config.grid, config.grid))
    missing = []
    for section, backbone in _backbones(config, jobs).items():
        timm_name(backbone)  # a network that there is not is a mistake, not something to fetch
        try:
            check_weights(backbone)
        except UserError as error:
            missing.append(f"{section}: {error}")
    return missing + (_missing_measures(run) if "evaluate" in jobs else [])


def check_cache(run: Run, job: Job) -> None:
    """Refuse a cache that can't hold the shards of a store that the lanes of one machine draw from at a time.

    Shards that are not there pass. Of a cluster it is not known which workers share a machine: one alone counts.

    Raises:
        UserError: it can't.
    """
    source, config = JOBS[job].inputs[0], run.config
    if run.artifact(source) is None:
        return
    folder = run.storage.child(run.prefix(source))
    manifest = read_manifest(folder) if job == "train_vavae" else read_latent_manifest(folder)
    infos = manifest.splits[TRAIN]
    shards = OrderedShards(
        folder, TRAIN, infos, order_of([info.count for info in infos], config.seed, config.stream), micro_batch_size=1
    )
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


def missing_sources(run: Run) -> list[str]:
    """One line for each source of images that can't be opened from here."""
    missing = []
    for source in _sources(run):
        try:
            open_source(source, run.storage)
        except UserError as error:
            missing.append(f"shards: {error}")
    return missing


def check_sources(run: Run) -> None:
    """Open the sources of images; UserError where that can't be done from here."""
    for source in _sources(run):
        open_source(source, run.storage)


def _sources(run: Run) -> list[str]:
    shards = run.config.shards
    return [source for source in (shards.source, shards.validation_source) if source is not None]


def _backbones(config: RunConfig, jobs: Sequence[Job]) -> dict[str, BackboneConfig]:
    """The pretrained networks of jobs, by the section of the configuration that asks for them."""
    backbones: dict[str, BackboneConfig] = {}
    if "train_vavae" in jobs or "evaluate" in jobs:
        backbones["teacher"] = config.teacher.backbone
    if "train_vavae" in jobs and config.losses.perceptual.kind == "lpips" and config.losses.perceptual.weight > 0:
        backbones["losses.perceptual"] = config.losses.perceptual.backbone
    if "evaluate" in jobs:
        if config.evaluate.lpips:
            backbones["losses.perceptual"] = config.losses.perceptual.backbone
        for name in config.evaluate.metrics.extractors:
            backbone = config.evaluate.metrics.backbone(name)
            if backbone is not None:
                backbones[f"extractor {name} of evaluate.metrics"] = backbone
    return backbones


def _missing_measures(run: Run) -> list[str]:
    """One line for each of Inception and the reference file that is asked for and can't be had from here."""
    evaluate, missing = run.config.evaluate, []
    try:
        if "inception" in evaluate.metrics.extractors:
            check_inception(evaluate.metrics.inception)
    except UserError as error:
        missing.append(f"evaluate.metrics: {error}")
    try:
        if evaluate.reference_file is not None:
            find_reference(run.storage, evaluate.reference_file)
    except UserError as error:
        missing.append(str(error))
    return missing
