"""Latent shards: read alike by stock webdataset and by ours, refused where they are not what they should be."""

import io
import pickle
import tempfile
from uuid import uuid4

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file
from support.golden import golden

from vavae.data.config import StreamConfig
from vavae.data.image_stream import MicroBatchKey
from vavae.data.sample_order import order_of
from vavae.data.shards.manifest import ShardInfo
from vavae.data.shards.tar import write_tar
from vavae.errors import UserError
from vavae.latents.manifest import MANIFEST, FeatureManifest, LatentManifest, read_latent_manifest, read_latents_of
from vavae.latents.shards import MappedLatents, feature_members, write_latents
from vavae.latents.statistics import STATISTICS, LatentNormalizer, LatentStatistics, read_statistics
from vavae.latents.stream import FeaturesToRead, LatentStream
from vavae.randomness import numpy_generator
from vavae.storage.storage import Storage, sha256_of

SHAPE, COUNTS, SEED = (3, 2, 5), (7, 6), 4


def arrays_of(count, views=2, shape=SHAPE):
    return numpy_generator(0, "latents", count).normal(size=(count, 2 * views, *shape)).astype(np.float16)


def labels_of(count):
    return [(7 * index) % 1000 for index in range(count)]


@pytest.mark.parametrize(("std", "word"), [(0.0, "0, expected more than 0"), (torch.nan, "nan")])
def test_statistics_that_latents_cannot_be_normalized_by_are_refused(storage, std, word):
    with storage.create(STATISTICS) as local:
        save_file({"mean": torch.zeros(3).double(), "std": torch.tensor([1, std, 1]).double()}, local)
    with pytest.raises(UserError, match=rf"statistics.safetensors: std\[1\] is {word}: these are no statistics"):
        read_statistics(storage)


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shard.tar"
    write_latents(path, arrays_of(7), labels_of(7), first_index=40)
    return path


def test_stock_webdataset_reads_a_shard(shard):
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{index:09d}" for index in range(40, 47)]
    assert [int(sample["cls"]) for sample in samples] == labels_of(7)
    stored = np.stack([np.load(io.BytesIO(sample["latent.npy"])) for sample in samples])
    assert stored.dtype == np.float16
    assert np.array_equal(stored, arrays_of(7))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), hnp.array_shapes(min_dims=3, max_dims=3, max_side=9), st.sampled_from([1, 2]))
def test_the_mapped_reader_finds_what_was_written(tmp_path_factory, count, shape, views):
    path = tmp_path_factory.mktemp("latents") / "shard.tar"
    write_latents(path, arrays_of(count, views, shape), labels_of(count), first_index=0)
    mapped = MappedLatents(path, count, (2 * views, *shape))
    assert np.array_equal(mapped.arrays, arrays_of(count, views, shape))
    assert mapped.labels.tolist() == labels_of(count)
    assert not mapped.arrays.flags.writeable


def test_equal_latents_are_equal_bytes(shard, tmp_path):
    write_latents(tmp_path / "again.tar", arrays_of(7), labels_of(7), first_index=40)
    assert (tmp_path / "again.tar").read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(
    ("count", "record_shape", "complaint"),
    [
        (70, (4, *SHAPE), "20480 bytes where 70 latents take 153600"),
        (8, (4, *SHAPE), "not 8 records of one size"),
        (6, (4, *SHAPE), "not 6 records of one size"),
        (7, (2, *SHAPE), r"float16\[4, 3, 2, 5\], expected float16\[2, 3, 2, 5\]"),
        (7, (4, 3, 5, 2), "expected float16"),
    ],
)
def test_what_the_manifest_promises_otherwise_is_refused(shard, count, record_shape, complaint):
    with pytest.raises(UserError, match=f"shard.tar: .*{complaint}.*; compute the latents again"):
        MappedLatents(shard, count, record_shape)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_truncated_shard_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("latents") / "shard.tar"
    write_latents(path, arrays_of(3), labels_of(3), first_index=0)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match="compute the latents again"):
        MappedLatents(path, 3, (4, *SHAPE))


