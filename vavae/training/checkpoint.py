"""The state of a training run, named in one place, and checkpoints that are whole or absent."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from vavae.config import differences, digest
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.storage.artefact import Artefact, FileInfo, commit, discard, is_intact, read
from vavae.storage.storage import Storage, sha256_of
from vavae.training.step import Step

logger = logging.getLogger(__name__)

_EMA = "ema"


class TrainState(BaseModel):
    """Where a run stands, besides its weights. With the engines and the average it is all that a resume needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images_seen: int
    config: str
    """Digest of the identity of the configuration."""
    data: str
    """Digest of what it is trained on."""

    def advanced(self, images: int) -> "TrainState":
        """The state after another step."""
        return self.model_copy(update={"images_seen": self.images_seen + images})


class Checkpoints:
    """Checkpoints of one run. A checkpoint exists when its commit record does.

    Args:
        storage: the folder of the checkpoints, one subfolder each.
        fresh: the state of a run that has no checkpoint yet.
        keep: how many committed checkpoints stay.
        world: the ranks; each writes its own files.
    """

    def __init__(self, storage: Storage, fresh: TrainState, keep: int, world: World) -> None:
        self._storage, self._fresh, self._keep, self._world = storage, fresh, keep, world

    def save(self, step: Step, state: TrainState) -> None:
        """Write the state of all ranks and commit it; every rank calls it."""
        name = f"{state.images_seen:012d}"
        if self._world.is_first:
            discard(self._storage, name)
        self._world.barrier()
        with tempfile.TemporaryDirectory(prefix="vavae-") as scratch:
            folder = Path(scratch)
            for engine_name, engine in step.engines.items():
                (folder / engine_name).mkdir()
                engine.save(folder / engine_name)
            if step.ema is not None:
                step.ema.save(folder / _EMA)
            parts = self._world.gather(self._put(folder, name))
        memories = self._world.gather(step.memory())
        if self._world.is_first:
            files = {path: info for part in parts for path, info in part.items()}
            record = Artefact(
                kind="checkpoint",
                digest=digest({path: info.sha256 for path, info in files.items()}),
                config=state.config,
                inputs={"data": state.data},
                images_seen=state.images_seen,
                files=files,
                details={
                    "state": state.model_dump(),
                    "layout": _layout(step),
                    "memory": {lane: values for memory in memories for lane, values in memory.items()},
                },
            )
            commit(self._storage, name, record)
            self._prune(name)
        self._world.barrier()

    def _prune(self, newest: str) -> None:
        """Keep the last few committed up to the one just written; what is half-written or lay ahead of it goes."""
        kept = [name for name in self.committed() if name <= newest][-self._keep :]
        for name in self._storage.list():
            if name not in kept:
                discard(self._storage, name)

    def _put(self, folder: Path, name: str) -> dict[str, FileInfo]:
        """Put this rank's files into storage."""
        put = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = path.relative_to(folder).as_posix()
            self._storage.put_file(path, f"{name}/{relative}")
            put[relative] = FileInfo(bytes=path.stat().st_size, sha256=sha256_of(path))
        return put

    def committed(self) -> list[str]:
        """Names of the committed checkpoints, oldest first."""
        return [name for name in self._storage.list() if read(self._storage, name) is not None]

    def latest(self) -> tuple[str, Artefact] | None:
        """Name and record of the newest checkpoint that is whole; others are passed over with a warning."""
        for name in reversed(self._storage.list()):
            record = read(self._storage, name)
            if record is not None and is_intact(self._storage, name, record):
                return name, record
            logger.warning("%s is not whole and is passed over", self._storage.url(name))
        return None

    def images_seen(self) -> int:
        """Images seen at the newest checkpoint that is whole; 0 where there is none. Every rank calls it."""
        found = self._world.broadcast(self.latest() if self._world.is_first else None)
        return 0 if found is None else TrainState.model_validate(found[1].details["state"]).images_seen

    def restore(self, step: Step, begin: int = 0) -> TrainState:
        """Load the newest checkpoint into the step; the fresh state where there is none. Every rank calls it.

        Args:
            step: what to load it into.
            begin: images seen at which the step's stage begins. A checkpoint of that moment belongs to the stage
                before: the step has its weights already, and other optimisers.

        Raises:
            UserError: it was made with another configuration or other data, or its files fit other engines or another
                number of workers.
        """
        found = self._world.broadcast(self.latest() if self._world.is_first else None)
        if found is None:
            return self._fresh
        name, record = found
        state, url = TrainState.model_validate(record.details["state"]), self._storage.url(name)
        for what in ("config", "data"):
            if getattr(state, what) != getattr(self._fresh, what):
                raise UserError(f"{url}: made with another {what}; give the run another name")
        if state.images_seen == begin:
            return state
        changed = differences(record.details["layout"], _layout(step))
        if changed:
            field, saved, now = changed[0]
            raise UserError(
                f"{url}: saved with {field}={saved}, which is {now} now; set it back to go on with this run"
            )
        with self._fetched(name) as folder:
            for engine_name, engine in step.engines.items():
                engine.load(folder / engine_name)
            if step.ema is not None:
                step.ema.load(folder / _EMA)
        step.recall(record.details["memory"])
        return state

    @contextmanager
    def _fetched(self, name: str) -> Iterator[Path]:
        """A local folder with all files of a checkpoint."""
        if self._storage.is_local:
            yield Path(self._storage.url(name))
            return
        with tempfile.TemporaryDirectory(prefix="vavae-") as scratch:
            for path in self._storage.list(name, recursive=True):
                target = Path(scratch) / path.removeprefix(f"{name}/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self._storage.read_bytes(path))
            yield Path(scratch)


def _layout(step: Step) -> dict[str, JsonValue]:
    """What of the engines has to be the same when the checkpoint is loaded; it is for all of a step."""
    return dict(next(iter(step.engines.values())).layout)
