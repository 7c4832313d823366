"""LightningDiT against the public implementation, and its switches."""

import pytest
import torch
from support.golden import golden as golden_numbers
from support.small_dit import SIZES, random_dit

from vavae.errors import UserError
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT


def inputs(model, batch=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, model.latent_dim, *model.grid, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % (model.null_label + 1)


@pytest.mark.parametrize("name", ["lightningdit_tiny", "lightningdit_tiny_p2_qknorm"])
def test_output_loss_and_gradients_equal_the_public_implementation(name):
    spec, golden = golden_numbers(name)
    public = spec["model"]
    config = LightningDiTConfig(
        size=None,
        depth=public["depth"],
        width=public["hidden_size"],
        heads=public["num_heads"],
        patch_size=public["patch_size"],
        classes=public["num_classes"],
        qk_norm=public.get("use_qknorm", False),
    )
    model = LightningDiT(config, public["in_channels"], public["input_size"])
    state = {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}
    for table in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        assert torch.equal(model.state_dict()[table], state[table]), table
    model.load_state_dict(state)

    velocity = model(golden["in.x"], golden["in.t"], golden["in.y"])
    loss = (velocity - golden["in.target"]).square().mean()
    loss.backward()
    torch.testing.assert_close(velocity, golden["out.velocity"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, golden["out.loss"], atol=1e-6, rtol=0)
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert sorted(gradients) == sorted(spec["grad_names"])
    norms = torch.stack([gradients[key].norm() for key in spec["grad_names"]])
    torch.testing.assert_close(norms, golden["out.grad_norms"], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("switches", "gone", "new"),
    [
        ({"qk_norm": False}, {"attn.q_norm.weight", "attn.k_norm.weight"}, set()),
        ({"norm": "layernorm"}, {"norm1.weight", "norm2.weight"}, {"attn.q_norm.bias", "attn.k_norm.bias"}),
        (
            {"mlp": "gelu"},
            {f"mlp.{layer}.{kind}" for layer in ("w12", "w3") for kind in ("weight", "bias")},
            {f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")},
        ),
        ({"rope": False}, set(), set()),
    ],
)
def test_each_switch_changes_the_names_it_should_and_the_output(switches, gone, new):
    default, switched = random_dit(), random_dit(**switches)
    names, changed = (
        {name.removeprefix("blocks.0.") for name in model.state_dict() if name.startswith("blocks.0.")}
        for model in (default, switched)
    )
    assert names - changed == gone
    assert changed - names == new
    assert ("feat_rope.freqs_cos" in switched.state_dict()) == switched.config.rope
    shared = {k: v for k, v in default.state_dict().items() if k in switched.state_dict()}
    switched.load_state_dict({**switched.state_dict(), **shared})
    assert not torch.allclose(default(*inputs(default)), switched(*inputs(default)))


def test_without_shift_the_blocks_scale_and_gate_as_with_a_shift_of_zero():
    plain, shifting = random_dit(shift=False), random_dit()
    state = plain.state_dict()
    for key, value in state.items():
        if key.startswith("blocks") and "adaLN" in key:
            scale1, gate1, scale2, gate2 = value.chunk(4)
            zero = torch.zeros_like(gate1)
            state[key] = torch.cat([zero, scale1, gate1, zero, scale2, gate2])
    shifting.load_state_dict(state)
    torch.testing.assert_close(shifting(*inputs(plain)), plain(*inputs(plain)))


def test_it_starts_silent_and_its_weights_are_a_function_of_the_generator():
    config = LightningDiTConfig(**SIZES)
    first, same, other = (LightningDiT(config, 3, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.count_nonzero(first(*inputs(first))) == 0
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_initial_weights_have_the_published_spread():
    model = LightningDiT(
        LightningDiTConfig(size=None, depth=1, width=128, heads=2, classes=100), 8, 4, torch.Generator().manual_seed(0)
    )
    bound = (6 / (128 + 3 * 128)) ** 0.5  # Xavier: uniform in ± sqrt(6 / (fan in + fan out))
    weight = model.blocks[0].attn.qkv.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert model.x_embedder.proj.weight.abs().max() <= (6 / (8 + 128)) ** 0.5
    for table in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.count_nonzero(model.blocks[0].adaLN_modulation[1].weight) == 0


def test_the_null_label_has_the_last_embedding_to_itself():
    model = random_dit()
    x, t, _ = inputs(model)
    y = torch.tensor([0, 1, 4, model.null_label])
    before = model(x, t, y)
    model.y_embedder.embedding_table.weight.data[-1] += 1
    changed = (model(x, t, y) != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, False, True]


def test_samples_do_not_see_each_other_and_training_mode_adds_no_dropout():
    model = random_dit()
    x, t, y = inputs(model)
    together = model.train()(x, t, y)
    alone = torch.cat([model.eval()(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone)


def test_a_grid_may_be_rectangular_and_its_transpose_is_another_model():
    model, transposed = random_dit(grid=(4, 6), patch_size=2), random_dit(grid=(6, 4), patch_size=2)
    x, t, y = inputs(model)
    assert model.tokens == (2, 3)
    assert model(x, t, y).shape == x.shape
    assert not torch.equal(model.pos_embed, transposed.pos_embed)
    with pytest.raises(AssertionError, match="expected"):
        transposed(x, t, y)


def test_patches_must_tile_the_grid():
    with pytest.raises(UserError, match="patch_size=3 does not divide the 4 x 4 latent"):
        random_dit(patch_size=3)


def test_checkpointing_keeps_fewer_activations():
    def saved(model):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(*inputs(model))
        return total

    assert saved(random_dit(checkpoint_activations=True)) < saved(random_dit()) / 2


def test_bfloat16_autocast_and_bfloat16_weights_stay_near_float32():
    model = random_dit()
    x, t, y = inputs(model)
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, y)
    mixed.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for velocity in (mixed, model.bfloat16()(x, t, y)):
        assert velocity.dtype == torch.float32
        assert (velocity - exact).norm() < 0.03 * exact.norm()


def test_tokens_stay_in_float32_between_blocks_whose_products_are_bfloat16():
    """Seen here 0.3 % in velocity and gradient; 0.9 and 0.8 % with tokens that are bfloat16 between blocks, too."""
    generator = torch.Generator().manual_seed(2)
    model = LightningDiT(LightningDiTConfig(**{**SIZES, "depth": 12, "width": 64}), 3, 4, generator)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.02, generator=generator)
    types, results = {}, []
    for name in ("blocks.0", "blocks.11", "blocks.5.attn.qkv", "blocks.5.mlp.w3", "final_layer.linear"):
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: types.update({name: output.dtype})
        )
    target, *_ = inputs(model, batch=16, seed=2)
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            velocity = model(*inputs(model, batch=16))
        (velocity - target).square().mean().backward()
        results.append((velocity.detach(), torch.cat([each.grad.flatten() for each in model.parameters()])))
    assert [*types.values()] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    for exact, mixed in zip(*results, strict=True):
        assert 1e-4 < (mixed - exact).norm() / exact.norm() < 0.005


def test_the_model_is_one_graph():
    model = random_dit()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs(model)), model(*inputs(model)))
