"""The commit of the code at work, for records and reports."""

import subprocess
from pathlib import Path


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout, with `-dirty` where files differ from it; None outside of one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def commit_of_code() -> str | None:
    """The commit of this package's own checkout; None where it is installed, even within another checkout."""
    root = Path(__file__).parents[2]
    return commit_of(root) if (root / ".git").exists() else None
