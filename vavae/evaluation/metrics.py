"""The metrics of a run, each with its protocol."""

import logging
from collections.abc import Mapping

import torch

from vavae.evaluation.generation import ClassifierVerdict, Reference, evaluate_generation, further_distances
from vavae.evaluation.latent_space import LatentSpace
from vavae.evaluation.metric import Metric
from vavae.evaluation.reconstruction import Reconstruction
from vavae.metrics.config import ExtractorName
from vavae.metrics.features import Description, Summaries, describe
from vavae.metrics.generation import SUBSETS
from vavae.metrics.inception_score import SPLIT_IMAGES
from vavae.metrics.latent_space import PERPLEXITY
from vavae.runs.config import RunConfig

_log = logging.getLogger(__name__)


def reconstruction_metrics(reconstruction: Reconstruction, config: RunConfig) -> list[Metric]:
    """Metrics of the tokenizer on held-out images."""
    protocol = config.evaluate.reconstruction_protocol
    images = f"{protocol}: {reconstruction.images:,} held-out images, one posterior sample each"
    means = reconstruction.means
    metrics = []
    if "psnr" in means:
        exact = f"; without {reconstruction.exact:,} that are exact" if reconstruction.exact else ""
        metrics.append(Metric("psnr", means["psnr"], "dB", f"{images}{exact}", "higher"))
    else:
        _log.warning("no PSNR: all %s reconstructions are exact", f"{reconstruction.images:,}")
    metrics.append(Metric("ssim", means["ssim"], "", images, "higher"))
    if "lpips" in means:
        metrics.append(Metric("lpips", means["lpips"], "", f"{images}; VGG16, output not clamped", "lower"))
    for name in config.evaluate.metrics.extractors:
        metric, distance = (
            _named("reconstruction_frechet_distance", name, config),
            reconstruction.frechet_distances[name],
        )
        extraction = _extraction(name, reconstruction.images, config)
        metrics.append(Metric(metric, distance, "", f"{images}; {extraction}", "lower"))
    if "alignment" in means:
        compared = f"{images}; projected latents against features of {config.teacher.name}"
        metrics.append(Metric("alignment_cosine", means["alignment"], "", compared, "higher"))
    return metrics


def generation_metrics(
    generated_images: Summaries, references: Mapping[str, Reference], config: RunConfig, device: torch.device
) -> list[Metric]:
    """Metrics of generated images: all of them through the main extractor, Fréchet distances through the others.

    Args:
        generated_images: features of the images by the name of the extractor, all kept.
        references: what they are compared with, by the name of the extractor.
        config: configuration of the run.
        device: where metrics over pairs of features are computed.
    """
    extractor, *others = config.evaluate.metrics.extractors
    found = evaluate_generation(generated_images[extractor], references[extractor], config.seed, device)
    further, images = further_distances(generated_images, references, others), found.images
    generated, reference = _generated(images, config), references[extractor]
    against = f"{generated} against {reference.name}"
    compared = f"{against}; {describe(extractor, config.evaluate.metrics).protocol}"
    metrics = []
    distances = {extractor: found.frechet_distance, **further}
    for each in config.evaluate.metrics.extractors:
        other, distance = references[each], distances[each]
        extraction = _extraction(each, min(images, other.images or images), config)
        protocol = f"{generated} against {other.name}; {extraction}"
        metrics.append(Metric(_named("generation_frechet_distance", each, config), distance, "", protocol, "lower"))
    if found.spatial_frechet_distance is not None:
        protocol = f"{against}; {extractor}, features of 17 x 17 positions (sFID)"
        metrics.append(
            Metric("generation_spatial_frechet_distance", found.spatial_frechet_distance, "", protocol, "lower")
        )
    if found.inception_score is not None:
        protocol = f"{generated}; {extractor}, mean over splits of {SPLIT_IMAGES:,}"
        metrics.append(Metric("inception_score", found.inception_score, "", protocol, "higher"))
    if found.kernel_distance is not None:
        mean, std, subset = found.kernel_distance
        protocol = f"{compared}; mean and deviation over {SUBSETS} subsets of {subset:,} (KID)"
        metrics.append(Metric("generation_kernel_distance", mean, "", protocol, "lower", std))
    if found.precision_recall is not None:
        protocol = f"{compared}; balls to the third neighbour, {len(reference.kept):,} real features"
        for name, share in found.precision_recall._asdict().items():
            metrics.append(Metric(f"generation_{name}", share, "", protocol, "higher"))
    return metrics


def classifier_metrics(
    verdict: ClassifierVerdict, generated: int, held_out: int, train: int, config: RunConfig
) -> list[Metric]:
    """Metrics of generated images by a classifier of real ones.

    Args:
        verdict: what the classifier found.
        generated: number of generated images.
        held_out: number of images of the ceiling.
        train: number of images that it was fitted to.
        config: configuration of the run.
    """
    protocol = _generated(generated, config)
    classifier = f"support vector machine on the pixels of {train:,} training images"
    real = f"custom: {held_out:,} held-out images"
    metrics = [
        Metric("class_agreement", verdict.class_agreement, "", f"{protocol}; {classifier}", "higher"),
        Metric("class_agreement_of_real_images", verdict.ceiling, "", f"{real}; {classifier}", "higher"),
    ]
    if verdict.within_class_variety is not None:
        variety = f"{protocol}; mean pixel distance within a class, over that of {train:,} training images"
        metrics.append(Metric("within_class_variety", verdict.within_class_variety, "", variety, "higher"))
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


def generation_protocol(generated: int, config: RunConfig) -> str:
    """Protocol of generated images: their number and labels, the average unless exported, solver and guidance."""
    images = f"{config.sample.in_words(generated)}{config.sample.weights_in_words}"
    return f"{images}, {config.solver.summary}, {config.guidance.summary}"


def small_set_warning(extractor: Description, images: int) -> str | None:
    """Why a Fréchet distance of so few images compares with none of another number; None where it does."""
    if images > extractor.num_features:
        return None
    return f"only {images:,} images for {extractor.num_features:,} dimensions, so compare equal numbers only"


def _generated(count: int, config: RunConfig) -> str:
    return f"{config.evaluate.generation_protocol}: {generation_protocol(count, config)}"


def _extraction(name: ExtractorName, images: int, config: RunConfig) -> str:
    description = describe(name, config.evaluate.metrics)
    warning = small_set_warning(description, images)
    return description.protocol if warning is None else f"{description.protocol}; {warning}"


def _named(metric: str, extractor: str, config: RunConfig) -> str:
    """Name of a metric through an extractor: with the extractor's unless that is the main one."""
    return metric if extractor == config.evaluate.metrics.extractor else f"{metric}_{extractor}"
