"""Released LightningDiT checkpoints against the public implementation, in every combination of its switches."""

import itertools

import pytest
import torch
from support.golden import golden, golden_state
from support.public_lightningdit import PublicLightningDiT

from vavae.errors import UserError
from vavae.interop.released_lightningdit import load_released_lightningdit, save_released_lightningdit
from vavae.models.dit.config import SIZES, LightningDiTConfig
from vavae.models.dit.model import LightningDiT

SWITCHES = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift")
FULL = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True}


@pytest.fixture
def saved(tmp_path):
    """Write a state dict as a checkpoint; its path."""

    def save(state, name="model.pt"):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("name", ["lightningdit_tiny", "lightningdit_tiny_p2_qknorm"])
def test_velocity_loss_and_gradients_of_the_fixtures(saved, name):
    spec, tensors = golden(name)
    model = load_released_lightningdit(saved({"ema": golden_state(tensors)}))
    velocity = model(tensors["in.x"], tensors["in.t"], tensors["in.y"])
    loss = (velocity - tensors["in.target"]).square().mean()
    loss.backward()
    torch.testing.assert_close(velocity, tensors["out.velocity"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, tensors["out.loss"], atol=1e-6, rtol=0)
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    norms = torch.stack([gradients[key].norm() for key in spec["grad_names"]])
    torch.testing.assert_close(norms, tensors["out.grad_norms"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("on", list(itertools.product([False, True], repeat=len(SWITCHES))))
def test_every_switch_of_the_public_code(saved, patch, on):
    switches = dict(zip(SWITCHES, on, strict=True))
    public = PublicLightningDiT(patch_size=patch, **switches)
    path = saved({"model": {f"module.{name}": tensor for name, tensor in public.state_dict().items()}, "opt": {}})
    heads = {} if switches["use_qknorm"] or switches["use_rope"] else {"heads": 3}
    model = load_released_lightningdit(path, **heads)
    assert model.config == LightningDiTConfig(
        size=None, depth=2, width=48, heads=3, patch_size=patch, classes=5,
        qk_norm=switches["use_qknorm"],
        mlp="swiglu" if switches["use_swiglu"] else "gelu",
        norm="rmsnorm" if switches["use_rmsnorm"] else "layernorm",
        rope=switches["use_rope"],
        shift=not switches["wo_shift"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0, 0.3, 1]), torch.tensor([0, 3, 5])
    velocity, expected = model(*inputs), public(*inputs)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)
    velocity.square().mean().backward()
    expected.square().mean().backward()
    gradients = dict(public.named_parameters())
    for name, parameter in model.named_parameters():
        # Without RoPE the bias of the keys' norm has no gradient but rounding.
        expected = pytest.approx(gradients[name].grad.norm().item(), rel=1e-4, abs=1e-7)
        assert parameter.grad.norm().item() == expected, name
    save_released_lightningdit(path, model)
    assert same(torch.load(path)["ema"], public.state_dict())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rope", [False, True])
def test_named_sizes_are_known_by_depth_and_width(saved, size, rope):
    with torch.device("meta"):
        config = LightningDiTConfig(size=size, classes=1000, qk_norm=False, rope=rope)
        shapes = {name: tensor.shape for name, tensor in LightningDiT(config, 2, 2).state_dict().items()}
    # A file of some kilobytes: all values of a tensor are one.
    path = saved({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})
    with pytest.raises(UserError, match=r"embedding_table.weight is .* with classes=3: [^(]*$"):  # and nothing else
        load_released_lightningdit(path, classes=3)


@pytest.fixture
def public():
    return PublicLightningDiT(**FULL).state_dict()


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "safetensors"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, saved, suffix, public):
    state = {name: tensor.to(torch.bfloat16) for name, tensor in public.items()}
    model = load_released_lightningdit(saved(state))
    path = f"{tmp_path}/again.{suffix}"
    save_released_lightningdit(path, model)
    assert same(load_released_lightningdit(path).state_dict(), state)


def test_the_average_goes_before_the_model(saved, public):
    ema = {name: tensor + 0.25 if name == "x_embedder.proj.bias" else tensor for name, tensor in public.items()}
    model = load_released_lightningdit(saved({"model": public, "ema": ema, "opt": {"state": {}}, "config": {"a": 1}}))
    assert same(model.state_dict(), ema)


def test_the_model_trains_and_is_not_tied_to_its_file(saved, public):
    path = saved(public)
    model = load_released_lightningdit(path)
    path.write_bytes(b"")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert same(model.state_dict(), public)


def test_the_average_of_positions_may_have_drifted_as_rounding_makes_it(saved, public):
    average = public["pos_embed"].clone()
    for _ in range(3000):
        average.mul_(0.9999).add_(public["pos_embed"], alpha=1 - 0.9999)
    assert not torch.equal(average, public["pos_embed"])
    model = load_released_lightningdit(saved({**public, "pos_embed": average}))
    assert torch.equal(model.pos_embed, average)


@pytest.mark.parametrize("table", ["pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"])
def test_other_positions_are_another_model(saved, public, table):
    path = saved({**public, table: public[table].flip(1)})
    with pytest.raises(
        UserError, match=rf"{table} \[.*64, \d+\] differs by [\d.]+ from the published positions of 8 x 8"
    ):
        load_released_lightningdit(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"latent_dim": 16}, r"x_embedder.proj.weight is \[48, 4, 1, 1\], expected \[48, 16, 1, 1\] with latent_dim"),
        ({"classes": 7}, r"y_embedder.embedding_table.weight is \[6, 48\], expected \[8, 48\] with classes=7"),
        ({"size": "S"}, r"pos_embed is \[1, 64, 48\], expected \[1, 64, 384\] with size=S"),
        ({"depth": 3}, r"no tensor blocks.2.norm1.weight, expected \[48\] with depth=3"),
        ({"heads": 2}, r"feat_rope.freqs_cos is \[64, 16\], expected \[64, 24\] with heads=2"),
        ({"qk_norm": True}, r"no tensor blocks.0.attn.q_norm.weight, expected \[16\] with qk_norm=True"),
        ({"norm": "layernorm"}, r"blocks.0.norm1.weight is \[48\], expected no such tensor with norm=layernorm"),
        ({"mlp": "gelu"}, r"no tensor blocks.0.mlp.fc1.weight, expected \[192, 48\] with mlp=gelu"),
        ({"rope": False}, r"feat_rope.freqs_cos is \[64, 16\], expected no such tensor with rope=False"),
        ({"shift": False}, r"adaLN_modulation.1.weight is \[288, 48\], expected \[192, 48\] with shift=False"),
        ({"grid": (8, 4)}, r"pos_embed is \[1, 64, 48\], expected \[1, 32, 48\] with grid=\(8, 4\)"),
        ({"patch_size": 2}, r"pos_embed is \[1, 64, 48\], expected \[1, 16, 48\] with patch_size=2"),
        ({"patch_size": 3}, r"patch_size=3 does not divide the 8 x 8 latent"),
        ({"heads": 5}, r"width=48 must be a multiple of heads=5"),
        ({"mlp": "relu"}, r"mlp: Input should be 'swiglu' or 'gelu'"),
        ({"shade": 3}, r"no setting shade; there are size, depth, width"),
    ],
)  # fmt: skip
def test_an_override_that_the_tensors_contradict_is_refused_in_one_line(saved, public, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_released_lightningdit(saved(public), **overrides)
    assert "\n" not in str(caught.value)


def test_overrides_that_agree_or_change_no_tensor_are_taken(saved, public):
    model = load_released_lightningdit(saved(public), classes=5, latent_dim=4, grid=(8, 8), checkpoint_activations=True)
    assert model.config.checkpoint_activations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learn_sigma": True}, r"final_layer.linear.weight is \[8, 48\], expected \[4, 48\]: .*\(learn_sigma\)"),
        ({"use_rope": False}, r"no tensor tells the number of heads .* depth=2 with width=48 .*: pass heads=\.\.\."),
    ],
)
def test_other_public_models_are_refused(saved, change, message):
    with pytest.raises(UserError, match=message):
        load_released_lightningdit(saved(PublicLightningDiT(**{**FULL, **change}).state_dict()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blocks.1.attn.qkv.weight", None, r"no tensor blocks.1.attn.qkv.weight, expected \[144, 48\] by the other"),
        ("blocks.1.attn.qkv.bias", torch.ones(3), r"blocks.1.attn.qkv.bias is \[3\], expected \[144\] by the other"),
        ("final_layer.linear.bias", torch.ones(4).int(), r"final_layer.linear.bias holds torch.int32, expected torch"),
        ("repa_projector.0.weight", torch.ones(2, 3), r"repa_projector.0.weight is \[2, 3\], expected no such tensor"),
        ("x_embedder.proj.weight", torch.ones(48), r"x_embedder.proj.weight is \[48\], expected 4 dimensions"),
        ("pos_embed", None, r"no tensor pos_embed, which every LightningDiT has; this looks like a LightningD"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named_with_its_shape(saved, public, name, change, message):
    state = {key: tensor for key, tensor in {**public, name: change}.items() if tensor is not None}
    with pytest.raises(UserError, match=message) as caught:
        load_released_lightningdit(saved(state))
    assert "\n" not in str(caught.value)
