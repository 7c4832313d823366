"""PSNR and SSIM of reconstructions, image by image."""

import torch
from torch import Tensor

import vavae.torchvision_compat  # noqa: F401  (before torchmetrics)

# isort: split
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels [B], float64; infinite where nothing differs.

    As in the paper's tables and the released code, on whole numbers and averaged over images, not over pixels of the
    set: the caller takes the mean. Both are uint8 or uint16 [B, C, H, W].
    """
    _check_pair(reconstructions, originals)
    error = (reconstructions.double() - originals.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(torch.iinfo(originals.dtype).max ** 2 / error)


def ssim(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each image [B], float32, at most 1.

    Both are uint8 or uint16 [B, C, H, W] with sides of 11 px or more. As in the released code on pixels in [-1, 1],
    which gives other values than the usual [0, 1]: the luminance term depends on the origin.
    """
    _check_pair(reconstructions, originals)
    half = torch.iinfo(originals.dtype).max / 2
    predicted, target = reconstructions.float() / half - 1, originals.float() / half - 1
    similarity = structural_similarity_index_measure(predicted, target, data_range=(-1.0, 1.0), reduction="none")
    assert isinstance(similarity, Tensor), "without `return_full_image` there is one result"
    return similarity


def _check_pair(reconstructions: Tensor, originals: Tensor) -> None:
    shapes = tuple(reconstructions.shape), tuple(originals.shape)
    assert shapes[0] == shapes[1], f"images of shapes {shapes} do not pair"
    assert reconstructions.dtype == originals.dtype, f"{reconstructions.dtype} and {originals.dtype} do not pair"
    assert not originals.is_floating_point(), "images are whole numbers"
