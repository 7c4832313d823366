"""Which errors of a store pass, how long to wait before asking again, and what all the asking amounts to."""

import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from tenacity import AsyncRetrying, AttemptManager, Retrying, retry_if_exception

from vavae.storage.config import StorageOptions

_MAX_PAUSE_SECONDS = 20.0
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 509}
_PASSING_CODES = {
    *("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException"),
    *("BadDigest", "XAmzContentSHA256Mismatch"),  # damaged on the way in
}
# By name, so that the libraries of stores which nobody uses are not imported.
_PASSING = {
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.parsers.ResponseParserError",
    "urllib3.exceptions.HTTPError",
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "httpx.TransportError",
    "httpx2.TransportError",
}
_LASTING = {"botocore.exceptions.SSLError", "ssl.SSLCertVerificationError", "requests.exceptions.SSLError"}

Result = TypeVar("Result")


class StorageUnavailableError(OSError):
    """A store that went on failing until patience was at its end; the last error is the cause."""


class Counts(NamedTuple):
    """What this process asked of stores other than local folders."""

    bytes_read: int = 0
    bytes_written: int = 0
    requests: int = 0
    """Requests sent to S3, repeated ones included; elsewhere calls of the file system."""

    retries: int = 0
    fetched_files: int = 0
    """Whole files copied into the cache."""


class Counters:
    """Running totals of a process, safe to add to from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    def add(self, **counts: int) -> None:
        """Add to the totals by field of :class:`Counts`."""
        with self._lock:
            self._counts = self._counts._replace(
                **{name: getattr(self._counts, name) + count for name, count in counts.items()}
            )

    def read(self) -> Counts:
        """The totals so far; the difference of two readings is what happened between them."""
        return self._counts


COUNTERS = Counters()


def error_class_names(error: BaseException) -> set[str]:
    """Full names of the classes, inherited ones too, of an error and of what caused it."""
    return {name for link in _causes(error) for name in _own_kinds(link)}


def is_transient(error: BaseException) -> bool:
    """Whether an error is of the kind that goes away: throttling, 5xx, a broken or silent connection."""
    if isinstance(error, StorageUnavailableError) or error_class_names(error) & _LASTING:
        return False
    for link in _causes(error):
        if _own_kinds(link) & _PASSING or isinstance(link, (ConnectionError, TimeoutError)):
            return True
        answer = _answer(link)
        if answer is not None:
            return answer.status in _PASSING_STATUS or answer.code in _PASSING_CODES
    return False


class Attempts:
    """The attempts at one operation: exponential back-off with full jitter, within the limits of the options.

    Iterate, also with ``async for``, and do the operation in ``with attempt``: the last attempt is the one that works.
    ``uniform`` draws from [low, high]; each process draws its own pauses, so that many don't come back together.
    """

    def __init__(self, options: StorageOptions, what: str, uniform: Callable[[float, float], float]) -> None:
        self._options, self._what, self._uniform = options, what, uniform
        self._rules: dict[str, Any] = {"retry": retry_if_exception(self._again), "wait": lambda _: self._seconds}
        self.progressed()

    def __iter__(self) -> Iterator[AttemptManager]:
        return iter(Retrying(**self._rules))

    def __aiter__(self) -> AsyncIterator[AttemptManager]:
        return aiter(AsyncRetrying(**self._rules))

    def progressed(self) -> None:
        """Something got through: patience starts anew."""
        self._failed, self._since = 0, time.monotonic()

    def pause(self, error: Exception) -> float | None:
        """Seconds to wait before the next attempt after an error; None where the error is one to raise.

        Raises:
            StorageUnavailableError: the error would pass, but the attempts or the time are used up.
        """
        if not is_transient(error):
            return None
        self._failed += 1
        waited = time.monotonic() - self._since
        if self._failed >= self._options.attempts or waited >= self._options.operation_seconds:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StorageUnavailableError(
                f"{self._what}: gave up after {self._failed} attempts in {waited:.0f} s: {reason}"
            ) from error
        COUNTERS.add(retries=1)
        return self._uniform(0.0, min(_MAX_PAUSE_SECONDS, self._options.backoff_seconds * 2.0 ** (self._failed - 1)))

    def _again(self, error: BaseException) -> bool:
        """Whether there is another attempt; how long to wait before it is known from then on."""
        pause = self.pause(error) if isinstance(error, Exception) else None
        self._seconds = pause or 0.0
        return pause is not None


@dataclass(frozen=True)
class Retry:
    """The patience of one storage."""

    options: StorageOptions
    uniform: Callable[[float, float], float]

    @staticmethod
    def of(options: StorageOptions) -> "Retry":
        """With a jitter of its own."""
        return Retry(options, random.Random().uniform)

    def attempts(self, what: str) -> Attempts:
        """Start on an operation; ``what`` names it in the error."""
        return Attempts(self.options, what, self.uniform)

    def call(self, what: str, operation: Callable[[], Result]) -> Result:
        """The operation's result, from the first attempt that doesn't fail."""
        for attempt in self.attempts(what):
            with attempt:
                result = operation()
        return result


class _Answer(NamedTuple):
    status: int
    code: str


def _own_kinds(error: BaseException) -> set[str]:
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> _Answer | None:
    """What a server answered, in the forms of botocore, requests, httpx, aiohttp and gcsfs; None where it didn't."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _Answer(status, response.get("Error", {}).get("Code", ""))
    for holder, name in ((response, "status_code"), (error, "status"), (error, "code")):
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return _Answer(status, "")
    return None
