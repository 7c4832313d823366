"""Sources: the same images in the same order however they are packed, and a message for whatever is not a source."""

import importlib
import io
import os
import sys
import tarfile
import types
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from vavae.config import digest
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
        open_source(pack(tmp_path, "folder", FLAT), HERE, str(path)).listing()


def test_sets_that_bring_classes_take_no_label_file():
    with pytest.raises(UserError, match="digits brings its classes along"):
        open_source("digits", HERE, "labels.txt")


MESSAGES = {
    "missing": (lambda place: str(place / "nothing"), "is not there: give a folder of class folders"),
    "missing object": (lambda place: f"memory://{uuid.uuid4().hex}/x", "is not there"),
    "empty": (lambda place: pack(place, "folder", {"cat/notes.txt": b""}), "no images; it must hold class/name.jpg"),
    "flat": (lambda place: pack(place, "folder", {"1.png": b"", "2.png": b""}), "1.png lies in no class folder"),
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
    "other packing": (lambda place: pack(place, "tar.bz2", FILES), "no zip or tar archive, or a damaged one"),
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


@given(
    st.lists(st.binary(max_size=300).map(lambda data: data * 400), min_size=1, max_size=5),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    st.sampled_from([io.BytesIO, Unseekable]),
    st.binary(max_size=40),
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
    source = open_source(str(tmp_path / "x.zip"), HERE)
    with pytest.raises(UserError, match=r"a/1.png is damaged \(packed by method 14, not stored or deflated\)"):
        source.read(source.listing().records[0])


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
    with pytest.raises(UserError, match="no column is a image; its columns are text, label"):
        describe("huggingface:text", HERE)


@pytest.mark.parametrize(("name", "package"), [("huggingface:x", "datasets"), ("digits", "scikit-learn")])
def test_missing_packages(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=f"needs a package that is not here .*pip install {package}"):
        open_source(name, HERE)
