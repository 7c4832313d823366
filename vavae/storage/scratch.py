"""Folders of this machine for files that can be fetched again, and the file systems that they lie on."""

import logging
import os
import re
import tempfile
from pathlib import Path

from vavae.errors import UserError

logger = logging.getLogger(__name__)

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = re.compile(
    r"nfs4?|lustre|beegfs|gpfs|cifs|smb3|ceph|glusterfs|afs|"
    r"fuse\.(?!fuse-overlayfs$).+"  # but for the disk of a container without a root
)
"""Types of file systems that are reached over the network."""
SHORT_FOLDER = "/tmp"
"""Folder for sockets whose paths would be too long in another one."""
_SOCKET_PATH_BYTES = 103
"""Longest path of a socket that every system takes."""


def scratch_folder() -> Path:
    """Folder of this user below the temporary folder of this machine (TMPDIR), made where it is not there.

    Raises:
        UserError: another user has made it, and could change what is in it.
    """
    folder = Path(tempfile.gettempdir(), f"vavae-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set storage.cache to a folder of yours")
    return folder


def holds_sockets(folder: str, name_bytes: int) -> bool:
    """Return whether the path of a folder is short enough for sockets whose names in it have so many bytes."""
    return len(os.fsencode(os.path.join(folder, ""))) + name_bytes <= _SOCKET_PATH_BYTES


def network_file_system(folder: Path, mounts: str) -> str | None:
    """Type of the file system of a folder, if it is one of the network.

    Args:
        folder: absolute path, which need not be there yet.
        mounts: content of Linux's `/proc/self/mountinfo`.
    """
    longest, found = -1, ""
    for line in mounts.splitlines():
        mount, _, source = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount.split()[4]))
        # Of two at one place the later one covers the other.
        if folder.is_relative_to(point) and len(point.parts) >= longest:
            longest, found = len(point.parts), source.split()[0]
    return found if _NETWORK.fullmatch(found) else None


def warn_of_network_file_system(cache: Path) -> None:
    """Log a warning where a cache lies on a file system of the network; where that cannot be told, nothing."""
    if not _MOUNTS.exists():
        return
    folder = Path(os.path.realpath(cache))
    kind = network_file_system(folder, _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"))
    if kind is not None:
        logger.warning(
            "the cache %s lies on a network file system (%s), which is no faster than the store: "
            "set storage.cache to a folder on a disk of the machine",
            folder,
            kind,
        )
