"""Time and label as tokens beside those of the latent."""

from functools import partial

import pytest
import torch
import yaml
from pydantic import ValidationError
from support.golden import golden as golden_numbers
from support.golden import golden_state
from support.older_reader import reader_without
from support.public_clock import PublicClock
from support.small_dit import SIZES, dit_inputs, random_dit
from torch._dynamo.testing import CompileCounter

from vavae.config import load
from vavae.errors import UserError
from vavae.interop.export import DESCRIPTION, WEIGHTS, LightningDiTDescription, load_exported_lightningdit, save_export
from vavae.interop.released_lightningdit import load_released_lightningdit, save_released_lightningdit
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.runs.config import RunConfig

HEADS = {"head": {"depth": 1, "width": 48, "heads": 3}, "intermediate_head": {"after_block": 1}}
ROUTING = {"first_block": 1, "last_block": 2}
TOKENS = {"time_tokens": 2, "label_tokens": 3}

tiny = partial(random_dit, depth=4, conditioning="in_context", **TOKENS)


def our_name(public, depth):
    """Name of a public tensor in ours, and which part it is there of how many: theirs are not fused."""
    names = {
        "t_embedder.learnable_tokens": "context_embedder.time_tokens",
        "ctx_embedder.learnable_tokens": "context_embedder.label_tokens",
        "ctx_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
    }
    if public in names:
        return names[public], (0, 1)
    part, *rest = public.split(".")
    if part == "blocks" and int(rest[0]) >= depth:
        part, rest[0] = "head.blocks", str(int(rest[0]) - depth)
    parts = {
        "s_embedder": "x_embedder", "x_embedder": "head.x_embedder", "s_projector": "head.projector",
        "base_final_layer": "final_layer_xr", "dec_rope": "head.feat_rope", "enc_rope": "feat_rope",
    }  # fmt: skip
    name = ".".join([parts.get(part, part), *rest]).replace("adaln_modulation", "adaLN_modulation")
    if part.endswith("final_layer"):
        name = name.replace(".norm.", ".norm_final.")
    for fused, several in (("attn.qkv", ("attn.q", "attn.k", "attn.v")), ("mlp.w12", ("mlp.w1", "mlp.w2"))):
        for index, one in enumerate(several):
            if f".{one}." in name:
                return name.replace(one, fused), (index, len(several))
    return name, (0, 1)


def public_model(spec, golden):
    sizes = spec["model"]
    shape, head = (
        {"width": sizes["hidden_size"][i], "depth": sizes["depth"][i], "heads": sizes["num_heads"][i]} for i in (0, 1)
    )
    config = LightningDiTConfig(
        size=None,
        **shape,
        classes=sizes["num_classes"],
        head=head,
        intermediate_head={"after_block": sizes["base_model_depth"]},
        conditioning="in_context",
        time_tokens=spec["tokens"]["num_t_tokens"],
        label_tokens=spec["tokens"]["num_c_tokens"],
    )
    model = LightningDiT(config, sizes["in_channels"], sizes["input_size"])
    model.t_embedder = PublicClock(shape["width"])
    joined = {}
    for name, tensor in golden_state(golden).items():
        ours, part = our_name(name, shape["depth"])
        joined.setdefault(ours, {})[part] = tensor
    state = {name: torch.cat([parts[part] for part in sorted(parts)]) for name, parts in joined.items()}
    for name in ("feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        state[name], rest = state[name].split([16, sum(spec["tokens"].values())])
        assert rest.eq(float(name.endswith("cos"))).all(), "not rotated"
    model.load_state_dict(state)
    return model, shape["depth"]


def test_outputs_inner_tensors_and_gradients_equal_the_public_implementation():
    spec, golden = golden_numbers("beyond_in_context")
    model, depth = public_model(spec, golden)
    inner = {}
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: inner.update(sequence=inputs[0]))
    model.blocks[-1].register_forward_hook(lambda *call: inner.update(encoder_tokens=call[2]))
    model.final_layer_xr.register_forward_pre_hook(lambda _, inputs: inner.update(base_condition=inputs[0]))
    found = model.predict(golden["in.x"], golden["in.noise_level"], golden["in.y"])
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found.velocity, golden["out.output"], **close)
    torch.testing.assert_close(found.intermediate, golden["out.output_base"], **close)
    assert len(inner) == 3
    for name, tensor in inner.items():
        torch.testing.assert_close(tensor, golden[f"out.{name}"], **close)
    loss = sum((output - golden["in.target"]).square().mean() for output in found[:2])
    torch.testing.assert_close(loss, golden["out.loss"], atol=0, rtol=1e-5)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = []
    for public in spec["grad_names"]:
        ours, part = our_name(public, depth)
        norms.append(gradients[ours].chunk(part[1])[part[0]].norm())
    torch.testing.assert_close(torch.stack(norms), golden["out.grad_norms"], rtol=1e-4, atol=1e-6)


