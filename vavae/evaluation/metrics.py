"""The figures of a run, each with the protocol that it was measured by."""

from collections.abc import Mapping

import torch

from vavae.data.shard_reader import LabeledImages
from vavae.evaluation.generation import ClassifierVerdict, Reference, further_distances, measure_generation
from vavae.evaluation.latent_space import LatentSpace
from vavae.evaluation.metric import Metric
from vavae.evaluation.reconstruction import Reconstruction
from vavae.metrics.config import ExtractorName
from vavae.metrics.features import Description, describe
from vavae.metrics.inception_score import SPLIT_IMAGES
from vavae.metrics.kernel_distance import SUBSETS
from vavae.metrics.latent_space import PERPLEXITY
from vavae.metrics.summary import Summaries
from vavae.runs.config import RunConfig


def reconstruction_metrics(measured: Reconstruction, config: RunConfig) -> list[Metric]:
    """Of the tokenizer on held-out images."""
    protocol = config.evaluate.reconstruction_protocol
    images = f"{protocol}: {measured.images:,} held-out images, one posterior sample each"
    means = measured.means
    metrics = [
        Metric("psnr", means["psnr"], "dB", images, "higher"),
        Metric("ssim", means["ssim"], "", images, "higher"),
    ]
    if "lpips" in means:
        metrics.append(Metric("lpips", means["lpips"], "", f"{images}; VGG16, output not clamped", "lower"))
    for name in config.evaluate.metrics.extractors:
        figure, distance = _named("reconstruction_frechet_distance", name, config), measured.frechet_distances[name]
        extraction = _extraction(name, measured.images, config)
        metrics.append(Metric(figure, distance, "", f"{images}; {extraction}", "lower"))
    if "alignment" in means:
        seen = f"{images}; projected latents against features of {config.teacher.name}"
        metrics.append(Metric("alignment_cosine", means["alignment"], "", seen, "higher"))
    return metrics


def generation_metrics(
    generated_images: Summaries, references: Mapping[str, Reference], config: RunConfig, device: torch.device
) -> list[Metric]:
    """Of the generated images: all measures through the main extractor, Fréchet distances through the others.

    Args:
        generated_images: with the features of all.
        references: what they are compared with, by the name of the extractor.
        config: of the run.
        device: where the measures over pairs of features are made.
    """
    extractor, *others = config.evaluate.metrics.extractors
    measured = measure_generation(generated_images[extractor], references[extractor], config.seed, device)
    further, images = further_distances(generated_images, references, others), measured.images
    generated, reference = _generated(images, config), references[extractor]
    against = f"{generated} against {reference.name}"
    seen = f"{against}; {describe(extractor, config.evaluate.metrics).protocol}"
    metrics = []
    distances = {extractor: measured.frechet_distance, **further}
    for each in config.evaluate.metrics.extractors:
        other, distance = references[each], distances[each]
        extraction = _extraction(each, min(images, other.images or images), config)
        protocol = f"{generated} against {other.name}; {extraction}"
        metrics.append(Metric(_named("generation_frechet_distance", each, config), distance, "", protocol, "lower"))
    if measured.spatial_frechet_distance is not None:
        protocol = f"{against}; {extractor}, features of 17 x 17 positions (sFID)"
        metrics.append(
            Metric("generation_spatial_frechet_distance", measured.spatial_frechet_distance, "", protocol, "lower")
        )
    if measured.inception_score is not None:
        protocol = f"{generated}; {extractor}, mean over splits of {SPLIT_IMAGES:,}"
        metrics.append(Metric("inception_score", measured.inception_score, "", protocol, "higher"))
    if measured.kernel_distance is not None:
        mean, std, subset = measured.kernel_distance
        protocol = f"{seen}; mean and deviation over {SUBSETS} subsets of {subset:,} (KID)"
        metrics.append(Metric("generation_kernel_distance", mean, "", protocol, "lower", std))
    if measured.precision_recall is not None:
        protocol = f"{seen}; balls to the third neighbour, {len(reference.kept):,} real features"
        for name, share in measured.precision_recall._asdict().items():
            metrics.append(Metric(f"generation_{name}", share, "", protocol, "higher"))
    return metrics


def classifier_metrics(
    judged: ClassifierVerdict, generated: int, held_out: LabeledImages, train: LabeledImages, config: RunConfig
) -> list[Metric]:
    """Of the generated images, by a classifier of real ones."""
    protocol = _generated(generated, config)
    classifier = f"support vector machine on the pixels of {len(train.images):,} training images"
    real = f"custom: {len(held_out.images):,} held-out images"
    return [
        Metric("class_agreement", judged.class_agreement, "", f"{protocol}; {classifier}", "higher"),
        Metric("class_agreement_of_real_images", judged.ceiling, "", f"{real}; {classifier}", "higher"),
        Metric(
            "within_class_variety",
            judged.within_class_variety,
            "",
            f"{protocol}; mean pixel distance within a class, over that of {len(train.images):,} training images",
            "higher",
        ),
    ]


def latent_space_metrics(measured: LatentSpace) -> list[Metric]:
    """Of the latents of the training images; equal densities are better."""
    protocol = (
        f"{measured.tokens:,} tokens, each of another training image; t-SNE (perplexity {PERPLEXITY}), Gaussian kernel "
        f"density; mean of {len(measured.samplings)} samplings"
    )
    spread = measured.spread
    return [
        Metric(
            f"density_{name}",
            value,
            protocol=protocol,
            better="higher" if name == "entropy" else "lower",
            spread=None if spread is None else getattr(spread, name),
        )
        for name, value in measured.mean._asdict().items()
    ]


def generation_protocol(generated: int, config: RunConfig) -> str:
    """How images were generated, in words."""
    return f"{config.sample.in_words(generated)}, {config.solver.summary}, {config.guidance.summary}"


def few_images(seen: Description, images: int) -> str | None:
    """Why a Fréchet distance of so few images compares with none of another number; none where it does."""
    if images > seen.num_features:
        return None
    return f"only {images:,} images for {seen.num_features:,} dimensions, so compare equal numbers only"


def _generated(count: int, config: RunConfig) -> str:
    return f"{config.evaluate.generation_protocol}: {generation_protocol(count, config)}"


def _extraction(name: ExtractorName, images: int, config: RunConfig) -> str:
    seen = describe(name, config.evaluate.metrics)
    few = few_images(seen, images)
    return seen.protocol if few is None else f"{seen.protocol}; {few}"


def _named(measure: str, extractor: str, config: RunConfig) -> str:
    """The name of a figure: that of the measure through the main extractor, with the extractor's through others."""
    return measure if extractor == config.evaluate.metrics.extractor else f"{measure}_{extractor}"
