from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.inception import random_inception
from torch import Tensor

import vavae.torchvision_compat  # noqa: F401  (before timm)

# isort: split
import timm

from vavae.errors import UserError
from vavae.metrics import features
from vavae.metrics.config import MetricsConfig
from vavae.metrics.features import TimmExtractor, describe, load_extractor, preprocess
from vavae.models.backbones.config import InceptionConfig
from vavae.models.backbones.weights import check_weights, timm_name


@pytest.fixture(scope="module")
def extractor() -> TimmExtractor:
    return TimmExtractor("efficientnet_lite0", MetricsConfig())


def images(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def test_features_are_float32_vectors_of_the_stated_length(extractor: TimmExtractor):
    found = extractor(images(2, 32))
    assert found.shape == (2, extractor.num_features)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_an_image_whose_features_are_not_finite_is_named(extractor: TimmExtractor, monkeypatch: pytest.MonkeyPatch):
    spoiled = torch.ones(3, extractor.num_features)
    spoiled[2, 5] = torch.nan
    summarizer = features.Summarizer({"some": extractor}, keep=0, image="held-out image", first=100)
    summarizer.update(images(3, 32))
    summarizer.summaries()
    monkeypatch.setattr(extractor, "features", lambda images: features.Features(spoiled, torch.ones(3, 2)))
    summarizer.update(images(3, 32))
    with pytest.raises(UserError, match=r"^held-out image 105: its features through some are not finite; give whole"):
        summarizer.summaries()


def test_features_do_not_depend_on_the_batch(extractor: TimmExtractor):
    drawn = images(3, 20)
    together = extractor(drawn)
    alone = torch.cat([extractor(image[None]) for image in drawn])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_the_judge_sees_images_as_large_as_in_its_training():
    judge = TimmExtractor("efficientnet_lite2", MetricsConfig(further_extractors=("efficientnet_lite2",)))
    assert judge(images(1, 32)).shape == (1, 1280)
    assert (judge.input_size, judge.model.pretrained_cfg["input_size"]) == (260, (3, 260, 260))
    assert judge.description.protocol == (
        "efficientnet_lite2, pooled features, images resized to 260 px (bicubic, antialiased)"
    )


def test_the_network_sees_its_own_normalization(extractor: TimmExtractor):
    seen: list[Tensor] = []
    handle = extractor.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    extractor(torch.tensor([[0], [255]], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32))
    handle.remove()
    assert seen[0].shape[2:] == (extractor.input_size, extractor.input_size)
    torch.testing.assert_close(seen[0].amin((1, 2, 3)), torch.tensor([-0.498 / 0.502, 1.0]))
    torch.testing.assert_close(seen[0].amax((1, 2, 3)), torch.tensor([-0.498 / 0.502, 1.0]))


@pytest.mark.parametrize(("side", "size"), [(50, 20), (20, 50), (24, 24)])
def test_resizing_agrees_with_pillow(side: int, size: int):
    (image,) = images(1, side)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
    found = (preprocess(image[None], size)[0] + 1) * 127.5
    assert (found - expected).abs().max() < 1.1  # Pillow rounds after each direction


def test_only_uint8_images(extractor: TimmExtractor):
    with pytest.raises(AssertionError, match="uint8"):
        extractor(images(1, 32).float())


def test_inception_gives_all_features_and_the_measures_take_the_pooled_ones(tmp_path):
    config = MetricsConfig(inception=random_inception(tmp_path))
    extractor = load_extractor("inception", config)
    found = extractor.features(images(2, 32))
    assert found.pooled.shape == (2, extractor.num_features)
    assert found.spatial is not None
    assert found.logits is not None
    assert torch.equal(extractor(images(2, 32)), found.pooled)


def test_dinov2_gives_the_class_token_of_timm(tmp_path, monkeypatch):
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m", depth=2, dynamic_img_size=True).eval()
    monkeypatch.setattr(features, "load_backbone", lambda backbone, **_: model)
    extractor = load_extractor("dinov2_small", MetricsConfig())
    (image,) = images(1, 50)
    assert extractor.num_features == 384
    assert "224 px (bicubic" in extractor.description.protocol
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    seen = (torch.from_numpy(np.array(pillow)) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    token = model.forward_features(seen.permute(2, 0, 1)[None])[:, 0]
    # Pillow rounds, and clamps where bicubic weights overshoot.
    torch.testing.assert_close(extractor(image[None]), token, rtol=0, atol=0.2)
    assert torch.nn.functional.cosine_similarity(extractor(image[None]), token).item() > 0.999


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NARROW = {"embed_dim": 64, "depth": 1, "num_heads": 2}
FDR: dict[str, tuple[Any, ...]] = {
    # name: (side of images, side seen, statistics, features, output, sizes of a small network)
    "dinov2_large_256": (256, 266, IMAGENET, 1024, "class token", NARROW),
    "convnextv2_base": (224, 224, IMAGENET, 1024, "pooled features", {"depths": (1,) * 4, "dims": (8, 8, 8, 8)}),
    "mae_large": (224, 224, IMAGENET, 1024, "class token", NARROW),
    "siglip2_so400m": (224, 224, ((0.5,) * 3, (0.5,) * 3), 1152, "attention-pooled features", NARROW),
    "clip_large": (256, 266, CLIP, 1024, "class token", NARROW),
}
"""The networks of FDr6 besides Inception, as they are published."""


@pytest.mark.parametrize("name", FDR)
def test_the_networks_of_fdr_see_images_as_published(name, monkeypatch):
    side, seen_side, (mean, std), _, _, sizes = FDR[name]
    loaded: list[Any] = []

    def small(backbone, **kwargs):
        loaded.append(timm.create_model(timm_name(backbone), **sizes, **kwargs).eval())
        return loaded[0]

    monkeypatch.setattr(features, "load_backbone", small)
    extractor = load_extractor(name, MetricsConfig())
    (model,), (image,), seen = loaded, images(1, 300), []
    embedding = model.patch_embed.proj if "dims" not in sizes else model.stem[0]
    embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = extractor(image[None])
    expected = (preprocess(image[None], side, "bicubic") + 1) / 2
    expected = (expected - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    padded = torch.nn.functional.pad(expected, (0, seen_side - side) * 2)
    torch.testing.assert_close(seen[0], padded, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        whole = model.forward_features(expected)
        if name == "convnextv2_base":
            taken = model.head.norm(whole.mean((2, 3), keepdim=True)).flatten(1)
        elif name == "siglip2_so400m":
            assert model.num_prefix_tokens == 0
            taken = model.attn_pool(whole)
        else:
            assert whole.shape[1] == 1 + (seen_side // model.patch_embed.patch_size[0]) ** 2
            taken = whole[:, 0]
    torch.testing.assert_close(found, taken)


@pytest.mark.parametrize("name", FDR)
def test_the_networks_of_fdr_are_described_without_their_weights(name):
    side, seen_side, _, num_features, output, _ = FDR[name]
    config = MetricsConfig(further_extractors=(name,), weights={name: "x.safetensors"})
    found, backbone = describe(name, config), config.backbone(name)
    assert found.num_features == num_features
    padded = " and padded to whole patches" if seen_side > side else ""
    assert found.protocol == f"{name}, {output}, images resized to {side} px (bicubic, antialiased){padded}"
    assert backbone is not None
    assert backbone.weights == "x.safetensors"
    assert config.fingerprint() != MetricsConfig(further_extractors=(name,)).fingerprint()


def test_weights_that_cannot_be_had_are_named_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = MetricsConfig().backbone("siglip2_so400m")
    assert backbone is not None
    with pytest.raises(
        UserError, match=r"^the weights of vit_so400m_patch14_siglip_224\.v2_webli are neither in .* and"
    ):
        check_weights(backbone)


def test_the_network_of_each_extractor_is_named_for_those_who_fetch_it():
    config = MetricsConfig(extractor="inception", further_extractors=("dinov2_large", "inception"), dinov2_weights="w")
    assert config.extractors == ("inception", "dinov2_large")
    assert config.backbone("inception") is None
    backbone = config.backbone("dinov2_large")
    assert backbone is not None
    assert (backbone.name, backbone.weights) == ("vit_large_patch14_dinov2.lvd142m", "w")
    timm_name(backbone)
    other = MetricsConfig(extractor="inception", inception=InceptionConfig(sha256="0" * 64))
    assert other.fingerprint() != MetricsConfig(extractor="inception").fingerprint()
