"""The representation autoencoder: what its frozen encoder gives, and what its decoder makes of it."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file
from support.golden import golden
from support.representation import DIM, tokenizer_config
from torch import Tensor

from vavae.errors import UserError
from vavae.models.backbones.load import meta_backbone
from vavae.models.tokenizer.config import DECODER_SIZES, EncoderConfig, ViTDecoderConfig
from vavae.models.tokenizer.representation import (
    RepresentationAutoencoder,
    RepresentationEncoder,
    build_autoencoder,
    check_encoder,
    combine_layers,
    load_encoder,
)
from vavae.models.tokenizer.vit_decoder import ViTDecoder, position_table
from vavae.randomness import torch_generator


def images(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape, generator=torch_generator(0, "images")) - 1


@pytest.fixture(scope="module")
def autoencoder() -> RepresentationAutoencoder:
    torch.manual_seed(0)
    config = tokenizer_config()
    found = build_autoencoder(config, load_encoder(config))
    assert isinstance(found, RepresentationAutoencoder)
    return found


@pytest.fixture
def transformer(tmp_path):
    """Make an encoder that is a tiny transformer of timm with random weights."""
    name, weights = "test_vit.r160_in1k", str(tmp_path / "vit.safetensors")
    generator = torch_generator(0, "vit")
    shapes = {key: each.shape for key, each in meta_backbone(EncoderConfig(name=name).backbone).state_dict().items()}
    save_file({key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}, weights)
    return lambda **fields: RepresentationEncoder(EncoderConfig(name=name, weights=weights, **fields))


def test_layers_are_combined_as_in_the_public_code():
    _, tensors = golden("beyond_rae")
    layers = [each.unflatten(1, (4, 4)) for each in tensors["layers.in"]]
    expected = tensors["layers.out"].unflatten(1, (4, 4))
    torch.testing.assert_close(combine_layers(layers, global_mean=True), expected, rtol=0, atol=1e-10)
    without_mean = expected - tensors["layers.out.global"][:, None, None]
    torch.testing.assert_close(combine_layers(layers, global_mean=False), without_mean, rtol=0, atol=1e-10)


def test_a_latent_is_normalized_at_each_position_and_is_a_point(autoencoder):
    latent = autoencoder.encode(images(2, 3, 32, 16))
    assert latent.mean.shape == (2, DIM, 4, 2)
    assert latent.mean.dtype == torch.float32
    torch.testing.assert_close(latent.mean.mean(1), torch.zeros(2, 4, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(latent.mean.var(1, correction=0), torch.ones(2, 4, 2), rtol=0, atol=1e-3)
    assert latent.std is None
    assert latent.kl() is None
    drawn = latent.sample(torch_generator(0, "x")), latent.at(torch.ones_like(latent.mean)), latent.mode
    assert all(each is latent.mean for each in drawn)


def test_one_layer_of_a_transformer_is_its_last_without_scale_and_shift(transformer):
    encoder, pixels = transformer(), images(2, 3, 64, 48)
    latent = encoder(pixels, (4, 3))
    encoder.model.norm.weight.data.fill_(1)  # which the latent does not depend on
    encoder.model.norm.bias.data.zero_()
    (normed,) = encoder.model.forward_intermediates(
        encoder.normalizer(pixels), indices=[5], norm=True, intermediates_only=True
    )
    torch.testing.assert_close(latent, normed, rtol=1e-5, atol=1e-5)


def test_several_layers_of_a_transformer_are_averaged(transformer):
    pixels = images(2, 3, 64, 64)
    one, other = (transformer(layers=(index,))(pixels, (4, 4)) for index in (2, 5))
    both = transformer(layers=(2, 5))(pixels, (4, 4))
    torch.testing.assert_close(both, (one + other) / 2)
    with_mean = transformer(layers=(2, 5), global_mean=True)(pixels, (4, 4))
    torch.testing.assert_close(with_mean, both + other.mean((2, 3), keepdim=True), rtol=1e-5, atol=1e-5)


def test_images_reach_the_encoder_at_its_own_size_by_bicubic_interpolation(transformer):
    pixels = images(1, 3, 32, 32)
    resized = F.interpolate(pixels, (64, 64), mode="bicubic", align_corners=False)
    encoder = transformer()
    assert torch.equal(encoder(pixels, (4, 4)), encoder(resized, (4, 4)))


def test_the_encoder_is_frozen_and_beside_the_weights(autoencoder):
    before = autoencoder.encoder.weights_digest()
    pixels = images(2, 3, 16, 16).requires_grad_()
    z = autoencoder.encode(pixels).mode
    assert not z.requires_grad
    autoencoder.train().decode(z).square().mean().backward()
    assert not any(each.requires_grad or each.grad is not None for each in autoencoder.encoder.parameters())
    assert all(name.startswith("decoder.") for name in autoencoder.state_dict())
    assert all(each.grad is not None for each in autoencoder.parameters())
    assert not any(module.training for module in autoencoder.encoder.modules())
    assert autoencoder.encoder.weights_digest() == before


def test_the_encoder_moves_with_the_autoencoder_but_is_not_emptied_with_it():
    config = tokenizer_config()
    encoder = load_encoder(config)
    before = encoder.weights_digest()
    with torch.device("meta"):
        built = build_autoencoder(config, encoder)
    built.to_empty(device="cpu")
    assert encoder.weights_digest() == before
    built.to(torch.float64)
    assert {each.dtype for each in encoder.model.parameters()} == {torch.float64}


def test_the_decoder_is_that_of_diffusers():
    rae = pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae")
    config = ViTDecoderConfig(size=None, width=24, depth=2, heads=3, mlp_width=48, patch_size=2)
    ours = ViTDecoder(config, latent_dim=5, image_channels=3).double()
    state = {name: torch.randn_like(each) / 2 for name, each in ours.state_dict().items()}
    ours.load_state_dict(state)
    # It stretches the positions of any other grid to those of 16 x 16, the published one.
    theirs = rae.RAEDecoder(5, 24, 2, 3, 48, num_patches=256, patch_size=2, image_size=32).double()
    theirs.load_state_dict(dict(pair for name, each in state.items() for pair in _in_diffusers(name, each)))
    z = torch.randn(2, 5, 16, 16, dtype=torch.float64)
    images = theirs.unpatchify(theirs(z.flatten(2).transpose(1, 2)).logits)
    torch.testing.assert_close(ours(z), images, rtol=1e-6, atol=1e-6)  # tables of positions are float32


def _in_diffusers(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Name a weight of the decoder as diffusers does, where queries, keys and values are by themselves."""
    renamed = {"embedder": "decoder_embed", "class_token": "trainable_cls_token", "norm": "decoder_norm"}
    block, *rest = re.split(r"(?<=^blocks\.\d)\.", name)
    if not rest:
        return [(re.sub(r"^\w+", lambda m: renamed.get(m[0], "decoder_pred"), name), value)]
    part, kind = rest[0].split(".")
    names = {
        "qkv": ["attention.to_q", "attention.to_k", "attention.to_v"],
        "proj": ["attention.to_out.0"],
        "norm1": ["layernorm_before"],
        "norm2": ["layernorm_after"],
        "fc1": ["intermediate.dense"],
        "fc2": ["output.dense"],
    }[part]
    layer = block.replace("blocks", "decoder_layers")
    return [(f"{layer}.{name}.{kind}", each) for name, each in zip(names, value.chunk(len(names)), strict=True)]


