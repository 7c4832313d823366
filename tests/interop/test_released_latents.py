"""Latents in the public layout: out of our shards, into them, and through both."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.image_shards import CLASSES

from vavae.data.shards.manifest import ShardInfo
from vavae.errors import UserError
from vavae.interop.released_latents import export_released_latents, import_released_latents
from vavae.latents.manifest import MANIFEST, LatentManifest, read_latent_manifest
from vavae.latents.shards import MappedLatents, write_latents
from vavae.latents.statistics import STATISTICS, read_statistics
from vavae.storage.storage import Storage, sha256_of

SHAPE = (3, 2, 4)
COUNTS = (5, 2)


@pytest.fixture
def ours(tmp_path):
    return write_ours(Storage(str(tmp_path / "ours")), flip=True)


@pytest.fixture
def public(tmp_path):
    return Storage(str(tmp_path / "public"))


@pytest.fixture
def back(tmp_path):
    return Storage(str(tmp_path / "back"))


def write_ours(storage, flip, counts=COUNTS):
    """Latent shards as the extraction leaves them, of posteriors with mean = index and a deviation of one half."""
    infos, first = [], 0
    for number, count in enumerate(counts):
        arrays = np.full((count, 2 * (1 + flip), *SHAPE), 0.5, np.float16)
        arrays[:, ::2] = np.arange(first, first + count).reshape(-1, 1, 1, 1, 1)
        name = f"{number:06d}.tar"
        with storage.create(f"train/{name}") as local:
            write_latents(local, arrays, [index % len(CLASSES) for index in range(first, first + count)], first)
            infos.append(ShardInfo(name=name, count=count, bytes=local.stat().st_size, sha256=sha256_of(local)))
        first += count
    manifest = LatentManifest(tokenizer="t", shape=SHAPE, flip=flip, classes=CLASSES, splits={"train": tuple(infos)})
    storage.write_json(MANIFEST, manifest.model_dump(mode="json"))
    with storage.create(STATISTICS) as local:
        save_file({"mean": torch.tensor([1 / 3, 2, 3]).double(), "std": torch.tensor([0.1, 5, 6]).double()}, local)
    return storage


def write_public(storage, counts=COUNTS, **change):
    """Files as the public extraction writes them, from normal samples; all tensors of all files."""
    generator, files = torch.Generator().manual_seed(0), []
    for number, count in enumerate(counts):
        tensors = {
            "latents": torch.randn(count, *SHAPE, generator=generator),
            "latents_flip": torch.randn(count, *SHAPE, generator=generator),
            "labels": torch.arange(count) % len(CLASSES),
            **(change if number == len(counts) - 1 else {}),
        }
        with storage.create(f"latents_rank{number:02d}_shard000.safetensors") as local:
            save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, local)
        files.append(tensors)
    return files


def write_statistics(storage, mean, std):
    with storage.create("latents_stats.pt") as local:
        torch.save({"mean": mean, "std": std}, local)


def read_ours(storage):
    """float16 [N, 4, C, H, W] and labels of all shards."""
    manifest = read_latent_manifest(storage)
    shards = [
        MappedLatents(storage.local_file(f"train/{info.name}"), info.count, manifest.record_shape)
        for info in manifest.splits["train"]
    ]
    return np.concatenate([shard.arrays for shard in shards]), np.concatenate([shard.labels for shard in shards])


def do_import(source, target, **arguments):
    return import_released_latents(source, target, "train", SHAPE, "t", CLASSES, **arguments)


def test_the_public_files_hold_one_sample_of_each_posterior(ours, public):
    export_released_latents(ours, "train", public, seed=0)
    names = [f"latents_rank00_shard{number:03d}.safetensors" for number in range(len(COUNTS))]
    assert public.list() == [*names, "latents_stats.pt"]
    tensors = [load_file(public.local_file(name)) for name in names]
    assert [list(part["labels"].shape) for part in tensors] == [[5], [2]]
    assert {name: tensor.dtype for name, tensor in tensors[0].items()} == {
        "latents": torch.float32, "latents_flip": torch.float32, "labels": torch.int64,
    }  # fmt: skip
    samples = torch.stack([torch.cat([part[view] for part in tensors]) for view in ("latents", "latents_flip")])
    noise = (samples - torch.arange(7).view(1, -1, 1, 1, 1)) / 0.5
    assert len(noise.unique()) == noise.numel()  # no draw is used twice, across images, views and shards
    assert abs(noise.mean()) < 0.2
    assert abs(noise.std() - 1) < 0.15


def test_samples_depend_on_seed_and_image_alone(tmp_path, ours, public):
    export_released_latents(ours, "train", public, seed=0)
    first, second = (load_file(public.local_file(name))["latents"] for name in public.list()[:2])
    whole = write_ours(Storage(str(tmp_path / "whole")), flip=True, counts=(7,))
    for seed, equal in ((0, True), (1, False)):
        target = Storage(str(tmp_path / f"again{seed}"))
        export_released_latents(whole, "train", target, seed=seed)
        again = load_file(target.local_file(target.list()[0]))["latents"]
        assert torch.equal(again, torch.cat([first, second])) == equal


def test_statistics_are_written_as_the_public_code_reads_them(ours, public):
    export_released_latents(ours, "train", public, seed=0)
    statistics = torch.load(public.local_file("latents_stats.pt"), weights_only=True)
    assert torch.equal(statistics["mean"], torch.tensor([1 / 3, 2, 3]).double().float().view(1, 3, 1, 1))
    assert torch.equal(statistics["std"], torch.tensor([0.1, 5, 6]).view(1, 3, 1, 1))


def test_latents_without_mirror_images_are_refused(tmp_path, public):
    ours = write_ours(Storage(str(tmp_path / "plain")), flip=False)
    with pytest.raises(UserError, match=r"no mirror images, which the public layout has; set latents.flip=true$"):
        export_released_latents(ours, "train", public, seed=0)
    assert not public.list()


@pytest.mark.parametrize("shard_images", [2, 2000])
def test_a_public_sample_becomes_a_mean_without_deviation(public, back, shard_images):
    files = write_public(public)
    manifest = do_import(public, back, shard_images=shard_images)
    assert read_latent_manifest(back) == manifest
    assert (manifest.shape, manifest.flip, manifest.classes, manifest.tokenizer) == (SHAPE, True, CLASSES, "t")
    assert [shard.count for shard in manifest.splits["train"]] == ([2, 2, 1, 2] if shard_images == 2 else [5, 2])
    arrays, labels = read_ours(back)
    assert labels.tolist() == [*range(3), 0, 1, 0, 1]
    for part, view in ((0, "latents"), (2, "latents_flip")):
        samples = torch.cat([tensors[view] for tensors in files])
        kept = torch.from_numpy(arrays[:, part]).float()
        assert torch.equal(kept, samples.half().float())
        assert ((kept - samples).abs() <= samples.abs() * 2**-11 + 2**-25).all()
    assert not arrays[:, 1::2].any()


def test_statistics_come_from_the_file_exactly_and_go_back(tmp_path, public, back):
    write_public(public)
    mean, std = torch.tensor([0.1, -0.7, 3]).view(1, 3, 1, 1), torch.tensor([1e-3, 2 / 3, 9]).view(1, 3, 1, 1)
    write_statistics(public, mean, std)
    do_import(public, back)
    ours = read_statistics(back)
    assert [values.dtype for values in ours] == [torch.float64] * 2
    assert torch.equal(ours[0], mean.double().flatten())
    assert torch.equal(ours[1], std.double().flatten())
    again = Storage(str(tmp_path / "again"))
    export_released_latents(back, "train", again, seed=3)
    statistics = torch.load(again.local_file("latents_stats.pt"), weights_only=True)
    assert torch.equal(statistics["mean"], mean)
    assert torch.equal(statistics["std"], std)
    arrays, _ = read_ours(back)
    for number, (start, stop) in enumerate(((0, 5), (5, 7))):
        tensors = load_file(again.local_file(f"latents_rank00_shard{number:03d}.safetensors"))
        assert torch.equal(tensors["latents"].half(), torch.from_numpy(arrays[start:stop, 0]))


def test_statistics_are_computed_from_all_samples_where_no_file_has_them(public, back):
    samples = torch.cat([torch.cat([t["latents"], t["latents_flip"]]) for t in write_public(public)]).double()
    do_import(public, back)
    mean, std = read_statistics(back)
    torch.testing.assert_close(mean, samples.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, samples.transpose(0, 1).flatten(1).std(1, correction=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 3, 4, 2)}, r"rank01.*: latents is \[2, 3, 4, 2\], expected \[2, 3, 2, 4\]$"),
        ({"latents_flip": torch.zeros(1, *SHAPE)}, r"latents_flip is \[1, 3, 2, 4\], expected \[2, 3, 2, 4\]$"),
        ({"latents_flip": None}, "no tensor latents_flip, which every file of released latents has"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels is \[3\], expected \[2\]$"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels holds torch.float32, expected integers$"),
        ({"latents": torch.ones(2, *SHAPE).int()}, "latents holds torch.int32, expected floating-point numbers$"),
        ({"labels": torch.tensor([0, 3])}, "labels 0 to 3, expected 0 to 2$"),
        ({"labels": torch.tensor([-1, 0])}, "labels -1 to 0, expected 0 to 2$"),
        ({"latents": torch.full((2, *SHAPE), 7e4)}, "latents as large as 70000, which float16 cannot hold$"),
        ({"latents": torch.full((2, *SHAPE), torch.nan)}, "latents as large as nan, which float16 cannot hold$"),
    ],
)
def test_files_that_do_not_fit_are_refused(public, back, change, message):
    write_public(public, **change)
    with pytest.raises(UserError, match=message):
        do_import(public, back)
    assert not back.list(recursive=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_any_floating_type_are_read(tmp_path, public, back, dtype):
    (tensors,) = write_public(public, counts=(5,))
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}
    other = Storage(str(tmp_path / "other"))
    write_public(other, counts=(5,), **rounded, labels=tensors["labels"].to(torch.uint8))
    do_import(other, back)
    arrays, labels = read_ours(back)
    for part, view in ((0, "latents"), (2, "latents_flip")):
        assert torch.equal(torch.from_numpy(arrays[:, part]), rounded[view].float().half())
    assert labels.tolist() == tensors["labels"].tolist()


def test_files_without_images_are_refused(public, back):
    empty = {name: torch.zeros(0, *SHAPE) for name in ("latents", "latents_flip")}
    write_public(public, counts=(0,), **empty)
    with pytest.raises(UserError, match=r"public: the files hold no image; fetch them again$"):
        do_import(public, back)
    assert not back.list(recursive=True)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.0, 0.0, r"std\[1\] is 0, expected more than 0: these are no statistics of latents; compute"),
        (0.0, -1.0, r"std\[1\] is -1, expected more than 0: "),
        (0.0, 1e-60, r"std\[1\] is 1e-60, expected more than 0: "),
        (0.0, torch.nan, r"std\[1\] is nan: these are no statistics of latents"),
        (torch.inf, 1.0, r"mean\[1\] is inf: "),
    ],
)
def test_statistics_that_are_none_are_refused_before_anything_is_written(public, back, mean, std, message):
    write_public(public)
    values = torch.tensor([[0.0, mean, 0.0], [1.0, std, 1.0]], dtype=torch.float64).view(2, 1, 3, 1, 1)
    write_statistics(public, *values)
    with pytest.raises(UserError, match="latents_stats.pt: " + message):
        do_import(public, back)
    assert not back.list(recursive=True)


def test_latents_with_a_constant_channel_are_refused(public, back):
    constant = torch.randn(5, *SHAPE)
    constant[:, 2] = 1
    write_public(public, counts=(5,), latents=constant, latents_flip=constant.clone())
    with pytest.raises(UserError, match=r"public: std\[2\] is 0, expected more than 0: "):
        do_import(public, back)
    assert not back.list(recursive=True)


def test_statistics_that_do_not_fit_are_refused(public, back):
    write_public(public)
    write_statistics(public, torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1))
    with pytest.raises(UserError, match=r"latents_stats.pt: mean is \[1, 4, 1, 1\], expected \[1, 3, 1, 1\]"):
        do_import(public, back)


def test_a_folder_without_latents_is_refused(public, back):
    public.write_bytes("latents.safetensors", b"")
    with pytest.raises(UserError, match=r"public: no latents_rank00_shard000.safetensors or the like there$"):
        do_import(public, back)
