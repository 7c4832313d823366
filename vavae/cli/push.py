"""``vavae push``: the models of a run, with a model card, into a repository of the Hugging Face hub."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vavae.cli.arguments import add_overrides, open_run

if TYPE_CHECKING:
    from vavae.interop.push import PushedFolder


def add_commands(commands: Any) -> None:
    """Add ``vavae push``; ``act`` of its arguments returns the exit status."""
    push = commands.add_parser("push", help="put the models of a run on the Hugging Face hub, with a model card")
    push.add_argument("run", metavar="RUN", help="folder or URL of a run, or its YAML configuration")
    push.add_argument("repository", metavar="owner/name", help="repository, which is made where there is none")
    push.add_argument("--out", metavar="FOLDER", help="write into this folder what would be uploaded; no upload")
    push.add_argument("--private", action="store_true", help="make the repository a private one")
    push.add_argument("--revision", metavar="BRANCH", help="branch, which is made where there is none; default: main")
    push.add_argument("--message", metavar="TEXT", help="message of the commit; default: the digests of the models")
    push.add_argument("--license", metavar="NAME", help="license for the card to name, such as apache-2.0")
    add_overrides(push)
    push.set_defaults(act=_push)


def _push(arguments: argparse.Namespace) -> int:
    from vavae.interop.hub import check_repository, check_upload, upload

    name, out = arguments.repository, arguments.out
    check_repository(name)
    if out is None:
        check_upload()
    # torch takes seconds to import.
    from vavae.interop.push import write_pushed_folder
    from vavae.report.model_card import model_card
    from vavae.runs.evaluation_inputs import ReportInputs
    from vavae.runs.push_inputs import PushInputs

    run = open_run(arguments.run, arguments.overrides)
    inputs = PushInputs.of(run)
    with _folder(out) as place:
        folder = write_pushed_folder(inputs, place)
        report = ReportInputs.of(run)
        card = model_card(inputs, report, folder, name, arguments.revision, arguments.license)
        Path(place, "README.md").write_text(card, encoding="utf-8")
        print(_summary(run.config.name, folder))
        if out is not None:
            print(f"{out}: written, and nothing uploaded")
            return 0
        digests = (f"{record.kind} {record.digest[:12]}" for record in inputs.records.values())
        message = arguments.message or f"{run.config.name}: {', '.join(digests)}"
        print(upload(place, name, arguments.private, arguments.revision, message))
    return 0


@contextmanager
def _folder(out: str | None) -> Iterator[Path]:
    """The folder to write: the one that is asked for, or one that lasts for the upload."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="vavae-") as scratch:
        yield Path(scratch, "push")


def _summary(run: str, folder: "PushedFolder") -> str:
    files = dict(folder.files())
    size = sum(files.values())
    names = ", ".join(dict.fromkeys(f"{path.partition('/')[0]}/" if "/" in path else path for path in files))
    without = f"; not for diffusers ({folder.not_in_diffusers})" if folder.not_in_diffusers else ""
    return f"run {run}: {len(files)} files, {size / 1e6:,.1f} MB: {names}{without}"
