"""The console command as a whole: what it may import, and how it takes overrides."""

import subprocess
import sys

import pytest

from vavae.cli.main import main

CHECK = """
import sys
from vavae.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("imported:", *{"ray", "torch", "deepspeed"} & {*sys.modules})
"""


IMPORTED = """
import sys
before = {*sys.modules}
from vavae.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
imported = {name.partition(".")[0] for name in {*sys.modules} - before}
print("imported:", *sorted(imported - sys.stdlib_module_names))
"""


def test_the_help_imports_the_standard_library_alone():
    found = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "imported: ray_jobs vavae"


@pytest.mark.parametrize("words", [["plan", "--help"], ["status", "no such run"]])
def test_ray_and_torch_are_not_imported_until_a_command_needs_them(words):
    found = subprocess.run([sys.executable, "-c", CHECK, *words], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize(
    "words", [["data", "stats", "folder", "a.b=1"], ["jobs", "a.b=1"], ["status", "run", "--unknown"]]
)
def test_what_no_command_takes_is_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_overrides_may_stand_after_an_option(capsys):
    assert (
        main(["status", "--config", "configs/tiny.yaml", "stream.lanes=0", "--hourly-price", "2", "stream.lans=1"]) == 2
    )
    assert "stream.lans (command line)" in capsys.readouterr().err
