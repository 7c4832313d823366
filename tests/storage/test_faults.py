"""Real S3 through a faulty network: the bytes are exact, damage is noticed, every attempt is counted."""

import os
import time
import uuid

import pytest
from support.faulty_proxy import PASSING, Fault, Plan, faulty

from vavae.errors import UserError
from vavae.storage.config import StorageOptions
from vavae.storage.retry import StorageUnavailableError
from vavae.storage.storage import Storage, sha256_of

MIB = 1 << 20
TOLD = {Fault.RESET, Fault.TRUNCATE, Fault.ERROR_500, Fault.ERROR_503, Fault.ERROR_429}
"""Faults that cost an attempt."""


@pytest.fixture
def place(s3):
    return f"s3://{s3.bucket}/{uuid.uuid4().hex}"


def through(endpoint, place, tmp_path, **options):
    options = {"attempts": 12, "backoff_seconds": 0.002, "read_seconds": 5.0, **options}
    return Storage(place, str(tmp_path / "cache"), StorageOptions(endpoint=endpoint, **options))


def difference(before):
    return type(before)(*(b - a for a, b in zip(before, Storage.counters.read(), strict=True)))


def put(s3, place, tmp_path, size, path="x.bin"):
    """Store random bytes without any fault."""
    source = tmp_path / path
    source.write_bytes(os.urandom(size))
    through(s3.endpoint, place, tmp_path).put_file(source, path)
    return source


@pytest.mark.parametrize("kind", PASSING)
def test_every_kind_of_fault_is_survived(s3, place, tmp_path, kind):
    source = put(s3, place, tmp_path, 300_000)
    plan = Plan(1, [kind], rate=1.0, limit=6, reads_only=True)
    before = Storage.counters.read()
    with faulty(s3.endpoint, plan) as endpoint:
        assert through(endpoint, place, tmp_path).read_bytes("x.bin") == source.read_bytes()
    assert plan.happened[kind] == (6 if kind in TOLD else 1)  # what is only slow costs no attempt
    counts = difference(before)
    assert counts.retries == (6 if kind in TOLD else 0)
    assert counts.requests == 1 + counts.retries
    assert counts.bytes_read == 300_000


def test_a_broken_body_goes_on_at_the_byte_it_broke_at(s3, place, tmp_path):
    source = put(s3, place, tmp_path, 2 * MIB)
    plan = Plan(2, [Fault.TRUNCATE], rate=1.0, limit=10, reads_only=True)
    with faulty(s3.endpoint, plan) as endpoint:
        assert through(endpoint, place, tmp_path, attempts=2).read_bytes("x.bin") == source.read_bytes()
    assert plan.happened.total() == 10  # far more than the attempts without progress
    assert plan.sent_bytes == 2 * MIB


def test_a_file_comes_whole_into_the_cache_through_faults(s3, place, tmp_path):
    source = put(s3, place, tmp_path, 40 * MIB)  # three parts
    plan = Plan(3, limit=20, rate=0.8, reads_only=True)
    before = Storage.counters.read()
    with faulty(s3.endpoint, plan) as endpoint:
        storage = through(endpoint, place, tmp_path)
        assert sha256_of(storage.local_file("x.bin")) == sha256_of(source)
    counts = difference(before)
    assert plan.happened.total() > 3
    assert (counts.bytes_read, counts.fetched_files) == (40 * MIB, 1)
    assert counts.retries == sum(plan.happened[kind] for kind in TOLD)


def test_everything_works_through_faults(s3, place, tmp_path):
    plan = Plan(4, rate=0.4)
    with faulty(s3.endpoint, plan) as endpoint:
        storage = through(endpoint, place, tmp_path)
        for number in range(8):
            storage.write_bytes(f"a/{number}", bytes([number]) * number)
        assert storage.sizes("a") == {f"a/{number}": number for number in range(8)}
        assert [storage.read_bytes(path) for path in storage.list("a")] == [bytes([n]) * n for n in range(8)]
        assert storage.read_range("a/7", 2, 5) == b"\7\7\7"
        assert storage.is_file("a/3")
        assert not storage.is_file("a/9")
        assert storage.exists("a")
        storage.delete("a")
        assert storage.sizes() == {}
    assert plan.happened.total() > 8


