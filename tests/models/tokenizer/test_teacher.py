"""Teachers give one feature per latent position, whatever their kind."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vavae.errors import UserError
from vavae.models.backbones.load import ImageNormalizer, meta_backbone
from vavae.models.backbones.weights import timm_name
from vavae.models.tokenizer.config import TEACHERS, TeacherConfig
from vavae.models.tokenizer.teacher import VisionFoundationTeacher, check_teacher, teacher_geometry
from vavae.randomness import torch_generator

# isort: split
import timm


@pytest.fixture(scope="module")
def convolutional() -> VisionFoundationTeacher:
    return VisionFoundationTeacher(TeacherConfig(name="efficientnet_lite0"))


@pytest.fixture
def transformer(tmp_path):
    """A tiny transformer of timm with random weights."""
    config = TeacherConfig(name="test_vit.r160_in1k", weights=str(tmp_path / "vit.safetensors"))
    generator = torch_generator(0, "vit")
    shapes = {name: tensor.shape for name, tensor in meta_backbone(config.backbone).state_dict().items()}
    save_file({name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}, config.weights)
    return VisionFoundationTeacher(config)


def images(*shape: int) -> torch.Tensor:
    return 2 * torch.rand(*shape, generator=torch_generator(0, "images")) - 1


def test_stage_of_the_embedded_teacher(convolutional):
    assert convolutional.geometry.stride == 16
    assert convolutional.feature_dim == 112
    assert convolutional(images(2, 3, 32, 32), (4, 3)).shape == (2, 112, 4, 3)


def test_features_of_an_image_do_not_depend_on_its_batch_or_the_mode(convolutional):
    batch = images(3, 3, 32, 32)
    alone = convolutional(batch[:1], (2, 2))
    torch.testing.assert_close(convolutional.train()(batch, (2, 2))[:1], alone, rtol=1e-4, atol=1e-4)


def test_features_carry_no_gradient_but_early_features_reach_the_images(convolutional):
    batch = images(2, 3, 32, 32).requires_grad_()
    assert not convolutional(batch, (2, 2)).requires_grad
    features = convolutional.early_features(batch)
    assert [feature.shape[1:] for feature in features] == [(16, 16, 16), (24, 8, 8), (40, 4, 4)]
    torch.stack([feature.square().mean() for feature in features]).sum().backward()
    assert (batch.grad != 0).any()
    assert all(parameter.grad is None for parameter in convolutional.parameters())


def test_the_other_embedded_network_can_teach_too():
    teacher = VisionFoundationTeacher(TeacherConfig(name="efficientnet_lite2", stage_stride=8))
    assert teacher(images(2, 3, 32, 32), (4, 4)).shape == (2, 48, 4, 4)


def test_another_stage_can_be_chosen():
    geometry = teacher_geometry(TeacherConfig(stage_stride=8))
    assert (geometry.stride, geometry.feature_dim) == (8, 40)
    with pytest.raises(UserError, match=r"no feature level of stride 5: stage_stride is one of \[2, 4, 8, 16, 32\]"):
        teacher_geometry(TeacherConfig(stage_stride=5))


def test_transformer_features_are_the_normed_patch_tokens(transformer):
    batch = images(2, 3, 32, 48)
    model = transformer.model
    tokens = model.forward_features(transformer.normalizer(batch))[:, model.num_prefix_tokens :]  # [B, N, C]
    expected = tokens.transpose(1, 2).reshape(2, -1, 2, 3)
    torch.testing.assert_close(transformer(batch, (2, 3)), expected)


def test_images_are_resized_to_the_grid_and_features_are_not(transformer):
    batch = images(1, 3, 256, 256)
    resized = F.interpolate(batch, size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(transformer(batch, (4, 4)), transformer(resized, (4, 4)))


def test_the_released_behavior_hands_over_plain_images(transformer):
    plain = VisionFoundationTeacher(transformer.config.model_copy(update={"normalize": False}))
    # This network's own statistics map [-1, 1] to itself.
    transformer.normalizer = plain.normalizer = ImageNormalizer((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    batch = images(1, 3, 32, 32)
    torch.testing.assert_close(transformer(batch, (2, 2)), plain(transformer.normalizer(batch), (2, 2)))
    assert not torch.allclose(transformer(batch, (2, 2)), plain(batch, (2, 2)))


def test_a_transformer_has_no_early_stages(transformer):
    with pytest.raises(UserError, match="no early feature levels"):
        transformer.early_features(images(1, 3, 32, 32))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_256_pixel_image_and_each_published_teacher(name):
    stride = 14 if "dinov2" in name or name == "clip_large" else 16
    width = {"small": 384, "base": 768, "large": 1024}[name.split("_")[1]]
    config = TeacherConfig(name=name)
    geometry = teacher_geometry(config)
    assert (geometry.stride, geometry.feature_dim) == (stride, 256 if name.startswith("sam") else width)
    model = meta_backbone(config.backbone, **geometry.timm_kwargs)
    pixels = torch.empty(1, 3, *geometry.image_size((16, 16)), device="meta")
    (features,) = model.forward_intermediates(pixels, indices=[geometry.level], norm=True, intermediates_only=True)
    assert features.shape == (1, geometry.feature_dim, 16, 16)
    assert timm_name(config.backbone) == TEACHERS[name]


def test_a_misspelt_short_name_gets_the_right_one():
    with pytest.raises(ValueError, match=r"teacher .dinov2_larg.: did you mean dinov2_large"):
        TeacherConfig(name="dinov2_larg")


def test_no_model_of_timm_is_taken_for_a_misspelling():
    for name in {*timm.list_pretrained(), *timm.list_models()}:
        TeacherConfig(name=name)


@pytest.mark.parametrize("name", ["resnet10t.c3_in1k", "convnext_atto.d2_in1k", "tf_efficientnet_lite0.in1k"])
@torch.no_grad()
def test_stages_of_convolutional_teachers(name, tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "random.pth"
    model = timm.create_model(name).eval()
    torch.save(model.state_dict(), file)
    stages = timm.create_model(name, features_only=True).eval()
    stages.load_state_dict(
        {
            key: model.state_dict()[key.replace("stages_", "stages.").replace("stem_", "stem.")]
            for key in stages.state_dict()
        }
    )
    batch = images(2, 3, 64, 96)
    for stride, channels, expected in zip(
        stages.feature_info.reduction(), stages.feature_info.channels(), stages(batch), strict=True
    ):
        config = TeacherConfig(name=name, weights=str(file), stage_stride=stride, normalize=False)
        teacher = VisionFoundationTeacher(config)
        assert teacher.feature_dim == channels
        torch.testing.assert_close(teacher(batch, (64 // stride, 96 // stride)), expected)


def test_what_can_teach_is_found_out_before_anything_is_loaded():
    check_teacher(TeacherConfig(), (1, 1))
    check_teacher(TeacherConfig(name="dinov2_small"), (5, 3))
    with pytest.raises(UserError, match="no feature level of stride 5"):
        check_teacher(TeacherConfig(stage_stride=5), (16, 16))
    fixed = TeacherConfig(name="beit_base_patch16_224")
    check_teacher(fixed, (14, 14))
    with pytest.raises(UserError, match="takes no images of 256 x 256 pixels, but 224 x 224 alone"):
        check_teacher(fixed, (16, 16))
