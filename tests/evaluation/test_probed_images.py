"""Probes of a tokenizer in its evaluation: which images, whatever their parts, and what is told of them."""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import small_models

from vavae.data.pixels import to_float
from vavae.data.shard_reader import LabeledImages
from vavae.evaluation.latent_probes import ProbedBatch, ProbedImages, ProbeResults, probe_results
from vavae.evaluation.metrics import latent_probe_metrics
from vavae.evaluation.parts import concatenate
from vavae.evaluation.reconstruction import Reconstructor, reconstruct
from vavae.metrics.config import LATENT_PROBES, LatentProbesConfig
from vavae.metrics.equivariance import EquivarianceErrors, SquaredErrors, equivariance_errors
from vavae.metrics.latent_space import LatentProbes, probe_latents
from vavae.randomness import torch_generator

CPU = torch.device("cpu")


def noise(*shape):
    return torch.randn(shape, generator=torch_generator(0, "noise"))


def batch_of(labels):
    """A batch whose latents [n, 2, 4, 4] and errors are told apart by their place."""
    errors = SquaredErrors(*(torch.arange(1.0, 1 + len(labels)) * scale for scale in (1, 2, 3)))
    return ProbedBatch(noise(len(labels), 2, 4, 4), torch.tensor(labels), errors)


@pytest.mark.parametrize(("classes", "chosen"), [(0, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (10, [0, 3, 6, 9])])
def test_classes_lie_evenly_among_all(classes, chosen):
    taken = ProbedImages(LatentProbesConfig(images_per_class=2, classes=4), classes).take(torch.arange(10).repeat(3))
    assert taken.tolist() == [*chosen, *(10 + each for each in chosen)], "two of each"


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(2, 5), st.integers(1, 3), st.data())
def test_parts_and_batches_change_nothing(labels, images, classes, data):
    config, labels = LatentProbesConfig(images_per_class=images, classes=classes), torch.tensor(labels).long()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(labels)), max_size=4)))
    whole = ProbedImages(config, 6).take(labels)
    assert whole.tolist() == sorted(whole.tolist())
    chooser, parts = ProbedImages(config, 6), labels.tensor_split(cuts)
    starts = [0, *cuts]
    in_batches = [chooser.take(part) + start for part, start in zip(parts, starts, strict=True)]
    assert torch.equal(torch.cat(in_batches), whole)
    of_parts = torch.cat(
        [ProbedImages(config, 6).take(part) + start for part, start in zip(parts, starts, strict=True)]
    )
    assert torch.equal(of_parts[ProbedImages(config, 6).take(labels[of_parts])], whole)


def test_probed_images_are_decoded_again_and_others_are_reconstructed_as_before():
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=torch_generator(0, "images"), dtype=torch.uint8)
    labels, tokenizer = torch.tensor([0, 1, 0, 0, 1, 1]), small_models.tokenizer()
    reconstructor = Reconstructor(tokenizer, alignment=None, teacher=None, lpips=None)

    def found(probed_images, size):
        batches = (LabeledImages(images[at : at + size], labels[at : at + size]) for at in range(0, 6, size))
        return list(reconstruct(batches, reconstructor, 5, 0, CPU, probed_images))

    config = LatentProbesConfig(images_per_class=2)
    (plain,), (probed,) = found(None, 6), found(ProbedImages(config, 2), 6)
    assert plain.probed is None
    assert probed.probed is not None
    assert torch.equal(probed.reconstructions, plain.reconstructions)
    assert all(torch.equal(probed.metrics[name], values) for name, values in plain.metrics.items())
    taken = [0, 1, 2, 4]
    assert torch.equal(probed.probed.labels, labels[taken])
    with torch.inference_mode():
        z, pixels = probed.probed.latents, to_float(images[taken])
        decoded = tokenizer.decode(z)
        turned = tokenizer.decode(z.flip(2).mT) - decoded.flip(2).mT
        expected = [(decoded - pixels).square().mean((1, 2, 3)), turned.square().mean((1, 2, 3))]
    torch.testing.assert_close(probed.probed.errors.reconstruction, expected[0])
    torch.testing.assert_close(probed.probed.errors.quarter_turn, expected[1])
    batches = [batch.probed for batch in found(ProbedImages(config, 2), 1)]
    assert [batch is not None for batch in batches] == [True, True, True, False, True, False]
    stored = concatenate(batch.tensors() for batch in batches if batch is not None)
    restored = ProbedBatch.from_tensors({"psnr": torch.zeros(6), "probed": torch.zeros(1), **stored})
    assert restored is not None
    torch.testing.assert_close(restored.latents, z, rtol=1e-4, atol=1e-5)
    assert ProbedBatch.from_tensors(plain.metrics) is None


def test_results_are_of_the_first_of_each_class_and_the_variance_of_whole_classes():
    labels = [0, 0, 2, 0, 1, 2, 0, 2, 2]  # two parts, either with three of a class at most; one of class 1
    batch, config = batch_of(labels), LatentProbesConfig(images_per_class=3)
    found = probe_results(batch, config, 3)
    kept = [0, 1, 2, 3, 4, 5, 7]
    assert (found.images, found.classes) == (7, 2)
    groups = [torch.tensor([0, 1, 3]), torch.tensor([2, 5, 6])]
    assert found.latents == probe_latents(batch.latents[kept], groups)
    assert found.equivariance == equivariance_errors(SquaredErrors(*(error[kept] for error in batch.errors)))
    assert found.equivariance == pytest.approx((2, 3))


def test_images_without_classes_are_one_class():
    found = probe_results(batch_of([0] * 8), LatentProbesConfig(images_per_class=8), 0)
    assert (found.images, found.classes) == (8, 1)
    assert 0 < found.latents.velocity_variance < math.pi / 2


def test_a_variance_of_too_few_images_is_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        metrics = latent_probe_metrics(probe_results(batch_of([0, 1, 0]), LatentProbesConfig(images_per_class=4), 2))
    assert {metric.name for metric in metrics} == LATENT_PROBES.keys() - {"latent_velocity_variance"}
    assert "no class has 4 held-out images (evaluate.latent_probes.images_per_class)" in caplog.text
    assert latent_probe_metrics(None) == []


def test_every_probe_is_a_metric_with_a_direction():
    latents = LatentProbes(*map(float, range(1, 8)))
    metrics = latent_probe_metrics(ProbeResults(12, 3, latents, EquivarianceErrors(8.0, 9.0)))
    assert {metric.name: metric.better for metric in metrics} == dict(LATENT_PROBES)
    values = {metric.name: metric.value for metric in metrics}
    assert values["latent_velocity_variance"] == latents.velocity_variance
    assert values["equivariance_error_half_size"] == 9
    protocols = {metric.name: metric.protocol for metric in metrics}
    assert protocols["equivariance_error_half_size"] == "custom: 12 held-out images, the first of each class"
    assert "mean over 3 of the classes" in protocols["latent_velocity_variance"]
