"""Shards of generated images: balanced over classes, made once, functions of their number."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import webdataset
from support import image_shards, small_models

from vavae.data.image import decode_image
from vavae.data.pixels import encode_png
from vavae.data.shard_reader import gather
from vavae.diffusion.config import GuidanceConfig, SolverConfig
from vavae.errors import UserError
from vavae.latents.statistics import LatentNormalizer
from vavae.sampling import sample_shards
from vavae.sampling.config import SampleConfig
from vavae.sampling.sample_shards import SampleSet, read_samples
from vavae.sampling.sampler import Sampler
from vavae.storage.storage import Storage, sha256_of

CONFIG = SampleConfig(images=10, shard_images=4, batch_size=3)
GUIDANCE, SOLVER, SEED = GuidanceConfig(), SolverConfig(num_steps=1), 3


class Recorder:
    """A sampler, with the indices that it was asked for."""

    batches = Sampler.batches

    def __init__(self):
        channels = small_models.TOKENIZER.latent_dim
        normalizer = LatentNormalizer(torch.zeros(channels), torch.ones(channels))
        self.sampler, self.asked = Sampler(small_models.tokenizer(), small_models.lightningdit(), normalizer), []

    def images(self, indices, *rest):
        self.asked.append(indices)
        return self.sampler.images(indices, *rest)


@pytest.fixture
def sampler():
    return Recorder()


def samples(storage, origin="o", config=CONFIG, threads=1):
    return SampleSet(storage, config, SEED, GUIDANCE, SOLVER, origin, image_shards.CLASSES, threads)


def ignore(count):
    pass


def die(count):
    raise KeyboardInterrupt


def generate_all(found, sampler, advance=ignore):
    return found.files([found.generate(shard, sampler, advance) for shard in found.shards()])


def contents(storage):
    return {path: storage.read_bytes(path) for path in storage.list(recursive=True)}


def test_image_i_is_of_class_i_modulo_the_classes(storage, sampler):
    files, counts = generate_all(samples(storage), sampler), []
    assert list(files) == ["000000.tar", "000001.tar", "000002.tar"]
    found = gather(read_samples(storage, files))
    labels = [index % len(image_shards.CLASSES) for index in range(10)]
    assert found.labels.tolist() == labels
    expected = sampler.sampler.images(list(range(10)), labels, SEED, GUIDANCE, SOLVER)
    assert (found.images.int() - expected.int()).abs().max() <= 1
    generate_all(samples(storage), sampler, counts.append)
    assert counts == [4, 4, 2]


def test_progress_counts_batches(storage, sampler):
    counts = []
    generate_all(samples(storage), sampler, counts.append)
    assert counts == [3, 1, 3, 1, 2]


def test_files_are_named_with_size_and_checksum(storage, sampler):
    for name, info in generate_all(samples(storage), sampler).items():
        path = storage.local_file(name)
        assert (path.stat().st_size, sha256_of(path)) == (info.bytes, info.sha256)


def test_stock_webdataset_reads_the_shards(storage, sampler):
    files = generate_all(samples(storage), sampler)
    dataset = webdataset.WebDataset([storage.url(name) for name in files], shardshuffle=False)
    assert [sample["__key__"] for sample in dataset.decode("rgb8")] == [f"{index:09d}" for index in range(10)]


def test_what_is_done_is_not_done_again(storage, sampler):
    files = generate_all(samples(storage), sampler)
    before = contents(storage)
    sampler.asked.clear()
    assert generate_all(samples(storage), sampler) == files
    assert sampler.asked == []
    storage.delete("000001.json")
    assert generate_all(samples(storage), sampler) == files
    assert sampler.asked == [[4, 5, 6], [7]]
    assert contents(storage) == before


def test_more_images_keep_the_full_shards_that_are_there(storage, sampler):
    generate_all(samples(storage), sampler)
    before = contents(storage)
    sampler.asked.clear()
    generate_all(samples(storage, config=CONFIG.model_copy(update={"images": 13})), sampler)
    assert sampler.asked == [[8, 9, 10], [11], [12]]
    after = contents(storage)
    assert all(
        after[f"00000{shard}.{kind}"] == before[f"00000{shard}.{kind}"] for shard in (0, 1) for kind in ("tar", "json")
    )
    sampler.asked.clear()
    generate_all(samples(storage), sampler)
    assert sampler.asked == [[8, 9]]
    assert {path: data for path, data in contents(storage).items() if path in before} == before


def test_a_shard_of_images_that_are_not_finite_leaves_nothing(storage, sampler):
    sampler.sampler.normalizer.mean[0] = torch.nan
    with pytest.raises(UserError, match=r"^statistics of the latents: mean\[0\] is nan"):
        generate_all(samples(storage), sampler)
    assert contents(storage) == {}


def test_a_truncated_shard_is_made_again(storage, sampler):
    generate_all(samples(storage), sampler)
    before = contents(storage)
    storage.write_bytes("000002.tar", before["000002.tar"][:-512])
    assert samples(storage).record(2) is None
    generate_all(samples(storage), sampler)
    assert contents(storage) == before


def test_a_shard_that_was_broken_off_leaves_nothing(storage, sampler):
    with pytest.raises(KeyboardInterrupt):
        samples(storage).generate(0, sampler, die)
    assert contents(storage) == {}
    assert samples(storage).record(0) is None


@pytest.mark.parametrize("batches", [0, 1, 3, 4])
def test_a_set_whose_process_is_killed_goes_on_to_the_same_bytes(storage, sampler, tmp_path, batches):
    def generate_until_killed():
        left = batches

        def advance(count):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        generate_all(samples(storage), sampler, advance)

    process = multiprocessing.get_context("fork").Process(target=generate_until_killed)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    survived = [shard for shard in samples(storage).shards() if samples(storage).record(shard)]
    assert survived == list(range(batches // 2))  # two batches a shard
    files = generate_all(samples(storage), sampler)
    assert len(sampler.asked) == 5 - 2 * len(survived)
    undisturbed = Storage(str(tmp_path / "undisturbed"))
    assert generate_all(samples(undisturbed), sampler) == files
    assert contents(storage) == contents(undisturbed)


def test_shards_are_the_same_in_any_order_and_from_any_worker(storage, sampler, tmp_path):
    files = generate_all(samples(storage), sampler)
    other = Storage(str(tmp_path / "other"))
    for shard in reversed(samples(other).shards()):
        samples(other).generate(shard, Recorder(), ignore)
    assert generate_all(samples(other), Recorder()) == files


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_byte(storage, sampler, tmp_path, threads):
    files = generate_all(samples(storage), sampler)
    more, at_once = (Storage(str(tmp_path / name)) for name in ("more", "at_once"))
    assert generate_all(samples(more, threads=threads), sampler) == files
    found = samples(at_once, threads=threads)
    with ThreadPoolExecutor(2) as pool:  # as in an actor
        records = list(pool.map(lambda shard: found.generate(shard, sampler, ignore), found.shards()))
    assert found.files(records) == files
    assert contents(storage) == contents(more) == contents(at_once)


def test_a_batch_is_encoded_while_the_next_is_generated(storage, sampler, monkeypatch):
    begun, images = threading.Event(), sampler.images

    def encode(image):
        assert begun.wait(30), "the second batch waits for the first"
        return encode_png(image)

    def generate(indices, *rest):
        if indices[0] == 3:
            begun.set()
        return images(indices, *rest)

    monkeypatch.setattr(sample_shards, "encode_png", encode)
    monkeypatch.setattr(sampler, "images", generate)
    samples(storage).generate(0, sampler, ignore)
    assert samples(storage).record(0)


def test_a_shard_is_stored_while_the_next_is_generated(storage, sampler, monkeypatch):
    """The first record waits for the second shard."""
    begun, images, write_json = threading.Event(), sampler.images, Storage.write_json

    def generate(indices, *rest):
        if indices[0] == 4:
            begun.set()
        return images(indices, *rest)

    def store(folder, path, value):
        assert path != "000000.json" or begun.wait(30), "the second shard waits for the first"
        write_json(folder, path, value)

    monkeypatch.setattr(sampler, "images", generate)
    monkeypatch.setattr(Storage, "write_json", store)
    found = samples(storage)
    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(lambda shard: found.generate(shard, sampler, ignore), found.shards()))
    assert found.files(records)
    assert [sorted(sampler.asked[at : at + 2]) for at in (0, 2)] in (
        [[[0, 1, 2], [3]], [[4, 5, 6], [7]]],
        [[[4, 5, 6], [7]], [[0, 1, 2], [3]]],
    ), "models take turns by shards"


def test_an_error_of_the_encoder_is_the_error_and_leaves_nothing(storage, sampler, monkeypatch):
    def fail(image):
        raise OSError("no space left")

    monkeypatch.setattr(sample_shards, "encode_png", fail)
    with pytest.raises(OSError, match="no space left"):
        samples(storage).generate(0, sampler, ignore)
    assert contents(storage) == {}


def test_samples_of_other_models_are_made_again(storage, sampler):
    generate_all(samples(storage, "one"), sampler)
    other = samples(storage, "other")
    assert not any(other.record(shard) for shard in other.shards())
    sampler.asked.clear()
    generate_all(other, sampler)
    assert [index for indices in sampler.asked for index in indices] == list(range(10))


def test_the_record_goes_before_the_shard_is_made_again(storage, sampler):
    generate_all(samples(storage), sampler)
    with pytest.raises(KeyboardInterrupt):
        samples(storage, "other").generate(0, sampler, die)
    assert "000000.json" not in contents(storage)


def test_no_batch_crosses_the_end_of_a_shard(storage, sampler):
    generate_all(samples(storage), sampler)
    assert sampler.asked == [[0, 1, 2], [3], [4, 5, 6], [7], [8, 9]]


@pytest.mark.parametrize("change", [{"batch_size": 1}, {"batch_size": 50}, {"shard_images": 3}, {"shard_images": 50}])
def test_batch_and_shard_sizes_change_no_image(storage, sampler, change):
    generate_all(samples(storage), sampler)
    whole = samples(storage).images(range(10))
    other = samples(storage, config=CONFIG.model_copy(update=change))
    generate_all(samples(storage, "other", CONFIG.model_copy(update=change)), sampler)
    assert (other.images(range(10)).int() - whole.int()).abs().max() <= 1


def test_given_labels_go_round(storage, sampler):
    config = CONFIG.model_copy(update={"labels": ("c", 0)})
    files = generate_all(samples(storage, config=config), sampler)
    assert gather(read_samples(storage, files)).labels.tolist() == [2, 0] * 5


def test_some_images_come_in_the_order_asked_for(storage, sampler):
    files = generate_all(samples(storage), sampler)
    everything = gather(read_samples(storage, files)).images
    assert torch.equal(samples(storage).images([7, 0, 9]), everything[[7, 0, 9]])
    pixels = torch.from_numpy(np.stack(list(samples(storage).pixels())))
    assert torch.equal(pixels.permute(0, 3, 1, 2), everything)


def test_only_the_images_asked_for_are_decoded(storage, sampler, monkeypatch):
    generate_all(samples(storage), sampler)
    decoded = []
    monkeypatch.setattr(
        sample_shards, "decode_image", lambda data, **form: decoded.append(1) or decode_image(data, **form)
    )
    samples(storage).images([5, 2])
    assert len(decoded) == 2


def test_a_shard_that_is_gone_is_our_own_mistake(storage, sampler):
    found = samples(storage)
    records = [found.generate(shard, sampler, ignore) for shard in found.shards()]
    storage.delete("000001.tar")
    with pytest.raises(AssertionError, match=r"000001\.tar is not what its record says"):
        found.files(records)
