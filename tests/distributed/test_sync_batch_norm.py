"""Batch normalization over two ranks is plain batch normalization over the images of both."""

from typing import NamedTuple

import pytest
import torch
from support.gloo import GlooLauncher
from torch import Tensor, nn

from vavae.distributed.sync_batch_norm import sync_batch_norm
from vavae.distributed.world import World
from vavae.losses.adversarial import DiscriminatorObjective, PatchDiscriminator
from vavae.losses.config import AdversarialLossConfig
from vavae.randomness import torch_generator

pytestmark = pytest.mark.gloo

CONFIG = AdversarialLossConfig(channels=8, layers=2, norm="sync_batch")
SHARES = (3, 2)
"""Images of each rank, unequal on purpose."""


class Record(NamedTuple):
    """What one network did to the images of one rank, or to those of all."""

    logits: Tensor
    image_grad: Tensor
    parameter_grads: dict[str, Tensor]
    state: dict[str, Tensor]
    evaluated: Tensor


def images() -> tuple[Tensor, ...]:
    """Of both ranks; their means and sizes differ, so that their statistics do."""
    drawn = torch.randn(sum(SHARES), 3, 16, 16, generator=torch_generator(0, "images"))
    first, second = drawn.split(SHARES)
    return first, 3 * second + 2


def discriminator() -> nn.Module:
    torch.manual_seed(0)
    return PatchDiscriminator(CONFIG)


def record(network: nn.Module, batch: Tensor) -> Record:
    """Two training passes, gradients of a curved loss summed over the batch, then an evaluation."""
    network(batch)
    batch = batch.clone().requires_grad_()
    logits = network(batch)
    logits.sigmoid().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    state = {name: value.clone() for name, value in network.state_dict().items()}
    return Record(logits.detach(), batch.grad, gradients, state, network.eval()(batch).detach())


def on_a_rank(world: World) -> Record:
    return record(sync_batch_norm(discriminator(), world), images()[world.rank])


def test_two_ranks_equal_the_whole_batch(gloo: GlooLauncher) -> None:
    whole, ranks = record(discriminator(), torch.cat(images())), gloo.run(2, on_a_rank)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(torch.cat([rank.logits for rank in ranks]), whole.logits, **close)
    torch.testing.assert_close(torch.cat([rank.image_grad for rank in ranks]), whole.image_grad, **close)
    torch.testing.assert_close(torch.cat([rank.evaluated for rank in ranks]), whole.evaluated, **close)
    for name, gradient in whole.parameter_grads.items():
        # The loss is a sum over images, so the ranks' gradients add up.
        summed = sum(rank.parameter_grads[name] for rank in ranks)
        torch.testing.assert_close(summed, gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())
    for rank in ranks:
        torch.testing.assert_close(rank.state, whole.state, **close)
    assert not torch.allclose(record(discriminator(), images()[0]).logits, ranks[0].logits, rtol=1e-2)


def adversary_step(world: World) -> Tensor:
    """The gradient that an engine would average over ranks, of the discriminator's whole step."""
    torch.manual_seed(0)
    objective = sync_batch_norm(DiscriminatorObjective(CONFIG), world)
    batch = torch.stack(torch.cat(images())[:4].split(2))  # equal micro-batches, as in training
    batch = batch[world.rank] if world.size > 1 else batch.flatten(0, 1)
    objective(batch, -batch).objective.backward()
    return torch.cat([parameter.grad.flatten() for parameter in objective.parameters()])


def test_gradients_averaged_over_ranks_are_those_of_the_mean_loss(gloo: GlooLauncher) -> None:
    whole, ranks = adversary_step(World()), gloo.run(2, adversary_step)
    torch.testing.assert_close(torch.stack(ranks).mean(0), whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())


def half_precision(world: World) -> Tensor:
    network = sync_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), world).bfloat16()
    # Large means beside small deviations.
    output = network(images()[world.rank].bfloat16() + 100)
    output.float().square().sum().backward()
    assert output.dtype == network[0].running_var.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    return output.float()


def test_half_precision_is_normalized_in_float32(gloo: GlooLauncher) -> None:
    normalized = torch.cat(gloo.run(2, half_precision))
    torch.testing.assert_close(normalized.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-2)
    torch.testing.assert_close(normalized.var((0, 2, 3)), torch.ones(3), rtol=2e-2, atol=0)


def test_names_and_values_are_kept() -> None:
    plain = discriminator()
    before = {name: value.data_ptr() for name, value in plain.state_dict().items()}
    converted = sync_batch_norm(plain, World(size=2))
    assert {name: value.data_ptr() for name, value in converted.state_dict().items()} == before
    assert not [layer for layer in converted.modules() if type(layer) is nn.BatchNorm2d]


def test_a_world_of_one_changes_nothing() -> None:
    network = discriminator()
    assert sync_batch_norm(network, World()) is network
    assert [type(layer) for layer in network.modules()] == [type(layer) for layer in discriminator().modules()]