def test_a_silent_server_is_asked_again(s3, place, tmp_path):
    source = put(s3, place, tmp_path, 100_000)
    plan = Plan(5, [Fault.STALL], rate=1.0, limit=1, reads_only=True, silence_seconds=6.0)
    start = time.monotonic()
    with faulty(s3.endpoint, plan) as endpoint:
        assert through(endpoint, place, tmp_path, read_seconds=0.3).read_bytes("x.bin") == source.read_bytes()
        assert time.monotonic() - start < plan.silence_seconds - 0.5


def test_silent_damage_is_caught_and_fetched_again(s3, place, tmp_path):
    source = put(s3, place, tmp_path, 100_000)
    plan = Plan(6, [Fault.FLIP], rate=1.0, limit=1, reads_only=True)
    before = Storage.counters.read()
    with faulty(s3.endpoint, plan) as endpoint:
        storage = through(endpoint, place, tmp_path)
        copy = storage.local_file("x.bin", sha256=sha256_of(source))
        assert copy.read_bytes() == source.read_bytes()
        assert difference(before).fetched_files == 2
        requests = difference(before).requests
        assert storage.local_file("x.bin", sha256=sha256_of(source)) == copy
        assert difference(before).requests == requests  # what is here and verified needs no request


def test_lasting_damage_is_an_error_and_leaves_nothing(s3, place, tmp_path):
    source = put(s3, place, tmp_path, 100_000)
    with faulty(s3.endpoint, Plan(7, [Fault.FLIP], rate=1.0, reads_only=True)) as endpoint:
        storage = through(endpoint, place, tmp_path)
        with pytest.raises(UserError, match=rf"^{place}/x\.bin: .*SHA-256 is not {sha256_of(source)}.*damaged"):
            storage.local_file("x.bin", sha256=sha256_of(source))
    assert [path for path in (tmp_path / "cache" / "files").rglob("*") if path.is_file()] == []


def test_a_server_that_stays_down_ends_patience(s3, place, tmp_path):
    before = Storage.counters.read()
    with faulty(s3.endpoint, Plan(8, [Fault.ERROR_503], rate=1.0)) as endpoint:
        storage = through(endpoint, place, tmp_path, attempts=4)
        for ask in (storage.read_bytes, storage.size, storage.is_file, lambda path: storage.write_bytes(path, b"")):
            with pytest.raises(StorageUnavailableError, match=rf"^{place}/x: gave up after 4 attempts in \d+ s: "):
                ask("x")
    assert difference(before)[2:4] == (16, 12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.long
def test_a_thousand_faults(s3, place, tmp_path, seed):
    source = put(s3, place, tmp_path, 64 * MIB)
    plan = Plan(seed, rate=0.7, limit=1000, silence_seconds=0.01)
    with faulty(s3.endpoint, plan) as endpoint:
        storage = through(endpoint, place, tmp_path, attempts=30)
        while plan.happened.total() < 1000:
            storage.put_file(source, "y.bin")
            assert sha256_of(storage.local_file("y.bin")) == sha256_of(source)
            storage.delete("y.bin")


@pytest.mark.long
def test_a_large_file_is_put_in_parts_through_faults(s3, place, tmp_path):
    source = tmp_path / "large.bin"
    source.write_bytes(os.urandom(MIB) * 220)
    kinds = [Fault.ERROR_500, Fault.ERROR_503, Fault.ERROR_429]
    with faulty(s3.endpoint, Plan(9, kinds, rate=0.3)) as endpoint:
        storage = through(endpoint, place, tmp_path)
        storage.put_file(source, "large.bin")
        assert sha256_of(storage.local_file("large.bin")) == sha256_of(source)
