"""Checkpoints of a training, each complete or absent.

A checkpoint is a folder. The attempt that writes it has a subfolder of its own in it, and every set of weights one in
that, with one file of each rank, which holds the rank's shards of weights and optimizer; so has each average. The
commit record is written last. Whatever the engine and the number of ranks that wrote a checkpoint, any other reads it:
there is nothing to convert.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from hashlib import sha256
from threading import Event
from typing import NamedTuple

from pydantic import ValidationError

from vavae.config import digest
from vavae.distributed.shard_files import (
    ShardFile,
    fetch_tensor_shards,
    fill_tensor_shards,
    header_of,
    save_tensor_shards,
)
from vavae.distributed.sharded_tensors import TensorShard
from vavae.distributed.world import World
from vavae.errors import CommonError, UserError, one_line
from vavae.finite import finite_row
from vavae.interop.averages import open_stored_shards
from vavae.runs.checkpoints import CHECKPOINTS, average_set, checkpoint_name
from vavae.storage.artifact import Artifact, FileInfo, commit, is_intact, read
from vavae.storage.storage import Storage, sha256_of
from vavae.training.checkpoints.background_write import BackgroundWrite
from vavae.training.checkpoints.lease import Lease, SupersededError
from vavae.training.checkpoints.retention import Retention
from vavae.training.checkpoints.state import CheckpointDetails, TrainState
from vavae.training.step import Step

logger = logging.getLogger(__name__)

_PARTS = "parts"
_LEASE = "lease.json"
_LOCAL_POLL_SECONDS, _POLL_SECONDS = 0.02, 1.0


class _Found(NamedTuple):
    """A checkpoint whose files are all there."""

    name: str
    record: Artifact
    details: CheckpointDetails


class EarlierCheckpointError(Exception):
    """A checkpoint is damaged, and a step must be made anew from what there was before it.

    That belongs to an earlier phase, whose step must load it, or there is none for a step that awaits one.
    """


class Checkpoints:
    """Checkpoints of one training, written while it continues. A checkpoint exists when its commit record does.

    Making one begins an attempt at the training and ends all others: they can neither commit nor delete any more.
    Every rank makes one.

    Args:
        training: the folder of the training; they lie in its `checkpoints`, one subfolder each.
        fresh: the state of a run that has no checkpoint yet.
        retention: which of the committed ones stay.
        world: the ranks; each writes its own files.
        owner: who runs the training, for whoever finds that it was taken over.
    """

    def __init__(
        self,
        training: Storage,
        fresh: TrainState,
        retention: Retention,
        world: World,
        owner: str = "another process",
    ) -> None:
        self._storage = training.child(CHECKPOINTS)
        self._fresh, self._retention, self._world = fresh, retention, world
        self._lease = Lease(training, _LEASE, owner)
        self._attempt: str = world.broadcast(self._lease.acquire() if world.is_first else None)
        self._saves = 0
        self._writing: BackgroundWrite | None = None
        self._saved: TrainState | None = None
        self._candidates: list[tuple[str, Artifact]] | None = None
        """Checkpoints to resume from, newest first; None before the first search."""

    def is_due(self, images_seen: int) -> bool:
        """Return whether a checkpoint of this moment is due, besides those at intervals; see `Retention.is_due`."""
        return self._retention.is_due(images_seen)

    def save(self, step: Step, state: TrainState, metrics: Mapping[str, float], put_log: Callable[[], None]) -> int:
        """Copy the state of all ranks, which a thread writes and commits. Every rank calls it.

        Args:
            step: step whose weights, optimizers and state are saved.
            state: progress of the training.
            metrics: the last row of the log, by which the best are found.
            put_log: writes the log up to here; on rank 0, before it commits.

        Returns:
            Bytes that this rank copied.

        Raises:
            CommonError: the checkpoint before could not be written, see `wait_for_pending_save`.
        """
        self.wait_for_pending_save()
        memories = self._world.gather(step.state_dict())
        details = CheckpointDetails(
            state=state,
            updates={key: engine.updates for key, engine in step.engines.items()},
            memory={lane: [*values] for memory in memories for lane, values in memory.items()},
            metrics=finite_row(metrics),
        )
        sets = {key: {**engine.tensor_shards(), **engine.moments()} for key, engine in step.engines.items()}
        sets |= _averages_of(step)
        copies = {key: _copies_on_cpu(parts) for key, parts in sets.items()}
        self._saves += 1
        place = _Place(checkpoint_name(state.images_seen), f"{self._attempt}-{self._saves}")
        self._writing = BackgroundWrite(lambda abandoned: self._write(place, copies, details, put_log, abandoned))
        self._saved, self._candidates = state, None
        return sum(part.values.nbytes for parts in copies.values() for part in parts.values())

    def wait_for_pending_save(self) -> None:
        """Wait until the last checkpoint is committed. Every rank calls it.

        Raises:
            CommonError: it could not be written, on whatever rank.
            SupersededError: another attempt at this training has begun since.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        own = None if self._world.is_first else writing.result()
        errors = [error for error in self._world.gather(own) if error is not None]
        if self._world.is_first:
            if errors:
                writing.abandon()
            own = writing.result()
        error = next(iter(errors), self._world.broadcast(own))
        if error is None:
            return
        lost = error if isinstance(error, SupersededError) else self._lease_error()
        if isinstance(lost, SupersededError):  # which deletes what this attempt is still writing
            raise lost
        raise CommonError(f"no checkpoint could be written: {error}; earlier ones stay")

    def check_lease(self) -> None:
        """Make sure that this attempt may still write. Every rank calls it.

        Raises:
            SupersededError: it may not.
            CommonError: whether it may can't be read.
        """
        error = self._lease_error()
        if error is not None:
            raise error

    def _lease_error(self) -> CommonError | None:
        """Read the lease; returns the error where this attempt may not write. Every rank calls it and gets the same."""
        error: CommonError | None = None
        if self._world.is_first:
            try:
                self._lease.check()
            except SupersededError as lost:
                error = lost
            except (OSError, UserError) as unreadable:
                reason = one_line(unreadable) if isinstance(unreadable, OSError) else unreadable
                error = CommonError(f"the lease of this training can't be read: {reason}")
        return self._world.broadcast(error)

    def _write(
        self,
        place: "_Place",
        sets: Mapping[str, Mapping[str, TensorShard]],
        details: CheckpointDetails,
        put_log: Callable[[], None],
        abandoned: Event,
    ) -> None:
        """Write this rank's files; on rank 0 wait for those of all and commit them, those of a snapshot first."""
        snapshots = self._retention.snapshots
        if snapshots is not None and not snapshots.is_due(details.state.images_seen):
            snapshots = None
        if snapshots is not None:
            self._write_files(snapshots.storage, place, {key: sets[key] for key in snapshots.sets})
        self._write_files(self._storage, place, sets)
        if self._world.is_first:
            put_log()
            if snapshots is not None:
                self._commit(snapshots.storage, "snapshot", place, details, abandoned)
            if self._commit(self._storage, "checkpoint", place, details, abandoned):
                self._retention.prune(self._storage, place.name)

    def _write_files(self, storage: Storage, place: "_Place", sets: Mapping[str, Mapping[str, TensorShard]]) -> None:
        """Write this rank's files of some sets of weights into a folder of checkpoints or snapshots."""
        files, headers = {}, {}
        for key, parts in sets.items():
            path = f"{key}/{self._world.rank:05d}.safetensors"
            with storage.create(f"{place.folder}/{path}") as local:
                save_tensor_shards(parts, local)
                header = header_of(local)
                files[path] = FileInfo(bytes=local.stat().st_size, sha256=sha256_of(local)).model_dump()
                headers[path] = FileInfo(bytes=len(header), sha256=sha256(header).hexdigest()).model_dump()
        part = {"files": files, "headers": headers}
        storage.write_json(f"{place.folder}/{_PARTS}/{self._world.rank:05d}.json", part)

    def _commit(
        self, storage: Storage, kind: str, place: "_Place", details: CheckpointDetails, abandoned: Event
    ) -> bool:
        """Wait for the files of all ranks and commit them; returns whether they all came."""
        poll_seconds = _LOCAL_POLL_SECONDS if storage.is_local else _POLL_SECONDS
        while len(parts := storage.list(f"{place.folder}/{_PARTS}")) < self._world.size:
            if abandoned.wait(poll_seconds):
                return False
        written = [json.loads(part) for part in storage.read_many(parts) if part is not None]
        files, headers = (
            {path: FileInfo.model_validate(info) for part in written for path, info in part[kind].items()}
            for kind in ("files", "headers")
        )
        details = details.model_copy(update={"headers": {f"{place.attempt}/{path}": headers[path] for path in headers}})
        record = Artifact(
            kind=kind,
            digest=digest({path: info.sha256 for path, info in files.items()}),
            config=details.state.config,
            inputs={"data": details.state.data},
            images_seen=details.state.images_seen,
            files={f"{place.attempt}/{path}": info for path, info in files.items()},
            details=details.model_dump(mode="json"),
        )
        self._lease.check()
        commit(storage, place.name, record)
        return True

    def images_seen(self) -> int:
        """Images seen at the newest complete checkpoint; 0 where there is none. Every rank calls it."""
        found = self._newest()
        return 0 if found is None else found.details.state.images_seen

    def restore(self, step: Step, begin: int = 0) -> TrainState:
        """Load the newest checkpoint into the step; the fresh state where there is none. Every rank calls it.

        Args:
            step: step to load it into; its engines may be others than those that were saved.
            begin: images seen at which the step's phase begins. A checkpoint of that moment belongs to the phase
                before: the step has its weights already, and other optimizers.

        Raises:
            UserError: it was made with another configuration or other data.
            EarlierCheckpointError: what there is, as far as it is not damaged, is nothing for this step.
        """
        if self._saved is not None and self._saved.images_seen == begin:
            return self._saved
        found = self._newest()
        if found is not None and found.details.state.images_seen == begin:
            return found.details.state
        while found is not None and found.details.state.images_seen > begin:
            if self._load(step, found):
                return found.details.state
            assert self._candidates, "there was a newest one"
            self._candidates.pop(0)
            found = self._newest()
        if begin > self._fresh.images_seen or step.awaits_checkpoint:
            raise EarlierCheckpointError
        return self._fresh

    def _load(self, step: Step, found: _Found) -> bool:
        """Load a checkpoint, unless what some rank needs of it is damaged, which leaves weights as they are."""
        with ExitStack() as stack:
            sets = {
                key: stack.enter_context(engine.restore(found.details.updates[key]))
                for key, engine in step.engines.items()
            }
            sets |= _averages_of(step)
            saved_shards = {}
            try:
                saved_shards = {key: fetch_tensor_shards(parts, self._files(found, key)) for key, parts in sets.items()}
            except (FileNotFoundError, UserError) as error:
                logger.warning("%s", error)
            damaged = self._world.any(not saved_shards)
            for key, parts in sets.items() if not damaged else ():
                fill_tensor_shards(parts, saved_shards[key])
        if damaged:
            self._warn_of_incomplete(found.name)
            for engine in step.engines.values():
                with engine.restore(updates=0):
                    pass  # without moments again
        else:
            step.load_state_dict(found.details.memory)
        return not damaged

    def _files(self, found: _Found, key: str) -> Iterator[ShardFile]:
        """Open the files of a set of weights, from the one on that a rank of this index has written.

        The second one is that of rank 0, which alone holds buffers: a thousand ranks would search all others for them.
        """
        paths = sorted(path for path in found.record.files if path.split("/")[1] == key)
        start = self._world.rank * len(paths) // self._world.size
        for path in dict.fromkeys([*paths[start : start + 1], *paths[:1], *paths[start:], *paths[:start]]):
            info, header = found.record.files[path], found.details.headers.get(path)
            yield open_stored_shards(self._storage, f"{found.name}/{path}", info, header)

    def _newest(self) -> _Found | None:
        """Find the newest complete checkpoint; others are skipped with a warning. Every rank calls it."""
        if self._candidates is None:
            self._candidates = self._world.broadcast(self._committed() if self._world.is_first else None)
            assert self._candidates is not None, "rank 0 has looked"
        if not self._candidates:
            return None
        name, record = self._candidates[0]
        return _Found(name, record, self._details(name, record))

    def _details(self, name: str, record: Artifact) -> CheckpointDetails:
        url = self._storage.url(name)
        try:
            details = CheckpointDetails.model_validate(record.details)
        except ValidationError as error:
            field = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(
                f"{url}: written by another version of this program ({field}): "
                "resume with that one, or give the run another name"
            ) from error
        for what in ("config", "data"):
            if getattr(details.state, what) != getattr(self._fresh, what):
                raise UserError(f"{url}: made with another {what}; give the run another name")
        return details

    def _committed(self) -> list[tuple[str, Artifact]]:
        """List names and records of the checkpoints whose files are all there, newest first."""
        found = []
        for name in reversed(self._storage.list()):
            record = read(self._storage, name)
            if record is not None and is_intact(self._storage, name, record):
                found.append((name, record))
            else:
                self._warn_of_incomplete(name)
        return found

    def _warn_of_incomplete(self, name: str) -> None:
        if self._world.is_first:
            logger.warning("%s is incomplete and is skipped", self._storage.url(name))


class _Place(NamedTuple):
    """Folders of a checkpoint that is being written."""

    name: str
    """Folder of the checkpoint."""
    attempt: str
    """Folder of the attempt within it."""

    @property
    def folder(self) -> str:
        """Folder of the attempt, below that of all checkpoints."""
        return f"{self.name}/{self.attempt}"


def _averages_of(step: Step) -> dict[str, dict[str, TensorShard]]:
    """Shards of all averages of a step, by the names of their sets."""
    exported = {} if step.ema is None else {average_set(None): step.ema.tensor_shards}
    return exported | {average_set(name): average.tensor_shards for name, average in step.averages.items()}


def _copies_on_cpu(parts: Mapping[str, TensorShard]) -> dict[str, TensorShard]:
    """Copy shards to the CPU, where further steps do not change them."""
    return {name: part._replace(values=part.values.to("cpu", copy=True)) for name, part in parts.items()}
