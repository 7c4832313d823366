"""The commands of the documents, run as they stand, from the folder and with the home of a fresh clone.

Each command of a ``bash`` block is either run here, with default paths, or listed with the reason why it can't be. What
takes minutes is run in the long form, in the order of the documents, and meanwhile as a dry run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from vavae.data.sources.datasets import DigitsSource

_ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"\s+#\s.*$")
_WHOLE_RUN = re.compile(r"(python -m ray_jobs\.(pipeline|tune_vf)|bash cluster/local/quickstart\.sh)\b")

_WHOLE = (
    r"cluster/local/quickstart\.sh$",
    r"ray_jobs\.train_vavae --config configs/quickstart\.yaml",
    r"ray_jobs\.tune_vf --config configs/sweeps/tiny\.yaml$",
    r"vavae sample --run runs/quickstart\b",
)
"""Commands that are run to their end in the long form, in this order."""

_NOT_HERE = {
    r"tests/run\.sh": "these tests are what it runs",
    r"^export RAY_ADDRESS=": "names a cluster that is not here; tests/jobs/test_submit_cluster.py has one",
    r"^vavae (submit|jobs|logs|stop)\b": "needs a cluster; tests/jobs/test_submit_cluster.py has one",
    r"^vavae status /mnt/": "a run on a cluster's storage; tests/cli/test_status.py has one",
    r"cluster/local/(up|down)\.sh|runs/local/environment": "tests/jobs/test_local_cluster.py starts and ends it",
    r"^vavae data (index|verify|stats) s3://": "needs a bucket; tests/data/test_verify.py has one",
    r"^python -m ray_jobs\.pipeline --config FILE\b": "FILE stands for a configuration, and it needs a bucket",
    r"^vavae (import|export) .* --config RUN\.yaml": "RUN.yaml stands for a configuration; tests/interop has the files",
    r"^vavae push\b": "needs a hub; tests/interop/test_push.py has one",
    r"^vavae average\b": "needs a trained run; tests/cli/test_average.py has one",
    r"^vavae demo\b": "serves until Ctrl-C; tests/demo has it",
    r"^vavae bench\b": "takes minutes; tests/bench has each of them at tiny sizes",
    r"^(docker|kubectl) ": "needs Docker or a Kubernetes cluster; tests/cluster checks the files",
    r"^sbatch ": "needs SLURM; tests/cluster runs the batch with stand-ins",
    r"\bpip (install|freeze)\b|^python3 -m venv |^source \.venv/": "make the environment, which is here",
}
"""Commands that can't be run here, and why."""

Way = Literal["as it stands", "dry run", "not here"]


class Command(NamedTuple):
    """A command of a document."""

    text: str
    place: str

    @property
    def is_long(self) -> bool:
        """Whether it is run to its end in the long form alone."""
        return any(re.search(pattern, self.text) for pattern in _WHOLE)

    @property
    def way(self) -> Way | None:
        """How it is run in every form; None where nothing says."""
        if any(re.search(pattern, self.text) for pattern in _NOT_HERE):
            return "not here"
        if re.search(r" --(dry-run|print-config)\b", self.text) or self.text.startswith("vavae plan "):
            return "as it stands"
        if _WHOLE_RUN.match(self.text):
            return "dry run"
        return None


def _documents() -> list[str]:
    """The documents of the project, the front page first."""
    listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=_ROOT, capture_output=True, text=True)
    return sorted(filter(None, listed.stdout.split("\0")), key=lambda name: (name.count("/"), name))


def _commands() -> list[Command]:
    """All commands, in the order of the documents; one on several lines is one."""
    found = []
    for name in _documents():
        for block in _BLOCK.findall((_ROOT / name).read_text(encoding="utf-8")):
            lines = block.replace("\\\n", " ").splitlines()
            texts = [" ".join(_COMMENT.sub("", line).split()) for line in lines]
            found += [Command(text, name) for text in texts if text and not text.startswith("#")]
    return found


_COMMANDS = _commands()
_SHORT = list(dict.fromkeys(one.text for one in _COMMANDS if one.way in ("as it stands", "dry run")))
_LONG = [
    text
    for pattern in _WHOLE
    for text in dict.fromkeys(one.text for one in _COMMANDS if one.is_long)
    if re.search(pattern, text)
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a fresh clone with the environment of these tests, and images where the documents name some."""
    folder = tmp_path_factory.mktemp("clone") / "vavae"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=_ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (_ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(_ROOT / name, folder / name)
    _link_environment(folder)
    source = DigitsSource()
    for record in source.listing().records[:120]:  # enough for a map of latents
        image = folder / "path" / "to" / "images" / f"{record.key}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(source.read(record))
    return folder


def _link_environment(clone: Path) -> None:
    """Give a clone an environment in which the scripts find everything installed."""
    environment = clone / ".venv"
    environment.mkdir()
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith("installed-"):
            (environment / path.name).symlink_to(path)
    stamp = subprocess.check_output("cat pyproject.toml cluster/docker/requirements.txt | cksum", shell=True, cwd=clone)
    for extra in ("quickstart", "s3", "test"):
        (environment / f"installed-{extra}").write_bytes(stamp)


def _run(command: str, clone: Path) -> str:
    """Run a command in a shell of its own; what it wrote, once it has ended well."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "VAVAE_"))}
    home = clone.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {
        **kept,
        "HOME": str(home),
        "PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{kept['PATH']}",
        "PYTHONPATH": str(clone),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{command} ends with {done.returncode}:\n{done.stdout}"
    assert "Traceback" not in done.stdout, f"{command}:\n{done.stdout}"
    assert "installing" not in done.stdout, f"it changes the environment of these tests:\n{done.stdout}"
    return done.stdout


def test_every_command_is_run_or_listed() -> None:
    assert _COMMANDS, "the documents are read from a git checkout"
    unknown = [f"{one.place}: {one.text}" for one in _COMMANDS if one.way is None and not one.is_long]
    assert not unknown, "let it be run here, or list it with the reason why it can't be"


@pytest.mark.parametrize("command", _SHORT)
def test_a_command_does_what_the_documents_say(command: str, clone: Path) -> None:
    dry = command if re.search(r" --(dry-run|print-config)\b|^vavae plan ", command) else f"{command} --dry-run"
    assert _run(dry, clone)


@pytest.mark.long
@pytest.mark.jobs
@pytest.mark.timeout(7200)
def test_the_long_commands_in_their_order(clone: Path) -> None:
    for command in _LONG:
        assert _run(command, clone)
    assert [*(clone / "runs" / "quickstart").rglob("report.html")], "default paths are those of the clone"
