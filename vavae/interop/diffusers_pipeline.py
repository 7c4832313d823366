"""A run's two models and the way that it samples as a folder that `diffusers.DiffusionPipeline.from_pretrained` reads.

The folder brings its code along: the very source that trains here, so it works where this package is not installed.
"""

import math

from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.diffusion.shift import shift_factor
from vavae.interop.diffusers_lightningdit import (
    TRANSFORMER,
    TRANSFORMER_CLASS,
    refuse_unsupported,
    save_diffusers_lightningdit,
    write_code,
)
from vavae.interop.diffusers_tokenizer import NotInDiffusersError, save_diffusers_tokenizer
from vavae.interop.export import load_latent_models
from vavae.latents.manifest import read_latent_manifest
from vavae.latents.statistics import read_statistics
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.runs.sampling_inputs import SamplingInputs
from vavae.storage.storage import Storage

_PIPELINE, _SCHEDULER = "lightningdit_pipeline", "lightningdit_scheduler"
_SOLVERS = ("euler", "heun")
_UNSUPPORTED_GUIDANCE = {"weak": None, "routing_scale": 1}
"""Fields of `guidance` that the pipeline lacks, with the value at which that makes no difference; others that it lacks
are of parts of a network that its transformer lacks."""


def save_diffusers_pipeline(inputs: SamplingInputs, folder: str) -> None:
    """Write the pipeline folder of a run: `vae`, `transformer`, `scheduler`, and the code of the last two and its own.

    Args:
        inputs: models, statistics of the latents, guidance and solver.
        folder: local path or storage URL.

    Raises:
        UserError: the folder can't do what the configuration asks for; or the models do not belong together.
    """
    config = inputs.config
    _check_sampling(config.guidance, config.solver, folder)
    tokenizer, lightningdit, normalizer = load_latent_models(inputs)
    if not isinstance(tokenizer, VAVAE):
        raise NotInDiffusersError(
            f"{folder}: tokenizer.kind={config.tokenizer.kind}: a pipeline of diffusers takes kl alone"
        )
    if normalizer.statistics != "channel":
        raise NotInDiffusersError(
            f"{folder}: latents.statistics={normalizer.statistics}: diffusers knows those of channels alone"
        )
    storage = Storage(folder)
    save_diffusers_lightningdit(storage.url("transformer"), lightningdit)
    statistics = dict(zip(("mean", "std"), read_statistics(inputs.latents.folder), strict=True))
    save_diffusers_tokenizer(storage.url("vae"), tokenizer, config.shards.image_size, statistics)
    scheduler = {
        "_class_name": "LinearPathScheduler",
        "num_train_timesteps": 1000,  # as everywhere in diffusers
        # The shift of diffusers is that of σ = 1 - t.
        "shift": 1 / shift_factor(config.solver.shift, math.prod((lightningdit.latent_dim, *lightningdit.grid))),
        "solver": config.solver.name,
        "ends_by_euler": lightningdit.config.predicts_data,
    }
    storage.write_json("scheduler/scheduler_config.json", scheduler)
    write_code(storage, f"scheduler/{_SCHEDULER}.py")
    guidance, classes = config.guidance, read_latent_manifest(inputs.latents.folder).classes
    index = {
        "_class_name": [_PIPELINE, "LightningDiTPipeline"],
        "vae": ["diffusers", "AutoencoderKL"],
        "transformer": [TRANSFORMER, TRANSFORMER_CLASS],
        "scheduler": [_SCHEDULER, "LinearPathScheduler"],
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "num_inference_steps": config.solver.num_steps,
        "guidance_scale": guidance.scale,
        "guidance_low": guidance.interval[0],
        "guidance_high": guidance.interval[1],
        "guidance_channels": guidance.channels,
    }
    write_code(storage, f"{_PIPELINE}.py")
    storage.write_json("model_index.json", index)


def _check_sampling(guidance: GuidanceConfig, solver: SolverConfig, folder: str) -> None:
    """Refuse guidance and solvers that the pipeline does not have."""
    if solver.name not in _SOLVERS:
        raise NotInDiffusersError(
            f"{folder}: no solver.name={solver.name} in diffusers: set one of {', '.join(_SOLVERS)}"
        )
    refuse_unsupported(guidance, _UNSUPPORTED_GUIDANCE, "guidance", folder, "set it to {neutral}")
