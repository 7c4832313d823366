"""What strangers send, to run code or to lead elsewhere: shards, archives, weights, manifests, configurations."""

import ast
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError
from support import image_shards
from support.image_shards import write_image_shards
from test_architecture import MODULES

from vavae.config import dump, load
from vavae.data.config import StreamConfig
from vavae.data.image_stream import ImageStream, MicroBatchKey
from vavae.data.sample_order import order_of
from vavae.data.shard_reader import read_images, shard_records
from vavae.data.shards.manifest import read_manifest, shard_file, write_manifest
from vavae.data.shards.mapped_shard import MappedShard
from vavae.data.shards.tar import write_tar
from vavae.data.shards.verify import index_shards, verify_shards
from vavae.data.sources.opening import open_source
from vavae.distributed.shard_files import load_tensor_shards
from vavae.errors import UserError
from vavae.interop.checkpoint_file import read_weights
from vavae.interop.export import load_exported_lightningdit, load_exported_tokenizer
from vavae.latents.shards import MappedLatents
from vavae.latents.statistics import read_statistics
from vavae.models.backbones.config import BackboneConfig
from vavae.models.backbones.load import load_backbone
from vavae.runs.config import RunConfig
from vavae.storage.artifact import Artifact, FileInfo, is_intact
from vavae.storage.storage import Storage

OUTSIDE = ("../outside", "a/../../outside", "/etc/passwd")
LEADS_ELSEWHERE = r"without empty parts, '\.' or '\.\.'"
SECRET = "wJalrXUtnFEMI"


class Trap:
    """Makes a folder where somebody unpickles it."""

    def __init__(self, sprung):
        self._sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self._sprung),)


@pytest.fixture
def sprung(tmp_path):
    """The folder that is there once a trap has run; a test ends without it."""
    path = tmp_path / "sprung"
    yield path
    assert not path.exists()


