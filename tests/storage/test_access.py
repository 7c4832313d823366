"""Who is let in and who is not, what is said about it, and that no key is ever said."""

import os
import pickle
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import pytest
from support import image_shards

from vavae.config import digest, dump, load
from vavae.data.config import ShardsConfig
from vavae.data.shards.write import write_shards
from vavae.errors import UserError
from vavae.storage.config import StorageConfig, StorageOptions
from vavae.storage.s3 import RetryingS3
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


def only_by_profile(s3, folder, monkeypatch):
    """Take keys and endpoint out of the environment; options that find them all the same."""
    lines = ["[lab]", *(f"{name.lower()} = {value}" for name, value in s3.environment.items() if "KEY" in name)]
    (folder / "credentials").write_text("\n".join(lines))
    for name in s3.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    return StorageOptions(profile="lab", endpoint=s3.endpoint, region="us-east-1")


def test_a_profile_gives_keys_and_options_reach_the_server(s3, tmp_path, monkeypatch):
    options = only_by_profile(s3, tmp_path, monkeypatch)
    storage = Storage(f"s3://{s3.bucket}/{uuid.uuid4().hex}", str(tmp_path), options)
    storage.child("a").write_bytes("x", b"1")
    again = pickle.loads(pickle.dumps(storage))
    assert again.read_bytes("a/x") == b"1"
    assert again.options == storage.at("memory://x").options == options


def test_sources_of_images_are_reached_as_the_run_is(s3, tmp_path, monkeypatch):
    """Keys are in a profile alone, the endpoint in the configuration alone."""
    options = only_by_profile(s3, tmp_path, monkeypatch)
    storage = Storage(f"s3://{s3.bucket}/{uuid.uuid4().hex}", str(tmp_path / "cache"), options)
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        storage.write_bytes(f"images/{name}", image_shards.png(image_shards.image("train", 0)))
    config = ShardsConfig(source=storage.url("images"), validation_fraction=0, image_size=8)
    assert write_shards(storage, "shards", config, lambda done, total: None).count("train") == 3
    assert image_shards.find_shards(storage, "shards", config) is not None


@contextmanager
def encrypted(folder, upstream):
    """Endpoint of a proxy that speaks TLS under a certificate of its own, and the file of that certificate."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    host, port = urlsplit(upstream).netloc.split(":")

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with (
                suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as client,
                socket.create_connection((host, int(port))) as server,
            ):
                back = threading.Thread(target=pump, args=(server, client))
                back.start()
                pump(client, server)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{proxy.server_address[1]}", str(certificate)
        proxy.shutdown()


def pump(source, target):
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_an_authority_of_ones_own_is_trusted_once_it_is_named(s3, tmp_path, monkeypatch):
    root = f"s3://{s3.bucket}/{uuid.uuid4().hex}"
    with encrypted(tmp_path, s3.endpoint) as (endpoint, certificate):
        with pytest.raises(UserError, match=r"certificate is not trusted: set storage\.ca_bundle"):
            Storage(root, options=StorageOptions(endpoint=endpoint)).write_bytes("x", b"1")
        trusting = Storage(root, options=StorageOptions(endpoint=endpoint, ca_bundle=certificate))
        trusting.write_bytes("x", b"1")
        assert trusting.read_bytes("x") == b"1"
        monkeypatch.setenv("AWS_CA_BUNDLE", certificate)
        RetryingS3.clear_instance_cache()
        assert Storage(root, options=StorageOptions(endpoint=endpoint)).read_bytes("x") == b"1"


def test_objects_that_stand_for_folders_are_no_files(s3, tmp_path):
    """Consoles and other programs put them."""
    name = f"{s3.bucket}/{uuid.uuid4().hex}"
    for marker in ("full/", "empty/"):
        RetryingS3(StorageOptions()).pipe_file(f"{name}/{marker}", b"")
    storage = Storage(f"s3://{name}", str(tmp_path))
    storage.write_bytes("full/x", b"1")
    assert storage.sizes() == {"full/x": 1}
    assert (storage.list(), storage.list("full"), storage.list("empty")) == (["empty", "full"], ["full/x"], [])
    storage.delete("full")
    assert (storage.list(), storage.is_file("empty")) == (["empty"], False)


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
    start = time.monotonic()
    assert storage.read_bytes("x") == b"12"
    assert time.monotonic() - start < storage.options.read_seconds / 2, "the child closed the parent's connections"


def test_local_runs_import_no_client_of_any_store():
    code = "import sys, vavae.storage.storage as s; s.Storage('x'); print({'s3fs', 'botocore'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
