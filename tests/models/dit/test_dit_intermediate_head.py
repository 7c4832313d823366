"""The output layer after an inner block: internal guidance."""

from functools import partial

import pytest
import torch
from support.golden import golden as golden_numbers
from support.small_dit import dit_inputs, random_dit

from vavae.diffusion.config import GuidanceConfig, ObjectiveConfig, SolverConfig
from vavae.diffusion.flow_matching import FlowMatchingObjective
from vavae.diffusion.guidance import guide
from vavae.diffusion.solvers import solve
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.runs.config import RunConfig

HEAD = {"after_block": 1}


def public_model(spec, golden):
    public = spec["model"]
    config = LightningDiTConfig(
        size=None,
        depth=public["depth"],
        width=public["hidden_size"],
        heads=public["num_heads"],
        classes=public["num_classes"],
        qk_norm=False,
        intermediate_head={"after_block": public["encoder_depth"]},
    )
    model = LightningDiT(config, public["in_channels"], public["input_size"])
    state = {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown
    assert set(missing) <= {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    return model


tiny = partial(random_dit, depth=3)


def test_losses_gradients_and_samples_equal_the_public_implementation():
    spec, golden = golden_numbers("beyond_internal_guidance")
    model = public_model(spec, golden)
    target = golden["in.data"] - golden["in.noise"]
    predictions = model.predict(golden["in.x_t"], golden["in.t"], golden["in.y"])
    torch.testing.assert_close(predictions.velocity, golden["out.velocity"], atol=1e-5, rtol=0)
    torch.testing.assert_close(predictions.intermediate, golden["out.intermediate"], atol=1e-5, rtol=0)

    losses = FlowMatchingObjective(ObjectiveConfig(intermediate_weight=spec["coefficient"]))(
        predictions.velocity, target, predictions.intermediate
    )
    both = losses.velocity + spec["coefficient"] * losses.intermediate
    torch.testing.assert_close(both, golden["out.velocity_and_intermediate_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.direction, golden["out.direction_loss"], rtol=1e-5, atol=0)
    total = losses.total.mean()
    torch.testing.assert_close(total, golden["out.total"], rtol=1e-5, atol=0)
    total.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    norms = torch.stack([gradients[key].norm() for key in spec["grad_names"]])
    torch.testing.assert_close(norms, golden["out.grad_norms"], rtol=1e-4, atol=0)

    for name, sample in spec["samples"].items():
        guidance = GuidanceConfig(
            scale=sample["cfg_scale"],
            interval=(sample["cfg_interval_start"], 1),
            internal_scale=sample["ig_scale"],
            internal_interval=spec["ig_interval"],
        )
        velocity = guide(model.predict, spec["null_label"], guidance)
        solver = SolverConfig(name="heun", num_steps=sample["num_points"] - 1, shift=sample["shift"])
        latents = solve(velocity, golden["sample.noise"], golden["sample.y"], solver, velocity.jumps)
        torch.testing.assert_close(latents, golden[f"sample.out.{name}"], atol=1e-5, rtol=0)


def test_scale_one_and_times_outside_the_interval_change_no_bit():
    model, (x, _, y) = tiny(intermediate_head=HEAD), dit_inputs()
    t = torch.tensor([0.1, 0.3, 0.6, 0.9])
    plain = model(x, t, y)
    assert torch.equal(guide(model.predict, 5, GuidanceConfig())(x, t, y), plain)
    config = GuidanceConfig(internal_scale=2, internal_interval=(0.3, 0.6))
    found = guide(model.predict, 5, config)(x, t, y)
    changed = (found != plain).flatten(1).any(1)
    assert changed.tolist() == [False, True, True, False]
    assert guide(model.predict, 5, config).jumps == torch.tensor([0.3, 0.6]).tolist()


def test_a_head_after_the_last_block_with_the_same_weights_predicts_the_same():
    model = tiny(intermediate_head={"after_block": 3})
    model.final_layer_xr.load_state_dict(model.final_layer.state_dict())
    velocity, intermediate, *_ = model.predict(*dit_inputs())
    assert torch.equal(velocity, intermediate)


def test_its_loss_moves_the_blocks_before_it_alone():
    model, (x, t, y) = tiny(intermediate_head=HEAD), dit_inputs()
    model.predict(x, t, y).intermediate.square().mean().backward()
    moved = {
        name.split(".")[1] for name, p in model.named_parameters() if name.startswith("blocks") and p.grad is not None
    }
    assert moved == {"0"}


def test_it_begins_at_zero_and_draws_no_number():
    with_head = LightningDiT(tiny(intermediate_head=HEAD).config, 3, 4, torch.Generator().manual_seed(0))
    without = LightningDiT(tiny().config, 3, 4, torch.Generator().manual_seed(0))
    assert with_head.predict(*dit_inputs()).intermediate.eq(0).all()
    for name, tensor in without.state_dict().items():
        assert torch.equal(with_head.state_dict()[name], tensor), name


@pytest.mark.parametrize("override", ["guidance.internal_scale=1.5", "objective.intermediate_weight=1"])
def test_what_needs_a_head_is_refused_without_one(override):
    from vavae.config.load import load
    from vavae.errors import UserError

    with pytest.raises(UserError, match=r"lightningdit\.intermediate_head"):
        load(RunConfig, "quickstart", [override])
    with_head = load(RunConfig, "quickstart", [override, "lightningdit.intermediate_head.after_block=3"])
    assert with_head.lightningdit.intermediate_head.after_block == 3
