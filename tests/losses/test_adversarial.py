"""The discriminator's published size, its initial values, and both sides of the game in closed form."""

import math

import pytest
import torch
from pydantic import ValidationError

from vavae.losses.adversarial import DiscriminatorObjective, PatchDiscriminator, generator_loss, hinge, vanilla
from vavae.losses.config import AdaptiveWeightConfig, AdversarialLossConfig
from vavae.losses.objective import adaptive_weight
from vavae.randomness import torch_generator

SMALL = AdversarialLossConfig(channels=16, layers=2)


def images(seed: int, batch: int = 4) -> torch.Tensor:
    return 2 * torch.rand(batch, 3, 32, 32, generator=torch_generator(seed, "images")) - 1


def test_published_size_and_patches():
    with torch.device("meta"):
        discriminator = PatchDiscriminator(AdversarialLossConfig())
        logits = discriminator(torch.zeros(2, 3, 256, 256))
    assert round(sum(p.numel() for p in discriminator.parameters()) / 1e6, 2) == 2.77
    assert logits.shape == (2, 1, 30, 30)


def test_initial_weights():
    torch.manual_seed(0)
    state = PatchDiscriminator(AdversarialLossConfig()).state_dict()
    assert state["main.5.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    assert state["main.9.weight"].mean().item() == pytest.approx(1.0, abs=0.01)
    assert state["main.9.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not state["main.9.bias"].any()


def test_group_normalization_sees_each_image_alone():
    config = AdversarialLossConfig(channels=16, layers=2, norm="group")
    discriminator = PatchDiscriminator(config)
    torch.testing.assert_close(discriminator(images(0))[:1], discriminator(images(0)[:1]), rtol=1e-4, atol=1e-6)
    batch = PatchDiscriminator(SMALL)
    assert not torch.allclose(batch(images(0))[:1], batch(images(0)[:2])[:1])


def test_a_norm_over_ranks_is_built_as_one_within_a_rank():
    """Same tensors, same values; extending it over the ranks is another room's business."""
    networks = []
    for norm in ("batch", "sync_batch"):
        torch.manual_seed(0)
        networks.append(PatchDiscriminator(SMALL.model_copy(update={"norm": norm})))
    torch.testing.assert_close(networks[0].state_dict(), networks[1].state_dict(), rtol=0, atol=0)
    assert torch.equal(networks[0](images(0)), networks[1](images(0)))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValidationError, match="multiple of 16"):
        AdversarialLossConfig(channels=24, norm="group")


def test_sides_of_the_game():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    assert hinge(torch.ones(3), -torch.ones(3)).item() == 0.0
    assert vanilla(torch.zeros(2), torch.zeros(2)).item() == pytest.approx(math.log(2))
    assert vanilla(real, fake).item() == pytest.approx(
        0.25 * sum(math.log1p(math.exp(x)) for x in (-2.0, 0.0, -3.0, 1.0))
    )
    assert generator_loss(fake).item() == 1.0


@pytest.mark.parametrize(("kind", "loss"), [("hinge", hinge), ("vanilla", vanilla)])
def test_discriminator_step(kind, loss):
    objective = DiscriminatorObjective(SMALL.model_copy(update={"loss": kind}))
    reconstruction = images(1).requires_grad_()
    terms = objective(images(0), reconstruction)
    real, fake = objective.discriminator(images(0)), objective.discriminator(reconstruction)
    assert terms.objective.item() == loss(real, fake).item()
    assert (terms.real.item(), terms.fake.item()) == (real.mean().item(), fake.mean().item())
    assert terms.right.tolist() == [
        sum((real > 0).flatten().tolist() + (fake < 0).flatten().tolist()),
        2 * real.numel(),
    ]
    terms.objective.backward()
    assert reconstruction.grad is None
    assert all((parameter.grad != 0).any() for parameter in objective.parameters())


def test_adaptive_weight_is_the_ratio_of_norms():
    reference, gradient = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert adaptive_weight(reference, gradient, 1e4).item() == pytest.approx(5 / (2 + 1e-4))
    assert adaptive_weight(reference, gradient, 1.5).item() == 1.5
    assert adaptive_weight(reference, torch.zeros(2), 1e8).item() == pytest.approx(5e4)
    assert not adaptive_weight(reference.requires_grad_(), gradient, 1.0).requires_grad


def test_released_limits():
    reference, nothing = torch.tensor([3e5, 4e5]), torch.zeros(2)
    limits = AdaptiveWeightConfig()
    assert adaptive_weight(reference, nothing, limits.adversarial_max).item() == 1e4
    assert adaptive_weight(reference, nothing, limits.vision_foundation_max).item() == 1e8
    assert adaptive_weight(nothing, reference, limits.adversarial_max).item() == 0.0
