"""Mapped shards: the records that any WebDataset reader finds, and no silent end of data."""

import io
import pickle
import tarfile

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.image_shards import write_image_shards

from vavae.data.shard_reader import shard_records
from vavae.data.shards.mapped_shard import MappedShard, ShardCache
from vavae.data.shards.tar import write_tar
from vavae.errors import UserError
from vavae.storage.storage import Storage

COUNT = 5


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_image_shards(Storage(str(folder)), {"train": (COUNT,)})
    return folder / "train" / "000000.tar"


def test_records_are_those_of_stock_webdataset(shard):
    mapped = MappedShard(shard, COUNT)
    stock = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len(mapped) == len(stock) == COUNT
    for index, sample in enumerate(stock):
        assert mapped[index] == {name: value for name, value in sample.items() if not name.startswith("__")}


def test_members_are_grouped_by_the_name_before_the_first_dot(tmp_path):
    with write_tar(tmp_path / "a.tar") as tar:
        tar.add(7, {"latent.npy": b"x", "cls": b"1"})
        tar.add(8, {"cls": b"2"})
    mapped = MappedShard(tmp_path / "a.tar")
    assert len(mapped) == 2
    assert [mapped[0], mapped[1]] == [{"latent.npy": b"x", "cls": b"1"}, {"cls": b"2"}]


def bytes_of(record):
    """Bytes that a record takes in a tar."""
    return sum(512 * (1 + -(-len(data) // 512)) for data in record.values())


def write_members(path, names, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name.encode())
            tar.addfile(info, io.BytesIO(name.encode()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.integers(1, 6), st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.data())
def test_any_kind_of_tar_is_read_as_by_stock_webdataset(tmp_path, count, form, data):
    """Folders, accents and names too long for a plain header."""
    stems = st.sampled_from(["{}", "a/b/{}", "é{}", "x" * 60 + "/" + "y" * 60 + "{}", "z" * 120 + "{}"])
    if form == tarfile.USTAR_FORMAT:
        stems = stems.filter(lambda stem: len(stem) < 110 or "/" in stem)
    names = [data.draw(stems).format(index) for index in range(count)]
    path = tmp_path / "made.tar"
    write_members(path, [f"{name}.{end}" for name in names for end in ("JPG", "seg.png", "cls")], form)
    mapped, stock = MappedShard(path), list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [mapped.key(index) for index in range(len(mapped))] == [sample["__key__"] for sample in stock]
    for index, sample in enumerate(stock):
        assert mapped[index] == {name: value for name, value in sample.items() if not name.startswith("__")}


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["1.png", "1.cls", "2.png", "1.txt"], "key '1' comes twice"),
        (["1.png", "1.png"], "member '1.png' comes twice"),
        (["1.png", "1.PNG"], "member '1.PNG' comes twice"),
        (["a/../../1.png"], r"member 'a/\.\./\.\./1.png' leads out of the shard's folder"),
        (["/etc/1.png"], "member '/etc/1.png' leads out of the shard's folder"),
    ],
)
def test_twins_and_names_that_lead_elsewhere_are_refused(tmp_path, names, complaint):
    write_members(tmp_path / "bad.tar", names)
    for read in (MappedShard, lambda path: list(shard_records(path))):
        with pytest.raises(UserError, match=rf"bad.tar: not a readable shard \({complaint}\); make the shards again"):
            read(tmp_path / "bad.tar")


def test_a_shard_of_nothing_has_no_records_and_is_another_count(tmp_path):
    write_members(tmp_path / "empty.tar", [])
    assert len(MappedShard(tmp_path / "empty.tar")) == 0
    with pytest.raises(UserError, match=r"empty.tar: 0 records where the manifest says 3"):
        MappedShard(tmp_path / "empty.tar", 3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(data=st.data())
def test_a_shard_without_its_end_is_an_error_wherever_it_was_cut(shard, tmp_path, data):
    mapped = MappedShard(shard)
    content = sum(bytes_of(mapped[index]) for index in range(COUNT))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[: data.draw(st.integers(0, content + 511))])
    for read in (MappedShard, lambda path: list(shard_records(path))):
        with pytest.raises(UserError, match=r"cut.tar: .*; make the shards again"):
            read(cut)


def test_a_shard_that_ends_between_two_members_is_an_error(shard, tmp_path):
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[: bytes_of(MappedShard(shard)[0])])
    with pytest.raises(UserError, match=r"cut.tar: not a readable shard \(ends after 1 records without the end mark\)"):
        MappedShard(cut)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_a_foreign_file_is_an_error(tmp_path, content):
    path = tmp_path / "foreign.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"foreign.tar: not a readable shard"):
        MappedShard(path)


@pytest.mark.parametrize(
    ("offset", "content"),
    [(0, b"1"), (124, b"00000000099"), (124, b"-0000002000"), (148, b"000000"), (257, b"usta_")],
)
def test_a_damaged_header_is_an_error_that_says_where(shard, tmp_path, offset, content):
    at = bytes_of(MappedShard(shard)[0])
    data = bytearray(shard.read_bytes())
    data[at + offset : at + offset + len(content)] = content
    (tmp_path / "damaged.tar").write_bytes(data)
    with pytest.raises(
        UserError, match=rf"damaged.tar: not a readable shard \(no header of a tar member at byte {at}\)"
    ):
        MappedShard(tmp_path / "damaged.tar")


def test_checksums_may_be_written_with_spaces_or_more_digits(shard, tmp_path):
    data = bytearray(shard.read_bytes())
    number = int(data[148:154], 8)
    data[148:156] = b"%7o " % number
    (tmp_path / "other.tar").write_bytes(data)
    assert MappedShard(tmp_path / "other.tar")[0] == MappedShard(shard)[0]


def test_another_count_than_promised_is_an_error(shard):
    with pytest.raises(UserError, match=r"000000.tar: 5 records where the manifest says 6; make the shards again"):
        MappedShard(shard, 6)


def test_the_cache_keeps_the_most_recently_used():
    cache, opened = ShardCache(2), []

    def open_shard(shard):
        opened.append(shard)
        return f"shard {shard}"

    assert [cache.get(shard, open_shard) for shard in (0, 1, 0, 2, 0, 1)] == [f"shard {i}" for i in (0, 1, 0, 2, 0, 1)]
    assert opened == [0, 1, 2, 1]


def test_a_pickled_cache_arrives_empty_with_its_limit():
    cache = ShardCache(1)
    cache.get(0, str)
    copy, opened = pickle.loads(pickle.dumps(cache)), []
    for shard in (0, 1, 0):
        copy.get(shard, opened.append)
    assert opened == [0, 1, 0]
