"""``vavae demo``: a page on this machine, to play with a trained run."""

import argparse
import importlib.util
import os
import sys
from typing import Any

from vavae.cli.arguments import add_overrides
from vavae.errors import UserError


def add_commands(commands: Any) -> None:
    """Add ``vavae demo``; ``act`` of its arguments returns the exit status."""
    about = (
        "A page to play with a trained run: samples by class and seed, under sliders of guidance and steps; a walk "
        "between two seeds; reconstructions of pictures of your own; the report, with the curves of the run."
    )
    demo = commands.add_parser("demo", help="serve a page to play with a trained run", description=about)
    demo.add_argument("run", metavar="RUN", help="path or URL of the folder of the run")
    demo.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen at; default: %(default)s, this machine alone. There is no password: whoever reaches "
        "another address can use the page",
    )
    demo.add_argument("--port", type=int, metavar="PORT", help="default: 7860, or any where that is taken; 0: any")
    demo.add_argument("--device", metavar="DEVICE", help="such as cpu or cuda:1; default: a GPU where there is one")
    add_overrides(demo)
    demo.set_defaults(act=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("gradio") is None:
        raise UserError("vavae demo needs gradio, which is not installed: pip install -e '.[demo]'")
    import torch

    from vavae.demo.playground import Playground
    from vavae.demo.server import listen, serve
    from vavae.distributed.torch_settings import configure_torch
    from vavae.runs.run import Run

    workers = Run.at(arguments.run, arguments.overrides).config.workers
    # Nothing else runs here, so the threads are not those of one worker among many.
    configure_torch(workers.model_copy(update={"threads": torch.get_num_threads()}))
    with listen(arguments.host, arguments.port) as listener:
        serve(Playground.at(arguments.run, arguments.overrides, arguments.device), listener)
    sys.stdout.flush()
    os._exit(0)  # else the interpreter waits for the thread of a request that is still being computed
