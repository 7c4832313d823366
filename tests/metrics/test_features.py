import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vavae.metrics.config import MetricsConfig
from vavae.metrics.features import FeatureExtractor, preprocess


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor(MetricsConfig().extractor)


def images(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def test_features_are_float32_vectors_of_the_stated_length(extractor: FeatureExtractor):
    found = extractor(images(2, 32))
    assert found.shape == (2, extractor.num_features)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_features_do_not_depend_on_the_batch(extractor: FeatureExtractor):
    drawn = images(3, 20)
    together = extractor(drawn)
    alone = torch.cat([extractor(image[None]) for image in drawn])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_the_network_sees_its_own_normalisation(extractor: FeatureExtractor):
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


def test_only_uint8_images(extractor: FeatureExtractor):
    with pytest.raises(AssertionError, match="uint8"):
        extractor(images(1, 32).float())
