"""Networks that predict the data instead of the velocity."""

from pathlib import Path

import pytest
import torch
import yaml
from support import small_models
from support.golden import golden
from support.older_reader import reader_without
from support.recipes import recipe_config
from support.training_steps import build_step

from vavae.config import load
from vavae.diffusion.config import GuidanceConfig, ObjectiveConfig, SolverConfig
from vavae.diffusion.flow_matching import FlowMatchingObjective
from vavae.diffusion.guidance import guide
from vavae.diffusion.solvers import solve
from vavae.distributed.world import World
from vavae.errors import UserError
from vavae.interop.export import DESCRIPTION, WEIGHTS, LightningDiTDescription, load_exported_lightningdit, save_export
from vavae.interop.released_lightningdit import load_released_lightningdit, save_released_lightningdit
from vavae.latents.statistics import LatentNormalizer
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.dit.parametrization import data_of_velocity, velocity_to_data
from vavae.runs.config import RunConfig
from vavae.sampling.sampler import Sampler
from vavae.training.collapse import OUTPUT_VARIANCE
from vavae.training.diffusion_step import FlowMatchingModel

ALL = torch.tensor([0.0, 0.3, 0.9, 0.97])


def dit(prediction="data", **switches):
    """Random weights, the same for both predictions."""
    config = LightningDiTConfig(size=None, depth=2, width=32, heads=2, classes=5, prediction=prediction, **switches)
    return small_models.randomized(LightningDiT(config, 4, 4), scale=0.3)


def batch():
    generator = torch.Generator().manual_seed(0)
    return *torch.randn(2, 4, 4, 4, 4, generator=generator), torch.arange(4)


def toy(tensors, dtype):
    """The two outputs of the fixture's network."""

    def outputs(x, t, y, weights=tensors):
        mixed, middle = (
            torch.einsum("ij,bjhw->bihw", weights[f"in.{key}"].to(dtype), x).tanh() for key in ("A", "A_mid")
        )
        t, y = (each.to(dtype).view(-1, 1, 1, 1) for each in (t, y))
        return mixed * (1 + 0.2 * y) + 0.3 * (1 - t), middle + 0.2 * y

    return outputs


def test_velocities_losses_and_gradients_equal_the_public_implementation():
    spec, tensors = golden("beyond_x_prediction")
    weights = {f"in.{key}": tensors[f"in.{key}"].clone().requires_grad_() for key in ("A", "A_mid")}
    x, t, floor = tensors["in.data"], tensors["in.t"], spec["eps"]
    weight = t.view(-1, 1, 1, 1)
    x_t = weight * x + (1 - weight) * tensors["in.noise"]
    outputs = toy(tensors, torch.float64)(x_t, t, tensors["in.label"], weights)
    velocity, intermediate = (velocity_to_data(output, x_t, t, floor) for output in outputs)
    target = velocity_to_data(x, x_t, t, floor)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(outputs[0], tensors["out.x_prediction"], **close)
    torch.testing.assert_close(velocity, tensors["out.velocity"], **close)
    torch.testing.assert_close(target, tensors["out.target_velocity"], **close)
    losses = [(each - target).square().flatten(1).mean(1) for each in (velocity, intermediate)]
    torch.testing.assert_close(losses[0] + spec["mid_coefficient"] * losses[1], tensors["out.loss"], **close)
    torch.testing.assert_close(losses[1], tensors["out.loss_mid"], **close)
    objective = FlowMatchingObjective(ObjectiveConfig(direction_weight=0, intermediate_weight=spec["mid_coefficient"]))
    total = objective(velocity, target, intermediate).total.mean()  # its losses are float32
    torch.testing.assert_close(total.double(), tensors["out.total"], rtol=1e-6, atol=0)
    total.backward()
    for key, gradient in weights.items():
        torch.testing.assert_close(gradient.grad, tensors[key.replace("in.", "out.grad_")], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "ig", "ig_cfg"])
def test_samples_equal_the_public_implementation(name):
    spec, tensors = golden("beyond_x_prediction")
    outputs = toy(tensors, torch.float32)

    def predict(x, t, y):
        return tuple(velocity_to_data(output, x, t, 0.0) for output in outputs(x, t, y))

    guidance = {}
    if "ig" in name:
        guidance |= {"internal_scale": spec["ig"]["scale"], "internal_interval": spec["ig"]["t"]}
    if "cfg" in name:
        guidance |= {"scale": spec["cfg"]["scale"], "interval": spec["cfg"]["t"]}
    solver = SolverConfig(num_steps=spec["steps"], shift=1 / spec["shift_of_noise_level"])
    velocity = guide(predict, spec["null_label"], GuidanceConfig(**guidance))
    noise = tensors["sample.noise"].float()
    found = solve(velocity, noise, tensors["sample.label"], solver, velocity.jumps, ends_by_euler=True)
    torch.testing.assert_close(found.double(), tensors[f"sample.out.{name}"], rtol=1e-5, atol=1e-5)


