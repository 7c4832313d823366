"""``vavae import | export``: released weights and latents into a run, and those of a run as they are released."""

import argparse
from typing import Any

from vavae.cli.arguments import add_config
from vavae.errors import UserError


def add_commands(commands: Any) -> None:
    """Add ``vavae import`` and ``vavae export``; ``act`` of their arguments returns the exit status."""
    importer = commands.add_parser(
        "import", help="make released weights or latents a run's own, as if they had been made there"
    )
    importer.set_defaults(act=_import)
    exporter = commands.add_parser("export", help="write weights or latents of a run as they are released")
    exporter.add_argument(
        "--format", choices=("released", "diffusers"), default="released", help="default: %(default)s"
    )
    exporter.add_argument(
        "--weights", metavar="NAME", help="average of the LightningDiT's weights; default: the one of its export"
    )
    exporter.set_defaults(act=_export)
    address = "path or storage URL; a folder for latents and for diffusers; to import a model, hf-hub:owner/name too"
    models = ("tokenizer", "lightningdit", "latents")
    for command, choices in ((importer, models), (exporter, (*models, "pipeline"))):
        command.add_argument("what", choices=choices)
        command.add_argument("file", metavar="FILE", help=address)
        add_config(command)


def _import(arguments: argparse.Namespace) -> int:
    from vavae.config.load import load
    from vavae.interop.import_export import import_latents, import_lightningdit, import_tokenizer
    from vavae.runs.config import RunConfig
    from vavae.runs.run import Run

    run, what, file = Run(load(RunConfig, arguments.config, arguments.overrides)), arguments.what, arguments.file
    if what == "tokenizer":
        import_tokenizer(run.config, run.import_output("train_vavae"), file)
    elif what == "lightningdit":
        output = run.import_output("train_lightningdit")
        import_lightningdit(run.config, run.folder("precompute_latents"), output, file)
    else:
        output = run.import_output("precompute_latents")
        import_latents(run.config, run.folder("prepare_shards"), output, file)
    print(f"imported the {what} of {run.storage.url()}: {file}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from vavae.config.load import load
    from vavae.interop.diffusers_pipeline import save_diffusers_pipeline
    from vavae.interop.import_export import (
        export_diffusers_lightningdit,
        export_diffusers_tokenizer,
        export_latents,
        export_lightningdit,
        export_tokenizer,
    )
    from vavae.runs.config import RunConfig
    from vavae.runs.run import Run
    from vavae.runs.sampling_inputs import SamplingInputs

    what, file, weights = arguments.what, arguments.file, arguments.weights
    overrides = arguments.overrides if weights is None else [*arguments.overrides, f"sample.weights={weights}"]
    run = Run(load(RunConfig, arguments.config, overrides))
    if weights is not None and what not in ("lightningdit", "pipeline"):
        raise UserError(f"--weights {weights}: only the LightningDiT has averages of its weights")
    match (what, arguments.format):
        case ("tokenizer", "released"):
            export_tokenizer(run.stored("train_vavae"), file)
        case ("tokenizer", "diffusers"):
            latents = None if run.artifact("precompute_latents") is None else run.stored("precompute_latents")
            export_diffusers_tokenizer(run.stored("train_vavae"), latents, run.config.shards.image_size, file)
        case ("lightningdit", "released"):
            export_lightningdit(run.stored_lightningdit(weights), file)
        case ("lightningdit", "diffusers"):
            export_diffusers_lightningdit(run.stored_lightningdit(weights), file)
        case ("pipeline", _):
            save_diffusers_pipeline(SamplingInputs.of(run), file)
        case ("latents", "released"):
            export_latents(run.stored("precompute_latents"), run.storage.at(file), run.config.seed)
        case _:
            raise UserError(f"--format {arguments.format}: latents are only written as released")
    print(f"exported the {what} of {run.storage.url()}: {file}")
    return 0
