"""A run whose models are those of `small_models`, as its jobs would have left it, without any training."""

import torch
from safetensors.torch import save_file

from vavae.config import digest, dump
from vavae.interop.export import WEIGHTS, LightningDiTDescription, TokenizerDescription, save_export
from vavae.latents.manifest import MANIFEST, LatentManifest
from vavae.latents.statistics import STATISTICS
from vavae.losses.config import VisionFoundationLossConfig
from vavae.models.tokenizer.config import TeacherConfig
from vavae.runs.config import RunConfig
from vavae.runs.files import CONFIG
from vavae.runs.jobs import JOBS
from vavae.runs.run import Run
from vavae.storage.artifact import Artifact, commit

from . import image_shards, small_models

DIGEST = "a" * 64
"""Of the tokenizer."""
MEAN, STD = torch.tensor([0.1, -0.2, 0.3, 0.0]).double(), torch.tensor([1.0, 2.0, 0.5, 1.5]).double()
"""Of its latents."""


def trained_run(root, name="run", lightningdit=small_models.LIGHTNINGDIT, **sections):
    """Write it into a folder below `root`.

    Args:
        root: the folder.
        name: of the run.
        lightningdit: sizes and switches of the LightningDiT.
        sections: sections of the configuration in place of those here.
    """
    training = {"images": 8, "batch_size": 8}
    document = {
        "name": name,
        "seed": 7,
        "storage": {"root": str(root)},
        "shards": {"source": "digits", "image_size": image_shards.SIZE},
        "stream": {"lanes": 2},
        "tokenizer": small_models.TOKENIZER.model_dump(mode="json"),
        "train_vavae": training,
        "lightningdit": lightningdit.model_dump(mode="json"),
        "train_lightningdit": training,
        "guidance": {"scale": 1.5},
        "solver": {"num_steps": 2},
        "sample": {"images": 9, "shard_images": 4, "batch_size": 3},
        **sections,
    }
    run = Run(RunConfig.model_validate(document))
    run.storage.write_bytes(CONFIG, dump(run.config).encode())
    tokenizer = TokenizerDescription(
        tokenizer=small_models.TOKENIZER,
        teacher=TeacherConfig(),
        vision_foundation=VisionFoundationLossConfig(),
        feature_dim=6,
    )
    weights = {WEIGHTS: small_models.tokenizer().state_dict()}
    _commit(run, "train_vavae", DIGEST, save_export(_folder(run, "train_vavae"), tokenizer, weights))
    latents, latent_dim = _folder(run, "precompute_latents"), small_models.TOKENIZER.latent_dim
    shape = (latent_dim, small_models.GRID, small_models.GRID)
    manifest = LatentManifest(
        tokenizer=DIGEST, shape=shape, flip=False, classes=image_shards.CLASSES[: lightningdit.classes], splits={}
    )
    latents.write_json(MANIFEST, manifest.model_dump(mode="json"))
    with latents.create(STATISTICS) as local:
        save_file({"mean": MEAN, "std": STD}, local)
    _commit(run, "precompute_latents", "b" * 64, {})
    description = LightningDiTDescription(
        lightningdit=lightningdit, latent_dim=latent_dim, grid=small_models.GRID, tokenizer=DIGEST
    )
    weights = {WEIGHTS: small_models.lightningdit(lightningdit).state_dict()}
    _commit(run, "train_lightningdit", "c" * 64, save_export(_folder(run, "train_lightningdit"), description, weights))
    return run


def _folder(run, job):
    return run.storage.child(run.prefix(job))


def _commit(run, job, content, files):
    inputs = run.inputs(job) if job == "train_lightningdit" else {}
    record = Artifact(
        kind=JOBS[job].makes, digest=content, config=digest(run.identity(job)), inputs=inputs, files=files
    )
    commit(run.storage, run.prefix(job), record)
