"""Benchmark of sampling, against its networks alone and against guidance in two passes."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from vavae.bench.computation import Computation, build_side, dense_peak
from vavae.bench.steps import disturbance
from vavae.data.pixels import to_pixels
from vavae.diffusion.guidance import ClassifierFreeGuidance
from vavae.diffusion.solvers import time_grid
from vavae.errors import UserError
from vavae.latents.statistics import LatentNormalizer
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.representation import build_autoencoder
from vavae.runs.config import RunConfig
from vavae.sampling.sampler import Sampler, noise_of
from vavae.training.flops.flops import decoding_flops, velocity_flops
from vavae.training.initialize import initialized

SAMPLER, TWO_PASSES, NETWORKS = "sampler", "two passes", "networks alone"
_CLASSES = 1000


def sampling_benchmark(config: RunConfig, device: torch.device) -> Computation:
    """Benchmark of one batch of images from noise to pixels.

    Two passes are the plain form of guidance, one evaluation of the LightningDiT with labels and one without. The
    networks alone are evaluated as often and as wide as the sampler does it, on the same input.

    Args:
        config: configuration of a run whose solver is `euler`.
        device: where to sample.

    Raises:
        UserError: the solver is another one.
    """
    if config.solver.name != "euler":
        raise UserError(f"solver.name={config.solver.name}: the slow side has euler alone; set solver.name=euler")
    if config.lightningdit.class_token is not None:
        raise UserError("lightningdit.class_token: the slow side has latents alone; leave it out")
    if config.guidance.routing_scale != 1 or config.guidance.path_drop:
        raise UserError(
            "guidance: the slow side has the classifier-free one alone; leave out routing_scale and path_drop"
        )
    sampler = _random_sampler(config, device)
    indices, count = range(config.sample.batch_size), config.sample.batch_size
    labels = [index % max(1, sampler.lightningdit.null_label) for index in indices]

    def fast() -> Tensor:
        return sampler.images(indices, labels, config.seed, config.guidance, config.solver)

    in_two_passes, networks_alone = (
        sampler.autocast()(partial(slow, sampler, config, labels)) for slow in (_in_two_passes, _networks_alone)
    )
    found, expected = fast().float(), in_two_passes().float()
    difference = (found - expected).abs().mean().item()
    assert difference < 0.5, f"guidance in two passes gives other images, by {difference:g} levels of 255 on average"

    def flops() -> float:
        evaluations = sum(1 + guided for guided in _guided(sampler, config))
        return count * (evaluations * velocity_flops(config) + decoding_flops(config))

    sides = {
        SAMPLER: build_side(lambda: fast, flops, device),
        TWO_PASSES: build_side(lambda: in_two_passes, flops, device),
        NETWORKS: build_side(lambda: networks_alone, flops, device),
    }
    name = f"sampling, {count} images, {config.solver.summary}, {config.guidance.summary}"
    pairs = [(SAMPLER, NETWORKS), (SAMPLER, TWO_PASSES)]
    return Computation(
        name, count, sides, pairs, device, dense_peak(device, config.sample.precision, config.workers.rounds_to_tf32)
    )


def _random_sampler(config: RunConfig, device: torch.device) -> Sampler:
    """Models of a run with random weights."""
    dim = config.tokenizer.latent_dim
    dit = config.lightningdit.with_classes(config.lightningdit.classes or _CLASSES)
    tokenizer = initialized(config.seed, "tokenizer", lambda: build_autoencoder(config.tokenizer))
    model = initialized(config.seed, "lightningdit", lambda: LightningDiT(dit, dim, config.grid))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.add_(disturbance(name, tensor.shape))
    normalizer = LatentNormalizer(torch.zeros(dim), torch.ones(dim))
    return Sampler.of(tokenizer.eval(), model.eval(), normalizer, config, device)


def _guided(sampler: Sampler, config: RunConfig) -> list[bool]:
    """Return for each step of the solver whether it is guided."""
    guidance = ClassifierFreeGuidance(sampler.lightningdit, sampler.lightningdit.null_label, config.guidance)
    return guidance.active(_times(sampler, config)[:-1]).tolist()


def _times(sampler: Sampler, config: RunConfig) -> Tensor:
    model = sampler.lightningdit
    return time_grid(config.solver, model.latent_dim * model.grid[0] * model.grid[1])


@torch.inference_mode()
def _in_two_passes(sampler: Sampler, config: RunConfig, labels: list[int]) -> Tensor:
    """Images uint8 [B, 3, H, W] by Euler's method, each velocity evaluated by itself."""
    model, scale, channels = sampler.lightningdit, config.guidance.scale, config.guidance.channels
    device = sampler.normalizer.mean.device
    x = noise_of(range(len(labels)), (model.latent_dim, *model.grid), config.seed).to(device)
    y = torch.tensor(labels, device=device)
    steps = zip(pairwise(_times(sampler, config).tolist()), _guided(sampler, config), strict=True)
    for (t, t_next), guided in steps:
        times = torch.full((len(x),), t, device=device)
        velocity = model(x, times, y)
        if guided:
            null = model(x, times, torch.full_like(y, model.null_label))[:, :channels]
            velocity[:, :channels] = null + scale * (velocity[:, :channels] - null)
        x = x + (t_next - t) * velocity
    return to_pixels(sampler.tokenizer.decode(sampler.normalizer.denormalize(x))).cpu()


@torch.inference_mode()
def _networks_alone(sampler: Sampler, config: RunConfig, labels: list[int]) -> None:
    """Evaluate the LightningDiT as often as sampling does, and decode once."""
    model, device = sampler.lightningdit, sampler.normalizer.mean.device
    x = noise_of(range(len(labels)), (model.latent_dim, *model.grid), config.seed).to(device)
    both = {guided: torch.cat([x] * (1 + guided)) for guided in (False, True)}
    for guided in _guided(sampler, config):
        batch = both[guided]
        times, y = torch.zeros(len(batch), device=device), torch.zeros(len(batch), dtype=torch.int64, device=device)
        model(batch, times, y)
    sampler.tokenizer.decode(x)
