"""Each family of teachers against an extraction written apart: timm's network built for the image's very size.

The architectures are timm's, narrower and with fewer blocks; every tensor, norms and embeddings included, is random.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vavae.errors import UserError
from vavae.models.tokenizer.config import TEACHERS, TeacherConfig
from vavae.models.tokenizer.teacher import VisionFoundationTeacher, teacher_geometry
from vavae.randomness import torch_generator

# isort: split
import timm
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Name -> patch, tokens before those of the patches, statistics that its publisher gives
FAMILIES = {
    "dinov2_small": (14, 1, IMAGENET),
    "dinov2_small_registers": (14, 5, IMAGENET),
    "dinov3_small": (16, 5, IMAGENET),
    "mae_base": (16, 1, IMAGENET),
    "clip_base": (16, 1, OPENAI),
    "clip_large": (14, 1, OPENAI),
    "sam_base": (16, 0, IMAGENET),
    "siglip2_base": (16, 0, HALF),
    "deit_tiny_distilled_patch16_224.fb_in1k": (16, 2, IMAGENET),
}
SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: real(name, **SMALL, **options))


def timm_model(name: str, **options: Any) -> Any:
    return timm.create_model(TEACHERS.get(name, name), **options).eval()


def random_weights(name: str) -> dict[str, torch.Tensor]:
    generator = torch_generator(0, name)
    return {
        key: 0.3 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in timm_model(name).state_dict().items()
    }


@pytest.fixture
def teacher(tmp_path):
    """Make the teacher of a name with random weights."""

    def make(name: str, **options: Any) -> VisionFoundationTeacher:
        file = tmp_path / "random.safetensors"
        save_file(random_weights(name), file)
        return VisionFoundationTeacher(TeacherConfig(name=name, weights=str(file), **options))

    return make


def images(*shape: int) -> torch.Tensor:
    return 2 * torch.rand(*shape, generator=torch_generator(0, "images")) - 1


def model_of_size(name: str, height: int, width: int) -> Any:
    """The network as if pretrained at this size, its position embeddings resampled beforehand."""
    patch, prefix, _ = FAMILIES[name]
    grid = (height // patch, width // patch)
    weights = random_weights(name)
    if name.startswith("sam"):
        weights["pos_embed"] = resample_abs_pos_embed_nhwc(weights["pos_embed"], grid)
        window = 14  # where attention is within windows, positions are relative to those
        for key, side in {"rel_pos_h": grid[0], "rel_pos_w": grid[1]}.items():
            for whole in [one for one in weights if one.endswith(key) and len(weights[one]) != 2 * window - 1]:
                table = weights[whole].T[None]  # [1, C, L]
                weights[whole] = F.interpolate(table, 2 * side - 1, mode="linear")[0].T
    elif "pos_embed" in weights:
        without_prefix = name.endswith("registers")
        weights["pos_embed"] = resample_abs_pos_embed(
            weights["pos_embed"], list(grid), num_prefix_tokens=0 if without_prefix else prefix
        )
    model = timm_model(name, img_size=(height, width))
    model.load_state_dict(weights)
    return model


def expected_features(name: str, batch: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] of images that already have the size of the grid and the statistics of the teacher."""
    patch, prefix, _ = FAMILIES[name]
    height, width = batch.shape[2:]
    tokens = model_of_size(name, height, width).forward_features(batch)
    if tokens.ndim == 4:
        return tokens
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (height // patch, width // patch))


@pytest.mark.parametrize("grid", [(16, 16), (3, 5)])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_patch_tokens_of_the_network_built_for_the_size(teacher, name, grid):
    patch, _, (mean, std) = FAMILIES[name]
    batch = images(2, 3, grid[0] * patch, grid[1] * patch)
    normalized = ((batch + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    features = teacher(name)(batch, grid)
    assert features.dtype == torch.float32
    assert features.std() > 0.1
    torch.testing.assert_close(features, expected_features(name, normalized), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "side"), [("dinov2_small", 224), ("mae_base", 256)])
@torch.no_grad()
def test_a_256_pixel_image_as_the_released_code_feeds_it(teacher, name, side):
    batch = images(1, 3, 256, 256)
    resized = F.interpolate(batch, size=(side, side), mode="bilinear", align_corners=False, antialias=False)
    released = timm_model(name, dynamic_img_size=True)
    released.load_state_dict(random_weights(name))
    expected = released.forward_features(resized)[:, 1:].transpose(1, 2).reshape(1, -1, 16, 16)
    torch.testing.assert_close(teacher(name, normalize=False)(batch, (16, 16)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2_small", "dinov2_small_registers", "dinov3_small", "clip_base"])
@torch.no_grad()
def test_a_class_token_is_the_one_that_the_network_ends_with(teacher, name):
    network, grid = teacher(name), (2, 2)
    batch = images(2, 3, *network.geometry.image_size(grid))
    found = network.tokens(batch, grid, True)
    assert torch.equal(found[:, 1:], network(batch, grid).flatten(2).transpose(1, 2))
    expected = network.model.forward_features(network.normalizer(batch))[:, 0]
    torch.testing.assert_close(found[:, 0], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_for_good_and_without_a_gradient(teacher, name):
    frozen = teacher(name).train()
    assert not any(module.training for module in frozen.modules() if module is not frozen)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen(images(1, 3, 32, 32).requires_grad_(), (2, 2)).requires_grad


@torch.no_grad()
def test_projected_tokens_of_clip_take_the_way_of_its_image_embedding(teacher):
    projecting = teacher("clip_base", project=True, normalize=False)
    batch = images(2, 3, 224, 224)
    model = model_of_size("clip_base", 224, 224)
    tokens = model.head(model.forward_features(batch))  # [B, 1 + N, 512]
    torch.testing.assert_close(tokens[:, 0], model(batch), msg="the class token becomes the embedding of the image")
    features = projecting(batch, (14, 14))
    assert features.shape[1] == projecting.feature_dim == 512
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["dinov2_small", "dinov3_small", "siglip2_base", "sam_base", "resnet18", "vit_base_patch16_rpn_224"]
)
def test_only_a_head_of_the_class_token_projects(name, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match="no projection of its tokens"):
        teacher_geometry(TeacherConfig(name=name, project=True))


def test_weights_in_the_names_of_their_publisher(teacher, tmp_path):
    ours = teacher("sam_base")
    published = {
        "image_encoder." + name.replace("mlp.fc", "mlp.lin"): tensor
        for name, tensor in random_weights("sam_base").items()
    }
    file = tmp_path / "sam_vit_b.pth"
    torch.save({**published, "mask_decoder.iou_token.weight": torch.zeros(1, 256)}, file)
    theirs = VisionFoundationTeacher(TeacherConfig(name="sam_base", weights=str(file)))
    batch = images(1, 3, 32, 32)
    assert torch.equal(ours(batch, (2, 2)), theirs(batch, (2, 2)))
