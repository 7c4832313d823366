"""A run with many shards of a few bytes, as its jobs would have left it: whatever is decided from records alone sees no
difference."""

import hashlib
import json
from contextlib import suppress

import numpy as np
import torch
from support.counting_store import CountingStore, by_kind, counted

from vavae.config import digest, load
from vavae.data.shards import write
from vavae.data.shards.manifest import ShardInfo
from vavae.data.shards.plan import PlannedShard, ShardPlan, describe_sources, origin
from vavae.interop.export import WEIGHTS, LightningDiTDescription, TokenizerDescription, save_export
from vavae.latents.extract import Extraction, LatentShardRecord
from vavae.latents.statistics import LatentStatistics
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.runs.config import RunConfig
from vavae.runs.extraction_inputs import ExtractionInputs
from vavae.runs.run import Run
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.runs.training_inputs import begin_training
from vavae.sampling.sample_shards import SampleSet, SampleShardRecord
from vavae.storage.artifact import FileInfo
from vavae.training import train
from vavae.training.session import LocalSession

_TAR, _SPLIT, _IMAGES = b"a shard", "train", 20
_DIGEST = "a" * 64


def make_run(config, root, shards, *overrides):
    """The run of a file on a store, whose jobs have as many shards each."""
    engines = [f"{job}.engine.backend=torch" for job in ("train_vavae", "train_lightningdit")]
    return Run(load(RunConfig, config, [f"storage.root={root}", f"sample.images={shards}", "sample.shard_images=1",
                                        "shards.validation_fraction=0", *engines, *overrides]))  # fmt: skip


def written_shards(run, shards):
    """Write the image shards of a run; return their plan and records."""
    config, sources = run.config.shards, describe_sources(run.config.shards, run.storage)
    write.claim(run.storage, "shards", config, sources)
    plan = digest(origin(config, sources))
    planned = [PlannedShard(f"{_SPLIT}/{n:06d}", config.source, (), n, config, plan) for n in range(shards)]
    records = []
    for shard in planned:
        records.append(write.ShardRecord(plan=plan, shard=_info(shard.name), skipped=()))
        _put(run.storage, f"shards/{shard.name}", records[-1])
    return ShardPlan(config, tuple(sources[_SPLIT]["classes"]), sources, tuple(planned)), records


def written_latents(run):
    """Write the latents of all shards of a run; return the extraction, its inputs and the records."""
    inputs = ExtractionInputs.of(run)
    extraction, channels = Extraction.of(inputs), run.config.tokenizer.latent_dim
    statistics, random = LatentStatistics(channels), np.random.default_rng(0)
    statistics.update(random.normal(size=(2, channels, 2, 2)), np.ones((2, channels, 2, 2)))
    records = []
    for task in extraction.tasks():
        name = f"{task.split}/{task.number:06d}"
        origin = extraction._origin(task)
        record = LatentShardRecord(origin=origin, shard=_info(name), statistics=statistics.to_json(), keys=())
        records.append(record)
        _put(inputs.output.folder, name, record)
    return extraction, inputs, records


def written_samples(run):
    """Write the samples of a run; return the set, its inputs and the records."""
    inputs = SamplingInputs.of(run)
    samples = SampleSet.of(inputs)
    records = []
    for shard in samples.shards():
        name = f"{shard:06d}"
        file = FileInfo(bytes=len(_TAR), sha256=_info(name).sha256)
        records.append(SampleShardRecord(origin=inputs.origin, images=1, file=file))
        _put(inputs.output.folder, name, records[-1])
    return samples, inputs, records


def commit_tokenizer(run):
    """Leave the export of a tokenizer that was never trained."""
    run.claim("train_vavae")
    config, output = run.config, run.output("train_vavae")
    description = TokenizerDescription(
        tokenizer=config.tokenizer,
        teacher=config.teacher,
        vision_foundation=config.losses.vision_foundation,
        feature_dim=6,
    )
    files = save_export(output.folder, description, {WEIGHTS: VAVAE(config.tokenizer).state_dict()})
    output.commit(_DIGEST, files, images_seen=run.budget("train_vavae"))


def commit_lightningdit(run):
    """Leave the export of a LightningDiT without weights."""
    run.claim("train_lightningdit")
    config, output = run.config, run.output("train_lightningdit")
    description = LightningDiTDescription(
        lightningdit=config.lightningdit.with_classes(10),
        latent_dim=config.tokenizer.latent_dim,
        grid=config.grid,
        tokenizer=_DIGEST,
    )
    files = save_export(output.folder, description, {WEIGHTS: {"x": torch.zeros(1)}})
    output.commit("c" * 64, files, images_seen=run.budget("train_lightningdit"))


def finished(run, shards):
    """Leave all but the evaluation of a run."""
    write.finish(run.storage, "shards", *written_shards(run, shards))
    commit_tokenizer(run)
    extraction, inputs, records = written_latents(run)
    inputs.output.commit(*extraction.finish(inputs.config.latent_shape, records))
    commit_lightningdit(run)
    samples, inputs, records = written_samples(run)
    files = samples.files(records)
    inputs.output.commit(digest([*files]), files)
    return run


def requests_of_rank(world, config, root, shards, job, page):
    """Begin a training, up to its first micro-batch, in a process of its own; return this rank's requests by kind.

    Probes and previews, whose images rank 0 reads, are off.
    """

    class ReachedLoopError(Exception):
        pass

    def stop(*_):
        raise ReachedLoopError

    def begin():
        with suppress(ReachedLoopError):
            train.train(begin_training(run, job, world), LocalSession(), world)

    CountingStore.page, train._Attempt.fit = page, stop
    run = make_run(config, root, shards, "train_vavae.probe_images=null", "train_vavae.preview_images=null")
    return by_kind(counted(begin)[1])


def _info(name):
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return ShardInfo(name=f"{name.rpartition('/')[2]}.tar", count=_IMAGES, bytes=len(_TAR), sha256=sha256)


def _put(storage, name, record):
    storage.write_bytes(f"{name}.tar", _TAR)
    storage.write_bytes(f"{name}.json", json.dumps(record.model_dump(mode="json")).encode())
