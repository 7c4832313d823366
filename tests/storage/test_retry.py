"""Which errors pass, and how long is waited: bounds, limits, and patience that starts anew with progress."""

import importlib.util
import threading
import time

import aiohttp
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
    SSLError,
)

from vavae.storage.config import StorageOptions
from vavae.storage.retry import Attempts, Counters, Counts, Retry, StorageUnavailableError, is_transient


def answered(status, code=""):
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def of_the_hub(name):
    """An error of the library by which huggingface_hub asks."""
    library = "httpx2" if importlib.util.find_spec("httpx2") else "httpx"
    return getattr(importlib.import_module(library), name)("x")


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answered(503, "SlowDown"), True),
        (answered(500), True),
        (answered(429), True),
        (answered(400, "RequestTimeout"), True),
        (caused(OSError(16, "busy"), answered(503)), True),
        (answered(403, "AccessDenied"), False),
        (answered(404, "NoSuchKey"), False),
        (answered(501, "NotImplemented"), False),
        (caused(FileNotFoundError("no bucket"), answered(404, "NoSuchBucket")), False),
        (ReadTimeoutError(endpoint_url="x"), True),
        (ConnectTimeoutError(endpoint_url="x"), True),
        (EndpointConnectionError(endpoint_url="x"), True),
        (SSLError(endpoint_url="x", error="self-signed"), False),
        (NoCredentialsError(), False),
        (aiohttp.ClientPayloadError(), True),
        (aiohttp.ServerDisconnectedError(), True),
        (ConnectionResetError(), True),
        (of_the_hub("ConnectError"), True),
        (of_the_hub("ReadTimeout"), True),
        (TimeoutError(), True),
        (FileNotFoundError(), False),
        (OSError(28, "no space left"), False),
        (StorageUnavailableError("gave up already"), False),
        (ValueError("a mistake of ours"), False),
    ],
    ids=repr,
)
def test_what_passes(error, expected):
    assert is_transient(error) is expected


def attempts(uniform, **options):
    return Attempts(StorageOptions(**options), "s3://b/x", uniform)


def test_the_pause_is_drawn_below_a_bound_that_doubles_up_to_a_limit():
    asked = []
    tries = attempts(lambda low, high: asked.append((low, high)) or high / 2, attempts=12, backoff_seconds=0.5)
    pauses = [tries.pause(ConnectionResetError()) for _ in range(8)]
    assert asked == [(0.0, high) for high in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0)]
    assert pauses == [high / 2 for _, high in asked]


def test_it_gives_up_after_as_many_attempts_as_allowed_and_says_so():
    tries = attempts(lambda low, high: low, attempts=3)
    assert [tries.pause(ConnectionResetError("reset")) for _ in range(2)] == [0.0, 0.0]
    with pytest.raises(StorageUnavailableError, match=r"^s3://b/x: gave up after 3 attempts in 0 s: reset$") as caught:
        tries.pause(ConnectionResetError("reset"))
    assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_it_gives_up_after_as_much_time_as_allowed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tries = attempts(lambda low, high: low, operation_seconds=60)
    now[0] += 59
    assert tries.pause(TimeoutError()) == 0.0
    now[0] += 1
    with pytest.raises(StorageUnavailableError, match="2 attempts in 60 s: TimeoutError"):
        tries.pause(TimeoutError())


def test_progress_starts_patience_anew():
    tries = attempts(lambda low, high: high, attempts=2, backoff_seconds=1)
    for _ in range(5):
        assert tries.pause(ConnectionResetError()) == 1.0
        tries.progressed()


def test_a_lasting_error_is_not_waited_for():
    assert attempts(lambda low, high: high).pause(PermissionError()) is None


def test_call_repeats_until_it_works(monkeypatch):
    slept, results = [], [ConnectionResetError(), TimeoutError(), 7]
    monkeypatch.setattr(time, "sleep", slept.append)

    def operation():
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    assert Retry(StorageOptions(), lambda low, high: high).call("x", operation) == 7
    assert slept == [0.2, 0.4]


def test_processes_draw_different_pauses():
    draws = {Retry.of(StorageOptions()).uniform(0.0, 1.0) for _ in range(4)}
    assert len(draws) == 4
    assert all(0 <= draw <= 1 for draw in draws)


def test_counters_lose_nothing_between_threads():
    counters = Counters()

    def work():
        for _ in range(2000):
            counters.add(requests=1, bytes_read=3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.read() == Counts(requests=8000, bytes_read=24000)
