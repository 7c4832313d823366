"""Files in a folder and in an object store: whole or absent, named within the root, the same through pickling."""

import errno
import os
import pickle
import uuid
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from vavae.errors import UserError
from vavae.storage.storage import Storage, sha256_of


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request, tmp_path):
    name = uuid.uuid4().hex
    if request.param == "s3":
        root = f"s3://{request.getfixturevalue('s3').bucket}/{name}/a root"
    else:
        root = {"local": str(tmp_path / "a root"), "memory": f"memory://{name}/deep"}[request.param]
    return Storage(root, cache=str(tmp_path / "cache"))


def test_round_trip(storage):
    storage.write_bytes("a/b.bin", b"\0\1")
    assert storage.read_bytes("a/b.bin") == b"\0\1"
    assert storage.size("a/b.bin") == 2
    storage.write_bytes("a/b.bin", b"new")
    assert storage.read_bytes("a/b.bin") == b"new"
    storage.write_json("a/c.json", {"b": [1.5, None], "a": "ü"})
    assert storage.read_json("a/c.json") == {"a": "ü", "b": [1.5, None]}


def test_json_does_not_depend_on_the_order_of_keys(storage):
    storage.write_json("x.json", {"a": 1, "b": 2})
    storage.write_json("y.json", {"b": 2, "a": 1})
    assert storage.read_bytes("x.json") == storage.read_bytes("y.json")


def test_what_is_there(storage):
    assert storage.sizes() == {}
    assert storage.list("nothing") == storage.list("nothing", recursive=True) == []
    for path, data in {"a/10": b"xx", "a/9": b"", "a/b/c": b"x", "ab": b"x"}.items():
        storage.write_bytes(path, data)
    assert storage.list() == ["a", "ab"]
    assert storage.list("a") == ["a/10", "a/9", "a/b"]
    assert storage.list("a", recursive=True) == ["a/10", "a/9", "a/b/c"]
    assert storage.sizes("a") == {"a/10": 2, "a/9": 0, "a/b/c": 1}
    assert [storage.exists(path) for path in ("a", "ab", "abc")] == [True, True, False]
    assert [storage.is_file(path) for path in ("a", "ab", "abc")] == [False, True, False]


def test_missing_files(storage):
    for ask in (storage.read_bytes, storage.size, storage.local_file, storage.read_json):
        with pytest.raises(FileNotFoundError):
            ask("nothing")


def test_many_small_files_are_read_in_order(storage, monkeypatch):
    monkeypatch.setattr("vavae.storage.storage._SMALL_READS_AHEAD", 3)
    for number in (0, 1, 3, 4, 5, 6):
        storage.write_bytes(f"a/{number}", b"%d" % number)
    paths = [f"a/{number}" for number in range(8)]
    assert list(storage.read_many(paths)) == [b"0", b"1", None, b"3", b"4", b"5", b"6", None]
    assert list(storage.read_many([])) == []
    with pytest.raises(UserError, match="give a relative path"):
        list(storage.read_many(["a/0", "../a/1"]))


def test_child_and_url(storage):
    storage.child("run").write_bytes("x", b"1")
    assert storage.read_bytes("run/x") == b"1"
    assert storage.child("run").url("x") == storage.url("run/x")
    assert Storage(storage.url("run")).read_bytes("x") == b"1"
    assert storage.child("run").list() == ["x"]


def test_delete(storage):
    for path in ("a/b/c", "a/d", "e"):
        storage.write_bytes(path, b"x")
    storage.delete("a")
    storage.delete("a")
    storage.delete("e")
    assert storage.sizes() == {}
    with pytest.raises(AssertionError, match="root"):
        storage.delete("")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "./x", "a/", "s3://bucket/x", ".."])
def test_no_path_leads_out_of_the_root(storage, path):
    asks = (storage.read_bytes, storage.exists, storage.delete, storage.sizes, storage.child, storage.local_file)
    for ask in (*asks, lambda path: storage.write_bytes(path, b"")):
        with pytest.raises(UserError, match="relative path"):
            ask(path)


def test_put_and_local_file(storage, tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"first")
    storage.put_file(source, "a/f.bin")
    copy = storage.local_file("a/f.bin")
    assert copy.read_bytes() == b"first"
    assert copy.name == "f.bin"
    assert storage.local_file("a/f.bin") == copy
    assert sha256_of(copy) == sha256_of(source)
    storage.write_bytes("a/f.bin", b"other")  # of the same size
    assert storage.local_file("a/f.bin").read_bytes() == b"other"


