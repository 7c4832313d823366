"""The metrics of a run, each with its protocol."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch

from vavae.data.config import RGB
from vavae.evaluation.generation import (
    ClassifierVerdict,
    Divisor,
    Reference,
    evaluate_generation,
    further_distances,
)
from vavae.evaluation.latent_probes import ProbeResults
from vavae.evaluation.latent_space import LatentSpace
from vavae.evaluation.metric import Metric
from vavae.evaluation.reconstruction import Reconstruction
from vavae.metrics.config import LATENT_PROBES, ExtractorName
from vavae.metrics.features import Description, Summaries, describe
from vavae.metrics.frechet_ratio import frechet_ratios
from vavae.metrics.generation import PROBE_STRENGTH, SUBSETS
from vavae.metrics.inception_score import SPLIT_IMAGES
from vavae.metrics.latent_space import PERPLEXITY
from vavae.runs.config import RunConfig

_log = logging.getLogger(__name__)


def reconstruction_metrics(reconstruction: Reconstruction, config: RunConfig) -> list[Metric]:
    """Metrics of the tokenizer on held-out images."""
    protocol = config.evaluate.reconstruction_protocol
    images = f"{protocol}: {reconstruction.images:,} held-out images"
    if config.tokenizer.kind == "kl":
        images += ", one posterior sample each"
    form, means = config.shards.pixel_format, reconstruction.means
    own = images if form == RGB else f"{images}; {form.in_words}"
    seen = _joined(images, form.as_color(form.depth))
    metrics = []
    if "psnr" in means:
        exact = f"; without {reconstruction.exact:,} that are exact" if reconstruction.exact else ""
        metrics.append(Metric("psnr", means["psnr"], "dB", f"{own}{exact}", "higher"))
    else:
        _log.warning("no PSNR: all %s reconstructions are exact", f"{reconstruction.images:,}")
    metrics.append(Metric("ssim", means["ssim"], "", own, "higher"))
    if "lpips" in means:
        metrics.append(Metric("lpips", means["lpips"], "", f"{seen}; VGG16, output not clamped", "lower"))
    for name in config.evaluate.metrics.extractors:
        metric, distance = (
            _named("reconstruction_frechet_distance", name, config),
            reconstruction.frechet_distances[name],
        )
        extraction = _extraction(name, reconstruction.images, config)
        metrics.append(Metric(metric, distance, "", f"{images}; {extraction}", "lower"))
    if "alignment" in means:
        compared = f"{seen}; projected latents against features of {config.teacher.name}"
        metrics.append(Metric("alignment_cosine", means["alignment"], "", compared, "higher"))
    return metrics


def generation_metrics(
    generated_images: Summaries,
    references: Mapping[str, Reference],
    classes: int,
    config: RunConfig,
    device: torch.device,
) -> list[Metric]:
    """Metrics of generated images: all of them through the main extractor, Fréchet distances through the others.

    Args:
        generated_images: features of the images by the name of the extractor, all kept.
        references: what they are compared with, by the name of the extractor.
        classes: number of classes.
        config: configuration of the run.
        device: where metrics over pairs of features are computed.
    """
    extractor, *others = config.evaluate.metrics.extractors
    mind = config.evaluate.mind
    found = evaluate_generation(generated_images[extractor], references[extractor], config.seed, device, mind)
    further, images = further_distances(generated_images, references, others), found.images
    generated, reference = _generated(images, classes, config), references[extractor]
    against = f"{generated} against {reference.name}"
    compared = f"{against}; {_protocol(extractor, config)}"
    seen = config.shards.pixel_format.as_color()
    metrics = []
    distances = {extractor: found.frechet_distance, **further}
    for each in config.evaluate.metrics.extractors:
        other, distance = references[each], distances[each]
        extraction = _extraction(each, min(images, other.images or images), config)
        protocol = f"{generated} against {other.name}; {extraction}"
        metrics.append(Metric(_named("generation_frechet_distance", each, config), distance, "", protocol, "lower"))
    if found.spatial_frechet_distance is not None:
        protocol = _joined(f"{against}; {extractor}, features of 17 x 17 positions (sFID)", seen)
        metrics.append(
            Metric("generation_spatial_frechet_distance", found.spatial_frechet_distance, "", protocol, "lower")
        )
    if found.inception_score is not None:
        protocol = _joined(f"{generated}; {extractor}, mean over splits of {SPLIT_IMAGES:,}", seen)
        metrics.append(Metric("inception_score", found.inception_score, "", protocol, "higher"))
    if found.kernel_distance is not None:
        mean, std, subset = found.kernel_distance
        protocol = f"{compared}; mean and deviation over {SUBSETS} subsets of {subset:,} (KID)"
        metrics.append(Metric("generation_kernel_distance", mean, "", protocol, "lower", std))
    if found.precision_recall is not None:
        protocol = f"{compared}; balls to the third neighbour, {len(reference.kept):,} real features"
        for name, share in found.precision_recall._asdict().items():
            metrics.append(Metric(f"generation_{name}", share, "", protocol, "higher"))
    if found.mind is not None:
        distance, samples, directions = found.mind
        protocol = f"{compared}; {directions:,} directions, {samples:,} images of each (MIND)"
        metrics.append(Metric("generation_mind", distance, "", protocol, "lower"))
    return metrics


def frechet_ratio_metrics(
    generation: Sequence[Metric], divisors: Mapping[ExtractorName, Divisor], classes: int, config: RunConfig
) -> list[Metric]:
    """Fréchet distances over those of real images, and their mean; none where they are not asked for.

    Args:
        generation: metrics of generated images, the Fréchet distances among them.
        divisors: distances of real images by extractor, all or none.
        classes: number of classes.
        config: configuration of the run.

    Raises:
        UserError: a distance of real images is not above 0.
    """
    if not divisors:
        return []
    by_name = {metric.name: metric for metric in generation}
    distances = {name: by_name[_named("generation_frechet_distance", name, config)] for name in sorted(divisors)}
    found = frechet_ratios(
        {name: metric.value for name, metric in distances.items()},
        {name: divisors[name].distance for name in distances},
    )
    metrics = [
        Metric(
            f"generation_frechet_ratio_{name}",
            found.ratios[name],
            "",
            f"{metric.protocol}; over {divisors[name].distance:.4g}, {divisors[name].words}",
        )
        for name, metric in distances.items()
    ]
    words = f"Fréchet distances over those of real images, mean over {', '.join(distances)} (FDr)"
    images = _generated(config.sample.images, classes, config)
    return [Metric("generation_frechet_ratio", found.mean, "", f"{images}; {words}"), *metrics]


def classifier_metrics(
    verdict: ClassifierVerdict, generated: int, train: int, classes: int, config: RunConfig
) -> list[Metric]:
    """Metrics of generated images by a classifier of real ones.

    Args:
        verdict: what the classifier found.
        generated: number of generated images.
        train: number of training images that variety is relative to.
        classes: number of classes.
        config: configuration of the run.
    """
    protocol, seen = _generated(generated, classes, config), config.shards.pixel_format.as_color()
    extractor = config.evaluate.class_agreement
    classifier = _joined(f"support vector machine on the pixels of {verdict.fitted:,} training images", seen)
    if not isinstance(extractor, bool):
        classifier = (
            f"linear probe (logistic regression, C = {PROBE_STRENGTH:g}) on standardized features of "
            f"{verdict.fitted:,} training images; {_protocol(extractor, config)}"
        )
    real = f"custom: {verdict.held_out:,} held-out images"
    metrics = [
        Metric("class_agreement", verdict.class_agreement, "", f"{protocol}; {classifier}", "higher"),
        Metric("class_agreement_of_real_images", verdict.ceiling, "", f"{real}; {classifier}", "higher"),
    ]
    if verdict.within_class_variety is not None:
        variety = f"{protocol}; mean pixel distance within a class, over that of {train:,} training images"
        variety = _joined(variety, seen)
        metrics.append(Metric("within_class_variety", verdict.within_class_variety, "", variety, "higher"))
    return metrics


def latent_probe_metrics(found: ProbeResults | None) -> list[Metric]:
    """Cheap probes of a tokenizer; those that its latents or images do not allow are left out with a warning."""
    if found is None:
        return []
    images = f"custom: {found.images:,} held-out images, the first of each class"
    by_name = {f"latent_{name}": value for name, value in found.latents._asdict().items()}
    by_name |= {f"equivariance_error_{name}": value for name, value in found.equivariance._asdict().items()}
    metrics = []
    for name, better in LATENT_PROBES.items():
        protocol = images
        if name == "latent_velocity_variance":
            protocol += f"; mean over {found.classes:,} of the classes, per dimension; white noise has 1.571"
        if math.isfinite(by_name[name]):
            metrics.append(Metric(name, by_name[name], "", protocol, better))
        else:
            _log.warning("no %s: it can't be told of these images", name)
    return metrics


def latent_space_metrics(latent_space: LatentSpace) -> list[Metric]:
    """Metrics of the latents of the training images; equal densities are better."""
    protocol = (
        f"{latent_space.tokens:,} tokens, each of another training image; t-SNE (perplexity {PERPLEXITY}), Gaussian "
        f"kernel density; mean of {len(latent_space.samplings)} samplings"
    )
    spread = latent_space.spread
    return [
        Metric(
            f"density_{name}",
            value,
            protocol=protocol,
            better="higher" if name == "entropy" else "lower",
            spread=None if spread is None else getattr(spread, name),
        )
        for name, value in latent_space.mean._asdict().items()
    ]


def generation_protocol(generated: int, config: RunConfig, classes: int | None) -> str:
    """Protocol of generated images: their number and labels, the average unless exported, solver and guidance.

    Args:
        generated: number of images.
        config: configuration of the run.
        classes: number of classes of its images; None where it is not known.
    """
    images = f"{config.sample.in_words(generated, classes)}{config.sample.weights_in_words}"
    return f"{images}, {config.solver.summary}, {config.guidance.summary}"


def small_set_warning(extractor: Description, images: int) -> str | None:
    """Why a Fréchet distance of so few images compares with none of another number; None where it does."""
    if images > extractor.num_features:
        return None
    return f"only {images:,} images for {extractor.num_features:,} dimensions, so compare equal numbers only"


def _generated(count: int, classes: int, config: RunConfig) -> str:
    return f"{config.evaluate.generation_protocol}: {generation_protocol(count, config, classes)}"


def _protocol(name: ExtractorName, config: RunConfig) -> str:
    """Protocol of an extractor, with how it sees the images of a run."""
    return _joined(describe(name, config.evaluate.metrics).protocol, config.shards.pixel_format.as_color())


def _joined(protocol: str, further: str) -> str:
    return f"{protocol}; {further}" if further else protocol


def _extraction(name: ExtractorName, images: int, config: RunConfig) -> str:
    warning = small_set_warning(describe(name, config.evaluate.metrics), images)
    return _joined(_protocol(name, config), warning or "")


def _named(metric: str, extractor: str, config: RunConfig) -> str:
    """Name of a metric through an extractor: with the extractor's unless that is the main one."""
    return metric if extractor == config.evaluate.metrics.extractor else f"{metric}_{extractor}"
