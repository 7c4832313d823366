"""The posterior in closed form."""

import pytest
import torch

from vavae.latents.statistics import LatentNormalizer
from vavae.models.tokenizer.autoencoder import DiagonalGaussian
from vavae.randomness import torch_generator


def test_kl_of_the_standard_normal_is_zero():
    zeros = torch.zeros(3, 4, 2, 2)
    assert DiagonalGaussian(zeros, zeros).kl().tolist() == [0.0, 0.0, 0.0]


def test_kl_equals_the_closed_form_of_torch():
    mean = torch.randn(2, 3, 4, 4, generator=torch_generator(0, "mean"))
    logvar = torch.randn(2, 3, 4, 4, generator=torch_generator(0, "logvar"))
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(normal, standard).sum(dim=(1, 2, 3))
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected)


def test_the_logarithm_of_the_variance_is_clamped_at_both_ends():
    logvar = torch.tensor([-100.0, 0.0, 100.0]).view(1, 3, 1, 1)
    assert DiagonalGaussian(torch.zeros_like(logvar), logvar).logvar.flatten().tolist() == [-30.0, 0.0, 20.0]


def test_samples_have_the_moments_and_repeat_with_the_generator():
    mean = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 200, 200)
    std = torch.tensor([0.5, 3.0]).view(1, 2, 1, 1).expand_as(mean)
    posterior = DiagonalGaussian(mean, 2 * std.log())
    sample = posterior.sample(torch_generator(0, "sample"))
    # 40,000 draws: five standard errors of mean and deviation
    assert ((sample - mean).mean(dim=(2, 3)).abs() < 5 * std[..., 0, 0] / 200).all()
    assert ((sample - mean).std(dim=(2, 3)) / std[..., 0, 0] - 1).abs().max() < 5 / (2**0.5 * 200)
    assert torch.equal(sample, posterior.sample(torch_generator(0, "sample")))
    assert torch.equal(posterior.at(torch.zeros_like(mean)), posterior.mode)


def test_normalizer_whitens_and_returns():
    mean, std = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.25])
    normalizer = LatentNormalizer(mean, std)
    z = mean.view(1, 2, 1, 1) + std.view(1, 2, 1, 1) * torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    assert torch.equal(normalizer.normalize(z), torch.tensor([-1.0, 1.0]).expand(1, 2, 1, 2))
    assert torch.equal(normalizer.denormalize(normalizer.normalize(z)), z)
    assert set(normalizer.state_dict()) == {"mean", "std"}


def test_normalizer_refuses_a_channel_that_does_not_vary():
    with pytest.raises(AssertionError, match="does not vary"):
        LatentNormalizer(torch.zeros(2), torch.tensor([1.0, 0.0]))
