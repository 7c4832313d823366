"""Tokens that skip a range of blocks."""

from functools import partial

import pytest
import torch
from support.golden import golden as golden_numbers
from support.small_dit import dit_inputs, random_dit
from torch import nn
from torch._dynamo.testing import CompileCounter

from vavae.config.load import load
from vavae.diffusion.config import GuidanceConfig
from vavae.diffusion.guidance import guide
from vavae.errors import UserError
from vavae.models.dit.config import LightningDiTConfig, RoutingConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.dit.routing import draw_tokens, kept_tokens, put_tokens, take_tokens
from vavae.runs.config import RunConfig

SKIP = {"first_block": 1, "last_block": 2}


def public_tread(spec, golden):
    """The public network: it has neither RoPE nor norms with weights, and embeds the level of the noise."""
    route = spec["dit_routes"][0]
    config = LightningDiTConfig(
        size=None,
        depth=4,
        width=16,
        heads=spec["heads"],
        classes=4,
        qk_norm=False,
        mlp="gelu",
        norm="layernorm",
        rope=False,
        routing={"first_block": route["start_layer_idx"], "last_block": route["end_layer_idx"]},
    )
    model = LightningDiT(config, 3, 4)
    state = {key.removeprefix("dit.state."): value for key, value in golden.items() if key.startswith("dit.state.")}
    model.load_state_dict(state)
    return model


tiny = partial(random_dit, depth=4)


def uniform(batch=4, tokens=16):
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2))


def test_kept_tokens_routes_and_velocities_equal_the_public_implementation():
    spec, golden = golden_numbers("beyond_tread")
    for index, rate in enumerate(spec["rates"]):
        assert torch.equal(kept_tokens(golden["keep.in.uniform"], rate), golden[f"keep.out.{index}"])

    model = public_tread(spec, golden)
    arguments = golden["dit.in.x"], golden["dit.in.noise_level"], golden["dit.in.y"]
    velocities = {}
    for name, keep in (("velocity", None), ("velocity_routed", "keep"), ("velocity_strong", "keep_strong")):
        velocities[name] = -model.predict(*arguments, keep and golden[f"dit.in.{keep}"]).velocity
        torch.testing.assert_close(velocities[name], golden[f"dit.out.{name}"], atol=1e-5, rtol=0)

    def both_routed(x, t, y, keep=golden["dit.in.keep"]):
        return model.predict(x, t, y, keep)

    guidance = GuidanceConfig(routing_scale=1.5, routing_drop=0.75)
    velocity = guide(both_routed, 4, guidance, keep=lambda drop: golden["dit.in.keep_strong"])
    torch.testing.assert_close(-velocity(*arguments), golden["dit.out.guided"], atol=1e-5, rtol=0)


def test_a_range_of_other_blocks_equals_the_public_implementation():
    spec, golden = golden_numbers("beyond_tread")
    (route,), tokens, keep = spec["routes"], golden["route.in.tokens"], golden["route.in.keep.0"]
    model = tiny(routing={"first_block": route["start_layer_idx"], "last_block": route["end_layer_idx"]})

    class Toy(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x, activated, rotation):
            return x + 0.4 * x @ self.weight + 0.3 * x.mean(1, keepdim=True)

    model.blocks = nn.ModuleList(Toy(weight) for weight in golden["route.in.W"])
    model.x_embedder.forward = lambda x: tokens
    model.pos_embed = torch.zeros(())
    model.final_layer.forward = lambda x, activated: x
    model._unpatchify = lambda x: x
    found = model.predict(torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.zeros(2, dtype=torch.int64), keep).velocity
    torch.testing.assert_close(found, golden["route.out.tokens"], atol=1e-5, rtol=0)


