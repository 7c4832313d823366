"""The right to write of the last of several attempts at one training."""

from uuid import uuid4

from vavae.errors import CommonError
from vavae.storage.storage import Storage


class SupersededError(CommonError):
    """Another attempt at the same training has begun since.

    Args:
        message: text for the user.
        owner: runner of that attempt.
    """

    def __init__(self, message: str, owner: str) -> None:
        super().__init__(message, owner)
        self.message, self.owner = message, owner

    def __str__(self) -> str:
        return self.message


class Lease:
    """Right to write, which never expires: a later attempt that acquires it ends it.

    So a training that lost its machine resumes at once, and a machine that was only cut off finds out before it
    commits, deletes or exports anything.

    Args:
        storage: folder of the training.
        path: file of the lease.
        owner: runner of the attempt; all attempts of one driver have the same.
    """

    def __init__(self, storage: Storage, path: str, owner: str) -> None:
        self._storage, self._path, self._owner = storage, path, owner
        self.attempt = ""
        """Name of this attempt, once the lease is acquired."""

    def acquire(self) -> str:
        """Begin an attempt; returns its name."""
        self.attempt = uuid4().hex[:8]
        self._storage.write_json(self._path, {"attempt": self.attempt, "owner": self._owner})
        return self.attempt

    def check(self) -> None:
        """Make sure that no other attempt has acquired it since.

        Raises:
            SupersededError: another one has.
        """
        holder = self._storage.read_json(self._path)
        if holder["attempt"] != self.attempt:
            raise SupersededError(
                f"{self._storage.url()}: {holder['owner']} resumes this training now, and this attempt ends",
                holder["owner"],
            )