def npy(array, version=(1, 0)):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


def foreign(name):
    array, label = arrays_of(1)[0], b"000000001"
    good = {"latent.npy": npy(array), "cls": label}
    return {
        "label first": [{"cls": label, "latent.npy": npy(array)}] * 3,
        "float32": [{"latent.npy": npy(array.astype(np.float32)), "cls": label}] * 3,
        "fortran order": [{"latent.npy": npy(np.asfortranarray(array)), "cls": label}] * 3,
        "npy 2.0": [{"latent.npy": npy(array, (2, 0)), "cls": label}] * 3,
        "short label": [{"latent.npy": npy(array), "cls": b"1"}] * 3,
        "one of another shape": [good, {"latent.npy": npy(array.transpose(0, 1, 3, 2).copy()), "cls": label}, good],
    }[name]


@pytest.mark.parametrize(
    "name", ["label first", "float32", "fortran order", "npy 2.0", "short label", "one of another shape"]
)
def test_a_foreign_shard_is_refused(tmp_path, name):
    path = tmp_path / "foreign.tar"
    with write_tar(path) as tar:
        for index, members in enumerate(foreign(name)):
            tar.add(index, members)
    with pytest.raises(UserError, match=r"foreign.tar: .*; compute the latents again"):
        MappedLatents(path, 3, (4, *SHAPE))


