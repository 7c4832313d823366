"""Files of ADM and pytorch-fid are read, and those that do not fit are refused."""

import numpy as np
import pytest
import torch

from vavae.errors import UserError
from vavae.metrics.features import Description
from vavae.metrics.reference import read_reference, reference_images

SEEN = Description("inception", 5, "")
SIDE = 8
RANDOM = np.random.default_rng(0)
MOMENTS = {"mu": RANDOM.normal(size=5), "sigma": np.diag(RANDOM.uniform(1, 2, 5))}
SPATIAL = {"mu_s": RANDOM.normal(size=3), "sigma_s": np.eye(3)}
IMAGES = RANDOM.integers(0, 256, (11, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "reference.npz"


def read(file):
    return read_reference(file, "some.npz", SEEN, (SIDE, SIDE))


def test_a_file_of_pytorch_fid_has_moments_alone(file):
    np.savez(file, **MOMENTS)
    found = read(file)
    assert np.array_equal(found.pooled.mean, MOMENTS["mu"])
    assert np.array_equal(found.pooled.covariance, MOMENTS["sigma"])
    assert found.pooled.mean.dtype == torch.float64
    assert found.spatial is None
    assert found.images == 0


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_of_adm_has_spatial_moments_and_images(file, save):
    save(file, arr_0=IMAGES, **{name: array.astype(np.float32) for name, array in (MOMENTS | SPATIAL).items()})
    found = read(file)
    assert found.spatial is not None
    assert np.array_equal(found.spatial.covariance, SPATIAL["sigma_s"])
    assert found.images == len(IMAGES)
    batches = list(reference_images(file, range(2, 9), 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), IMAGES[2:9])
    assert torch.cat(batches).dtype == torch.uint8


def test_moments_of_another_extractor_are_refused(file):
    np.savez(file, mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(UserError, match=r"some.npz has moments of 7 features, but inception gives 5: .*extractor"):
        read(file)


def test_images_of_another_size_are_refused(file):
    np.savez(file, arr_0=np.zeros((2, 16, 16, 3), np.uint8), **MOMENTS)
    with pytest.raises(UserError, match=r"some.npz is of images of 16 x 16 pixels, the run's have 8"):
        read(file)


@pytest.mark.parametrize(
    "arrays",
    [
        {"arr_0": IMAGES},
        {"mu": MOMENTS["mu"]},
        MOMENTS | {"arr_0": np.zeros((2, 8, 8, 3))},
        MOMENTS | {"arr_0": np.zeros((2, 8), np.uint8)},
        {"mu": np.array([None]), "sigma": np.array([None])},
    ],
)
def test_other_arrays_are_no_reference(file, arrays):
    np.savez(file, **arrays)
    with pytest.raises(UserError, match=r"some.npz is no reference .*: give an npz file with mu and sigma"):
        read(file)


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_other_files_are_no_reference(file, content):
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"some.npz is no reference"):
        read(file)