def test_it_begins_at_zero_with_tokens_as_long_as_they_are_wide():
    config = LightningDiTConfig(**{**SIZES, "width": 128, "conditioning": "in_context", **HEADS})
    model = LightningDiT(config, 3, 4, torch.Generator().manual_seed(0))
    velocity, intermediate, *_ = model.predict(*dit_inputs())
    assert velocity.eq(0).all()
    assert intermediate.eq(0).all()
    drawn = torch.cat([*model.context_embedder.parameters()])
    assert drawn.std().item() == pytest.approx(128**-0.5, rel=5 / (2 * drawn.numel()) ** 0.5)
    assert not [name for name in model.state_dict() if name == "pos_embed" or name.startswith("blocks.0.adaLN")]
    assert "context_embedder" not in str([*random_dit().state_dict()])


def test_an_output_layer_without_a_wide_head_has_the_condition_of_time_and_label():
    model, (x, t, y), seen = tiny(), dit_inputs(), []
    model.final_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model(x, t, y)
    ((tokens, activated),) = seen
    assert tokens.shape == (4, 16, 32)
    torch.testing.assert_close(activated, torch.nn.functional.silu(model.t_embedder(t) + model.y_embedder(y)))


@pytest.mark.parametrize("switches", [{}, HEADS])
def test_every_weight_learns_and_recomputed_blocks_give_the_same_gradients(switches):
    gradients = []
    for again in (False, True):
        model = tiny(checkpoint_activations=again, routing=ROUTING, **switches)
        keep = torch.arange(8).flip(0).expand(4, -1)
        velocity, intermediate, *_ = model.predict(*dit_inputs(), keep)
        (velocity.square().mean() + (0 if intermediate is None else intermediate.square().mean())).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_tokens_of_time_and_label_skip_no_block_and_have_no_position():
    model, (x, t, y), seen = tiny(routing=ROUTING), dit_inputs(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[1], inputs[2])))
    keep = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:6] for i in range(4)])
    model.predict(x, t, y, keep)
    assert [count for count, _ in seen] == [21, 11, 11, 21]
    of_all, of_kept = seen[0][1], seen[1][1]
    assert of_kept.cos.shape == (4, 11, 1, 16)
    torch.testing.assert_close(of_kept.cos[2, :6, 0], of_all.cos[keep[2], 0], rtol=0, atol=0)
    assert of_kept.cos[:, 6:].eq(1).all()
    assert of_kept.sin[:, 6:].eq(0).all()
    # As many as there are, in any order, are all of them.
    shuffled = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    torch.testing.assert_close(model.predict(x, t, y, shuffled).velocity, model(x, t, y), rtol=1e-4, atol=1e-5)


def test_inner_tokens_are_those_of_the_latent():
    model, seen = tiny(), []
    model.blocks[1].register_forward_hook(lambda *call: seen.append(call[2]))
    found = model.predict(*dit_inputs(), tokens_after=2).tokens
    assert torch.equal(found, seen[0][:, :16])


def test_tokens_keep_the_dtype_of_the_weights_under_autocast():
    model, dtypes = tiny(**HEADS), []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*dit_inputs())
    assert dtypes == [torch.float32]
    torch.testing.assert_close(half, model(*dit_inputs()), atol=0.05, rtol=0.05)


def test_a_compiled_block_has_one_graph():
    model, counter = tiny(), CompileCounter()
    plain = model(*dit_inputs())
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model(*dit_inputs()), plain)
    model(*dit_inputs())
    assert counter.frame_count == 1


def test_another_grid_changes_the_rotation_alone():
    model = tiny().at_grid((4, 8))
    assert len(model.feat_rope.freqs_cos) == 32
    assert model(torch.ones(1, 3, 4, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64)).shape == (1, 3, 4, 8)


def test_an_export_comes_back_and_older_readers_refuse_it(storage):
    model = tiny(**HEADS).eval()
    description = LightningDiTDescription(lightningdit=model.config, latent_dim=3, grid=4, tokenizer="t")
    save_export(storage, description, {WEIGHTS: model.state_dict()})
    loaded, found = load_exported_lightningdit(storage)
    assert found == description
    assert torch.equal(loaded(*dit_inputs()), model(*dit_inputs()))
    with pytest.raises(ValidationError, match=r"lightningdit\.conditioning\s+Extra inputs are not permitted"):
        reader_without("conditioning").restore(yaml.safe_load(storage.read_bytes(DESCRIPTION)))


def test_the_released_layout_has_no_such_tokens(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"no lightningdit\.conditioning=in_context: take the run's own") as caught:
        save_released_lightningdit(path, tiny())
    assert "\n" not in str(caught.value)
    save_released_lightningdit(path, random_dit())
    with pytest.raises(UserError, match=r"no tensor context_embedder\..* with conditioning=in_context") as caught:
        load_released_lightningdit(path, conditioning="in_context")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lightningdit.time_tokens=3"], r"time_tokens=3 is of conditioning=in_context"),
        (["lightningdit.label_tokens=3"], r"label_tokens=3 is of conditioning=in_context"),
        (["lightningdit.conditioning=in_context", "lightningdit.label_tokens=0"], "greater than or equal to 1"),
        (["lightningdit.conditioning=in_context", "lightningdit.rope=false"], r"rope=false with conditioning"),
        (["lightningdit.conditioning=in_context", "lightningdit.shift=false"], r"shift=false is of adaptive layer"),
        (
            ["lightningdit.conditioning=in_context", "lightningdit.routing={first_block: 1, last_block: 1, fuse: {}}"],
            r"routing\.fuse joins tokens that may all skip",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load(RunConfig, "quickstart", overrides)
    assert "\n" not in str(caught.value)
