"""Shards: planned from names, written once, the same bytes every time, readable by stock webdataset."""

import hashlib
import io
import json
import logging
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from support.image_shards import find_shards

from vavae.config import digest
from vavae.data.config import ShardsConfig
from vavae.data.image import decode_image
from vavae.data.shards import write as writer
from vavae.data.shards.manifest import Manifest, read_manifest
from vavae.data.shards.plan import describe_sources, input_digests, is_held_out, plan_shards
from vavae.data.shards.write import claim, finish, write_shard, write_shards
from vavae.errors import UserError
from vavae.storage import artifact as artifact
from vavae.storage.storage import Storage

CLASSES = ("airplane", "bird", "cat")
PER_CLASS = 20


def jpeg(red):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), (red, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_zip(path, damaged=(), classes=CLASSES, per_class=PER_CLASS):
    with zipfile.ZipFile(path, "w") as archive:
        for label, name in enumerate(classes):
            for index in range(per_class):
                key = f"{name}/{index:04d}.jpg"
                archive.writestr(key, b"damaged" if key in damaged else jpeg(4 * index + 80 * label))
    return str(path)


@pytest.fixture
def config(tmp_path):
    source = make_zip(tmp_path / "images.zip")
    return ShardsConfig(source=source, validation_fraction=0.25, image_size=32, shard_images=8)


def silent(done, total):
    pass


def samples(storage, manifest, prefix="shards"):
    """Per split, (key, original key, label, red) of all samples, as stock webdataset reads them."""
    found = {}
    for split, shards in manifest.splits.items():
        urls = [storage.url(f"{prefix}/{split}/{shard.name}") for shard in shards]
        dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
        found[split] = [
            (sample["__key__"], sample["json"]["key"], sample["cls"], int(sample["png"][0, 0, 0])) for sample in dataset
        ]
    return found


def contents(storage, prefix="shards"):
    return {path: storage.read_bytes(path) for path in storage.list(prefix, recursive=True)}


def test_round_trip_through_stock_webdataset(storage, config):
    manifest = write_shards(storage, "shards", config, silent)
    found = samples(storage, manifest)
    everything = found["train"] + found["validation"]
    expected = {(f"{name}/{index:04d}.jpg", label) for label, name in enumerate(CLASSES) for index in range(PER_CLASS)}
    assert {(original, label) for _, original, label, _ in everything} == expected
    assert len(everything) == len(expected)
    for _, original, label, red in everything:
        assert abs(red - (4 * int(original[-8:-4]) + 80 * label)) <= 2
    for split, items in found.items():
        assert [key for key, *_ in items] == [f"{index:09d}" for index in range(manifest.count(split))]
        assert all(is_held_out(original, config) == (split == "validation") for _, original, _, _ in items)
    labels = [label for _, _, label, _ in found["train"]]
    assert len(set(labels[:8])) == 3, "the first shard holds one class only"


def test_the_manifest_tells_the_truth(storage, config):
    manifest = write_shards(storage, "shards", config, silent)
    assert read_manifest(storage, "shards") == manifest
    assert manifest.classes == CLASSES
    assert manifest.image_size == config.image_size
    for split, shards in manifest.splits.items():
        assert [shard.name for shard in shards] == [f"{number:06d}.tar" for number in range(len(shards))]
        assert [shard.count for shard in shards[:-1]] == [8] * (len(shards) - 1)
        for shard in shards:
            data = storage.read_bytes(f"shards/{split}/{shard.name}")
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                assert len({member.name.partition(".")[0] for member in tar}) == shard.count
                assert all((m.mtime, m.uid, m.gid, m.pax_headers) == (0, 0, 0, {}) for m in tar)
            assert data[257:263] == b"ustar\0"
    record = artifact.read(storage, "shards")
    assert record is not None
    assert artifact.is_intact(storage, "shards", record)
    assert record.digest == manifest.digest
    assert record.config == digest(config)
    assert record.inputs == input_digests(describe_sources(config, storage))


def test_two_runs_give_equal_bytes(storage, config, tmp_path):
    write_shards(storage, "a/shards", config, silent)
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "other.zip"
    os.replace(config.source, moved)
    other = Storage("memory://two-runs", cache=str(tmp_path / "cache"))
    write_shards(other, "a/shards", config.model_copy(update={"source": str(moved)}), silent)
    assert contents(storage, "a") == contents(other, "a")


def test_a_seed_is_another_order_and_another_content(storage, config):
    manifests = [
        write_shards(storage, f"s{seed}", config.model_copy(update={"seed": seed, "validation_fraction": 0}), silent)
        for seed in (0, 1)
    ]
    orders = [[s[1] for s in samples(storage, m, f"s{seed}")["train"]] for seed, m in enumerate(manifests)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert manifests[0].digest != manifests[1].digest


def test_shards_are_pure_functions_that_workers_can_run_in_any_order(storage, config):
    expected = write_shards(storage, "once", config, silent)
    plan = plan_shards(config, storage)
    claim(storage, "shards", config, plan.sources)
    records = [
        write_shard(pickle.loads(pickle.dumps(storage)), "shards", pickle.loads(pickle.dumps(shard)))
        for shard in reversed(plan.shards)
    ]
    assert finish(storage, "shards", plan, records[::-1]) == expected
    once, mapped = contents(storage, "once"), contents(storage, "shards")
    assert {path.replace("once", "shards"): data for path, data in once.items()} == mapped


def test_progress_counts_every_image(storage, config):
    seen = []
    write_shards(storage, "shards", config, lambda done, total: seen.append((done, total)))
    assert seen == [(done, 60) for done in range(1, 61)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survived", [0, 1, 13, 30, 59])
def test_a_killed_job_goes_on_where_it_was(storage, config, monkeypatch, survived):
    expected = write_shards(storage, "whole", config, silent)

    def kill(done, total):
        if done > survived:
            raise Killed

    with pytest.raises(Killed):
        write_shards(storage, "shards", config, kill)
    assert artifact.read(storage, "shards") is None
    assert find_shards(storage, "shards", config) is None
    done = [path for path in storage.list("shards", recursive=True) if path.endswith(".tar")]
    before = {path: os.stat(storage.url(path)).st_ino for path in done}

    calls = []
    real = writer.stored_image
    monkeypatch.setattr(writer, "stored_image", lambda data, config: calls.append(1) or real(data, config))
    assert write_shards(storage, "shards", config, silent) == expected
    kept = sum(
        shard.count
        for split, shards in expected.splits.items()
        for shard in shards
        if f"shards/{split}/{shard.name}" in before
    )
    assert len(calls) == 60 - kept
    assert kept >= survived - config.shard_images
    assert {path: os.stat(storage.url(path)).st_ino for path in done} == before
    whole = contents(storage, "whole")
    assert contents(storage, "shards") == {path.replace("whole", "shards"): data for path, data in whole.items()}


def test_a_finished_set_is_found_and_a_lost_shard_is_made_again(storage, config, monkeypatch):
    assert find_shards(storage, "shards", config) is None
    manifest = write_shards(storage, "shards", config, silent)
    assert find_shards(storage, "shards", config) == manifest
    whole = contents(storage)
    storage.delete("shards/train/000001.tar")
    assert find_shards(storage, "shards", config) is None
    storage.write_bytes("shards/validation/000000.json", b"{half")
    calls = []
    real = writer.stored_image
    monkeypatch.setattr(writer, "stored_image", lambda data, config: calls.append(1) or real(data, config))
    assert write_shards(storage, "shards", config, silent) == manifest
    assert len(calls) == 16
    assert contents(storage) == whole


def test_unreadable_images_are_left_out_counted_and_named(storage, config, tmp_path, caplog):
    damaged = {"cat/0003.jpg", "bird/0000.jpg", "bird/0019.jpg"}
    whole = samples(storage, write_shards(storage, "whole", config, silent), "whole")
    make_zip(tmp_path / "images.zip", damaged)
    with caplog.at_level(logging.WARNING):
        manifest = write_shards(storage, "shards", config, silent)
    assert set(manifest.skipped) == damaged
    assert manifest.skipped_count == 3
    assert all(f"left out {key}" in caplog.text for key in damaged)
    found = samples(storage, manifest)
    for split, items in whole.items():
        assert found[split] == [item for item in items if item[1] not in damaged]
        assert manifest.count(split) == len(found[split])


def test_the_list_of_skipped_names_is_bounded(storage, config, tmp_path, monkeypatch):
    make_zip(tmp_path / "images.zip", {f"cat/{index:04d}.jpg" for index in range(PER_CLASS)})
    monkeypatch.setattr(writer, "_SKIPPED_NAMES", 5)
    manifest = write_shards(storage, "shards", config, silent)
    assert (len(manifest.skipped), manifest.skipped_count) == (5, PER_CLASS)


def test_a_shard_without_images_leaves_no_file(storage, config, tmp_path):
    single = config.model_copy(update={"shard_images": 1, "validation_fraction": 0})
    make_zip(tmp_path / "images.zip", {"cat/0003.jpg"})
    manifest = write_shards(storage, "shards", single, silent)
    assert len(manifest.splits["train"]) == manifest.count("train") == 59
    tars = [path for path in storage.list("shards/train") if path.endswith(".tar")]
    assert tars == [f"shards/train/{shard.name}" for shard in manifest.splits["train"]]
    assert find_shards(storage, "shards", single) == manifest


def test_nothing_readable_is_an_error_and_leaves_nothing(storage, config, tmp_path):
    make_zip(tmp_path / "images.zip", {f"{name}/{index:04d}.jpg" for name in CLASSES for index in range(PER_CLASS)})
    with pytest.raises(UserError, match=r"no image of split train can be read \(.*\.jpg, \.\.\.\)"):
        write_shards(storage, "shards", config, silent)
    assert storage.sizes() == {}


def test_a_failing_source_is_never_taken_for_bad_images(storage, config, monkeypatch):
    def fail(self, record):
        raise OSError("connection reset")

    monkeypatch.setattr("vavae.data.sources.files.ZipSource.read", fail)
    with pytest.raises(OSError, match="connection reset"):
        write_shards(storage, "shards", config, silent)
    assert [path for path in storage.list("shards", recursive=True)] == ["shards/plan.json"]


def test_a_target_made_otherwise_is_refused(storage, config, tmp_path):
    write_shards(storage, "shards", config, silent)
    before = contents(storage)

    def refused(other, message):
        for make in (find_shards, lambda *args: write_shards(*args, silent)):
            with pytest.raises(UserError, match=message):
                make(storage, "shards", other)

    refused(config.model_copy(update={"image_size": 16}), "made with image_size=32, not 16: delete it")
    refused(
        config.model_copy(update={"source": make_zip(tmp_path / "b.zip", per_class=21)}),
        r"from another source \(train\.images was 60, is 63 now\)",
    )
    refused(
        config.model_copy(update={"source": make_zip(tmp_path / "c.zip", classes=CLASSES[:2], per_class=30)}),
        "train.classes was airplane, bird, cat, is airplane, bird now",
    )
    storage.write_bytes("notes/x.txt", b"mine")
    with pytest.raises(UserError, match="notes holds something else than shards"):
        write_shards(storage, "notes", config, silent)
    storage.delete("notes")
    assert contents(storage) == before


def test_validation_source(storage, config, tmp_path):
    held_out = make_zip(tmp_path / "test.zip", classes=CLASSES[1:], per_class=4)
    both = config.model_copy(update={"validation_source": held_out})
    manifest = write_shards(storage, "shards", both, silent)
    assert {split: manifest.count(split) for split in manifest.splits} == {"train": 60, "validation": 8}
    found = samples(storage, manifest)["validation"]
    assert {(original.partition("/")[0], label) for _, original, label, _ in found} == {("bird", 1), ("cat", 2)}
    assert set(manifest.sources) == {"train", "validation"}
    strange = make_zip(tmp_path / "strange.zip", classes=("bird", "cow"))
    with pytest.raises(UserError, match=r"class cow is not among the 3 of .*images\.zip"):
        plan_shards(config.model_copy(update={"validation_source": strange}), storage)


def test_a_flat_validation_set_with_its_labels(storage, config, tmp_path):
    with zipfile.ZipFile(make_zip(tmp_path / "test.zip", classes=CLASSES[1:], per_class=2)) as archive:
        images = [archive.read(name) for name in sorted(archive.namelist()) if name.endswith(("png", "jpg"))]
    for number, data in enumerate(images):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{number}.jpg").write_bytes(data)
    (tmp_path / "labels.txt").write_text("bird\n" * (len(images) - 1) + "cat\n")
    update = {"validation_source": str(tmp_path / "flat"), "validation_labels": str(tmp_path / "labels.txt")}
    manifest = write_shards(storage, "shards", config.model_copy(update=update), silent)
    found = samples(storage, manifest)["validation"]
    assert {original: label for _, original, label, _ in found} == {
        f"{number}.jpg": 2 if number == len(images) - 1 else 1 for number in range(len(images))
    }


def test_labels_without_images_are_refused():
    with pytest.raises(ValidationError, match="validation_labels=x without a validation_source: name its images"):
        ShardsConfig(source="digits", validation_labels="x")


def test_an_empty_split_is_refused(storage, config):
    with pytest.raises(UserError, match=r"validation_fraction=1e-09 of 60 images leaves none for validation"):
        plan_shards(config.model_copy(update={"validation_fraction": 1e-9}), storage)


@given(st.integers(0, 9), st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_holding_out_is_fair_and_other_images_do_not_matter(seed, fraction):
    config = ShardsConfig(source="x", seed=seed, validation_fraction=fraction)
    chosen = [is_held_out(f"cat/{index}.jpg", config) for index in range(2000)]
    assert abs(np.mean(chosen) - fraction) < 5 * (fraction * (1 - fraction) / 2000) ** 0.5
    larger = config.model_copy(update={"validation_fraction": min(fraction + 0.04, 0.99)})
    assert all(is_held_out(f"cat/{index}.jpg", larger) for index in np.flatnonzero(chosen))


@pytest.mark.parametrize(
    ("update", "extension"), [({"keep_original": True}, "jpg"), ({"format": "jpeg"}, "jpg"), ({}, "png")]
)
def test_forms_of_storage(storage, config, update, extension):
    manifest = write_shards(storage, "shards", config.model_copy(update=update), silent)
    with tarfile.open(storage.url("shards/train/000000.tar")) as tar:
        names = tar.getnames()
        data = tar.extractfile(names[0]).read()
        original = json.loads(tar.extractfile("000000000.json").read())["key"]
    assert names[:3] == [f"000000000.{extension}", "000000000.cls", "000000000.json"]
    if update.get("keep_original"):
        assert data == zipfile.ZipFile(config.source).read(original)
    else:
        assert decode_image(data).shape == (32, 32, 3)
    assert manifest.count("train") + manifest.count("validation") == 60


def test_digits(storage):
    config = ShardsConfig(source="digits", validation_fraction=0.15, image_size=32, shard_images=256)
    plan = plan_shards(config, storage)
    held_out = sum(len(shard.records) for shard in plan.shards if shard.name.startswith("validation"))
    assert (plan.images, plan.classes) == (1797, tuple("0123456789"))
    assert abs(held_out / plan.images - 0.15) < 0.02
    assert len(pickle.dumps(plan.shards[0])) < 30_000, "a task must not carry the whole plan"


@pytest.mark.parametrize("data", [b"{half", b"{}", b'{"splits": 3}'])
def test_damaged_or_missing_manifests(storage, data):
    with pytest.raises(UserError, match=r"no shards in .*shards: it has no manifest\.json; prepare them first"):
        read_manifest(storage, "shards")
    storage.write_bytes("shards/manifest.json", data)
    with pytest.raises(UserError, match=r"manifest\.json is no manifest \(.*delete"):
        read_manifest(storage, "shards")


def test_the_digest_is_of_the_content():
    shard = {"name": "000000.tar", "count": 3, "bytes": 10, "sha256": "a"}

    def manifest(shards, **others):
        values = {"splits": {"train": shards}, "classes": ["x"], "image_size": 32, "sources": {}, **others}
        return Manifest.model_validate(values).digest

    first = manifest([shard])
    assert first == manifest([shard], skipped=["x"], skipped_count=1, sources={"train": {"kind": "zip"}})
    assert first != manifest([{**shard, "sha256": "b"}])
    assert first != manifest([shard], classes=["y"])
    assert first != manifest([shard, shard])


def make_folder(path, names, damaged=()):
    """A folder of images; names are bytes or text."""
    for index, name in enumerate(names):
        place = os.fsdecode(os.fsencode(path) + b"/" + os.fsencode(name))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(b"damaged" if name in damaged else jpeg(index))
    return str(path)


def members_of(storage, path):
    with tarfile.open(storage.url(path)) as tar:
        return {member.name.partition(".")[2] for member in tar}


def test_images_without_labels_have_no_class_member(storage, tmp_path):
    source = make_folder(tmp_path / "flat", [f"{index:02d}.jpg" for index in range(20)])
    config = ShardsConfig(source=source, image_size=32, validation_fraction=0.3)
    manifest = write_shards(storage, "shards", config, silent)
    assert manifest.classes == ()
    assert members_of(storage, "shards/train/000000.tar") == {"png", "json"}
    assert read_manifest(storage, "shards") == manifest
    folders = make_folder(tmp_path / "classes", ["a/1.jpg", "b/1.jpg"])
    both = config.model_copy(update={"validation_source": folders})
    with pytest.raises(UserError, match=r"shards.validation_source has classes and shards.source has none: name those"):
        plan_shards(both, storage)
    with pytest.raises(UserError, match=r"shards.source has classes and shards.validation_source has none"):
        plan_shards(both.model_copy(update={"source": folders, "validation_source": source}), storage)
    plan = plan_shards(both.model_copy(update={"label_key": "none"}), storage)
    assert plan.classes == ()
    assert {record.label for shard in plan.shards for record in shard.records} == {0}


def test_images_with_names_that_are_not_utf_8_are_written_and_left_out_by_name(storage, tmp_path):
    names = [b"caf\xe9/%d\xff.jpg" % index for index in range(8)] + [b"b/%d.jpg" % index for index in range(8)]
    config = ShardsConfig(
        source=make_folder(tmp_path / "x", names, damaged={names[3]}), image_size=32, validation_fraction=0
    )
    manifest = write_shards(storage, "shards", config, silent)
    assert manifest.classes == ("b", "caf\\xe9")
    assert manifest.skipped == ("caf\\xe9/3\\xff.jpg",)
    assert read_manifest(storage, "shards") == manifest
    keys = {original for _, original, _, _ in samples(storage, manifest)["train"]}
    assert "caf\\xe9/0\\xff.jpg" in keys
    assert write_shards(storage, "shards", config, silent) == manifest, "what is done is found again"


def test_classes_that_nothing_is_left_of_are_named(storage, tmp_path):
    names = [f"{name}/{index}.jpg" for name in "abc" for index in range(1)] + [f"d/{index}.jpg" for index in range(30)]
    config = ShardsConfig(source=make_folder(tmp_path / "x", names, damaged={"b/0.jpg"}), image_size=32)
    config = config.model_copy(update={"validation_fraction": 0.5})
    held_out = [name[0] for name in names[:3] if is_held_out(name, config) and name[0] != "b"]
    manifest = write_shards(storage, "shards", config, silent)
    assert manifest.left_out.startswith(
        "1 images that cannot be read, such as b/0.jpg; 1 classes without an image, such"
    )
    found = {each.reason: each.count for each in manifest.excluded}
    assert found.pop("classes without an image") == 1
    assert found == ({"classes whose only images are held out": len(held_out)} if held_out else {})


def test_captions_are_members_of_their_records(storage, tmp_path):
    source = make_folder(tmp_path / "x", [f"{index}.jpg" for index in range(4)])
    rows = [json.dumps({"file_name": f"{index}.jpg", "text": f"cät {index}"}) for index in range(3)]
    (tmp_path / "x" / "metadata.jsonl").write_text("\n".join(rows))
    config = ShardsConfig(source=source, image_size=32, validation_fraction=0)
    write_shards(storage, "shards", config, silent)
    dataset = webdataset.WebDataset([storage.url("shards/train/000000.tar")], shardshuffle=False)
    found = {json.loads(each["json"])["key"]: each.get("txt", b"").decode() for each in dataset}
    assert found == {"0.jpg": "cät 0", "1.jpg": "cät 1", "2.jpg": "cät 2", "3.jpg": ""}