@pytest.fixture
def traps(sprung):
    """Files that run code where they are unpickled, which is seen here once."""
    data, npy, zipped = pickle.dumps(Trap(sprung)), io.BytesIO(), io.BytesIO()
    pickle.loads(data)
    sprung.rmdir()
    np.save(npy, np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    torch.save({"model": {"weight": torch.ones(1)}, "more": Trap(sprung)}, zipped)
    return {"pickle": data, "npy": npy.getvalue(), "pth": zipped.getvalue()}


def put(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


def test_members_that_webdataset_would_unpickle_stay_bytes(tmp_path, traps):
    evil = {**traps, **dict.fromkeys(("pyd", "pkl", "pt", "npz"), traps["pickle"])}
    storage = Storage(str(tmp_path))
    for split in ("train", "validation"):
        with storage.create(f"{split}/000000.tar") as local, write_tar(local) as tar:
            for index in range(2):
                tar.add(index, {**evil, "png": image_shards.png(image_shards.image(split, index)), "cls": b"0"})
    manifest = index_shards({split: [str(tmp_path / split)] for split in ("train", "validation")}, None, storage)
    stream = ImageStream(
        storage, manifest, "train", order_of([2], 0, StreamConfig(lanes=1)), 2, StreamConfig(lanes=1), seed=0
    )
    assert len(stream[MicroBatchKey(0, 0)].images) == 2
    assert sum(len(batch.images) for batch in read_images(storage, manifest, "train", 2, 2)) == 2
    assert not any(faults.lines or faults.unreadable for faults in verify_shards(storage, manifest, images=True))
    shard = tmp_path / "train" / "000000.tar"
    assert all(
        found[name] == evil[name] for found in (next(shard_records(shard)), MappedShard(shard)[0]) for name in evil
    )


def test_latents_of_objects_are_refused(tmp_path, traps):
    with write_tar(tmp_path / "000000.tar") as tar:
        tar.add(0, {"latent.npy": traps["npy"], "cls": b"000000000"})
    with pytest.raises(UserError, match="expected float16"):
        MappedLatents(tmp_path / "000000.tar", 1, (1,))


WEIGHTS = {
    "a checkpoint": lambda folder, data: read_weights(put(folder, "model.pt", data)),
    "what is called safetensors": lambda folder, data: read_weights(put(folder, "model.safetensors", data)),
    "a backbone": lambda folder, data: load_backbone(
        BackboneConfig(name="resnet18", weights=str(put(folder, "resnet18.pth", data)))
    ),
    "statistics": lambda folder, data: read_statistics(
        Storage(str(put(folder, "statistics.safetensors", data).parent))
    ),
    "fragments": lambda folder, data: load_tensor_shards({}, [put(folder, "00000.safetensors", data)]),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("kind", ["pickle", "npy", "pth"])
def test_weights_run_no_code(tmp_path, traps, what, kind):
    with pytest.raises((UserError, SafetensorError)):
        WEIGHTS[what](tmp_path, traps[kind])


@pytest.mark.parametrize("text", ['!!python/object/apply:os.mkdir ["{}"]', 'a: !!python/object/new:os.mkdir ["{}"]'])
def test_yaml_runs_no_code(tmp_path, sprung, text):
    text = text.format(sprung)
    yaml.unsafe_load(text)
    sprung.rmdir()
    put(tmp_path, "model.yaml", text.encode())
    for read in (load_exported_tokenizer, load_exported_lightningdit):
        with pytest.raises(UserError, match=r"model\.yaml"):
            read(Storage(str(tmp_path)))
    for overrides in ([], [f"name={text.removeprefix('a: ')}"]):
        with pytest.raises(UserError, match="tag"):
            load(RunConfig, tmp_path / "model.yaml" if not overrides else "configs/tiny.yaml", overrides)


def write_link(path, name, kind):
    with tarfile.open(path, "w") as tar:
        for index in range(2):
            info = tarfile.TarInfo(f"class/{index}.png")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tars_are_refused(tmp_path, kind):
    write_link(tmp_path / "images.tar", "class/2.png", kind)
    for read in (MappedShard, lambda path: list(shard_records(path))):
        with pytest.raises(UserError, match=r"images.tar: .*'class/2.png' is a link or a device"):
            read(tmp_path / "images.tar")
    with pytest.raises(UserError, match=r"images.tar: class/2.png is a link or a device"):
        open_source(str(tmp_path / "images.tar"), Storage(str(tmp_path))).listing()


def test_links_in_zips_are_refused(tmp_path):
    link = zipfile.ZipInfo("class/1.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("class/0.png", b"x")
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match=r"images.zip: class/1.png is a link or a device"):
        open_source(str(tmp_path / "images.zip"), Storage(str(tmp_path))).listing()


@pytest.mark.parametrize("name", [f"{name}/x.png" for name in OUTSIDE])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_that_lead_elsewhere_are_refused(tmp_path, name, kind):
    path = tmp_path / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("class/0.png", b"x")
            archive.writestr(name, b"x")
    else:
        with tarfile.open(path, "w") as tar:
            for member in ("class/0.png", name):
                tar.addfile(tarfile.TarInfo(member))
    with pytest.raises(UserError, match=rf"images.{kind}: {name} leads out of the archive"):
        open_source(str(path), Storage(str(tmp_path))).listing()


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("root", ["folder", "memory://manifests"])
def test_manifests_and_records_that_lead_elsewhere_are_refused(tmp_path, name, root):
    storage = Storage(str(tmp_path / "inside") if root == "folder" else root, str(tmp_path / "cache"))
    put(tmp_path, "outside", b"x" * 10)
    made = write_image_shards(storage, {"train": (1,)})
    for splits in ({"train": name}, {name: "000000.tar"}):
        ((split, shard),) = splits.items()
        info = made.splits["train"][0].model_copy(update={"name": shard})
        write_manifest(storage, "", made.model_copy(update={"splits": {split: (info,)}}))
        with pytest.raises(UserError, match=LEADS_ELSEWHERE):
            shard_file(storage, split, read_manifest(storage).splits[split][0])
    record = Artifact(kind="x", digest="", config="", files={name: FileInfo(bytes=10, sha256="")})
    assert not is_intact(storage, "train", record)
    for act in (storage.read_bytes, storage.delete, storage.local_file, lambda path: storage.write_bytes(path, b"")):
        with pytest.raises(UserError, match=LEADS_ELSEWHERE):
            act(name)


@pytest.mark.parametrize(
    "key", ["shards.source", "shards.validation_source", "teacher.weights", "train_vavae.start_from", "storage.cache"]
)
def test_no_field_of_a_configuration_carries_credentials(key):
    for url in (f"s3://AKIA:{SECRET}@bucket/x", f"https://host/x?X-Amz-Signature={SECRET}"):
        with pytest.raises(UserError, match=rf"{key.rpartition('.')[2]} is .* credentials in it") as caught:
            dump(load(RunConfig, "configs/tiny.yaml", [f"{key}={url}"]))
        assert SECRET not in str(caught.value)


def calls_of(source):
    """Dotted names of what a source calls, with the call."""
    return [(ast.unparse(node.func), node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def option(call, name):
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


FORBIDDEN = {
    "unpickling": lambda name, call: name.startswith(("pickle.load", "dill.", "joblib.", "marshal.", "shelve.")),
    "loading weights with code": lambda name, call: name == "torch.load" and option(call, "weights_only") != "True",
    "unpickling arrays": lambda name, call: option(call, "allow_pickle") not in (None, "False"),
    "unsafe YAML": lambda name, call: name.startswith("yaml.") and "load" in name and name != "yaml.safe_load",
    "unpacking to disk": lambda name, call: name.endswith((".extractall", ".extract", "unpack_archive")),
    "running text": lambda name, call: name in ("eval", "exec", "os.system") or option(call, "shell") == "True",
    "listening to everybody": lambda name, call: "0.0.0.0" in ast.unparse(call) or "'::'" in ast.unparse(call),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_module_does_what_could_run_code(what):
    found = {
        f"{module}:{call.lineno}"
        for module, path in MODULES.items()
        for name, call in calls_of(path.read_text())
        if FORBIDDEN[what](name, call)
    }
    assert not found


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("unpickling", "pickle.loads(data)"),
        ("loading weights with code", "torch.load(path)"),
        ("loading weights with code", "torch.load(path, weights_only=False)"),
        ("unpickling arrays", "np.load(path, allow_pickle=True)"),
        ("unsafe YAML", "yaml.load(text, Loader=yaml.Loader)"),
        ("unpacking to disk", "tar.extractall(folder)"),
        ("running text", "subprocess.run(text, shell=True)"),
        ("listening to everybody", "server.bind(('0.0.0.0', 80))"),
    ],
)
def test_what_is_forbidden_is_found(what, line):
    ((name, call),) = [found for found in calls_of(line) if FORBIDDEN[what](*found)]
    assert FORBIDDEN[what](name, call)
