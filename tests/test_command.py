"""The shared command line and its exit statuses."""

import errno
import signal
import subprocess
import sys
from typing import Any

import pytest

from vavae.command import Arguments, parse_arguments, run_command
from vavae.errors import UserError


def parse(*argv: str) -> Arguments:
    return parse_arguments("sample", "Make images.", argv)


def test_overrides_may_stand_anywhere():
    expected = Arguments("run.yaml", ("a.b=1", "c=-2", "d=x y"), print_config=False, dry_run=True)
    assert parse("--config", "run.yaml", "a.b=1", "c=-2", "d=x y", "--dry-run") == expected
    assert parse("a.b=1", "--dry-run", "c=-2", "--config=run.yaml", "d=x y") == expected
    assert parse("--print-config", "--config", "run.yaml") == Arguments("run.yaml", (), True, False)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config", "x", "--drt-run"], "sample: error: unrecognized arguments: --drt-run; see --help\n"),
        (["--config", "x", "--dry"], "sample: error: unrecognized arguments: --dry; see --help\n"),
        (["a=1"], "sample: error: the following arguments are required: --config; see --help\n"),
        (["a=1", "--config"], "sample: error: argument --config: expected one argument; see --help\n"),
    ],
)
def test_misuse_is_one_line_and_status_2(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert (exit_.value.code, capsys.readouterr().err) == (2, expected)


def test_exit_status(capsys: pytest.CaptureFixture[str]):
    def mistake() -> int:
        raise UserError("x.yaml: no such file")

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert run_command(lambda: None) == 0
    assert run_command(lambda: 3) == 3
    assert run_command(mistake) == 2
    assert capsys.readouterr().err == "error: x.yaml: no such file\n"
    assert run_command(interrupt) == 130


@pytest.mark.parametrize("of_interrupts", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_interrupts_a_command(capsys: pytest.CaptureFixture[str], of_interrupts: Any):
    before, of_terminations = signal.signal(signal.SIGINT, of_interrupts), signal.getsignal(signal.SIGTERM)
    try:
        assert run_command(lambda: signal.raise_signal(signal.SIGTERM)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is of_terminations


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_configuration_needs_no_torch():
    code = "import sys, vavae.config; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            "runs/a: No space left on device; free some space there, or name another folder",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "runs/aaa"),
            "runs/aaa: File name too long; give it a shorter name",
        ),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"runs"), "runs: Is a directory"),
        (FileNotFoundError("s3://bucket/key"), "s3://bucket/key: no such file"),
        (ConnectionError("nobody\nis there"), "nobody is there"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_status_2(
    error: OSError, line: str, capsys: pytest.CaptureFixture[str]
):
    def fail() -> None:
        raise error

    assert (run_command(fail), capsys.readouterr().err) == (2, f"error: {line}\n")
