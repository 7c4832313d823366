"""Retries of requests to a store: transient errors, pauses between attempts, and counters of all requests."""

import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from tenacity import AsyncRetrying, AttemptManager, Retrying, retry_if_exception

from vavae.storage.config import StorageOptions

_MAX_PAUSE_SECONDS = 20.0
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504, 509}
_TRANSIENT_CODES = {
    *("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException"),
    *("BadDigest", "XAmzContentSHA256Mismatch"),  # damaged on the way in
}
# By name, so that the libraries of stores which nobody uses are not imported.
_TRANSIENT = {
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
_PERMANENT = {"botocore.exceptions.SSLError", "ssl.SSLCertVerificationError", "requests.exceptions.SSLError"}

Result = TypeVar("Result")


class StorageUnavailableError(OSError):
    """Raised when a store failed in every attempt; the last error is the cause."""


class Counts(NamedTuple):
    """Counters of this process's requests to stores other than local folders."""

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
        """Return the totals so far; the difference of two readings is what happened between them."""
        return self._counts


COUNTERS = Counters()


def error_class_names(error: BaseException) -> set[str]:
    """Full names of the classes, inherited ones too, of an error and of what caused it."""
    return {name for link in _causes(error) for name in _own_class_names(link)}


def is_transient(error: BaseException) -> bool:
    """Return whether an error may pass by itself: throttling, 5xx, a broken or silent connection."""
    if isinstance(error, StorageUnavailableError) or error_class_names(error) & _PERMANENT:
        return False
    for link in _causes(error):
        if _own_class_names(link) & _TRANSIENT or isinstance(link, (ConnectionError, TimeoutError)):
            return True
        response = _response(link)
        if response is not None:
            return response.status in _TRANSIENT_STATUS or response.code in _TRANSIENT_CODES
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
        """Start counting attempts and time anew, because something got through."""
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
    """The retries of one storage."""

    options: StorageOptions
    uniform: Callable[[float, float], float]

    @staticmethod
    def of(options: StorageOptions) -> "Retry":
        """Retries under the given options, with a jitter of their own."""
        return Retry(options, random.Random().uniform)

    def attempts(self, what: str) -> Attempts:
        """Start on an operation; ``what`` names it in the error."""
        return Attempts(self.options, what, self.uniform)

    def call(self, what: str, operation: Callable[[], Result]) -> Result:
        """Run an operation until an attempt succeeds, and return its result."""
        for attempt in self.attempts(what):
            with attempt:
                result = operation()
        return result


class _Response(NamedTuple):
    status: int
    code: str


def _own_class_names(error: BaseException) -> set[str]:
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _response(error: BaseException) -> _Response | None:
    """Status and code of a server's response, as botocore, requests, httpx, aiohttp or gcsfs hold it; None without."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _Response(status, response.get("Error", {}).get("Code", ""))
    for holder, name in ((response, "status_code"), (error, "status"), (error, "code")):
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return _Response(status, "")
    return None