def test_equal_base_names_have_their_own_copies(storage):
    for split in ("train", "val"):
        storage.write_bytes(f"{split}/00000.tar", split.ljust(5).encode())
    assert storage.local_file("train/00000.tar").read_bytes() == b"train"
    assert storage.local_file("val/00000.tar").read_bytes() == b"val  "


def test_create_puts_nothing_when_the_block_fails(storage):
    storage.write_bytes("f", b"before")

    def fail():
        with storage.create("f") as local:
            local.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert storage.read_bytes("f") == b"before"
    assert storage.list() == ["f"]
    assert not storage.is_local or os.listdir(storage.root) == ["f"]


def test_a_short_copy_is_an_error(tmp_path, monkeypatch):
    storage = Storage(f"memory://{uuid.uuid4().hex}", cache=str(tmp_path))
    storage.write_bytes("f", b"whole")
    monkeypatch.setattr(type(storage._fs), "cat_file", lambda fs, name, start, end: b"wh")
    with pytest.raises(OSError, match="2 of 5 bytes"):
        storage.local_file("f")
    monkeypatch.undo()
    assert storage.local_file("f").read_bytes() == b"whole"


def test_local_writes_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace

    def name(handle):
        return "folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"

    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(name(handle)), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    Storage(str(tmp_path)).write_bytes("f", b"x")
    assert calls == ["file", "rename", "folder"]


def test_leftovers_of_a_killed_write_are_invisible(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok: None)  # as if killed before the end
    monkeypatch.setattr(os, "replace", lambda a, b: None)
    storage.write_bytes("f", b"x")
    assert len(os.listdir(tmp_path)) == 1
    assert storage.list() == storage.list(recursive=True) == []


def test_pickle_keeps_the_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs", cache="here")
    storage.write_bytes("x", b"1")
    data = pickle.dumps(storage)
    assert len(data) < 500
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = pickle.loads(data)
    assert again.read_bytes("x") == b"1"
    assert (again.root, again.cache) == (str(tmp_path / "runs"), "here")


def test_links_are_followed_and_closed_folders_are_errors(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_bytes(b"123")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "dangling").symlink_to(tmp_path / "nothing")
    assert Storage(str(tmp_path / "root")).sizes() == {"link/f": 3}

    def closed(folder):
        raise PermissionError(13, "closed", folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError):
        Storage(str(tmp_path / "root")).sizes()


def test_messages(tmp_path):
    with pytest.raises(UserError, match=r"storage 'nosuch://x': .*nosuch"):
        Storage("nosuch://x")
    storage = Storage(str(tmp_path))
    storage.write_bytes("x.json", b"{half")
    with pytest.raises(UserError, match=r"x\.json holds no JSON .*delete it"):
        storage.read_json("x.json")


def _safetensors_on_a_full_disk(file):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(b"x"),
        lambda file: torch.save({"a": torch.zeros(4096)}, file),
        _safetensors_on_a_full_disk,
    ],
    ids=["bytes", "torch", "safetensors"],
)
def test_a_full_disk_is_an_error_that_names_the_file_and_nothing_stays(tmp_path, write):
    storage = Storage(str(tmp_path))

    def fill():
        with storage.create("a/b.tar") as file:
            file.symlink_to("/dev/full")
            write(file)

    with pytest.raises(OSError, match="No space left on device") as caught:
        fill()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, storage.url("a/b.tar"))
    assert [*(tmp_path / "a").iterdir()] == []


def test_other_errors_in_the_middle_of_a_file_stay_what_they_are(tmp_path):
    for error in (ValueError("a"), BrokenPipeError(errno.EPIPE, "Broken pipe")):
        with pytest.raises(type(error)) as caught, Storage(str(tmp_path)).create("a"):
            raise error
        assert caught.value is error
        assert getattr(error, "filename", None) is None


def test_checking_that_writing_works_leaves_nothing(tmp_path):
    Storage(str(tmp_path / "a/b")).check_writing()
    assert not [*tmp_path.iterdir()]
    (tmp_path / "a").mkdir()
    Storage(str(tmp_path / "a/b")).check_writing()
    assert [*tmp_path.rglob("*")] == [tmp_path / "a"]
