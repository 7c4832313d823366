"""The array that the evaluator of ADM reads: what NumPy would have written, in constant memory."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from vavae.sampling.files import write_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)


def test_numpy_reads_the_images_in_order(tmp_path):
    path = tmp_path / "samples.npz"
    write_npz(path, iter(IMAGES.transpose(0, 2, 1, 3)), 7)  # in whatever layout they come
    with np.load(path) as found:
        assert found.files == ["arr_0"]
        assert found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"], IMAGES.transpose(0, 2, 1, 3))


def test_the_array_can_be_read_piece_by_piece(tmp_path):
    """As ADM's evaluator does: the header, then bytes."""
    write_npz(tmp_path / "samples.npz", iter(IMAGES), 7)
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        assert np.lib.format.read_array_header_1_0(member) == (IMAGES.shape, False, np.dtype(np.uint8))
        assert member.read(IMAGES[0].size) == IMAGES[0].tobytes()


def test_equal_images_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        write_npz(tmp_path / name, iter(IMAGES), 7)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    def peak(count):
        tracemalloc.start()
        write_npz(tmp_path / "samples.npz", (np.zeros((64, 64, 3), np.uint8) for _ in range(count)), count)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak(1)  # what is loaded once
    assert peak(1000) < 2 * peak(10) < 20 * 64 * 64 * 3


def test_a_wrong_number_of_images_is_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="7 images came where 8 were announced"):
        write_npz(tmp_path / "samples.npz", iter(IMAGES), 8)
