import sys

import pytest
import torch
from torch import Tensor

from vavae.errors import UserError
from vavae.metrics.generation import LinearProbe, class_agreement, within_class_variety

CLASSES, PER_CLASS = 3, 20
LABELS = torch.arange(CLASSES).repeat_interleave(PER_CLASS)


def images(spread: int = 20, seed: int = 0) -> Tensor:
    """Class c is of brightness 40 + 80 c, give or take ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-spread, spread + 1, (len(LABELS), 3, 8, 8), generator=generator)
    return (40 + 80 * LABELS.view(-1, 1, 1, 1) + noise).byte()


def test_agreement_is_the_share_of_right_classes():
    generated = images(seed=1)
    assert class_agreement(generated, LABELS, images(), LABELS, seed=0) == 1
    asked = LABELS.clone()
    asked[:15] = 2  # of 20 zeros
    assert class_agreement(generated, asked, images(), LABELS, seed=0) == pytest.approx(45 / 60)


def test_the_cap_is_drawn_by_the_seed_alone():
    # Classes overlap, so that it matters which images the classifier is fitted on.
    jitter = torch.randint(0, 100, (2, len(LABELS), 1, 1, 1), generator=torch.Generator().manual_seed(0))
    real, generated = ((images(spread=0) // 2 + brighter).byte() for brighter in jitter)
    state = torch.get_rng_state()
    found = [class_agreement(generated, LABELS, real, LABELS, seed=seed, max_real=6) for seed in (0, 1, 2, 3, 0)]
    assert found[0] == found[4]
    assert len(set(found)) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_one_class_cannot_disagree():
    with pytest.raises(UserError, match="two classes or more"):
        class_agreement(images(), LABELS, images(), torch.zeros_like(LABELS), seed=0)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(UserError, match=r"\.\[quickstart\]"):
        class_agreement(images(), LABELS, images(), LABELS, seed=0)


def features(seed: int = 0) -> Tensor:
    """Class c lies around unit vector c, in dimensions of very different scales."""
    noise = 0.1 * torch.randn(len(LABELS), CLASSES, generator=torch.Generator().manual_seed(seed))
    return (torch.eye(CLASSES)[LABELS] + noise) * torch.tensor([1.0, 100.0, 0.01])


def test_a_linear_probe_agrees_with_the_right_classes_whatever_the_scale_of_features():
    probe = LinearProbe(features(), LABELS)
    assert probe.agreement(features(seed=1), LABELS) == 1
    asked = LABELS.clone()
    asked[:15] = 2  # of 20 zeros
    assert probe.agreement(features(seed=1), asked) == pytest.approx(45 / 60)
    assert LinearProbe(1e3 * features() - 7, LABELS).agreement(1e3 * features(seed=1) - 7, LABELS) == 1


def test_a_linear_probe_of_one_class_is_refused():
    with pytest.raises(UserError, match="two classes or more"):
        LinearProbe(features(), torch.zeros_like(LABELS))


def test_variety_is_relative_to_the_real_images():
    real = images() // 2 * 2
    assert within_class_variety(real, LABELS, real, LABELS, seed=0) == pytest.approx(1)
    assert within_class_variety(real // 2, LABELS, real, LABELS, seed=0) == pytest.approx(0.5)


def test_variety_of_collapsed_classes_is_nothing():
    collapsed = torch.stack([images()[PER_CLASS * name] for name in LABELS.tolist()])
    assert within_class_variety(collapsed, LABELS, images(), LABELS, seed=0) == 0


def test_variety_averages_over_classes_that_can_be_compared():
    real = images() // 2 * 2
    generated = real.clone()
    generated[LABELS == 1] = generated[LABELS == 1] // 2
    keep = (LABELS < 2) | (torch.arange(len(LABELS)) == len(LABELS) - 1)  # a single image of class 2
    assert within_class_variety(generated[keep], LABELS[keep], real, LABELS, seed=0) == pytest.approx(0.75)
    none_left = within_class_variety(generated[LABELS == 0], LABELS[LABELS == 0], real, LABELS.clamp(min=1), seed=0)
    assert none_left is None


def test_variety_of_a_sample_is_near_that_of_all():
    found = within_class_variety(images(seed=1), LABELS, images(), LABELS, seed=0, max_per_class=5)
    assert found == pytest.approx(1, abs=0.1)
    assert found != within_class_variety(images(seed=1), LABELS, images(), LABELS, seed=0)
