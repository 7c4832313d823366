"""The command line of every job: ``--config FILE key=value … [--print-config] [--dry-run]``, and its exit status."""

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from vavae.errors import UserError, one_line

_MISUSE = 2
INTERRUPTED = 130
"""Exit status of a command that was interrupted."""


@dataclass(frozen=True)
class Arguments:
    """The parsed command line of a job."""

    config: str
    overrides: tuple[str, ...]
    print_config: bool
    dry_run: bool


class Parser(argparse.ArgumentParser):
    """A parser that reports misuse in one line; so do the parsers of its subcommands."""

    def error(self, message: str) -> NoReturn:
        """Exit with the line."""
        self.exit(_MISUSE, f"{self.prog}: error: {message}; see --help\n")


def parse_arguments(prog: str, description: str, argv: Sequence[str] | None = None) -> Arguments:
    """Parse a job's command line, ``sys.argv`` by default; overrides may stand anywhere among the options.

    Misuse is one line on standard error and exit status 2.
    """
    parser = Parser(prog, description=description, allow_abbrev=False)
    text = "the YAML configuration of the run, or the name of one that comes along, such as quickstart"
    parser.add_argument("--config", required=True, metavar="FILE", help=text)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and exit")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="set one key, value in YAML; later wins")
    found = parser.parse_intermixed_args(argv)
    return Arguments(found.config, tuple(found.overrides), found.print_config, found.dry_run)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM do in the block what SIGINT does, or interrupt it where that is ignored, as in the background.

    In threads other than the main one signals are left alone.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        of_interrupt = signal.getsignal(signal.SIGINT)
        if callable(of_interrupt):
            of_interrupt(number, frame)
        else:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command and return its exit status: 2, and one line on standard error, for what a user can mend.

    That is a `UserError`, and what the machine refuses, from a full disk to a name that is too long. SIGTERM interrupts
    it as Ctrl-C does: one line, and status 130.
    """
    try:
        with interrupted_by_sigterm():
            return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _MISUSE
    except OSError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return _MISUSE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
