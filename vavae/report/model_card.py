"""The model card of a pushed run: a Markdown file with front matter that the hub reads, from what is on storage."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from vavae.config import ELSEWHERE, describe_size, dump, written_path
from vavae.data.shards.manifest import MANIFEST, read_manifest
from vavae.evaluation.metric import Metric, read_metrics
from vavae.interop.push import PushedFolder
from vavae.latents.manifest import read_latent_manifest
from vavae.report.html import number, protocols
from vavae.report.run_facts import run_byline, run_facts, run_summary
from vavae.report.run_report import log_rows, shown_pictures
from vavae.runs.config import RunConfig
from vavae.runs.evaluation_inputs import ReportInputs
from vavae.runs.files import METRICS
from vavae.runs.jobs import JOBS, TRAININGS
from vavae.runs.push_inputs import PushInputs
from vavae.runs.run import IMPORTED

_TEMPLATES = Environment(  # Markdown, which is not escaped as HTML is
    loader=PackageLoader("vavae", ""), autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters["number"] = number
_TASK = "unconditional-image-generation"
"""The hub's name of a task that includes generation by classes."""
_CLASSES = 20
"""Classes that are named; of more the first ones are."""
_NOT_RECIPE = {"storage", "tracking", "workers"}
"""Sections of the configuration that say where a run is, who works on it and who is told."""
_HUGGINGFACE = "huggingface:"


def model_card(
    inputs: PushInputs,
    report: ReportInputs,
    folder: PushedFolder,
    repository: str,
    revision: str | None = None,
    license_name: str | None = None,
) -> str:
    """Write the model card of a run.

    Args:
        inputs: what of the run is pushed.
        report: what its jobs have left, for the facts about its training.
        folder: the folder that goes to the hub.
        repository: `owner/name` on the hub.
        revision: branch of it; None for the main one.
        license_name: the hub's name of a license; None names none.
    """
    config = inputs.config
    report = replace(report, config=config)
    metrics = read_metrics(inputs.storage) if METRICS in inputs.files else []
    classes = () if inputs.sampling is None else read_latent_manifest(inputs.sampling.latents.folder).classes
    facts = run_facts(report, log_rows(report))
    trainings = (f"training of the {JOBS[job].makes}" for job in TRAININGS)  # and not where they were followed
    shards = report.artifacts.get("prepare_shards")
    records = [*([shards] if shards else []), *inputs.records.values()]
    imported = {each.kind: each.details[IMPORTED] for each in records if IMPORTED in each.details}
    text = _TEMPLATES.get_template("report/model_card.md.jinja").render(
        front_matter=_front_matter(inputs, folder, metrics, classes, license_name),
        name=config.name,
        version=version("vavae"),
        summary=_summary(inputs).replace(ELSEWHERE, ""),
        byline=run_byline(report.storage),
        pictures=[picture for picture in shown_pictures(report) if picture.file in inputs.files],
        samples=inputs.sampling is not None,
        address=f"hf-hub:{repository}" + (f"@{revision}" if revision else ""),
        repository=repository,
        revision=revision,
        of_revision=f', revision="{revision}"' if revision else "",
        not_in_diffusers=folder.not_in_diffusers,
        frozen_encoder=None if config.tokenizer.encoder is None else config.tokenizer.encoder.name,
        metrics=metrics,
        protocols=protocols(metrics),
        data=_data(report),
        classes=_listed(classes),
        labels=[*range(len(classes))][:2],
        facts={name: facts[name] for name in trainings if name in facts}
        | {kind: f"imported from {source}" for kind, source in imported.items()},
        recipe=_recipe(config),
        local_source=_is_local(config),
        elsewhere=ELSEWHERE if ELSEWHERE in dump(config) else "",
        digests={record.kind: record.digest for record in records},
        weights=folder.weights,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _front_matter(
    inputs: PushInputs,
    folder: PushedFolder,
    metrics: Sequence[Metric],
    classes: Sequence[str],
    license_name: str | None,
) -> str:
    config, samples = inputs.config, inputs.sampling is not None
    in_diffusers = samples and not folder.not_in_diffusers
    source = written_path(config.shards.source)
    repository = source.removeprefix(_HUGGINGFACE).partition("#")[0]
    dataset = PurePosixPath(repository).name if _is_local(config) else repository
    data = ModelCardData(
        language=None,
        license=license_name,
        library_name="diffusers" if in_diffusers else "vavae",
        pipeline_tag=_TASK if samples else None,
        datasets=[repository] if source.startswith(_HUGGINGFACE) else None,
        tags=[
            *("vavae", "va-vae", "autoencoder", "latent-diffusion"),
            *(["lightningdit", "image-generation"] if samples else []),
            *(["class-conditional"] if classes else []),
        ],
        model_name=config.name,
        eval_results=[
            EvalResult(
                task_type=_TASK,
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=metric.name,
                metric_value=metric.value,
                metric_args={"protocol": metric.protocol},
            )
            for metric in metrics
        ]
        or None,
    )
    return data.to_yaml().strip()


def _summary(inputs: PushInputs) -> str:
    """Models and data in a line."""
    config = inputs.config
    if inputs.sampling is not None:
        return f"A tokenizer (VA-VAE) and a diffusion transformer (LightningDiT) on its latents: {run_summary(config)}"
    kind = f"f{config.tokenizer.downsample}d{config.tokenizer.latent_dim}"
    size = describe_size(config.shards.image_size)
    return f"A tokenizer (VA-VAE), {kind}: {written_path(config.shards.source)} at {size} px"


def _data(report: ReportInputs) -> str:
    """Source, size and numbers of the images."""
    shards = report.config.shards
    parts = [f"`{written_path(shards.source).replace(ELSEWHERE, '')}`, {describe_size(shards.image_size)} px"]
    if report.shards.is_file(MANIFEST):
        manifest = read_manifest(report.shards)
        parts += [f"{manifest.count(split):,} images in the split {split}" for split in manifest.splits]
    return "; ".join(parts) + "."


def _listed(classes: Sequence[str]) -> str:
    names = ", ".join(f"`{name}`" for name in classes[:_CLASSES])
    return f"{names} and {len(classes) - _CLASSES:,} more" if len(classes) > _CLASSES else names


def _recipe(config: RunConfig) -> str:
    """The keys that differ from the defaults, as YAML."""
    values: Mapping[str, Any] = config.model_dump(mode="json", exclude_defaults=True, exclude=_NOT_RECIPE)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()


def _is_local(config: RunConfig) -> bool:
    """Return whether the images are where only this machine has them."""
    source = written_path(config.shards.source)
    return "/" in source and "://" not in source and not source.startswith(_HUGGINGFACE)