def test_positions_are_those_of_mae():
    table = position_table(16, (2, 3))
    for row in range(2):
        for column in range(3):
            expected = [
                function(place / 10_000 ** (index / 4))
                for place in (column, row)
                for function in (math.sin, math.cos)
                for index in range(4)
            ]
            assert table[3 * row + column].tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("unit_output", [False, True])
def test_each_position_fills_its_patch_of_the_image(unit_output):
    config = ViTDecoderConfig(size=None, width=8, depth=1, heads=1, patch_size=2, unit_output=unit_output)
    decoder = ViTDecoder(config, latent_dim=3, image_channels=3)
    bias = torch.arange(12.0)  # row, column and channel of a patch, in this order
    with torch.no_grad():
        decoder.output.weight.zero_()
        decoder.output.bias.copy_(bias)
        image = decoder(torch.zeros(1, 3, 2, 3))
    patch = bias.view(2, 2, 3).permute(2, 0, 1)
    expected = patch.repeat(1, 2, 3)[None]
    assert torch.equal(image, 2 * expected - 1 if unit_output else expected)


def test_recomputed_blocks_have_equal_gradients():
    z, found = torch.randn(2, DIM, 2, 2), []
    for recompute in (False, True):
        torch.manual_seed(0)
        decoder = build_autoencoder(tokenizer_config(checkpoint_activations=recompute))
        decoder.decode(z).square().sum().backward()
        found.append([each.grad for each in decoder.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_published_decoders_have_their_sizes():
    counts = {}
    for size in DECODER_SIZES:
        with torch.device("meta"):
            decoder = ViTDecoder(ViTDecoderConfig(size=size), latent_dim=768, image_channels=3)
        counts[size] = sum(each.numel() for each in decoder.parameters())
    # 12 D² of a block with an inner width of 4 D, and the layers around the blocks.
    assert counts["B"] == pytest.approx(12 * 12 * 768**2, rel=0.05)
    assert counts["L"] == pytest.approx(24 * 12 * 1024**2, rel=0.05)
    assert counts["XL"] == pytest.approx(28 * (4 * 1152**2 + 2 * 1152 * 4096), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "kl"}, "latent_dim"),
        ({"encoder": None}, "kind=representation needs encoder"),
        ({"decoder": None}, "kind=representation needs decoder"),
        ({"channels": 32}, "channels=32 is of kind=kl"),
        ({"decoder": {"width": 8}}, "width=8 beside size=XL"),
        ({"decoder": {"size": None, "width": 8, "heads": 2}}, "size=null needs depth"),
        ({"decoder": {"size": None, "width": 8, "depth": 1, "heads": 3}}, "multiple of 4 and of heads=3"),
        ({"encoder": {"layers": [3, 1]}}, "in rising order"),
        ({"encoder": {"global_mean": True}}, "is of several layers"),
        ({"encoder": {"name": "clip_base", "project": True}}, "project=true is of a teacher"),
    ],
)
def test_sections_that_do_not_agree_are_refused(changes, message):
    message = "encoder is of kind=representation" if changes == {"kind": "kl"} else message
    with pytest.raises(ValidationError, match=re.escape(message)):
        tokenizer_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 32}, "gives 112 channels: set latent_dim=112"),
        ({"encoder": {"name": "efficientnet_lite0", "layers": [1, 2]}}, "efficientnet_lite0 is convolutional"),
        ({"encoder": {"name": "dinov2_small", "layers": [12]}, "latent_dim": 384}, "has blocks 0 to 11"),
        ({"encoder": {"name": "efficientnet_lite0", "stage_stride": 5}}, "stage_stride is one of"),
    ],
)
def test_an_encoder_that_cannot_be_is_refused_without_its_weights(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_encoder(tokenizer_config(**changes), (2, 2))


@pytest.mark.parametrize(
    ("name", "dim"),
    [("dinov3_large", 1024), ("clip_base", 768), ("sam_base", 768)],
)
def test_teachers_can_be_encoders(name, dim):
    config = tokenizer_config(encoder={"name": name, "layers": [1, 3]}, latent_dim=dim)
    check_encoder(config, (16, 16) if name != "sam_base" else (64, 64))