def test_the_model_converts_the_outputs_of_both_heads_in_single_precision():
    head = {"intermediate_head": {"after_block": 1}}
    noise, _, labels = batch()
    data, converted = (dit(kind, **head).predict(noise, ALL, labels, data_floor=0.05) for kind in ("velocity", "data"))
    for output, velocity in zip(data[:2], converted[:2], strict=True):
        distance = (1 - ALL).clamp(min=0.05).view(-1, 1, 1, 1)
        torch.testing.assert_close(velocity, (output - noise) / distance)
        torch.testing.assert_close(data_of_velocity(velocity, noise, ALL, 0.05), output, rtol=1e-5, atol=1e-5)
    half = velocity_to_data(data.velocity.bfloat16(), noise.bfloat16(), ALL, 0.0)
    assert half.dtype == torch.float32
    # Without a floor only near the data: there it bounds what an error counts.
    free = dit(**head).predict(noise, ALL, labels).velocity
    assert (free != converted.velocity).flatten(1).any(1).tolist() == [False, False, False, True]


def test_the_true_data_gives_the_velocity_of_the_path_up_to_the_floor():
    noise, data, _ = batch()
    weight = ALL.view(-1, 1, 1, 1)
    found = velocity_to_data(data, weight * data + (1 - weight) * noise, ALL, 0.05)
    share = torch.tensor([1, 1, 1, 0.03 / 0.05]).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, share * (data - noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("num_steps", [1, 30])
def test_solvers_end_at_the_data_however_small_the_last_step_is(solver, num_steps):
    noise, data, labels = batch()
    solver = SolverConfig(name=solver, num_steps=num_steps)

    def velocity(x, t, y):
        assert (t < 1).all()
        return velocity_to_data(data, x, t, 0.0)

    found = solve(velocity, noise, labels, solver, ends_by_euler=True)
    torch.testing.assert_close(found, data, rtol=0, atol=1e-5)


def sampler(prediction):
    dim = small_models.TOKENIZER.latent_dim
    return Sampler(small_models.tokenizer(), dit(prediction), LatentNormalizer(torch.zeros(dim), torch.ones(dim)))


def test_a_sampler_ends_its_steps_where_there_is_a_velocity():
    arguments = ([0, 1], [0, 1], 7, GuidanceConfig(scale=2))
    images = sampler("data").images(*arguments, SolverConfig(name="heun", num_steps=30))
    assert images.float().std() > 1
    with pytest.raises(UserError, match=r"dopri5 takes velocities at t = 1.*lightningdit\.prediction=data") as caught:
        sampler("data").images(*arguments, SolverConfig(name="dopri5"))
    assert "\n" not in str(caught.value)


def test_the_loss_of_a_training_is_the_squared_error_of_the_data_over_the_distance():
    noise, data, labels = batch()
    weight, distance = (each.view(-1, 1, 1, 1) for each in (ALL, (1 - ALL).clamp(min=0.05)))
    objective = FlowMatchingObjective(ObjectiveConfig(direction_weight=0))
    _, terms, losses, _ = FlowMatchingModel(dit(), objective)(data, noise, ALL, labels)
    outputs = dit("velocity")(weight * data + (1 - weight) * noise, ALL, labels)
    torch.testing.assert_close(losses, ((outputs - data) / distance).square().flatten(1).mean(1))
    assert terms["loss/total"] == terms["loss/velocity"] == losses.mean()


def test_a_training_is_watched_by_what_the_network_puts_out():
    step = build_step("train_lightningdit", recipe_config("prediction of data"), World.current())
    items = [step.source()[lane, 0] for lane in range(4)]
    result = step.run(items, 0, 1e-3)
    outputs, data = result.ratios[OUTPUT_VARIANCE]
    assert outputs < 1e-8 * data  # a network that begins at zero


@pytest.mark.parametrize(("prediction", "readable"), [("velocity", True), ("data", False)])
def test_an_export_says_what_the_network_predicts_and_older_readers_refuse_it(storage, prediction, readable):
    model, (noise, _, labels) = dit(prediction), batch()
    description = LightningDiTDescription(lightningdit=model.config, latent_dim=4, grid=4, tokenizer="t")
    save_export(storage, description, {WEIGHTS: model.state_dict()})
    loaded, found = load_exported_lightningdit(storage)
    assert found == description
    assert torch.equal(loaded(noise, ALL, labels), model(noise, ALL, labels))
    stored = yaml.safe_load(storage.read_bytes(DESCRIPTION))
    if readable:
        reader_without("prediction").restore(stored)
    else:
        with pytest.raises(ValueError, match=r"lightningdit\.prediction\s+Extra inputs are not permitted"):
            reader_without("prediction").restore(stored)


def test_the_released_layout_is_of_velocities_alone(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"lightningdit\.prediction=data: the run's own export") as caught:
        save_released_lightningdit(path, dit())
    assert "\n" not in str(caught.value)
    save_released_lightningdit(path, LightningDiT(dit("velocity").config, 4, 4))
    assert load_released_lightningdit(path).config.prediction == "velocity"
    with pytest.raises(UserError, match=r"lightningdit\.prediction=data, but a published LightningDiT"):
        load_released_lightningdit(path, prediction="data")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["solver.name=dopri5", "lightningdit.prediction=data"], r"solver\.name=dopri5 .*set euler or heun"),
        (["objective.data_floor=0.1"], r"objective\.data_floor=0\.1 is of lightningdit\.prediction=data"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load(RunConfig, "quickstart", overrides)
