"""Which of several attempts at one training may write: the last one that began."""

from uuid import uuid4

from vavae.errors import CommonError
from vavae.storage.storage import Storage


class SupersededError(CommonError):
    """Another attempt at the same training has begun since.

    Args:
        message: for the user.
        owner: who runs that attempt.
    """

    def __init__(self, message: str, owner: str) -> None:
        super().__init__(message, owner)
        self.message, self.owner = message, owner

    def __str__(self) -> str:
        return self.message


class Lease:
    """The right to write. It has no end of its own: whoever takes it later ends it.

    So a run that lost its machine is taken up at once, and a machine that was only cut off finds out before it commits,
    deletes or exports anything.

    Args:
        storage: where the lease lies.
        path: its file.
        owner: who asks for it; all attempts of one driver have the same.
    """

    def __init__(self, storage: Storage, path: str, owner: str) -> None:
        self._storage, self._path, self._owner = storage, path, owner
        self.attempt = ""
        """Name of this attempt, once the lease is taken."""

    def acquire(self) -> str:
        """Begin an attempt; returns its name."""
        self.attempt = uuid4().hex[:8]
        self._storage.write_json(self._path, {"attempt": self.attempt, "owner": self._owner})
        return self.attempt

    def check(self) -> None:
        """Make sure that nobody has taken it since.

        Raises:
            SupersededError: somebody has.
        """
        holder = self._storage.read_json(self._path)
        if holder["attempt"] != self.attempt:
            raise SupersededError(
                f"{self._storage.url()}: {holder['owner']} goes on with this training now, and this attempt ends",
                holder["owner"],
            )
