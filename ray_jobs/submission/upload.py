"""The upload of a job: the working directory without what `.gitignore` and `.rayignore` name."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ray._private.runtime_env.packaging import create_package

from vavae.config.presets import is_preset
from vavae.errors import UserError


class Upload(NamedTuple):
    """The files of a working directory that Ray uploads, as they will lie on the cluster."""

    folder: Path
    files: int
    bytes: int
    """Size of the package."""


@contextmanager
def unpacked(working_dir: Path) -> Iterator[Upload]:
    """Copy what will be uploaded, for the length of the block."""
    quiet = logging.getLogger(f"{__name__}.ray")
    quiet.setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="vavae-") as scratch:
        package, copy = Path(scratch, "package.zip"), Path(scratch, "working_dir")
        create_package(str(working_dir), package, include_gitignore=True, logger=quiet)
        with zipfile.ZipFile(package) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(working_dir / name, copy / name)
        yield Upload(copy, len(names), package.stat().st_size)


def config_inside(config: str, working_dir: Path) -> str:
    """The path of a configuration file as the job will see it; a name that the package knows stays one.

    Raises:
        UserError: it lies outside of the upload.
    """
    if is_preset(config):
        return config
    path = Path(os.path.relpath(Path(config).resolve(), working_dir.resolve()))
    if path.parts[:1] == ("..",):
        raise UserError(f"--config {config}: outside of {working_dir}, which is what the job gets; see --working-dir")
    return path.as_posix()


def dry_run(upload: Upload, job: str, arguments: Sequence[str]) -> None:
    """Run the dry run of a job in a copy of what it will find on the cluster.

    Raises:
        UserError: the dry run failed; it has printed why.
    """
    # The copy's own modules, whatever is installed here.
    environment = {**os.environ, "PYTHONPATH": str(upload.folder)}
    command = [sys.executable, "-m", f"ray_jobs.{job}", *arguments, "--dry-run"]
    status = subprocess.run(command, cwd=upload.folder, env=environment).returncode
    if status:
        raise UserError(f"the dry run of {job} ended with status {status}, so nothing is submitted")