@pytest.mark.parametrize("content", [b"", b"something else" * 100])
def test_a_file_that_is_no_shard_is_refused(tmp_path, content):
    (tmp_path / "foreign.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"foreign.tar: not a latent shard .*; compute the latents again"):
        MappedLatents(tmp_path / "foreign.tar", 3, (4, *SHAPE))


def write_set(storage, flip, kind="kl"):
    infos, moments = [], 2 if kind == "kl" else 1
    for number, count in enumerate(COUNTS):
        with storage.create(f"train/{number:06d}.tar") as path:
            arrays = arrays_of(count, 1 + flip)[:, : moments * (1 + flip)]
            write_latents(path, arrays, labels_of(count), first_index=0)
            infos.append(
                ShardInfo(name=f"{number:06d}.tar", count=count, bytes=path.stat().st_size, sha256=sha256_of(path))
            )
    splits = {"train": tuple(infos)}
    return LatentManifest(tokenizer="t", shape=SHAPE, flip=flip, classes=("a",) * 1000, splits=splits, kind=kind)


@pytest.mark.parametrize("flip", [False, True])
def test_a_slice_gathers_the_posteriors_of_the_order(storage, flip):
    manifest, config = write_set(storage, flip), StreamConfig(lanes=2, block=3)
    order = order_of(COUNTS, SEED, config)
    stream = LatentStream(storage, manifest, "train", order, 4, SEED, open_shards=1)
    mirrored = []
    for key in (MicroBatchKey(lane, step) for step in range(8) for lane in (0, 1)):
        found = stream[key]
        assert (found.lane, found.step) == key
        assert found.mean.dtype == found.std.dtype == torch.float32
        assert found.labels.dtype == torch.int64
        for row, location in enumerate(order.micro_batch(*key, 4)):
            array = torch.from_numpy(arrays_of(COUNTS[location.shard], 1 + flip)[location.record]).float()
            pair = torch.stack([found.mean[row], found.std[row]])
            assert found.labels[row] == labels_of(COUNTS[location.shard])[location.record]
            views = [view for view in range(1 + flip) if torch.equal(pair, array[2 * view : 2 * view + 2])]
            assert len(views) == 1
            mirrored += views
    if flip:
        draws = {tuple(mirrored[start : start + 4]) for start in range(0, len(mirrored), 4)}
        assert len(draws) > 8, "every lane and step has its own"
        assert 0.25 < np.mean(mirrored) < 0.75
    else:
        assert not any(mirrored)


def test_a_slice_is_a_function_of_its_key(storage):
    manifest, config = write_set(storage, flip=True), StreamConfig(lanes=2, block=3)
    stream = LatentStream(storage, manifest, "train", order_of(COUNTS, SEED, config), 4, SEED, open_shards=2)
    keys = [MicroBatchKey(lane, step) for step in range(4) for lane in (0, 1)]
    found, other = [stream[key] for key in keys], pickle.loads(pickle.dumps(stream))
    for slice_, key in zip(reversed(found), reversed(keys), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(slice_[2:5], other[key][2:5], strict=True))


posteriors = hnp.arrays(
    np.float16, st.tuples(st.integers(1, 6), st.just(4), st.just(2), st.just(3)), elements=st.floats(-8, 8, width=16)
)


@settings(deadline=None, max_examples=40)
@given(posteriors, st.integers(0, 6))
def test_statistics_are_those_of_samples_from_the_posteriors(mean, cut):
    std = np.abs(mean[::-1]) + np.float16(0.1)
    statistics, rest = LatentStatistics(4), LatentStatistics(4)
    statistics.update(mean[:cut], std[:cut])
    rest.update(mean[cut:], std[cut:])
    statistics.merge(LatentStatistics.from_json(rest.to_json()))
    mu, sigma = mean.astype(np.float64), std.astype(np.float64)
    expected = mu.mean((0, 2, 3))
    variance = mu.var((0, 2, 3)) + (sigma**2).mean((0, 2, 3))  # law of total variance
    assert statistics.count == mean[:, 0].size
    np.testing.assert_allclose(statistics.mean, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.std, np.sqrt(variance), rtol=1e-9)


def test_statistics_agree_with_drawn_samples():
    random = numpy_generator(0, "samples")
    mean, std = random.normal(2, 3, (50, 2, 4, 4)), random.uniform(0.5, 2, (50, 2, 4, 4))
    statistics = LatentStatistics(2)
    statistics.update(mean, std)
    samples = mean + std * random.normal(size=(400, *mean.shape))
    np.testing.assert_allclose(statistics.mean, samples.mean((0, 1, 3, 4)), atol=0.02)
    np.testing.assert_allclose(statistics.std, samples.std((0, 1, 3, 4)), rtol=0.01)


@settings(deadline=None, max_examples=20)
@given(posteriors, st.integers(0, 6))
def test_statistics_of_positions_are_those_of_each(mean, cut):
    statistics, rest = LatentStatistics(mean.shape[1:]), LatentStatistics(mean.shape[1:])
    statistics.update(mean[:cut], None)
    rest.update(mean[cut:], None)
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        statistics.merge(LatentStatistics.read(storage, "sums", rest.write(storage, "sums")))
    assert statistics.count == len(mean)
    np.testing.assert_allclose(statistics.mean, mean.astype(np.float64).mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.std**2, mean.astype(np.float64).var(0) + 1e-5, rtol=1e-9, atol=1e-9)


def test_positions_are_normalized_as_in_the_public_code():
    _, tensors = golden("beyond_rae")
    latents = tensors["layers.out"].transpose(1, 2).unflatten(2, (4, 4))
    normalizer = LatentNormalizer(tensors["stats.mean"], (tensors["stats.var"] + 1e-5).sqrt()).double()
    torch.testing.assert_close(normalizer.normalize(latents), tensors["stats.out.latent"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_a_slice_of_points_has_no_deviation(storage, flip):
    manifest = write_set(storage, flip, "representation")
    order = order_of(COUNTS, SEED, StreamConfig(lanes=2, block=3))
    stream = LatentStream(storage, manifest, "train", order, 4, SEED, open_shards=1)
    mirrored = []
    for key in (MicroBatchKey(lane, step) for step in range(4) for lane in (0, 1)):
        found = stream[key]
        assert found.std is None
        for row, location in enumerate(order.micro_batch(*key, 4)):
            array = torch.from_numpy(arrays_of(COUNTS[location.shard], 1 + flip)[location.record]).float()
            (view,) = (view for view in range(1 + flip) if torch.equal(found.mean[row], array[view]))
            mirrored.append(view)
    assert {*mirrored} == {*range(1 + flip)}


def test_manifest_and_statistics_are_read_back(storage):
    manifest = write_set(storage, flip=True)
    storage.write_json(MANIFEST, manifest.model_dump(mode="json"))
    tensors = {"mean": torch.tensor([1.0, 2.0]).double(), "std": torch.tensor([3.0, 4.0]).double()}
    with storage.create(STATISTICS) as local:
        save_file(tensors, local)
    assert read_latent_manifest(storage) == manifest
    assert manifest.record_shape == (4, *SHAPE)
    assert not {"kind", "statistics"} & manifest.to_json().keys(), (
        "a manifest is what it was before there were other kinds"
    )
    mean, std = read_statistics(storage)
    assert torch.equal(mean, tensors["mean"])
    assert torch.equal(std, tensors["std"])


@pytest.mark.parametrize(("name", "read"), [(MANIFEST, read_latent_manifest), (STATISTICS, read_statistics)])
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_nothing_readable_there_names_the_job_to_run(storage, name, read, content):
    if content is not None:
        storage.write_bytes(name, content)
    with pytest.raises(UserError, match=f"{name}: no .* of .*latents there; run precompute_latents"):
        read(storage)


def first_slice(storage, manifest):
    stream = LatentStream(storage, manifest, "train", order_of(COUNTS, SEED, StreamConfig(lanes=2)), 4, SEED, 2)
    return [stream[MicroBatchKey(lane, 0)] for lane in (0, 1)]


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone", "classes"])
def test_a_shard_that_the_manifest_does_not_describe_is_refused_in_one_line(storage, damage):
    manifest = write_set(storage, flip=False)
    path = storage.local_file("train/000000.tar")
    data = bytearray(path.read_bytes())
    message = {
        "changed": r"train/000000.tar: its checksum is not the manifest's",
        "shorter": r"train/000000.tar: \d+ bytes where the manifest says \d+",
        "gone": r"train/000000.tar is gone, but the manifest names it",
        "classes": r"train/00000\d.tar: label \d+, but the manifest has 3 classes; compute the latents again",
    }[damage]
    if damage == "changed":
        data[700] ^= 1
        path.write_bytes(data)
    elif damage == "shorter":
        path.write_bytes(data[:-512])
    elif damage == "gone":
        path.unlink()
    else:
        manifest = manifest.model_copy(update={"classes": ("a", "b", "c")})
    with pytest.raises(UserError, match=message) as caught:
        first_slice(storage, manifest)
    assert "\n" not in str(caught.value)


def test_latents_of_another_tokenizer_or_size_are_refused_in_one_line(storage):
    manifest = write_set(storage, flip=True)
    storage.write_json(MANIFEST, manifest.model_dump(mode="json"))
    assert read_latents_of(storage, "t", SHAPE) == manifest
    with pytest.raises(UserError, match=r"latents of the tokenizer t, but the run's is u; run precompute_latents"):
        read_latents_of(storage, "u", SHAPE)
    with pytest.raises(UserError, match=r"latents \[3, 2, 5\], but tokenizer.latent_dim=3 on a 2 x 4 grid"):
        read_latents_of(storage, "t", (3, 2, 4))


def features_of(count, flip, shape=(6, 5)):
    return numpy_generator(0, "features", count).integers(-9999, 9999, (count, 1 + flip, *shape)).astype(np.int16)


def write_features(storage, flip):
    infos = []
    for number, count in enumerate(COUNTS):
        with storage.create(f"features/train/{number:06d}.tar") as path:
            with write_tar(path) as tar:
                for index, bits in enumerate(features_of(count, flip)):
                    tar.add(index, feature_members(bits))
            infos.append(
                ShardInfo(name=f"{number:06d}.tar", count=count, bytes=path.stat().st_size, sha256=sha256_of(path))
            )
    return FeatureManifest(config="c", shape=(6, 5), flip=flip, shards=tuple(infos))


@pytest.mark.parametrize("flip", [False, True])
def test_features_are_those_of_the_images_and_views_and_end_with_their_steps(storage, flip):
    manifest, features = write_set(storage, flip), write_features(storage, flip)
    order = order_of(COUNTS, SEED, StreamConfig(lanes=2, block=3))
    arguments = (storage, manifest, "train", order, 4, SEED, 1)
    stream, plain = LatentStream(*arguments, FeaturesToRead(features, 5.5)), LatentStream(*arguments)
    views = set()
    for key in (MicroBatchKey(lane, step) for step in range(8) for lane in (0, 1)):
        found, without = stream[key], plain[key]
        assert all(a.equal(b) for a, b in zip(found[2:5], without[2:5], strict=True)), "the same bits"
        assert without.features is None
        if key.step > 5:
            assert found.features is None
            continue
        assert found.features.dtype == torch.bfloat16
        for row, location in enumerate(order.micro_batch(*key, 4)):
            count, record = COUNTS[location.shard], location.record
            mean = arrays_of(count, 1 + flip)[record].astype(np.float32)
            view = next(each for each in range(1 + flip) if np.array_equal(mean[2 * each], found.mean[row]))
            assert np.array_equal(found.features[row].view(torch.int16), features_of(count, flip)[record, view])
            views.add(view)
    assert len(views) == 1 + flip
    assert stream.micro_batch_bytes == plain.micro_batch_bytes + 4 * 6 * 5 * 2
    of_both, of_latents = stream.shards.bytes_of([0, 1], 5), plain.shards.bytes_of([0, 1], 5)
    assert of_both == of_latents + sum(info.bytes for info in features.shards)
    assert stream.shards.bytes_of([0, 1], 6) == of_latents
    again = pickle.loads(pickle.dumps(stream))[MicroBatchKey(1, 3)]
    assert torch.equal(again.features.view(torch.int16), stream[MicroBatchKey(1, 3)].features.view(torch.int16))


def test_features_of_another_shape_or_content_are_refused(storage):
    manifest, features = write_set(storage, flip=False), write_features(storage, flip=False)
    order = order_of(COUNTS, SEED, StreamConfig(lanes=2))
    other = features.model_copy(update={"shape": (5, 6)})
    with pytest.raises(UserError, match=r"int16\[1, 6, 5\], expected int16\[1, 5, 6\]; compute the latents again"):
        _ = LatentStream(storage, manifest, "train", order, 4, SEED, 2, FeaturesToRead(other, 9))[MicroBatchKey(0, 0)]
    path = storage.local_file("features/train/000000.tar")
    path.write_bytes(path.read_bytes()[:-512])
    stream = LatentStream(storage, manifest, "train", order, 4, SEED, 2, FeaturesToRead(features, 9))
    with pytest.raises(UserError, match=r"features/train/000000.tar: \d+ bytes where the manifest says"):
        _ = [stream[MicroBatchKey(lane, 0)] for lane in (0, 1)]


def test_features_are_fetched_with_their_latents(tmp_path):
    storage = Storage(f"memory://{uuid4()}", str(tmp_path / "cache"))
    manifest, features = write_set(storage, flip=True), write_features(storage, flip=True)
    order = order_of(COUNTS, SEED, StreamConfig(lanes=2))
    stream = LatentStream(storage, manifest, "train", order, 4, SEED, 2, FeaturesToRead(features, 9))
    stream.shards.fetch(1, 8)
    for folder in ("train", "features/train"):
        storage.delete(f"{folder}/000001.tar")
    assert stream.shards.open_features(1, lambda path: path.stat().st_size) == features.shards[1].bytes
    stream.shards.fetch(0, 9)
    for folder in ("train", "features/train"):
        storage.delete(f"{folder}/000000.tar")
    assert stream.shards.open(0, lambda path: path.stat().st_size) == manifest.splits["train"][0].bytes
    with pytest.raises(UserError, match=r"features/train/000000\.tar is gone"):
        stream.shards.open_features(0, lambda path: None)  # no step from the ninth on reads it
