"""Files of ADM and pytorch-fid are read, and those that do not fit are refused."""

import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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


def test_an_extractor_that_fits_is_named(file):
    np.savez(file, mu=np.zeros(384), sigma=np.eye(384))
    with pytest.raises(UserError, match=r"made with another extractor \(dinov2_small gives as many\); set evaluate"):
        read(file)


def test_images_of_another_size_are_refused(file):
    np.savez(file, arr_0=np.zeros((2, 16, 16, 3), np.uint8), **MOMENTS)
    with pytest.raises(UserError, match=r"some.npz is of images of 16 x 16 pixels, the run's have 8"):
        read(file)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": MOMENTS["mu"]},
        {"mean": np.zeros(4), "std": np.ones(4)},
        {"m": MOMENTS["mu"], "s": MOMENTS["sigma"]},
        MOMENTS | {"arr_0": IMAGES.transpose(0, 3, 1, 2)},
        MOMENTS | {"arr_0": np.zeros((2, 8, 8, 3))},
        MOMENTS | {"arr_0": np.zeros((2, 8), np.uint8)},
        {"mu": np.array([None]), "sigma": np.array([None])},
    ],
)
def test_other_arrays_are_no_reference(file, arrays):
    np.savez(file, **arrays)
    with pytest.raises(UserError, match=r"some.npz is no reference .*: give an npz file with mu and sigma"):
        read(file)


def test_a_file_of_images_alone_has_no_moments(file):
    np.savez(file, IMAGES, np.zeros(len(IMAGES), np.int64))  # as ADM's sampling script names them
    assert read(file) == (None, None, len(IMAGES))
    np.savez(file, IMAGES[:1])
    with pytest.raises(UserError, match=r"some.npz has 1 images and no moments: .*, two or more$"):
        read(file)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.full(5, np.nan)}, r"mu\[0\] is nan \(the first of 5 values that are not finite\): "),
        ({"mu": np.array([0, 0, np.inf, 0, 0])}, r"mu\[2\] is inf: "),
        ({"sigma": np.diag([1, 1, 1, 1, np.nan])}, r"sigma\[4, 4\] is nan: "),
        ({"mu_s": np.full(3, np.nan)}, r"mu_s\[0\] is nan"),
        ({"sigma": -np.eye(5)}, r"sigma has the eigenvalue -1, below 0 by more than rounding \(5e-06\)"),
        ({"sigma": np.eye(5) + np.triu(np.ones((5, 5)), 1)}, r"sigma is not symmetric, entries differ by 1 "),
        ({"sigma_s": np.diag([1, 1, -1e-3])}, r"sigma_s has the eigenvalue -0.001"),
        ({"mu": np.zeros((1, 5)), "sigma": np.eye(5)[None]}, r"mu is \[1, 5\], expected \[5\]: "),
        ({"sigma": np.eye(5)[None]}, r"sigma is \[1, 5, 5\], expected \[5, 5\]: "),
        ({"sigma": np.ones(5)}, r"sigma is \[5\], expected \[5, 5\]: "),
        ({"sigma": np.eye(4)}, r"sigma is \[4, 4\], expected \[5, 5\]: "),
        ({"sigma": np.eye(5) * 1j}, r"sigma holds complex128, expected real numbers: "),
        ({"mu": np.array(["a"] * 5)}, r"mu holds <U1, expected real numbers: "),
    ],
)
def test_moments_that_are_none_are_refused(file, arrays, message):
    np.savez(file, **(MOMENTS | SPATIAL | arrays))
    with pytest.raises(UserError, match="^some.npz: " + message):
        read(file)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f8", np.complex128, np.int64])
def test_moments_in_any_type_of_numbers_are_read(file, dtype):
    np.savez(file, **{name: np.asfortranarray(array.round().astype(dtype)) for name, array in MOMENTS.items()})
    assert np.array_equal(read(file).pooled.covariance, MOMENTS["sigma"].round())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_singular_covariance_keeps_its_rounding(file, dtype):
    """A covariance of fewer images than dimensions, whose eigenvalues of zero fall below zero in every type."""
    features = np.random.default_rng(1).normal(size=(20, 100)) + 3
    sigma = np.cov(features.T).astype(dtype)
    assert np.linalg.eigvalsh(sigma.astype(float))[0] < 0
    np.savez(file, mu=features.mean(0), sigma=sigma)
    found = read_reference(file, "some.npz", Description("inception", 100, ""), SIDE)
    assert np.array_equal(found.pooled.covariance, sigma.astype(float))


def test_files_of_latents_are_named(file):
    save_file({"mean": torch.zeros(4), "std": torch.ones(4)}, file)
    with pytest.raises(UserError, match=r"\(it is a safetensors file with mean, std, as weights and statistics of l"):
        read(file)
    torch.save({"mean": torch.zeros(4)}, file)
    with pytest.raises(UserError, match=r"\(it holds a file of torch.save, as weights and statistics of latents are\)"):
        read(file)


def test_images_that_are_cut_off_are_refused(file):
    with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": IMAGES.shape}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(IMAGES.tobytes()[:-1])
    with pytest.raises(UserError, match=r"arr_0 has 2,111 bytes, \[11, 8, 8, 3\] has 2,112"):
        read(file)


@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"PK cut off", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_other_files_are_no_reference(file, content):
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"some.npz is no reference"):
        read(file)
