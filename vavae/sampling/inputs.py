"""What a run samples with: its models, and the set of images that its configuration asks for."""

import torch

from vavae.config import digest
from vavae.latents.manifest import read_latent_manifest
from vavae.runs.run import Run
from vavae.sampling.sample_shards import SampleSet
from vavae.sampling.sampler import Sampler


def class_names(run: Run) -> tuple[str, ...]:
    """The classes that the LightningDiT was trained on, in the order of their labels.

    Raises:
        UserError: there are no latents yet.
    """
    run.require("precompute_latents")
    return read_latent_manifest(run.storage.child(run.prefix("precompute_latents"))).classes


def this_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_sampler(run: Run, device: torch.device) -> Sampler:
    """The trained models, ready to generate.

    Raises:
        UserError: one of them is not there yet.
    """
    tokenizer = run.require("train_vavae").digest
    run.require("train_lightningdit")
    return Sampler.load(
        run.storage.child(run.prefix("train_vavae")),
        tokenizer,
        run.storage.child(run.prefix("precompute_latents")),
        run.storage.child(run.prefix("train_lightningdit")),
        device,
    )


def sample_set(run: Run) -> SampleSet:
    """The images of the configuration, done or not; where it asks for more than before, those that are there stay.

    Raises:
        UserError: `sample.labels` names a class that there is not, or an input is missing.
    """
    config = run.config
    identity = run.identity("sample")
    each = {key: value for key, value in identity["sample"].items() if key != "images"}
    origin = digest({"config": {**identity, "sample": each}, "inputs": run.inputs("sample")})
    storage = run.storage.child(run.prefix("sample"))
    return SampleSet(storage, config.sample, config.seed, config.guidance, config.solver, origin, class_names(run))