def public_sprint(spec, golden):
    """The public network: it has no table of positions but RoPE, and its pixels lie channel by channel in a patch."""
    public = spec["model"]
    before, inner, after = (public[f"{part}_depth"] for part in ("encoder", "middle", "decoder"))
    width, patch, channels = public["hidden_size"], public["patch_size"], public["in_channels"]
    config = LightningDiTConfig(
        size=None,
        depth=before + inner + after,
        width=width,
        heads=public["num_heads"],
        classes=public["num_classes"],
        patch_size=patch,
        qk_norm=False,
        mlp="gelu",
        norm="layernorm",
        routing={"first_block": before, "last_block": before + inner - 1, "drop": spec["drop"], "fuse": {}},
    )
    state = {}
    starts = {"encoder_blocks": 0, "middle_blocks": before, "decoder_blocks": before + inner}
    for name, value in golden.items():
        kind, *rest = name.removeprefix("state.").split(".")
        if kind in starts:
            kind, rest[0] = "blocks", str(starts[kind] + int(rest[0]))
        kind = {"renoise_linear": "fusion.linear", "mask_token": "fusion.mask_token"}.get(kind, kind)
        if name.startswith("state."):
            state[".".join([kind, *rest])] = value
    patches = state["x_embedder.proj.weight"].view(width, channels, patch, patch)
    state["x_embedder.proj.weight"] = patches
    for name in ("weight", "bias"):
        values = state[f"final_layer.linear.{name}"].unflatten(0, (channels, patch * patch))
        state[f"final_layer.linear.{name}"] = values.transpose(0, 1).flatten(0, 1)
    model = LightningDiT(config, channels, public["context_size"])
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown
    assert set(missing) == {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    model.pos_embed.zero_()
    return model


def test_fused_tokens_and_guidance_by_path_drop_equal_the_public_implementation():
    spec, golden = golden_numbers("beyond_sprint")
    model, seen, null = public_sprint(spec, golden), {}, spec["model"]["num_classes"]
    noise, t, y = (golden[f"in.{name}"] for name in ("x", "noise_level", "y"))
    model.blocks[1].register_forward_pre_hook(lambda block, given: seen.update(middle_in=given[0]))
    model.blocks[2].register_forward_hook(lambda block, given, out: seen.update(middle_out=out))
    model.blocks[3].register_forward_pre_hook(lambda block, given: seen.update(decoder_in=given[0]))
    sparse = model.predict(noise, t, y, golden["in.keep"]).velocity
    for name, tokens in seen.items():
        torch.testing.assert_close(tokens, golden[f"out.{name}"], atol=1e-5, rtol=0)

    nobody, everybody = torch.full_like(y, null), torch.ones(len(y), dtype=torch.bool)
    config = GuidanceConfig(scale=spec["path_drop_scale"], path_drop=True)
    found = {
        "velocity_sparse": sparse,
        "velocity_dense": model(noise, t, y),
        "velocity_null_dense": model(noise, t, nobody),
        "velocity_path_dropped": model.predict(noise, t, nobody, y.new_empty(len(y), 0)).velocity,
        "guided": guide(model.predict, null, config)(noise, t, y),
    }
    for name, velocity in found.items():
        torch.testing.assert_close(-velocity, golden[f"out.{name}"], atol=1e-5, rtol=0)
    for keep in (None, golden["in.keep"]):
        dropped = model.predict(noise, t, nobody, keep, everybody).velocity
        torch.testing.assert_close(dropped, found["velocity_path_dropped"])


@pytest.mark.parametrize(("drop", "side", "kept"), [(0.75, 2, 1), (0.5, 2, 2), (0.625, 4, 6), (0.875, 4, 2)])
def test_as_many_tokens_are_drawn_in_every_square(drop, side, kept):
    config = RoutingConfig(last_block=2, drop=drop, fuse={})
    keep = draw_tokens(config, (4, 8), 300, torch.Generator().manual_seed(0))
    assert keep.shape == (300, 32 * kept // side**2)
    square = keep // 8 // side * (8 // side) + keep % 8 // side
    assert torch.equal(square, torch.arange(32 // side**2).repeat_interleave(kept).expand(300, -1))
    assert all(len(set(image)) == len(image) for image in keep.tolist())
    counts = keep.flatten().bincount(minlength=32)
    assert (counts - 300 * (1 - drop)).abs().max() < 5 * (300 * drop * (1 - drop)) ** 0.5


def test_a_fusion_leaves_the_other_initial_weights_as_they_are():
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    configs = [tiny(routing={**SKIP, **fuse}).config for fuse in ({}, {"fuse": {}})]
    without, fused = (LightningDiT(*each[:1], 3, 4, each[1]) for each in zip(configs, generators, strict=True))
    for name, tensor in without.state_dict().items():
        assert torch.equal(fused.state_dict()[name], tensor), name
    assert 0.01 < fused.fusion.mask_token.std() < 0.03
    assert set(fused.state_dict()) - set(without.state_dict()) == {
        "fusion.mask_token", "fusion.linear.weight", "fusion.linear.bias",
    }  # fmt: skip


def test_all_tokens_in_any_order_and_kept_ones_in_another_order_give_the_same():
    model = tiny(routing=SKIP)
    plain = model(*dit_inputs())
    assert torch.equal(plain, tiny()(*dit_inputs()))
    torch.testing.assert_close(model.predict(*dit_inputs(), uniform().argsort(1)).velocity, plain)
    keep = kept_tokens(uniform(), 0.5)
    routed = model.predict(*dit_inputs(), keep).velocity
    assert not torch.allclose(routed, plain, atol=1e-3)
    torch.testing.assert_close(model.predict(*dit_inputs(), keep.flip(1)).velocity, routed)


def test_each_image_is_routed_by_itself():
    model, keep = tiny(routing=SKIP), kept_tokens(uniform(), 0.5)
    together = model.predict(*dit_inputs(), keep).velocity
    for image in range(4):
        alone = model.predict(*(each[image : image + 1] for each in dit_inputs()), keep[image : image + 1]).velocity
        torch.testing.assert_close(alone[0], together[image])


def test_tokens_that_skip_give_the_blocks_no_gradient_and_keep_their_own():
    tokens = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    keep = kept_tokens(uniform(), 0.75)
    assert torch.equal(put_tokens(tokens, keep, take_tokens(tokens, keep)), tokens)
    put_tokens(torch.zeros_like(tokens), keep, take_tokens(tokens, keep)).sum().backward()
    assert tokens.grad.sum(2).div(8).gather(1, keep).eq(1).all()
    assert tokens.grad.sum() == keep.numel() * 8


def test_activation_checkpointing_changes_no_bit_of_the_gradients():
    gradients = []
    for recompute in (False, True):
        model = tiny(routing=SKIP, checkpoint_activations=recompute)
        model.predict(*dit_inputs(), kept_tokens(uniform(), 0.5)).velocity.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_compiled_blocks_have_one_graph_for_some_tokens_and_one_for_all():
    model, counter = tiny(routing=SKIP), CompileCounter()
    for block in model.blocks:
        block.compile(dynamic=False, backend=counter)
    counts = []
    for seed, drop in ((0, 0.5), (1, 0.5), (2, 0), (3, 0.5), (4, 0)):
        generator = torch.Generator().manual_seed(seed)
        keep = kept_tokens(torch.rand(4, 16, generator=generator), drop) if drop else None
        model.predict(*dit_inputs(), keep).velocity.sum().backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    assert counts[2] == counts[4] <= 6, "a graph of each block, and another of those that tokens skip"


def test_guidance_by_routing_takes_one_further_evaluation_within_its_interval():
    model, asked = tiny(routing=SKIP), []

    def predict(x, t, y, keep=None):
        asked.append((len(x), None if keep is None else keep.shape[1]))
        return model.predict(x, t, y, keep)

    def keep(drop):
        return kept_tokens(uniform(), drop)

    (x, _, y), plain = dit_inputs(), GuidanceConfig(scale=2)
    config = GuidanceConfig(scale=2, routing_scale=3, routing_interval=(0.3, 0.6), routing_drop=0.75)
    for t, further in ((0.2, []), (0.5, [(4, 4)])):
        times = torch.full((4,), t)
        asked.clear()
        found = guide(predict, 5, config, keep=keep)(x, times, y)
        assert asked == [(8, None), *further]
        expected = guide(predict, 5, plain)(x, times, y)
        if further:
            routed = model.predict(x, times, y, keep(0.75)).velocity
            expected = routed + 3 * (expected - routed)
        assert torch.equal(found, expected)
    assert guide(predict, 5, config, keep=keep).jumps == torch.tensor([0.3, 0.6]).tolist()
    assert config.summary.endswith("guidance 3 by 75% of the tokens skipping blocks for t in [0.3, 0.6]")


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["lightningdit.routing={first_block: 3, last_block: 2}"], "last_block=2 lies before first_block=3"),
        (["lightningdit.routing={last_block: 4}"], r"routing\.last_block=4 is none of 4 blocks, 0 to 3"),
        (["lightningdit.routing={last_block: 2, drop: 0.01}"], r"routing\.drop=0\.01 is less than one of \d+ tokens"),
        (["guidance.routing_scale=2"], r"give lightningdit\.routing"),
        (
            ["lightningdit.routing={first_block: 1, last_block: 2}", "lightningdit.intermediate_head.after_block=2"],
            r"after_block=2 lies among the blocks that tokens skip, 1 to 2: choose at most 1 or more than 2",
        ),
        (
            ["lightningdit.routing.last_block=2", "guidance.routing_scale=2", "solver.name=dopri5"],
            "draws tokens in every evaluation",
        ),
        (["lightningdit.routing={last_block: 2, drop: 0.7, fuse: {}}"], "no whole number of the 16 tokens of a square"),
        (
            ["lightningdit.routing={last_block: 2, drop: 0.625, fuse: {}}", "lightningdit.patch_size=2"],
            "draws from squares of 4 x 4 tokens, which do not divide 2 x 2",
        ),
        (["lightningdit.routing.last_block=2", "guidance.path_drop=true"], r"give lightningdit\.routing\.fuse"),
        (
            ["lightningdit.routing={last_block: 2, fuse: {path_dropout: 0}}", "guidance.path_drop=true"],
            r"give lightningdit\.routing\.fuse\.path_dropout above 0",
        ),
        (
            ["lightningdit.routing={last_block: 2, fuse: {}}", "guidance.routing_scale=2"],
            r"without fuse, which has guidance\.path_drop",
        ),
        (
            ["lightningdit.routing.last_block=2", "guidance={routing_scale: 2, routing_drop: 0.001}"],
            r"routing_drop=0\.001 is less than one of",
        ),
    ],
)
def test_what_cannot_be_routed_is_refused(overrides, error):
    small = ["lightningdit={size: null, depth: 4, width: 32, heads: 2}"]
    with pytest.raises(UserError, match=error):
        load(RunConfig, "quickstart", [*small, *overrides])
