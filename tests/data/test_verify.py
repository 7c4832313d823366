"""Shards made by others: a manifest without rewriting, its check, its statistics, and a run that uses them."""

import io
import tarfile
import uuid

import numpy as np
import pytest
from PIL import Image
from support import image_shards
from support.image_shards import find_shards, write_image_shards

from vavae.cli.main import main
from vavae.data.config import ShardsConfig, StreamConfig
from vavae.data.image import encode_image
from vavae.data.image_stream import ImageStream, MicroBatchKey
from vavae.data.sample_order import order_of
from vavae.data.shard_reader import gather, read_images
from vavae.data.shards.manifest import ShardInfo, read_manifest, shard_file, write_manifest
from vavae.data.shards.tar import write_tar as open_tar
from vavae.data.shards.verify import ShardFaults, verify_shards, without_unreadable
from vavae.data.shards.write import write_shards
from vavae.data.sources.opening import open_source
from vavae.errors import UserError
from vavae.latents.manifest import FeatureManifest, LatentManifest
from vavae.latents.shards import feature_members, write_latents
from vavae.storage.storage import Storage, sha256_of

LABELS = [0, 2, 2, 1, 0]
PNG = image_shards.png(np.zeros((4, 4, 3), np.uint8))


def write_tar(path, labels, form="jpeg", members=None):
    """A tar as others make it: folders, times, names of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, label in enumerate(labels):
            image = encode_image(Image.fromarray(image_shards.image("train", index, 12, 20)), form)
            for name, data in (members or {image.extension: image.data, "cls": b"%d" % label}).items():
                info = tarfile.TarInfo(f"photos/n{index}.{name}")
                info.size, info.mtime = len(data), 1e9 + index
                tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def theirs(tmp_path):
    for number in range(2):
        write_tar(tmp_path / "theirs" / "train" / f"{number}.tar", LABELS)
    write_tar(tmp_path / "theirs" / "val.tar", LABELS[:3], "png")
    return tmp_path / "theirs"


@pytest.fixture
def folder(tmp_path, theirs):
    path = str(tmp_path / "index")
    sources = ["--train", str(theirs / "train"), "--validation", str(theirs / "val.tar")]
    assert main(["data", "index", path, *sources]) == 0
    return path


def test_an_index_names_the_shards_where_they_lie(folder, theirs):
    manifest = read_manifest(Storage(folder))
    assert {split: [shard.url for shard in shards] for split, shards in manifest.splits.items()} == {
        "train": [str(theirs / "train" / "0.tar"), str(theirs / "train" / "1.tar")],
        "validation": [str(theirs / "val.tar")],
    }
    assert [shard.count for shard in manifest.splits["train"]] == [5, 5]
    assert manifest.classes == ("0", "1", "2")
    assert Storage(folder).list(recursive=True) == ["manifest.json"]


def test_a_run_takes_an_index_for_its_shards(folder, theirs, tmp_path):
    storage, config = Storage(str(tmp_path / "run")), ShardsConfig(source=f"indexed:{folder}", image_size=10)
    assert find_shards(storage, "shards", config) is None
    manifest = write_shards(storage, "shards", config, lambda done, total: None)
    assert find_shards(storage, "shards", config) == manifest
    assert not [path for path in storage.list(recursive=True) if path.endswith(".tar")]
    stream = ImageStream(
        storage.child("shards"), manifest, "train", order_of([5, 5], 0, StreamConfig(lanes=1)), 10, StreamConfig(), 0
    )
    found = stream[MicroBatchKey(0, 0)]
    assert found.images.shape == (10, 3, 10, 10)
    assert sorted(found.labels.tolist()) == sorted(2 * LABELS)
    write_tar(theirs / "train" / "1.tar", LABELS[:4])
    assert main(["data", "index", folder, "--train", str(theirs / "train"), "--validation", str(theirs)]) == 0
    with pytest.raises(UserError, match=r"from another source \(train.images was 10, is 9 now"):
        find_shards(storage, "shards", config)


def test_named_classes(tmp_path, theirs, capsys):
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\neel\n")
    sources = ["--train", str(theirs / "train"), "--validation", str(theirs / "val.tar")]
    command = ["data", "index", str(tmp_path / "i"), *sources, "--classes", str(tmp_path / "classes.txt")]
    assert main(command) == 0
    assert read_manifest(Storage(str(tmp_path / "i"))).classes == ("cat", "dog", "owl", "eel")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    capsys.readouterr()
    assert main(command) == 2
    assert "0.tar#photos/n1: label 2, but the manifest has 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"txt": b"a cat", "cls": b"1"}, r"theirs/bad.tar#photos/n0: without an image: its members are \['cls', 'txt'"),
        ({"png": PNG, "cls": b""}, r"theirs/bad.tar#photos/n0: its class is b''; expected a member cls"),
        ({"png": PNG, "cls": b"-1"}, r"theirs/bad.tar#photos/n0: its class is '-1'; expected a number from 0"),
        ({"png": PNG, "cls": b"\1\0"}, r"theirs/bad.tar#photos/n0: its class is b'\\x01\\x00'; expected a member cls"),
        (
            {"png": PNG, "jpg": PNG, "cls": b"1"},
            r"#photos/n0: several images, png and jpg: name one of them with",
        ),
        (
            {"a.png": PNG, "b.png": PNG},
            r"#photos/n0: several images, a.png and b.png: name one of them",
        ),
        (
            {"png": PNG, "a.cls": b"1", "b.cls": b"2"},
            r"#photos/n0: several labels, a.cls and b.cls: name one of",
        ),
        ({"png": PNG, "cls": b"1", "label": b"2"}, r"#photos/n0: several labels, cls and label: name one of them with"),
        ({"png": PNG, "json": b"{"}, r"#photos/n0: its member json holds no JSON"),
    ],
)
def test_records_that_are_no_labeled_images_are_named(tmp_path, capsys, members, message):
    bad = write_tar(tmp_path / "theirs" / "bad.tar", [0], members=members)
    assert main(["data", "index", str(tmp_path / "i"), "--train", bad, "--validation", bad]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


def index_of(tmp_path, members, *options):
    """The manifest of an index of one shard, and what was printed of it."""
    path = write_tar(tmp_path / "theirs" / "x.tar", [0, 1, 2], members=members)
    assert main(["data", "index", str(tmp_path / "i"), "--train", path, "--validation", path, *options]) == 0
    return read_manifest(Storage(str(tmp_path / "i")))


@pytest.mark.parametrize(
    ("members", "options", "classes", "keys"),
    [
        ({"cls": b"2\n"}, [], ("0", "1", "2"), (None, None)),
        ({"cls": b"tench"}, [], ("tench",), (None, None)),
        ({"label": b"1"}, [], ("0", "1"), (None, "label")),
        ({"output.cls": b"1"}, [], ("0", "1"), (None, "output.cls")),
        ({"json": b'{"label": 1, "class_id": "n01"}'}, [], ("0", "1"), (None, "json.label")),
        (
            {"json": b'{"label": 1, "class_id": "n01"}'},
            ["--label-key", "json.class_id"],
            ("n01",),
            (None, "json.class_id"),
        ),
        ({"cls": b"1", "json": b'{"label": 0}'}, [], ("0", "1"), (None, None)),
        ({"txt": b"a cat", "json": b'{"caption": "a photo"}'}, [], (), (None, None)),
        ({"cls": b"1"}, ["--label-key", "none"], (), (None, None)),
        ({"json": b'{"label": null}'}, [], (), (None, None)),
        ({"cls": b"1", "seg.png": b"a mask"}, [], ("0", "1"), (None, None)),
        ({"cls": b"1", "jpg": b"a mask"}, ["--image-key", "png"], ("0", "1"), ("png", None)),
    ],
)
def test_labels_from_where_people_have_them(tmp_path, members, options, classes, keys):
    manifest = index_of(tmp_path, {"png": PNG, **members}, *options)
    assert manifest.classes == classes
    assert (manifest.image_key, manifest.label_key) == keys
    found = gather(read_images(Storage(str(tmp_path / "i")), manifest, "train", 3, 3))
    assert found.labels.tolist() == [max(0, len(classes) - 1)] * 3
    assert main(["data", "verify", str(tmp_path / "i"), "--images"]) == 0
    assert main(["data", "stats", str(tmp_path / "i")]) == 0


def test_records_of_a_null_label_are_left_out_and_counted(tmp_path, capsys):
    theirs = tmp_path / "theirs"
    for number, values in enumerate((["null", "1", "0"], ["null"], ["1", "null", "null"])):
        (theirs / str(number)).mkdir(parents=True)
        for index, value in enumerate(values):
            members = {"png": PNG, "json": b'{"label": %s}' % value.encode()}
            write_tar(theirs / str(number) / f"{index}.tar", [0], members=members)
    train, validation = [str(theirs / number) for number in "01"], str(theirs / "2")
    command = ["data", "index", str(tmp_path / "i"), "--train", *train, "--validation", validation]
    assert main(command) == 0
    words = "4 records of a null label, such as " + str(theirs / "0" / "0.tar") + "#photos/n0"
    assert f"2 train, 1 validation images of 2 classes (left out: {words}" in capsys.readouterr().out
    manifest = read_manifest(Storage(str(tmp_path / "i")))
    assert gather(read_images(Storage(str(tmp_path / "i")), manifest, "train", 9, 9)).labels.tolist() == [1, 0]
    assert main(["data", "verify", str(tmp_path / "i"), "--images"]) == 0
    assert main([*command[:4], train[1], "--validation", validation]) == 2
    assert "json.label is null in every record of split train" in capsys.readouterr().err


def test_a_run_names_an_image_or_takes_an_index_without_labels(tmp_path):
    index_of(tmp_path, {"png": PNG, "a.cls": b"1"})
    source = f"indexed:{tmp_path / 'i'}"
    storage, config = Storage(str(tmp_path / "run")), ShardsConfig(source=source, label_key="none", image_key="png")
    manifest = write_shards(storage, "shards", config, lambda done, total: None)
    assert (manifest.classes, manifest.label_key, manifest.image_key) == ((), None, "png")
    with pytest.raises(UserError, match=r"shards.label_key=cls, but indexed:.* was made with a.cls: leave it out"):
        write_shards(storage, "other", ShardsConfig(source=source, label_key="cls"), lambda done, total: None)


def test_classes_without_an_image_are_named(tmp_path, capsys):
    index_of(tmp_path, {"png": PNG, "cls": b"2"})
    assert "3 classes (left out: 2 classes without an image, such as 0); use them with" in capsys.readouterr().out
    assert main(["data", "stats", str(tmp_path / "i")]) == 0
    assert "left out: 2 classes without an image, such as 0" in capsys.readouterr().out
    (tmp_path / "names").write_text("a\nb\n")
    train = ["--train", str(tmp_path / "theirs"), "--validation", str(tmp_path / "theirs")]
    bare = write_tar(tmp_path / "theirs" / "x.tar", [0], members={"png": PNG})
    assert main(["data", "index", str(tmp_path / "j"), *train, "--classes", str(tmp_path / "names")]) == 2, bare
    assert "--classes names 2 classes, but the records have no labels" in capsys.readouterr().err


def test_a_place_without_shards_or_index_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert main(["data", "index", empty, "--train", empty, "--validation", empty]) == 2
    assert "empty: no shard there; give a .tar or a folder of them" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no manifest.json there; write it with `vavae data index`"):
        open_source(f"indexed:{empty}", Storage("."))
    with pytest.raises(UserError, match="indexed:x brings its classes along"):
        open_source("indexed:x", Storage("."), "labels.txt")


def test_verify_names_every_shard_that_is_not_as_the_manifest_says(folder, theirs, capsys):
    capsys.readouterr()
    assert main(["data", "verify", folder]) == 0
    assert capsys.readouterr().out == "3 of 3 shards are as the manifest says\n"
    data = bytearray((theirs / "train" / "1.tar").read_bytes())
    data[600] ^= 1
    (theirs / "train" / "1.tar").write_bytes(data)
    (theirs / "val.tar").unlink()
    assert main(["data", "verify", folder]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "train/1.tar: its checksum is not the manifest's" in lines[0]
    assert "val.tar is gone, but the manifest names it" in lines[1]
    assert lines[2:] == ["1 of 3 shards are as the manifest says"]


def test_verify_names_classes_beyond_the_manifest_s_and_on_request_unreadable_images(tmp_path, capsys):
    storage, bad = Storage(str(tmp_path)), [("train", 1)]
    manifest = write_image_shards(storage, {"train": (3, 2)}, damaged=bad)
    write_manifest(storage, "", manifest)
    assert main(["data", "verify", str(tmp_path)]) == 0
    assert main(["data", "verify", str(tmp_path), "--images"]) == 1
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].startswith("train/000000.tar#000000001: unreadable (")
    assert lines[1:] == ["1 of 2 shards are as the manifest says"]
    write_manifest(storage, "", manifest.model_copy(update={"classes": ("a", "b")}))
    assert main(["data", "verify", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train/000000.tar#000000002: label 2, but the manifest has 2 classes")


def test_verify_drops_unreadable_images_from_an_index(tmp_path, capsys):
    bad = [("train", index) for index in (1, 3, 4)]
    write_image_shards(Storage(str(tmp_path / "theirs")), {"train": (3, 2, 4), "validation": (2,)}, damaged=bad)
    folder, theirs = str(tmp_path / "index"), str(tmp_path / "theirs")
    command = ["data", "index", folder, "--train", f"{theirs}/train", "--validation", f"{theirs}/validation"]
    assert main(command) == 0
    before = read_manifest(Storage(folder))
    assert main(["data", "verify", folder, "--drop"]) == 0
    manifest = read_manifest(Storage(folder))
    assert [(shard.count, shard.dropped) for shard in manifest.splits["train"]] == [(2, (1,)), (4, None)]
    assert manifest.splits["validation"] == before.splits["validation"]
    assert (manifest.skipped[0], manifest.skipped_count) == ("train/000000.tar#000000001", 3)
    assert manifest.digest != before.digest
    kept = np.stack([image_shards.image("train", index) for index in (0, 2, 5, 6, 7, 8)])
    sized = manifest.model_copy(update={"image_size": image_shards.SIZE})
    found = gather(read_images(Storage(folder), sized, "train", 9, 9)).images.permute(0, 2, 3, 1)
    assert np.array_equal(found, kept)
    config = StreamConfig(lanes=1, crop="center", unreadable_limit=0)
    stream = ImageStream(Storage(folder), sized, "train", order_of([2, 4], 0, config), 6, config, 0)
    found = stream[MicroBatchKey(0, 0)].images.permute(0, 2, 3, 1)
    assert sorted(found.flatten().tolist()) == sorted(kept.flatten().tolist())
    capsys.readouterr()
    assert main(["data", "verify", folder, "--images"]) == 0
    assert capsys.readouterr().out == "3 of 3 shards are as the manifest says\n"
    assert main(["data", "verify", folder, "--drop"]) == 0
    assert read_manifest(Storage(folder)) == manifest


def test_dropping_leaves_something_and_no_run_s_own_shards(tmp_path, capsys):
    storage = Storage(str(tmp_path / "theirs"))
    manifest = write_image_shards(storage, {"train": (1,), "validation": (1,)}, damaged=[("train", 0)])
    write_manifest(storage, "", manifest)
    assert main(["data", "verify", storage.root, "--drop"]) == 2
    assert "is a run's own: delete the shard with the image" in capsys.readouterr().err
    sources = ["--train", f"{storage.root}/train", "--validation", f"{storage.root}/validation"]
    assert main(["data", "index", str(tmp_path / "index"), *sources]) == 0
    assert main(["data", "verify", str(tmp_path / "index"), "--drop"]) == 2
    assert "no image of split train can be read" in capsys.readouterr().err


def test_a_manifest_less_other_images_is_another(tmp_path):
    manifest = write_image_shards(Storage(str(tmp_path)), {"train": (3,)})
    faults = [ShardFaults("train", 0, [], {position: "x: unreadable"}) for position in (0, 1)]
    digests = {manifest.digest, *(without_unreadable(manifest, [each]).digest for each in faults)}
    assert len(digests) == 3


def test_verify_reads_latents_too(tmp_path, capsys):
    storage, arrays = Storage(str(tmp_path)), np.zeros((2, 2, 3, 2, 2), np.float16)
    with storage.create("train/000000.tar") as local:
        write_latents(local, arrays, [0, 1], 0)
        info = ShardInfo(name="000000.tar", count=2, bytes=local.stat().st_size, sha256=sha256_of(local))
    manifest = LatentManifest(tokenizer="t", shape=(3, 2, 2), flip=False, classes=("a", "b"), splits={"train": (info,)})
    storage.write_json("manifest.json", manifest.model_dump(mode="json"))
    assert main(["data", "verify", str(tmp_path)]) == 0
    assert main(["data", "verify", str(tmp_path), "--images"]) == 2
    assert "holds latents, which have no images to decode" in capsys.readouterr().err
    storage.delete("train/000000.tar")
    assert main(["data", "verify", str(tmp_path)]) == 1
    assert "train/000000.tar is gone" in capsys.readouterr().out


def test_verify_reads_features_beside_latents(tmp_path, capsys):
    storage, arrays = Storage(str(tmp_path)), np.zeros((2, 2, 3, 2, 2), np.float16)
    with storage.create("train/000000.tar") as local:
        write_latents(local, arrays, [0, 1], 0)
        info = ShardInfo(name="000000.tar", count=2, bytes=local.stat().st_size, sha256=sha256_of(local))
    with storage.create("features/train/000000.tar") as local:
        with open_tar(local) as tar:
            for index in range(2):
                tar.add(index, feature_members(np.zeros((1, 4, 6), np.int16)))
        of_features = info.model_copy(update={"bytes": local.stat().st_size, "sha256": sha256_of(local)})
    fields = {"tokenizer": "t", "shape": (3, 2, 2), "flip": False, "classes": ("a", "b")}
    manifest = LatentManifest(splits={"train": (info,)}, **fields)

    def describe(shape, info=of_features):
        features = FeatureManifest(config="c", shape=shape, flip=False, shards=(info,))
        storage.write_json("features/manifest.json", features.model_dump(mode="json"))

    storage.write_json("manifest.json", manifest.model_dump(mode="json"))
    describe((4, 6))
    assert main(["data", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "2 of 2 shards are as the manifest says\n"
    describe((6, 4))
    assert main(["data", "verify", str(tmp_path)]) == 1
    assert "latents int16[1, 4, 6], expected int16[1, 6, 4]" in capsys.readouterr().out
    describe((4, 6), of_features.model_copy(update={"name": "000001.tar"}))
    storage.write_bytes("features/train/000001.tar", storage.read_bytes("features/train/000000.tar"))
    assert main(["data", "verify", str(tmp_path)]) == 1
    assert "features of 2 images, but latents of 0" in capsys.readouterr().out
    describe((4, 6), of_features.model_copy(update={"sha256": "0" * 64}))
    assert main(["data", "verify", str(tmp_path)]) == 1
    assert "features/train/000000.tar: its checksum is not the manifest's" in capsys.readouterr().out


def test_verify_asks_the_store_and_not_the_cache(tmp_path):
    storage = Storage(f"memory://{uuid.uuid4().hex}", str(tmp_path))
    manifest = write_image_shards(storage, {"train": (2,)})
    shard_file(storage, "train", manifest.splits["train"][0])  # now it is in the cache, too
    assert not next(verify_shards(storage, manifest, images=False)).lines
    storage.delete("train/000000.tar")
    (line,) = next(verify_shards(storage, manifest, images=False)).lines
    assert "train/000000.tar is gone, but the manifest names it" in line


def test_a_shard_of_others_without_a_record_is_refused(tmp_path, capsys):
    bad = write_tar(tmp_path / "theirs" / "bad.tar", [])
    assert main(["data", "index", str(tmp_path / "i"), "--train", bad, "--validation", bad]) == 2
    assert "bad.tar: a shard without a record; delete it or leave it out" in capsys.readouterr().err


def test_stats_count_images_and_classes(folder, capsys):
    capsys.readouterr()
    assert main(["data", "stats", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 10 images in 2 shards, ")
    assert lines[1].startswith("  10 jpg; ")
    assert lines[2] == "  3 classes of 2 to 4 images"
    assert lines[3].startswith("validation: 3 images in 1 shards, ")
    assert lines[5] == "  3 classes of 0 to 2 images"


def test_an_argument_too_many_is_refused(folder):
    with pytest.raises(SystemExit):
        main(["data", "verify", folder, "seed=3"])
