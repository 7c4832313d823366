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
    address = "path or storage URL; a folder for latents and for diffusers; hf-hub:owner/name of a tokenizer to import"
    for command in (importer, exporter):
        command.add_argument("what", choices=("tokenizer", "lightningdit", "latents"))
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
    from vavae.interop.import_export import (
        export_diffusers_tokenizer,
        export_latents,
        export_lightningdit,
        export_tokenizer,
    )
    from vavae.runs.config import RunConfig
    from vavae.runs.run import Run

    run, what, file = Run(load(RunConfig, arguments.config, arguments.overrides)), arguments.what, arguments.file
    if arguments.weights is not None and what != "lightningdit":
        raise UserError(f"--weights {arguments.weights}: only the LightningDiT has averages of its weights")
    match (what, arguments.format):
        case ("tokenizer", "released"):
            export_tokenizer(run.stored("train_vavae"), file)
        case ("tokenizer", "diffusers"):
            export_diffusers_tokenizer(run.stored("train_vavae"), run.config.shards.image_size, file)
        case ("lightningdit", "released"):
            export_lightningdit(run.stored_lightningdit(arguments.weights), file)
        case ("latents", "released"):
            export_latents(run.stored("precompute_latents"), run.storage.at(file), run.config.seed)
        case _:
            raise UserError(f"--format {arguments.format}: only the tokenizer can be written in that format")
    print(f"exported the {what} of {run.storage.url()}: {file}")
    return 0
