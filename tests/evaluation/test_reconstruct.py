"""Reconstructions are a function of image, seed and index; each is measured as the released code does."""

import math

import pytest
import torch
from support import small_models
from torch import Tensor

import vavae.torchvision_compat  # noqa: F401  (before torchmetrics)

# isort: split
from torchmetrics.functional.image import peak_signal_noise_ratio

from vavae.data.pixels import to_float, to_pixels
from vavae.data.shard_reader import LabeledImages
from vavae.evaluation.reconstruction import ReconstructedBatch, Reconstruction, Reconstructor, reconstruct
from vavae.losses.config import PerceptualLossConfig
from vavae.losses.perceptual import LPIPS, published_heads
from vavae.models.backbones.load import meta_backbone
from vavae.randomness import torch_generator

SEED, FIRST = 5, 40


@pytest.fixture(scope="module")
def reconstructor() -> Reconstructor:
    layers = meta_backbone(PerceptualLossConfig().backbone).features.to_empty(device="cpu")
    for name, parameter in layers.named_parameters():
        scale = math.sqrt(2 / parameter[0].numel())
        parameter.data = torch.randn(parameter.shape, generator=torch_generator(0, name)) * scale
    return Reconstructor(small_models.tokenizer(), alignment=None, teacher=None, lpips=LPIPS(layers, published_heads()))


def images(count: int = 5) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def reconstructed(reconstructor: Reconstructor, batch_size: int, seed: int = SEED) -> list[ReconstructedBatch]:
    batches = (LabeledImages(batch, torch.zeros(len(batch))) for batch in images().split(batch_size))
    return list(reconstruct(batches, reconstructor, seed, FIRST, torch.device("cpu")))


def test_lpips_is_of_what_the_decoder_gives_and_the_rest_of_8_bits(reconstructor: Reconstructor):
    (found,) = reconstructed(reconstructor, 9)
    pixels = to_float(images())
    with torch.inference_mode():
        posterior = reconstructor.tokenizer.encode(pixels)
        shape = posterior.mean.shape[1:]
        noise = [torch.randn(shape, generator=torch_generator(SEED, "reconstruction", FIRST + i)) for i in range(5)]
        decoded = reconstructor.tokenizer.decode(posterior.mean + posterior.std * torch.stack(noise))
        assert reconstructor.lpips is not None
        lpips = reconstructor.lpips(pixels, decoded)
        rounded = reconstructor.lpips(pixels, to_float(to_pixels(decoded)))
    torch.testing.assert_close(found.metrics["lpips"], lpips)
    assert (lpips - rounded).abs().max() > 1e-5
    assert torch.equal(found.reconstructions, to_pixels(decoded))
    for original, restored, psnr in zip(images(), to_pixels(decoded), found.metrics["psnr"], strict=True):
        theirs = peak_signal_noise_ratio(restored.double(), original.double(), data_range=255.0)
        assert psnr.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert found.metrics.keys() == {"psnr", "ssim", "lpips"}, "what there is no projection for is left out"


def test_images_that_the_decoder_makes_black_are_told(reconstructor: Reconstructor, monkeypatch: pytest.MonkeyPatch):
    assert reconstructed(reconstructor, 9)[0].finite.tolist() == [True] * 5
    decode = reconstructor.tokenizer.decode

    def spoiled(z: Tensor) -> Tensor:
        decoded = decode(z)
        decoded[1, 2, 3, 4] = torch.nan
        return decoded

    monkeypatch.setattr(reconstructor.tokenizer, "decode", spoiled)
    assert reconstructed(reconstructor, 9)[0].finite.tolist() == [True, False, True, True, True]


def test_exact_images_stay_out_of_the_mean_of_psnr():
    empty = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    values = {"psnr": torch.tensor([20.0, torch.inf, 30.0]).double(), "ssim": torch.tensor([0.5, 1.0, 0.6])}
    found = Reconstruction.of(values, {}, {}, (empty, empty))
    assert (found.images, found.exact, found.means["psnr"]) == (3, 1, 25.0)
    assert found.means["ssim"] == pytest.approx(0.7)
    exact = Reconstruction.of({name: tensor[1:2] for name, tensor in values.items()}, {}, {}, (empty, empty))
    assert (exact.images, exact.exact, exact.means) == (1, 1, {"ssim": 1.0})


def test_batches_change_nothing_and_the_seed_does(reconstructor: Reconstructor):
    (whole,), parts, (other,) = (
        reconstructed(reconstructor, 9),
        reconstructed(reconstructor, 2),
        reconstructed(reconstructor, 9, seed=6),
    )
    assert [len(part.originals) for part in parts] == [2, 2, 1]
    for name, values in whole.metrics.items():
        torch.testing.assert_close(torch.cat([part.metrics[name] for part in parts]), values, rtol=1e-4, atol=1e-5)
        assert not torch.equal(other.metrics[name], values)
    assert torch.equal(torch.cat([part.originals for part in parts]), images())
