"""Who is let in and who is not, what is said about it, and that no key is ever said."""

import os
import pickle
import subprocess
import sys
import uuid

import pytest

from vavae.config import digest, dump, load
from vavae.errors import UserError
from vavae.storage.config import StorageConfig, StorageOptions
from vavae.storage.storage import Storage

SECRET = "wJalr/XUtn+FEMI"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@bucket/x",
        f"ftp://user:{SECRET}@host/x",
        f"s3://bucket/x?AWSAccessKeyId=AKIA&Signature={SECRET}",
        f"https://host/x?X-Amz-Credential={SECRET}",
        f"https://host:443/x?token={SECRET}",
        f"simplecache::s3://AKIA:{SECRET}@bucket",
    ],
)
def test_a_url_with_credentials_is_refused_without_repeating_them(url, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("cache: here\n")
    for ask in (Storage, lambda url: load(StorageConfig, file, [f"root={url}"]), Storage("memory://x").at):
        with pytest.raises(UserError, match="credentials in it: take them out") as caught:
            ask(url)
        assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match="credentials"):
        StorageOptions(endpoint=url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/x@y:z",
        "s3://arn:aws:s3:us-west-2:1:accesspoint/p/x@y",
        "http://host:80/x@y",
        "hf://datasets/a/b@main/x",
        "a:b@c/d",
        "memory://x?y=1",
    ],
)
def test_other_urls_are_not(url):
    assert StorageConfig(root=url).root == url


def test_keys_stay_out_of_everything_that_is_written(s3, tmp_path):
    keys = [s3.environment["AWS_ACCESS_KEY_ID"], s3.environment["AWS_SECRET_ACCESS_KEY"]]
    config = StorageConfig(root=f"s3://{s3.bucket}/{uuid.uuid4().hex}", cache=str(tmp_path))
    storage = Storage.of(config)
    storage.write_bytes("x", b"1")
    texts = [pickle.dumps(storage).decode("latin1"), repr(storage), storage.url("x"), dump(config), repr(vars(storage))]
    assert not [key for key in keys for text in texts if key in text]
    assert digest(config) == digest(StorageConfig())


def test_wrong_keys_are_refused_at_once(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    storage, before = Storage(f"s3://{s3.bucket}/a", str(tmp_path)), Storage.counters.read()
    asks = (storage.read_bytes, storage.size, storage.exists, storage.list, storage.sizes, storage.local_file)
    for ask in (*asks, lambda path: storage.write_bytes(path, b"")):
        with pytest.raises(UserError, match=rf"^s3://{s3.bucket}/a/x: access denied .*storage\.profile") as caught:
            ask("x")
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value)
        assert s3.environment["AWS_ACCESS_KEY_ID"] not in str(caught.value)
    assert Storage.counters.read().retries == before.retries


def test_no_keys_and_no_profile(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    cases = {"NoCredentials": StorageOptions(), "ProfileNotFound": StorageOptions(profile="nobody")}
    cases["PermissionError"] = StorageOptions(anonymous=True)
    for reason, options in cases.items():
        with pytest.raises(UserError, match=f"access denied .{reason}"):
            Storage(f"s3://{s3.bucket}/a", options=options).read_bytes("x")


def test_a_profile_gives_keys_and_options_reach_the_server(s3, tmp_path, monkeypatch):
    lines = ["[lab]", *(f"{name.lower()} = {value}" for name, value in s3.environment.items() if "KEY" in name)]
    (tmp_path / "credentials").write_text("\n".join(lines))
    for name in s3.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    options = StorageOptions(profile="lab", endpoint=s3.endpoint, region="us-east-1")
    storage = Storage(f"s3://{s3.bucket}/{uuid.uuid4().hex}", str(tmp_path), options)
    storage.child("a").write_bytes("x", b"1")
    again = pickle.loads(pickle.dumps(storage))
    assert again.read_bytes("a/x") == b"1"
    assert again.options == storage.at("memory://x").options == options


def test_missing_things_are_missing_at_once(s3, tmp_path):
    before = Storage.counters.read()
    nowhere = Storage("s3://no-such-bucket/a", str(tmp_path))
    for storage in (nowhere, Storage(f"s3://{s3.bucket}/{uuid.uuid4().hex}", str(tmp_path))):
        for ask in (storage.read_bytes, storage.size, storage.local_file):
            with pytest.raises(FileNotFoundError, match=storage.url("x")):
                ask("x")
        assert not storage.exists("x")
        assert storage.list() == []
    with pytest.raises(UserError, match="s3://no-such-bucket/a/x: there is no such bucket"):
        nowhere.write_bytes("x", b"")
    assert Storage.counters.read().retries == before.retries


def test_a_store_whose_package_is_missing_names_it():
    with pytest.raises(UserError, match=r"gs://b.*gcsfs.*pip install"):
        Storage("gs://b")


def test_a_forked_process_has_connections_of_its_own(s3, tmp_path):
    storage = Storage(f"s3://{s3.bucket}/{uuid.uuid4().hex}", str(tmp_path))
    storage.write_bytes("x", b"12")
    child = os.fork()
    if child == 0:
        os._exit(0 if storage.read_bytes("x") == b"12" and storage.url("x").startswith("s3://") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert storage.read_bytes("x") == b"12"


def test_local_runs_import_no_client_of_any_store():
    code = "import sys, vavae.storage.storage as s; s.Storage('x'); print({'s3fs', 'botocore'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
