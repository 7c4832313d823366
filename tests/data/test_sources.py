"""Sources: the same images in the same order however they are packed, and a message for whatever is not a source."""

import importlib
import io
import json
import os
import sys
import tarfile
import types
import uuid
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from vavae.config import digest
from vavae.data.config import RecordKeys
from vavae.data.image import decode_image
from vavae.data.sources.listing import digest_of_rows
from vavae.data.sources.opening import open_source
from vavae.errors import UserError
from vavae.storage.storage import Storage


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {
    "cat/10.png": png(1),
    "cat/9.png": png(2),
    "cat/more/1.PNG": png(3),
    "dog/1.png": png(4),
    "dog/notes.txt": b"no image",
    ".thumbnails/1.png": b"hidden",
    "__MACOSX/cat/._9.png": b"hidden",
}
EXPECTED = [("cat/10.png", 0, 1), ("cat/9.png", 0, 2), ("cat/more/1.PNG", 0, 3), ("dog/1.png", 1, 4)]


def pack(place, kind, files, wrap=""):
    """Pack files as a folder, an archive, or a prefix of an object store; returns the name of the source."""
    files = {wrap + name: data for name, data in reversed(files.items())}
    path = place / f"images.{kind}"
    if kind in ("folder", "memory"):
        storage = Storage(str(path) if kind == "folder" else f"memory://{uuid.uuid4().hex}")
        for name, data in files.items():
            storage.write_bytes(name, data)
        return storage.root
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, f"w:{kind.partition('.')[2]}") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(f"./{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)


HERE = Storage(".")


def cached(folder):
    """A storage whose cache is a folder."""
    return Storage(".", str(folder))


def describe(name, storage):
    """Fingerprint of a source."""
    return open_source(name, storage).listing().fingerprint


def contents(name, storage=HERE):
    """Classes and (key, label, red) of all images."""
    source = open_source(name, storage)
    listing = source.listing()
    return listing.classes, [(r.key, r.label, int(decode_image(source.read(r))[0, 0, 0])) for r in listing.records]


KINDS = ["folder", "memory", "zip", "tar", "tar.gz"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", ["", "train/", "set/train/"])
def test_class_folders(tmp_path, kind, wrap):
    classes, images = contents(pack(tmp_path, kind, FILES, wrap))
    assert classes == ("cat", "dog")
    assert images == [(wrap + key, label, red) for key, label, red in EXPECTED]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_folder_of_an_archive(tmp_path, kind):
    files = {f"{split}/{name}": data for split in ("train", "test", "training") for name, data in FILES.items()}
    name = pack(tmp_path, kind, files)
    assert contents(f"{name}#train")[1] == [(f"train/{key}", label, red) for key, label, red in EXPECTED]
    with pytest.raises(UserError, match="no images in nothing/"):
        contents(f"{name}#nothing")


def test_archives_of_an_object_store_are_fetched(tmp_path):
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    storage.put_file(pack(tmp_path, "tar.gz", FILES), "images.tar.gz")
    assert contents(storage.url("images.tar.gz"), cached(tmp_path / "cache"))[1] == EXPECTED


def test_archives_go_by_what_they_are_and_not_by_their_name(tmp_path):
    path = tmp_path / "download"
    path.write_bytes((tmp_path / pack(tmp_path, "zip", FILES)).read_bytes())
    assert contents(str(path))[1] == EXPECTED


def test_one_class_is_enough(tmp_path):
    assert contents(pack(tmp_path, "folder", {"cat/1.png": png(1)}))[0] == ("cat",)


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_tell_sources_apart_and_know_them_again(tmp_path, kind):
    def fingerprint(files):
        place = tmp_path / uuid.uuid4().hex
        place.mkdir()
        return describe(pack(place, kind, files), HERE)

    first = fingerprint(FILES)
    assert first == fingerprint(dict(sorted(FILES.items())))
    assert (first["images"], first["classes"]) == (4, ["cat", "dog"])
    assert first != fingerprint({**FILES, "dog/2.png": png(5)})
    assert first != fingerprint({**FILES, "dog/1.png": FILES["dog/1.png"] + b"\0"})
    assert first != fingerprint({"cow" + name[3:] if name[:3] == "cat" else name: data for name, data in FILES.items()})


@given(st.lists(st.tuples(st.text(), st.integers(), st.integers())))
def test_the_digest_of_rows_is_that_of_their_list(rows):
    assert digest_of_rows(iter(rows)) == digest(rows)


def test_digits():
    source = open_source("digits", HERE)
    listing = source.listing()
    assert len(listing.records) == 1797
    assert listing.classes == tuple("0123456789")
    record = listing.records[42]
    assert (record.key, record.label) == ("1/0042", 1)
    image = decode_image(source.read(record))
    assert image.shape == (32, 32, 3)
    from sklearn.datasets import load_digits

    block_means = image[..., 0].reshape(8, 4, 8, 4).mean((1, 3)) * 16 / 255  # [8, 8]
    assert np.abs(block_means - load_digits().images[42]).mean() < 1
    assert np.corrcoef(block_means.ravel(), load_digits().images[42].ravel())[0, 1] > 0.98


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_a_tar_of_class_tars_as_imagenet_comes(tmp_path):
    tars = {"n02.tar": tar_of({"n02_1.PNG": png(5), "n02_0.PNG": png(6)}), "n01.tar": tar_of({"n01_7.PNG": png(7)})}
    name = file(tmp_path, "ILSVRC2012_img_train.tar", tar_of(tars))
    assert contents(name) == (
        ("n01", "n02"),
        [("n01/n01_7.PNG", 0, 7), ("n02/n02_0.PNG", 1, 6), ("n02/n02_1.PNG", 1, 5)],
    )


FLAT = {f"val_{number}.png": png(number) for number in (1, 2, 3)}


def devkit():
    """Classes numbered in an order of their own, with an inner node of the tree among them."""
    synsets = np.array(
        [(1, "n03", 0), (2, "n01", 0), (1001, "n00", 2)],
        dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    folder = "ILSVRC2012_devkit_t12/data"
    truth = b"2\n1\n2\n"
    return tar_of({f"{folder}/meta.mat": meta.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth})


LABELS = {
    "devkit": devkit(),
    "kaggle": b"ImageId,PredictionString\nval_2,n03 85 1 499 272 \nval_1,n01 1 2 3 4 n01 5 6 7 8\nval_3,n01 0 0 1 1\n",
    "names": b"val_3.png n01\nval_1.png n01\nval_2.png n03\n",
    "in order": b"n01\nn03\nn01\n",
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_set_with_a_label_file(tmp_path, kind, labels):
    name, labels = pack(tmp_path, kind, FLAT), file(tmp_path, "labels", LABELS[labels])
    source = open_source(name, cached(tmp_path), labels)
    listing = source.listing()
    assert listing.classes == ("n01", "n03")
    assert [(record.key, record.label) for record in listing.records] == [
        ("val_1.png", 0),
        ("val_2.png", 1),
        ("val_3.png", 0),
    ]
    assert [decode_image(source.read(record))[0, 0, 0] for record in listing.records] == [1, 2, 3]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (b"n01\nn02\n", "2 classes for the 3 images of"),
        (b"val_1 n01\nval_2 n01\n", "no class for val_3 of"),
        (b"n01\nval_2 n01\n", "expected a class, or a name and a class, on every line"),
        (b"", "expected a class, or a name"),
        (b"\xff\xfe\x00", "neither a text nor ImageNet's development kit"),
        (tar_of({"meta.mat": b""}), "not ImageNet's development kit"),
        (None, "is not there: name the file with the classes"),
    ],
)
def test_messages_about_labels(tmp_path, labels, message):
    path = tmp_path / "labels"
    if labels is not None:
        path.write_bytes(labels)
    with pytest.raises(UserError, match=rf"validation_labels .*{message}"):
        open_source(pack(tmp_path, "folder", FLAT), HERE, str(path), labels_field="validation_labels").listing()


def test_sets_that_bring_classes_take_no_label_file():
    with pytest.raises(UserError, match="digits brings its classes along"):
        open_source("digits", HERE, "labels.txt")


MESSAGES = {
    "missing": (lambda place: str(place / "nothing"), "is not there: give a folder of images or of class folders"),
    "missing object": (lambda place: f"memory://{uuid.uuid4().hex}/x", "is not there"),
    "empty": (
        lambda place: pack(place, "folder", {"cat/notes.txt": b""}),
        "no images; it must hold name.jpg or class/name.jpg",
    ),
    "stray": (lambda place: pack(place, "zip", {**FILES, "x.png": b""}), "x.png lies in no class folder"),
    "splits": (lambda place: pack(place, "tar", {"train/a/1.png": b"", "val/a/1.png": b""}), "train, val are splits"),
    "no archive": (lambda place: file(place, "x.zip", b"PK no zip"), "neither a folder nor a zip nor a tar archive"),
    "twins": (lambda place: appended(pack(place, "tar", FILES), "cat/9.png"), "cat/9.png comes twice; pack it again"),
    "empty archive": (lambda place: pack(place, "tar", {}), "no images"),
    "cut tar": (lambda place: cut(pack(place, "tar", {"a/1.png": b"x" * 9999})), "damaged"),
    "cut zip": (
        lambda place: cut(pack(place, "zip", {f"a/{i}.png": b"x" * 99 for i in range(99)})),
        "neither a folder",
    ),
    "cut gzip": (
        lambda place: cut(pack(place, "tar.gz", {"a/1.png": np.random.default_rng(0).bytes(50_000)})),
        "damaged gzip",
    ),
    "no gzip": (lambda place: file(place, "x.tar.gz", b"\x1f\x8b garbage"), "neither a folder nor"),
    "bzip2": (lambda place: pack(place, "tar.bz2", FILES), "packed by bzip2, which is not read here; unpack it"),
    "xz": (lambda place: pack(place, "tar.xz", FILES), "packed by xz, which is not read here; unpack it"),
}


def appended(name, member):
    with tarfile.open(name, "a") as archive:
        archive.addfile(tarfile.TarInfo(member))
    return name


def file(place, name, data):
    (place / name).write_bytes(data)
    return str(place / name)


def cut(name):
    path = Path(name)
    data = path.read_bytes()
    return file(path.parent, "cut", data[: len(data) // 2])


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(tmp_path, case):
    make, message = MESSAGES[case]
    with pytest.raises(UserError, match=message):
        describe(make(tmp_path), cached(tmp_path / "cache"))


def test_a_damaged_member_is_an_error_of_the_source(tmp_path):
    name = pack(tmp_path, "zip", {"a/1.png": bytes(range(256)) * 40})
    data = bytearray(Path(name).read_bytes())
    data[60:80] = b"\0" * 20
    source = open_source(file(tmp_path, "damaged.zip", data), HERE)
    with pytest.raises(UserError, match=r"a/1\.png is damaged"):
        source.read(source.listing().records[0])


class Unseekable(io.BytesIO):
    """A stream that cannot seek: a zip file packed into it has checksums and sizes behind its members."""

    def seekable(self):
        return False

    def seek(self, *where):
        raise OSError

    def tell(self):
        raise OSError


ARCHIVES = (b"PK", b"BZh", b"7z", b"\xfd7z", b"\x28\xb5")
"""First bytes of archives: what begins with them is one, whatever comes after."""


@given(
    st.lists(st.binary(max_size=300).map(lambda data: data * 400), min_size=1, max_size=5),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    st.sampled_from([io.BytesIO, Unseekable]),
    st.binary(max_size=40).filter(lambda before: not before.startswith(ARCHIVES)),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_members_of_any_zip_are_read_as_by_zipfile(tmp_path, images, method, target, before):
    buffer = target()
    buffer.write(before)
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for index, data in enumerate(images):
            archive.writestr(f"é/{index}.png", data)
    source = open_source(file(tmp_path, "x.zip", buffer.getvalue()), HERE)
    assert [source.read(record) for record in source.listing().records] == images


def test_a_zip_packed_in_another_way_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/1.png", b"1")
    with pytest.raises(UserError, match=r"a/1.png is packed by LZMA; only stored and deflated members are read"):
        open_source(str(tmp_path / "x.zip"), HERE)
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.writestr("a/1.png", b"1")
        archive.writestr("a/2.png", b"1", zipfile.ZIP_BZIP2)
    with pytest.raises(UserError, match=r"a/2.png is packed by bzip2"):
        describe(str(tmp_path / "y.zip"), HERE)


def test_a_tar_that_shrinks_is_an_error_of_the_source(tmp_path):
    name = pack(tmp_path, "tar", FILES)
    source = open_source(name, HERE)
    records = source.listing().records
    os.truncate(name, 600)
    with pytest.raises(UserError, match="ends within"):
        [source.read(record) for record in records]


def test_an_encrypted_zip_is_refused(tmp_path):
    name = pack(tmp_path, "zip", {"a/1.png": b"x"})
    data = bytearray(Path(name).read_bytes())
    data[data.find(b"PK\1\2") + 8] |= 1
    with pytest.raises(UserError, match="encrypted"):
        describe(file(tmp_path, "x.zip", data), HERE)


class Pets:
    """A torchvision set as far as we use one."""

    classes = ("cat", ("dog", "hound"))

    def __init__(self, root, train=True, transform=None, download=False):
        assert (download, os.path.basename(root)) == (True, "torchvision")
        self.targets = [1, 0, 1] if train else [0]

    def __getitem__(self, index):
        return Image.new("L", (4, 4), 10 * index), self.targets[index]


class Numbers:
    """A set without names, without a list of labels and without options."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Image.new("RGB", (4, 4), (index, 0, 0)), index


class Unlabelled(Numbers):
    def __init__(self, split):
        if split == "best":
            raise ValueError("unknown split best\nwith details")
        self.labels = np.array([-1, -1])


@pytest.fixture
def torchvision(monkeypatch):
    importlib.import_module("vavae.torchvision_compat")  # it would put the real module back
    module = types.SimpleNamespace(Pets=Pets, Numbers=Numbers, Unlabelled=Unlabelled, wrap=print)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


@pytest.mark.usefixtures("torchvision")
def test_torchvision(tmp_path):
    assert contents("torchvision:Pets", cached(tmp_path)) == (
        ("cat", "dog"),
        [("dog/0", 1, 0), ("cat/1", 0, 10), ("dog/2", 1, 20)],
    )
    assert contents("torchvision:Pets#test", cached(tmp_path))[1] == [("cat/0", 0, 0)]
    assert contents("torchvision:Numbers", cached(tmp_path)) == (("0", "1"), [("0/0", 0, 0), ("1/1", 1, 1)])
    assert describe("torchvision:Pets", cached(tmp_path)) != describe("torchvision:Pets#test", cached(tmp_path))


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Cows", "torchvision.datasets has no class Cows"),
        ("wrap", "torchvision.datasets has no class wrap"),
        ("Unlabelled#test", "this split has no labels"),
        ("Unlabelled#best", "torchvision:Unlabelled#best: unknown split best$"),
    ],
)
def test_torchvision_messages(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        describe(f"torchvision:{name}", cached(tmp_path))


class ImageFeature:
    def __init__(self, decode=True):
        self.decode = decode


class LabelFeature:
    names = ("cat", "dog")


class ArrowRows(NamedTuple):
    columns: dict

    def __getitem__(self, rows):
        assert rows == slice(None)
        return self.columns


class Rows:
    """A data set of the package `datasets` as far as we use one: columns, of which the image can be left undecoded."""

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    def __getitem__(self, name):
        feature = self.features[name]
        assert not getattr(feature, "decode", False), "images must not be decoded twice"
        return self.columns[name]

    def select_columns(self, names):
        return Rows({name: self.columns[name] for name in names}, {name: self.features[name] for name in names})

    def cast_column(self, name, feature):
        return Rows(self.columns, {**self.features, name: feature})

    def with_format(self, name):
        assert name == "arrow"
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        return ArrowRows(
            {name: pyarrow.chunked_array([pyarrow.array(column, kind)]) for name, column in self.columns.items()}
        )


@pytest.fixture
def huggingface(monkeypatch, tmp_path):
    def load_dataset(name, split):
        if name == "missing":
            raise FileNotFoundError("no such data set\nand more")
        path = tmp_path / "1.png"
        path.write_bytes(png(7))
        images = [{"bytes": png(5), "path": None}, {"bytes": None, "path": str(path)}]
        features = {"img": ImageFeature(), "label": LabelFeature()}
        if name == "text":
            features = {"text": object(), "label": LabelFeature()}
        return Rows({"img": images, "label": [1, 0] if split == "train" else [0, 0]}, features)

    module = types.SimpleNamespace(load_dataset=load_dataset, Image=ImageFeature, ClassLabel=LabelFeature)
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.usefixtures("huggingface")
def test_huggingface():
    assert contents("huggingface:pets") == (("cat", "dog"), [("dog/0", 1, 5), ("cat/1", 0, 7)])
    assert contents("huggingface:pets#test")[1] == [("cat/0", 0, 5), ("cat/1", 0, 7)]
    with pytest.raises(UserError, match=r"huggingface:missing#train: no such data set$"):
        describe("huggingface:missing", HERE)
    with pytest.raises(UserError, match="no column is an image; its columns are text, label"):
        describe("huggingface:text", HERE)


@pytest.mark.parametrize(("name", "package"), [("huggingface:x", "datasets"), ("digits", "scikit-learn")])
def test_missing_packages(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=f"needs a package that is not here .*pip install {package}"):
        open_source(name, HERE)


IMAGES = {f"{number:02d}.png": png(number) for number in range(6)}
NAMES = [*IMAGES]


def jsonl(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def listing_of(place, kind, files, labels=None, **keys):
    """The listing of a packed source, and the red of its images."""
    if labels is not None:
        labels = file(place, "labels.csv", labels)
    source = open_source(pack(place, kind, files), cached(place / "cache"), labels, RecordKeys(**keys))
    listing = source.listing()
    assert all(decode_image(source.read(record))[0, 0, 0] == int(record.key[-6:-4]) for record in listing.records)
    return listing


PAIRS = [[name, index % 3] for index, name in enumerate(NAMES)]
LABELED = {
    "dataset.json": (
        {"dataset.json": json.dumps({"labels": [[name, i % 3] for i, name in enumerate(NAMES)]}).encode()},
        {},
    ),
    "metadata.jsonl": (
        {"metadata.jsonl": jsonl({"file_name": name, "label": label} for name, label in PAIRS)},
        {},
    ),
    "metadata.csv": (
        {"metadata.csv": b"file_name,kind\n" + "".join(f"{name},{label}\n" for name, label in PAIRS).encode()},
        {"label": "kind"},
    ),
    "a CSV": ({}, {"labels": b"id,breed\n" + "".join(f"{n[:2]},{i % 3}\n" for i, n in enumerate(NAMES)).encode()}),
}


@pytest.mark.parametrize("kind", ["folder", "memory", "zip", "tar"])
@pytest.mark.parametrize("case", LABELED)
def test_labels_that_a_file_beside_the_images_names(tmp_path, kind, case):
    files, options = LABELED[case]
    listing = listing_of(tmp_path, kind, {**IMAGES, **files}, **options)
    assert listing.classes == ("0", "1", "2")
    assert [record.label for record in listing.records] == [0, 1, 2, 0, 1, 2]
    assert not listing.excluded


def test_the_labels_of_stylegan_come_before_its_numbered_folders(tmp_path):
    files = {f"0000{i % 2}/{name}": data for i, (name, data) in enumerate(IMAGES.items())}
    labels = {"labels": [[name, 2 - i % 3] for i, name in enumerate(sorted(files))]}
    listing = listing_of(tmp_path, "zip", {**files, "dataset.json": json.dumps(labels).encode()})
    assert [record.label for record in listing.records] == [2, 1, 0, 2, 1, 0]
    unlabeled = {**files, "dataset.json": b'{"labels": null}'}
    assert listing_of(tmp_path, "zip", unlabeled, label="none").classes == ()


def test_names_are_numbered_in_sorted_order_and_null_labels_are_left_out_and_counted(tmp_path):
    rows = [
        {"file_name": name, "label": label} for name, label in zip(NAMES, ["owl", "cat", None, "owl"], strict=False)
    ]
    listing = listing_of(tmp_path, "folder", {**IMAGES, "metadata.jsonl": jsonl(rows)})
    assert listing.classes == ("cat", "owl")
    assert [(record.key, record.label) for record in listing.records] == [("00.png", 1), ("01.png", 0), ("03.png", 1)]
    (left_out,) = listing.excluded
    assert str(left_out) == "3 images without a label, such as 02.png"


def test_captions_are_carried_and_are_part_of_the_fingerprint(tmp_path):
    def with_text(text):
        rows = [{"file_name": name, "text": text} for name in NAMES]
        place = tmp_path / text
        place.mkdir()
        return listing_of(place, "folder", {**IMAGES, "metadata.jsonl": jsonl(rows)})

    listing = with_text("ä cat")
    assert (listing.classes, {record.caption for record in listing.records}) == ((), {"ä cat"})
    assert listing.fingerprint != with_text("a dog").fingerprint


@pytest.mark.parametrize(("column", "classes"), [("text", ()), ("label", ("tree",))])
def test_one_folder_of_images_beside_a_table_of_captions_is_no_class(tmp_path, column, classes):
    files = {f"images/{name}": data for name, data in IMAGES.items()}
    rows = [{"file_name": name, column: "tree"} for name in files]
    listing = listing_of(tmp_path, "folder", {**files, "metadata.jsonl": jsonl(rows)})
    assert (listing.classes, {record.label for record in listing.records}) == (classes, {0})


AMBIGUOUS = {
    "two columns": (
        {"metadata.csv": b"file_name,class,class_id\n00.png,a,1\n"},
        {},
        "several columns of labels, class and",
    ),
    "no such column": (
        {"metadata.csv": b"file_name,label\n00.png,a\n"},
        {"label": "x"},
        r"no column x \(shards.label_key",
    ),
    "no file": ({}, {"label": "x"}, "no dataset.json, metadata.csv, metadata.jsonl with a column x"),
    "vector": (
        {"dataset.json": b'{"labels": [["00.png", [0, 1]]]}'},
        {},
        r"label of 00.png is \[0, 1\]; expected a number",
    ),
    "other images": ({"dataset.json": b'{"labels": [["x.png", 1]]}'}, {}, "dataset.json names none of its images"),
    "no names": (
        {"metadata.csv": b"a,label\n1,2\n"},
        {},
        "no column with the names of images; its columns are a, label",
    ),
    "negative": ({"metadata.jsonl": b'{"file_name": "00.png", "label": -1}'}, {}, "label of 00.png is '-1'; expected"),
    "columns of a CSV": (
        {},
        {"labels": b"id,a,b\n00,1,2\n"},
        "several columns, a, b: name that of the classes with shards",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_labels_that_cannot_be_told_are_refused(tmp_path, case):
    files, options, message = AMBIGUOUS[case]
    with pytest.raises(UserError, match=message):
        listing_of(tmp_path, "folder", {**IMAGES, **files}, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", ["", "train/"])
def test_a_flat_set_has_no_labels(tmp_path, kind, wrap):
    listing = listing_of(tmp_path, kind, {wrap + name: data for name, data in IMAGES.items()})
    assert listing.classes == ()
    assert {record.label for record in listing.records} == {0}


def test_class_folders_are_taken_without_labels_where_that_is_asked_for(tmp_path):
    files = {"x.png": png(1), **{f"{name[0]}/{name}": data for name, data in IMAGES.items()}}
    source = open_source(pack(tmp_path, "folder", files), HERE, keys=RecordKeys(label="none"))
    assert (source.listing().classes, len(source.listing().records)) == ((), 7)
    digits = open_source("digits", HERE, keys=RecordKeys(label="none"))
    assert len(digits.listing().records) == 1797
    with pytest.raises(UserError, match=r"shards.label_key=x: digits has no columns; leave the field out"):
        open_source("digits", HERE, keys=RecordKeys(label="x"))


def test_what_is_left_out_is_counted_and_named(tmp_path):
    files = {
        **{f"cat/{name}": data for name, data in IMAGES.items()},
        **{f"owl/{number}.jxr": b"" for number in range(7)},
        "cat/._00.png": b"",
        "cat/@eaDir/00.png": b"",
        "#recycle/00.png": b"",
        "System Volume Information/00.png": b"",
        "cat/Thumbs.db": b"",
        "readme": b"",
    }
    listing = listing_of(tmp_path, "tar", files)
    assert listing.classes == ("cat",)
    assert [str(each) for each in listing.excluded] == [
        "8 files that are no images by their names, such as owl/0.jxr",
        "4 images that are hidden, or in folders of the system, such as #recycle/00.png",
        "1 folders without an image, such as owl",
    ]


def test_formats_that_nothing_here_decodes_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("vavae.data.sources.listing.UNDECODABLE_SUFFIXES", frozenset([".heic"]))
    monkeypatch.setattr("vavae.data.sources.listing.IMAGE_SUFFIXES", frozenset([".png"]))
    files = {**{f"a/{name}": data for name, data in IMAGES.items()}, "b/1.HEIC": b"", "b/2.heic": b""}
    found = [str(each) for each in listing_of(tmp_path, "folder", files).excluded]
    assert found == [
        "2 files of .heic, which nothing here decodes (pip install 'vavae[formats]'), such as b/1.HEIC",
        "1 folders without an image, such as b",
    ]
    with pytest.raises(
        UserError, match=r"no images; it must hold name.jpg or class/name.*; 1 files of .heic, which nothing here"
    ):
        listing_of(tmp_path, "zip", {"b/1.heic": b""})


def test_names_that_are_not_utf_8_simply_work(tmp_path):
    folder = os.fsencode(tmp_path / "x")
    for name in (b"caf\xe9", b"b"):
        os.makedirs(folder + b"/" + name)
        for number in range(2):
            Path(os.fsdecode(folder + b"/" + name + b"/%02d\xe9.png" % number)).write_bytes(png(number))
    source = open_source(str(tmp_path / "x"), HERE)
    listing = source.listing()
    assert listing.classes == ("b", "caf\\xe9")
    assert digest(listing.fingerprint)
    assert [decode_image(source.read(record))[0, 0, 0] for record in listing.records] == [0, 1, 0, 1]


def test_each_file_counts_once_whatever_links_lead_to_it(tmp_path):
    name, outside = pack(tmp_path, "folder", {f"a/{name}": data for name, data in IMAGES.items()}), tmp_path / "outside"
    (outside / "c").mkdir(parents=True)
    (outside / "c" / "07.png").write_bytes(png(7))
    root = Path(name)
    (root / "b").mkdir()
    (root / "b" / "06.png").write_bytes(png(6))
    (root / "b" / "twin.png").symlink_to(root / "a" / "00.png")
    (root / "b" / "cycle").symlink_to(root)
    (root / "0").symlink_to(root / "a")  # comes first in sorted order, and is not the folder itself
    (root / "c").symlink_to(outside / "c")
    (root / "d").symlink_to(outside / "c")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nothing.png")
    source = open_source(name, HERE)
    listing = source.listing()
    assert listing.classes == ("a", "b", "c")
    assert [record.key for record in listing.records] == [f"a/{name}" for name in NAMES] + ["b/06.png", "c/07.png"]
    assert [decode_image(source.read(record))[0, 0, 0] for record in listing.records] == [*range(8)]
    assert [str(each) for each in listing.excluded] == [
        "4 links to folders that are there already, or to nothing, such as 0",
        "1 links to images that are there already, such as b/twin.png",
    ]


def test_a_link_to_a_file_that_is_no_image_by_its_name_is_an_image(tmp_path):
    name = pack(tmp_path, "folder", {"blobs/ab": png(5)})
    (Path(name) / "cat").mkdir()
    (Path(name) / "cat" / "1.png").symlink_to(Path(name) / "blobs" / "ab")
    assert contents(name) == (("cat",), [("cat/1.png", 0, 5)])


def test_empty_class_folders_are_named(tmp_path):
    name = pack(tmp_path, "folder", FILES)
    (Path(name) / "owl").mkdir()
    (Path(name) / "more" / "deep").mkdir(parents=True)
    found = [str(each) for each in open_source(name, HERE).listing().excluded]
    assert found[-1] == "2 folders without an image, such as more"


def test_folders_that_windows_separates(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("cat", "dog"):
            member = zipfile.ZipInfo("x")
            member.filename = f"set\\{name}\\1.png"
            archive.writestr(member, png(3))
    assert contents(str(tmp_path / "x.zip"))[0] == ("cat", "dog")


@pytest.fixture
def tables(tmp_path):
    """A function that writes a data set of the package `datasets` and returns the name of its source."""
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in range(4)]

    def write(columns, features):
        kinds = {"image": datasets.Image(), "int": datasets.Value("int64"), "text": datasets.Value("string")}
        kinds["class"] = datasets.ClassLabel(names=["cat", "dog"])
        filled = {name: images if column == "images" else column for name, column in columns.items()}
        table = datasets.Dataset.from_dict(
            filled, datasets.Features({name: kinds[kind] for name, kind in features.items()})
        )
        folder = tmp_path / uuid.uuid4().hex
        (folder / "data").mkdir(parents=True)
        table.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
        return f"huggingface:{folder}"

    return write


def test_columns_of_a_data_set(tables):
    def found(columns, kinds, **keys):
        source = open_source(
            tables({"image": "images", **columns}, {"image": "image", **kinds}), HERE, keys=RecordKeys(**keys)
        )
        listing = source.listing()
        reds = [int(decode_image(source.read(record))[0, 0, 0]) for record in listing.records]
        return listing.classes, list(zip(reds, (record.label for record in listing.records), strict=True)), listing

    pairs = [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert found({"label": [0, 1, 0, 1]}, {"label": "class"})[:2] == (("cat", "dog"), pairs)
    assert found({"label": [0, 1, 0, 1]}, {"label": "int"})[:2] == (("0", "1"), pairs)
    assert found({"label": ["a", "b", "a", "b"]}, {"label": "text"})[:2] == (("a", "b"), pairs)
    assert found({"x": [0, 1, 0, 1]}, {"x": "int"}, label="x")[:2] == (("0", "1"), pairs)
    classes, unlabeled, listing = found({"text": ["a", "b", "c", "d"]}, {"text": "text"})
    assert (classes, unlabeled) == ((), [(red, 0) for red in range(4)])
    assert [record.caption for record in listing.records] == ["a", "b", "c", "d"]
    images = [Image.new("RGB", (4, 4)), None, Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))]
    classes, kept, listing = found({"image": images, "label": [0, 1, None, 1]}, {"label": "class"})
    assert kept == [(0, 0), (0, 1)]
    assert [str(each) for each in listing.excluded] == [
        "1 rows without a label, such as row 2",
        "1 rows without an image, such as row 1",
    ]
    with pytest.raises(UserError, match="several columns of images, image and mask: name one of them with"):
        found({"mask": "images"}, {"mask": "image"})
    with pytest.raises(UserError, match="several columns of labels, a and b: name one of them with"):
        found({"a": [0] * 4, "b": [0] * 4}, {"a": "class", "b": "class"})
    with pytest.raises(UserError, match=r"x \(shards.image_key\) is no column of images; its columns are image"):
        found({}, {}, image="x")
    with pytest.raises(UserError, match=r"x \(shards.label_key\) is no column of numbers or texts"):
        found({}, {}, label="x")


ROWS = {
    "formats": "test_image.test_a_fresh_process_knows_every_format test_image.test_formats_with_decoders_of_their_own",
    "colors": "test_image.test_other_modes",
    "gray, opacity": "test_image.test_gray_and_opacity_are_kept",
    "16 bits of gray": "test_image.test_sixteen_bits_of_gray_stay_what_they_are",
    "sizes": "test_image.test_crop_has_the_size_asked_for_and_keeps_a_constant",
    "names": "test_sources.test_names_that_are_not_utf_8_simply_work",
    "class folders": "test_sources.test_class_folders",
    "one flat folder": "test_sources.test_a_flat_set_has_no_labels "
    "test_sources.test_one_folder_of_images_beside_a_table_of_captions_is_no_class",
    "zip, tar, tar.gz": "test_sources.test_class_folders test_sources.test_a_zip_packed_in_another_way_is_refused",
    "a tar of tars": "test_sources.test_a_tar_of_class_tars_as_imagenet_comes",
    "`dataset.json`": "test_sources.test_the_labels_of_stylegan_come_before_its_numbered_folders",
    "`metadata.jsonl`, `metadata.csv`": "test_sources.test_labels_that_a_file_beside_the_images_names",
    "`shards.labels`": "test_sources.test_labels_that_a_file_beside_the_images_names",
    "`huggingface:NAME`": "test_sources.test_columns_of_a_data_set",
    "WebDataset shards": "test_verify.test_labels_from_where_people_have_them "
    "test_verify.test_records_of_a_null_label_are_left_out_and_counted",
    "captions": "test_write.test_captions_are_members_of_their_records",
    "no labels wanted": "test_sources.test_class_folders_are_taken_without_labels_where_that_is_asked_for",
}
"""Tests of this folder by the row of the README's table on images that they prove."""


def test_every_row_of_the_table_on_images_has_a_test():
    text = (Path(__file__).parents[2] / "vavae" / "data" / "README.md").read_text()
    section = text.partition("## What your images may look like")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    assert rows[1:] == [*ROWS]
    for names in ROWS.values():
        for name in names.split():
            module, _, function = name.partition(".")
            assert f"def {function}(" in (Path(__file__).parent / f"{module}.py").read_text(), name
