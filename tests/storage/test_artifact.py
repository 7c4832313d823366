"""Commit records: last, whole, and never believed where they are damaged."""

import logging

import pytest

from vavae.storage.artifact import RECORD, Artifact, FileInfo, commit, discard, is_intact, read
from vavae.storage.storage import Storage

ARTIFACT = Artifact(
    kind="shards",
    digest="d",
    config="c",
    inputs={"source": "s"},
    images_seen=128,
    files={"train/0.tar": FileInfo(bytes=3, sha256="x")},
    details={"train": 10, "note": ["a", None]},
)


def test_round_trip(storage):
    assert read(storage, "runs/a") is None
    commit(storage, "runs/a", ARTIFACT)
    assert read(storage, "runs/a") == ARTIFACT


def test_equal_records_are_equal_bytes(storage):
    for name, inputs in {"a": {"x": "1", "y": "2"}, "b": {"y": "2", "x": "1"}}.items():
        commit(storage, name, ARTIFACT.model_copy(update={"inputs": inputs}))
    assert storage.read_bytes(f"a/{RECORD}") == storage.read_bytes(f"b/{RECORD}")


def test_intact_means_every_file_with_its_size(storage):
    assert not is_intact(storage, "a", ARTIFACT)
    storage.write_bytes("a/train/0.tar", b"12")
    assert not is_intact(storage, "a", ARTIFACT)
    storage.write_bytes("a/train/0.tar", b"123")
    assert is_intact(storage, "a", ARTIFACT)


@pytest.mark.parametrize("data", [b"", b"{half", b"[]", b'{"kind": "shards"}', b"\xff\xfe"])
def test_a_damaged_record_is_missing_and_logged(storage, caplog, data):
    storage.write_bytes(f"a/{RECORD}", data)
    with caplog.at_level(logging.WARNING):
        assert read(storage, "a") is None
    assert storage.url(f"a/{RECORD}") in caplog.text


def test_discard_deletes_the_record_first(storage, monkeypatch):
    storage.write_bytes("a/train/0.tar", b"123")
    commit(storage, "a", ARTIFACT)
    deleted = []
    monkeypatch.setattr(Storage, "delete", lambda self, path: deleted.append(path))
    discard(storage, "a")
    assert deleted == [f"a/{RECORD}", "a"]
    monkeypatch.undo()
    discard(storage, "a")
    assert storage.sizes() == {}
