"""WebDataset tars that depend on nothing but their content: USTAR, no times, no owners."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEY_DIGITS = 9


class ShardWriter:
    """Writes samples of members `<key>.<extension>` into an open tar."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.count = 0

    def add(self, index: int, members: dict[str, bytes]) -> None:
        """Append a sample: its index becomes the key, `members` maps extensions to contents."""
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{index:0{KEY_DIGITS}d}.{extension}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.count += 1


@contextmanager
def write_tar(path: Path) -> Iterator[ShardWriter]:
    """Write a shard into a local file; equal samples give equal bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        yield ShardWriter(tar)
