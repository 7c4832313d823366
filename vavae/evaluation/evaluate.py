"""The evaluation of a run or of its tokenizer: every part, then all metrics."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from vavae.evaluation.evaluator import CLASSIFIER_IMAGES, Evaluator
from vavae.evaluation.generation import classify_generated
from vavae.evaluation.metric import Metric, require_results
from vavae.evaluation.metrics import (
    classifier_metrics,
    frechet_ratio_metrics,
    generation_metrics,
    latent_probe_metrics,
    latent_space_metrics,
    reconstruction_metrics,
    small_set_warning,
)
from vavae.metrics.features import describe
from vavae.metrics.latent_space import LatentMap
from vavae.progress import Progress
from vavae.runs.evaluation_inputs import EvaluationInputs

_log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """The result of an evaluation."""

    metrics: list[Metric]
    pairs: tuple[Tensor, Tensor]
    """The first held-out images and their reconstructions, uint8 [P, 3, H, W] each."""
    latent_map: LatentMap | None
    """A map of the latents, where one is asked for."""


def evaluate(
    evaluator: Evaluator, advance: Callable[[int], None], report: Callable[[Progress], None] = lambda _: None
) -> Evaluation:
    """Evaluate tokenizer, samples and latents of a run.

    Args:
        evaluator: of a run with samples; parts that have been evaluated already are not evaluated again.
        advance: called with the number of images done since its last call.
        report: called with the progress of what comes after the images.
    """

    def begin(doing: str) -> None:
        report(Progress("evaluate", 0, None, doing=doing))

    for part in evaluator.missing():
        evaluator.evaluate(part, advance)
    config, reconstruction = evaluator.inputs.config, evaluator.reconstruction()
    for name in config.evaluate.metrics.extractors:
        description = describe(name, config.evaluate.metrics)
        warning = small_set_warning(description, min(reconstruction.images, config.sample.images))
        if warning is not None:
            _log.warning(
                "Fréchet distances through %s are biased upwards, for their covariances are singular: %s", name, warning
            )
    begin("comparing features")
    metrics = reconstruction_metrics(reconstruction, config) + latent_probe_metrics(evaluator.latent_probes())
    classes, references = evaluator.classes, evaluator.references()
    generated = generation_metrics(evaluator.generated(), references, classes, config, evaluator.device)
    metrics += generated + frechet_ratio_metrics(generated, evaluator.divisors(references), classes, config)
    classifier = config.evaluate.class_agreement
    if classifier:
        begin("classifying samples")
        train, held_out = (evaluator.first_images(split, CLASSIFIER_IMAGES) for split in ("train", "validation"))
        samples = evaluator.samples()
        features = None if classifier is True else evaluator.labeled_features(classifier, samples.labels)
        verdict = classify_generated(samples, train, held_out, config.seed, features)
        counts = config.sample.images, len(train.images)
        if verdict.within_class_variety is None:
            _log.warning("no within-class variety: no class has two generated and two differing real images")
        metrics += classifier_metrics(verdict, *counts, classes, config)
    latent_space = evaluator.latent_space(
        lambda done, total: report(Progress("evaluate", done, total, "maps", doing="mapping latents"))
    )
    if latent_space is not None:
        metrics += latent_space_metrics(latent_space)
    return Evaluation(metrics, reconstruction.pairs, None if latent_space is None else latent_space.maps[0])


def evaluate_tokenizer(inputs: EvaluationInputs, advance: Callable[[int], None]) -> list[Metric]:
    """Evaluate the tokenizer alone, which needs neither latents nor samples.

    Args:
        inputs: those of the run.
        advance: called with the number of images done since its last call.
    """
    evaluator = Evaluator(inputs)
    for part in evaluator.missing(("held_out", "reconstructions")):
        evaluator.evaluate(part, advance)
    metrics = reconstruction_metrics(evaluator.reconstruction(), inputs.config)
    metrics += latent_probe_metrics(evaluator.latent_probes())
    require_results(metrics)
    return metrics
