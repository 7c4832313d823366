"""A file of another storage under the same name: one more name of it on a local disk, a copy within an object store."""

from pathlib import Path

import pytest

from vavae.storage.loopback import S3Server
from vavae.storage.storage import Storage


def test_on_a_local_disk_it_is_one_file_until_it_is_replaced(tmp_path: Path) -> None:
    source, target = Storage(str(tmp_path / "a")), Storage(str(tmp_path / "b"))
    source.write_bytes("folder/file", b"first")
    target.write_bytes("folder/file", b"what was there")
    target.copy_from(source, "folder/file")
    paths = [Path(storage.url("folder/file")) for storage in (source, target)]
    assert paths[0].samefile(paths[1])
    source.write_bytes("folder/file", b"second")
    assert target.read_bytes("folder/file") == b"first"
    assert target.list("folder") == ["folder/file"], "nothing temporary is left"


def test_where_a_disk_refuses_it_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    source, target = Storage(str(tmp_path / "a")), Storage(str(tmp_path / "b"))
    source.write_bytes("file", b"content")
    target.copy_from(source, "file")
    assert target.read_bytes("file") == b"content"
    assert not Path(source.url("file")).samefile(target.url("file"))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Storage(str(tmp_path / "b")).copy_from(Storage(str(tmp_path / "a")), "file")


def test_a_store_copies_by_itself(s3: S3Server) -> None:
    root = Storage(f"s3://{s3.bucket}/copy_from")
    source, target = root.child("a"), root.child("b")
    source.write_bytes("folder/file", b"content")
    before = Storage.counters.read()
    target.copy_from(source, "folder/file")
    after = Storage.counters.read()
    assert (after.bytes_read, after.bytes_written) == (before.bytes_read, before.bytes_written)
    assert target.read_bytes("folder/file") == b"content"
    with pytest.raises(FileNotFoundError):
        target.copy_from(source, "missing")
