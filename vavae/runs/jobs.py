"""The jobs of a run, in the order of the pipeline: what each makes, and from what. With the standard library alone."""

from dataclasses import dataclass
from typing import Literal

Job = Literal["prepare_shards", "train_vavae", "precompute_latents", "train_lightningdit", "sample", "evaluate"]


@dataclass(frozen=True)
class JobSpec:
    """One job of a run: its artifact, and the configuration and inputs that it depends on."""

    job: Job
    makes: str
    sections: tuple[str, ...]
    """Sections of the configuration whose identity it depends on."""
    inputs: tuple[Job, ...]
    """Jobs whose artifacts it reads."""


JOBS: dict[Job, JobSpec] = {
    spec.job: spec
    for spec in (
        JobSpec("prepare_shards", "image shards", ("shards",), ()),
        JobSpec(
            "train_vavae",
            "tokenizer",
            ("seed", "stream", "teacher", "tokenizer", "losses", "train_vavae"),
            ("prepare_shards",),
        ),
        JobSpec("precompute_latents", "latents", ("latents",), ("prepare_shards", "train_vavae")),
        JobSpec(
            "train_lightningdit",
            "LightningDiT",
            ("seed", "stream", "lightningdit", "timesteps", "objective", "train_lightningdit"),
            ("precompute_latents",),
        ),
        JobSpec(
            "sample",
            "samples",
            ("seed", "guidance", "solver", "sample"),
            ("train_vavae", "precompute_latents", "train_lightningdit"),
        ),
        JobSpec("evaluate", "measures and report", ("seed", "evaluate"), ("prepare_shards", "train_vavae", "sample")),
    )
}
"""All jobs by name, in the order in which a run goes through them."""

TRAININGS: tuple[Job, ...] = ("train_vavae", "train_lightningdit")
