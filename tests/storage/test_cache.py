"""The node's cache: bounded, one fetch for all, nothing half-written, whoever dies in the middle."""

import fcntl
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from pathlib import Path

import pytest
from support.waiting import wait_until

from vavae.errors import UserError
from vavae.storage import scratch
from vavae.storage.cache import Cache
from vavae.storage.local import PARTIAL
from vavae.storage.scratch import network_file_system, scratch_folder
from vavae.storage.storage import Storage

FORK = multiprocessing.get_context("fork")


def writes(data, log=None, before=None):
    """A fetch of some bytes; it notes itself in a log, and may do something half-way."""

    def fetch(file):
        if log is not None:
            with open(log, "a") as lines:
                lines.write(f"{os.getpid()}\n")
        file.write(data[: len(data) // 2])
        file.flush()
        if before is not None:
            before()
        file.write(data[len(data) // 2 :])

    return fetch


def get(cache, key, data, **how):
    return cache.get(key, "f.bin", lambda: len(data), writes(data, **how))


def refuse(file):
    raise AssertionError("fetched again")


def sizes(folder):
    """Bytes by path relative to a cache of every file of its, partial ones too."""
    files = Path(folder, "files")
    return {str(path.relative_to(files)): path.stat().st_size for path in files.rglob("*") if path.is_file()}


def test_a_file_is_fetched_once_under_its_name(tmp_path):
    cache = Cache(tmp_path, 100)
    path = get(cache, "k", b"abcd")
    assert path.read_bytes() == b"abcd"
    assert path.name == "f.bin"
    assert Cache(tmp_path, 100).get("k", "f.bin", lambda: 4, refuse) == path


def test_what_was_asked_for_longest_ago_is_dropped(tmp_path):
    cache = Cache(tmp_path, 10)
    first, second = get(cache, "a", b"1234"), get(cache, "b", b"1234")
    assert get(cache, "a", b"1234") == first
    third = get(cache, "c", b"1234")
    assert [path.exists() for path in (first, second, third)] == [True, False, True]
    assert sum(sizes(tmp_path).values()) == 8
    assert not second.parent.exists()
    whole = get(cache, "d", b"x" * 10)
    assert sizes(tmp_path) == {"d/f.bin": 10}
    assert whole.read_bytes() == b"x" * 10


def test_a_file_above_the_bound_is_refused_with_the_field_to_change(tmp_path):
    cache = Cache(tmp_path, 1000)
    get(cache, "a", b"1")
    with pytest.raises(UserError, match=r"storage\.cache_bytes = 1,000 cannot hold a file of 1,001 bytes"):
        get(cache, "b", b"x" * 1001)
    assert sizes(tmp_path) == {"a/f.bin": 1}


def test_a_mapped_file_keeps_its_pages_when_it_is_dropped(tmp_path):
    cache = Cache(tmp_path, 8192)
    path = get(cache, "a", b"a" * 8192)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        get(cache, "b", b"b" * 8192)
        assert not path.exists()
        assert pages[:] == b"a" * 8192


def test_a_failed_fetch_leaves_nothing(tmp_path):
    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    cache = Cache(tmp_path, 100)
    with pytest.raises(KeyboardInterrupt):
        cache.get("k", "f.bin", lambda: 8, fail)
    assert sizes(tmp_path) == {}
    assert get(cache, "k", b"whole").read_bytes() == b"whole"


def test_an_empty_file_can_be_cached(tmp_path):
    assert get(Cache(tmp_path, 1), "k", b"").read_bytes() == b""


def run_all(target, arguments):
    processes = [FORK.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.fixture
def asked(monkeypatch):
    """How many times a process or one that it forks has asked for the lock of a file to come, and got it or not."""
    count, flock = FORK.Value("i", 0), fcntl.flock

    def counted(file, operation):
        if operation == fcntl.LOCK_EX and file.name.endswith(PARTIAL):
            with count:
                count.value += 1
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", counted)
    return count


def test_of_processes_that_want_the_same_file_one_fetches_it(tmp_path, asked):
    log, data = tmp_path / "log", os.urandom(1000)

    def want(key):
        cache = Cache(tmp_path / "cache", 10_000)
        path = get(cache, key, data, log=log, before=lambda: wait_until(lambda: asked.value == 6))
        assert path.read_bytes() == data

    run_all(want, [("same",)] * 6)
    assert len(log.read_text().splitlines()) == 1
    assert sizes(tmp_path / "cache") == {"same/f.bin": 1000}


def killed_half_way(folder, key, data):
    """Leave behind what a process leaves that is killed in the middle of a fetch."""
    here, there = FORK.Pipe()

    def hang():
        there.send("half")
        time.sleep(60)

    process = FORK.Process(target=get, args=(Cache(folder, 10_000), key, data), kwargs={"before": hang})
    process.start()
    assert here.recv() == "half"
    return process


def test_a_killed_fetch_is_taken_over_by_one_that_waits(tmp_path, asked):
    data = os.urandom(1000)
    process = killed_half_way(tmp_path, "k", data)
    waiting = FORK.Process(target=get, args=(Cache(tmp_path, 10_000), "k", data))
    waiting.start()
    wait_until(lambda: asked.value == 2)
    assert waiting.is_alive()
    assert sizes(tmp_path) == {"k/.partial": 1000}
    os.kill(process.pid, signal.SIGKILL)
    waiting.join(60)
    assert waiting.exitcode == 0
    assert sizes(tmp_path) == {"k/f.bin": 1000}
    assert (tmp_path / "files" / "k" / "f.bin").read_bytes() == data
    process.join()


def test_what_a_killed_fetch_left_is_swept_and_what_a_living_one_holds_is_not(tmp_path):
    process = killed_half_way(tmp_path, "other", bytes(6000))
    cache = Cache(tmp_path, 10_000)
    get(cache, "a", bytes(3000))
    get(cache, "b", bytes(3000))
    assert sizes(tmp_path) == {"other/.partial": 6000, "b/f.bin": 3000}
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    get(cache, "c", bytes(7000))
    assert sizes(tmp_path) == {"b/f.bin": 3000, "c/f.bin": 7000}


def test_a_folder_that_another_process_drops_just_now_is_made_again(tmp_path, monkeypatch):
    made, mkdir = [], Path.mkdir

    def dropped_at_first(path, *arguments, **named):
        made.append(path)
        if len(made) == 1:
            raise FileExistsError(path)  # what pathlib says of a folder that was there and is not any more
        mkdir(path, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", dropped_at_first)
    assert get(Cache(tmp_path, 3000), "k", b"x").read_bytes() == b"x"
    assert len(made) > 1


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "k").touch()
    with pytest.raises(NotADirectoryError):
        get(Cache(tmp_path, 3000), "k", b"x")


def test_many_processes_a_small_bound_and_some_of_them_killed(tmp_path):
    def content(number):
        return bytes([number]) * (500 + number)

    reached = FORK.RawArray("i", 6)

    def work(seed, turns):
        cache = Cache(tmp_path, 3000)
        for turn in range(turns):
            reached[seed] = turn
            number = (seed * 7 + turn * 5 + turn // 9) % 8
            try:
                data = get(cache, str(number), content(number), before=lambda: time.sleep(0.002)).read_bytes()
            except FileNotFoundError:
                continue  # dropped before it was opened
            assert data == content(number)

    processes = [FORK.Process(target=work, args=(seed, 1_000_000 if seed < 3 else 40)) for seed in range(6)]
    for process in processes:
        process.start()
    wait_until(lambda: min(reached[:3]) >= 9)
    for process in processes[:3]:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 3 + [0] * 3
    get(Cache(tmp_path, 3000), "last", bytes(600))
    left = sizes(tmp_path)
    assert not [path for path in left if path.endswith(".partial")]
    assert sum(left.values()) <= 3000


_MOUNTS = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 259:1 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p1 rw
40 27 0:50 / /home rw,relatime shared:30 master:2 - nfs4 server:/export/home rw,vers=4.2
41 40 0:51 / /home/me/local rw - xfs /dev/nvme1n1 rw
42 27 0:52 / /mnt/two\040words rw - lustre ost@tcp:/fs rw
43 27 0:53 / /mnt/remote rw - fuse.sshfs me@there:/ rw
44 27 0:54 / /mnt/covered rw - nfs server:/old rw
45 44 0:55 / /mnt/covered rw - tmpfs tmpfs rw
46 27 0:56 / /mnt/container rw - fuse.fuse-overlayfs fuse-overlayfs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/tmp/vavae-0", None),
        ("/home/me/.cache/vavae", "nfs4"),
        ("/homes/me", None),
        ("/home/me/local/cache", None),
        ("/mnt/two words/cache", "lustre"),
        ("/mnt/remote", "fuse.sshfs"),
        ("/mnt/covered/cache", None),
        ("/mnt/container/cache", None),
    ],
)
def test_a_network_file_system_is_told_by_the_innermost_mount(folder, kind):
    assert network_file_system(Path(folder), _MOUNTS.strip()) == kind


def test_a_cache_on_a_network_file_system_is_a_warning_with_the_field_to_change(tmp_path, monkeypatch, caplog):
    place = Path(os.path.realpath(tmp_path)) / "cache"
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"27 1 259:1 / / rw - ext4 /dev/sda rw\n40 27 0:50 / {place} rw - beegfs beegfs_nodev rw\n")
    monkeypatch.setattr(scratch, "_MOUNTS", mounts)
    with caplog.at_level(logging.WARNING):
        for root in (str(tmp_path / "runs"), "memory://a-slow-cache"):
            Storage(root, str(place / "below")).warn_of_slow_cache()
        Storage("memory://a-slow-cache", str(tmp_path)).warn_of_slow_cache()
        (line,) = caplog.messages
        assert str(place / "below") in line
        assert "(beegfs)" in line
        assert "set storage.cache to" in line
        mounts.unlink()
        Storage("memory://a-slow-cache", str(place)).warn_of_slow_cache()
    assert caplog.messages == [line]


def test_without_a_folder_the_cache_is_the_user_s_own_below_each_machine_s_temporary_folder(tmp_path, monkeypatch):
    storage = Storage("memory://a-cache-in-scratch")
    storage.write_bytes("file", b"content")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (folder,) = {pickle.loads(pickle.dumps(storage)).cache_folder, scratch_folder()}
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert pickle.loads(pickle.dumps(storage)).local_file("file").is_relative_to(folder)


def test_a_folder_that_another_user_has_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"vavae-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"belongs to another user: set storage\.cache to"):
        scratch_folder()
