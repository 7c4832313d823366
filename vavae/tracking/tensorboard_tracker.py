"""TensorBoard's files in the folder of a run."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL.Image import Image
from torch.utils.tensorboard import SummaryWriter

from vavae.storage.storage import Storage


class TensorBoardTracker:
    """A `Tracker` that writes files, on a bucket by way of a folder of this machine.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Storage) -> None:
        self._folder = folder
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._open: SummaryWriter | None = None

    def rewind(self, images_seen: int) -> None:
        """See `Tracker.rewind`; TensorBoard drops all that came later."""
        self.close(failed=False)
        if not self._folder.is_local:
            self._scratch = tempfile.TemporaryDirectory(prefix="vavae-")
        folder = self._scratch.name if self._scratch else self._folder.url()
        self._open = SummaryWriter(folder, purge_step=images_seen + 1)

    @property
    def _writer(self) -> SummaryWriter:
        assert self._open is not None, "rewind opens the tracker"
        return self._open

    def metrics(self, images_seen: int, row: Mapping[str, float]) -> None:
        """See `Tracker.metrics`."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, images_seen)

    def picture(self, images_seen: int, name: str, picture: Image) -> None:
        """See `Tracker.picture`."""
        self._writer.add_image(name, np.asarray(picture.convert("RGB")), images_seen, dataformats="HWC")

    def flush(self) -> Callable[[], None]:
        """See `Tracker.flush`."""
        self._writer.flush()
        return self._upload

    def _upload(self) -> None:
        if self._scratch:
            for file in Path(self._scratch.name).iterdir():
                self._folder.put_file(file, file.name)

    def close(self, failed: bool) -> None:
        """See `Tracker.close`; what was not flushed does not reach a bucket."""
        if self._open is not None:
            self._open.close()
        if self._scratch:
            self._scratch.cleanup()
