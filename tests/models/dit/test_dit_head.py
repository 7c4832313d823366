"""Blocks of another width at the end of the network."""

import pytest
import torch
import yaml
from pydantic import ValidationError
from support.golden import golden
from support.older_reader import reader_without
from support.public_clock import PublicClock
from torch.nn import functional as F

from vavae.errors import UserError
from vavae.interop.export import DESCRIPTION, WEIGHTS, LightningDiTDescription, load_exported_lightningdit, save_export
from vavae.interop.released_lightningdit import load_released_lightningdit, save_released_lightningdit
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT

HEAD = {"depth": 1, "width": 48, "heads": 3}
TABLES = {"pos_embed", *(f"{part}feat_rope.freqs_{kind}" for part in ("", "head.") for kind in ("cos", "sin"))}


def config(head=HEAD, **switches):
    return LightningDiTConfig(size=None, depth=2, width=32, heads=2, classes=5, head=head, **switches)


def dit(head=HEAD, **switches):
    generator = torch.Generator().manual_seed(0)
    model = LightningDiT(config(head, **switches), 6, 4, generator)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, 4, 4, generator=generator), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 5])


def our_name(public, depth):
    """Theirs number all blocks in a row, and their `x_embedder` is that of the head."""
    block = public.split(".")
    if block[0] == "blocks" and int(block[1]) >= depth:
        return ".".join(["head", "blocks", str(int(block[1]) - depth), *block[2:]])
    names = {
        "s_embedder": "x_embedder", "x_embedder": "head.x_embedder", "s_projector": "head.projector",
        "enc_feat_rope": "feat_rope", "dec_feat_rope": "head.feat_rope",
    }  # fmt: skip
    return ".".join([names.get(block[0], block[0]), *block[1:]])


@pytest.mark.parametrize("prefix", ["", "weak."])
def test_outputs_inner_tensors_and_gradients_equal_the_public_implementation(prefix):
    spec, tensors = golden("beyond_ddt_head")
    sizes = spec["weak" if prefix else "model"]
    shape, head = (
        {"width": sizes["hidden_size"][i], "depth": sizes["depth"][i], "heads": sizes["num_heads"][i]} for i in (0, 1)
    )
    switches = LightningDiTConfig(size=None, **shape, classes=sizes["num_classes"], qk_norm=False, head=head)
    model = LightningDiT(switches, sizes["in_channels"], sizes["input_size"])
    model.t_embedder = PublicClock(shape["width"])
    names = [name for name in tensors if name.startswith(f"{prefix}state.")]
    state = {our_name(name.removeprefix(f"{prefix}state."), shape["depth"]): tensors[name] for name in names}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown
    assert {*missing} <= TABLES
    inner = {}
    for module, name in ((model.head.projector, "decoder_condition"), (model.head.x_embedder, "decoder_in")):
        module.register_forward_hook(lambda *call, name=name: inner.update({name: call[2]}))
    model.head.blocks[-1].register_forward_hook(lambda *call: inner.update(decoder_out=call[2]))
    model.head.projector.register_forward_hook(lambda *call: inner.update(encoder_condition=call[1][0]))
    velocity = -model(tensors["in.x"], tensors["in.noise_level"], tensors["in.y"])
    expected = tensors["out.velocity_weak" if prefix else "out.velocity"]
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    if prefix:
        return
    for name, tensor in inner.items():
        torch.testing.assert_close(tensor, tensors[f"out.{name}"], atol=1e-5, rtol=1e-5)
    assert len(inner) == 4
    loss = (velocity - tensors["in.target"]).square().mean()
    torch.testing.assert_close(loss, tensors["out.loss"], atol=0, rtol=1e-5)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = torch.stack([gradients[our_name(name, shape["depth"])].norm() for name in spec["grad_names"]])
    torch.testing.assert_close(norms, tensors["out.grad_norms"], rtol=1e-4, atol=0)


def test_without_a_head_there_is_no_tensor_of_it_and_with_one_the_first_output_is_zero():
    assert not [name for name in LightningDiT(config(None), 6, 4).state_dict() if "head" in name]
    assert LightningDiT(config(), 6, 4)(*batch()).eq(0).all()


def test_a_head_as_wide_as_the_blocks_needs_no_projection():
    model = dit({"depth": 1, "width": 32, "heads": 2})
    assert not [name for name in model.state_dict() if "projector" in name]
    assert model(*batch()).std() > 0


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for again in (False, True):
        model = dit(checkpoint_activations=again, intermediate_head={"after_block": 1})
        velocity, intermediate, *_ = model.predict(*batch())
        (velocity.square().mean() + intermediate.square().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_tokens_of_the_head_keep_the_dtype_of_the_weights_under_autocast():
    model, dtypes = dit(), []
    model.head.blocks[0].register_forward_pre_hook(lambda _, arguments: dtypes.append(arguments[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*batch())
    assert dtypes == [torch.float32]
    torch.testing.assert_close(half, model(*batch()), atol=0.05, rtol=0.05)


def test_another_grid_has_tables_for_the_head_too():
    model = dit().at_grid((4, 8))
    assert len(model.head.feat_rope.freqs_cos) == 32
    assert model(torch.ones(1, 6, 4, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64)).shape == (1, 6, 4, 8)


def test_each_token_has_its_own_condition():
    model = dit()
    x, t, _ = batch()
    tokens = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(1))
    _, activated = model.head(x, tokens, model.t_embedder(t))
    condition = F.silu(model.t_embedder(t)[1] + tokens[1, 5])
    torch.testing.assert_close(activated[1, 5], F.silu(model.head.projector(condition)))


def test_an_export_comes_back_and_older_readers_refuse_it(storage):
    model = dit().eval()
    description = LightningDiTDescription(lightningdit=model.config, latent_dim=6, grid=4, tokenizer="t")
    save_export(storage, description, {WEIGHTS: model.state_dict()})
    loaded, found = load_exported_lightningdit(storage)
    assert found == description
    assert torch.equal(loaded(*batch()), model(*batch()))
    with pytest.raises(ValidationError, match=r"lightningdit\.head\s+Extra inputs are not permitted"):
        reader_without("head").restore(yaml.safe_load(storage.read_bytes(DESCRIPTION)))


def test_the_released_layout_has_no_head(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"no lightningdit\.head: take the run's own export"):
        save_released_lightningdit(path, dit())
    save_released_lightningdit(path, LightningDiT(config(None), 6, 4))
    with pytest.raises(UserError, match=r"no tensor head\..* with head=") as caught:
        load_released_lightningdit(path, head=HEAD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"depth": 0}, "greater than or equal to 1"),
        ({"width": 50, "heads": 3}, "width=50 must be a multiple of heads=3"),
        ({"width": 54, "heads": 9}, r"head\.width=54 / head\.heads=9 must be a multiple of 4 for rope"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(head, message):
    with pytest.raises(ValidationError, match=message):
        config(head)
