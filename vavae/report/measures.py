"""The figures of a run, each with the protocol that it was measured by."""

from vavae.data.passes import LabelledImages
from vavae.evaluation.generation import Judgement
from vavae.evaluation.reconstruction import Reconstruction
from vavae.metrics.features import FeatureExtractor
from vavae.report.html import Metric
from vavae.training.config import RunConfig


def reconstruction_metrics(measured: Reconstruction, extractor: FeatureExtractor, config: RunConfig) -> list[Metric]:
    """Of the tokenizer on held-out images."""
    images = f"{measured.images:,} held-out images, one posterior sample each"
    metrics = [
        Metric("psnr", measured.psnr, "dB", images, "higher"),
        Metric("ssim", measured.ssim, "", images, "higher"),
        Metric(
            "reconstruction_frechet_distance",
            measured.frechet_distance,
            "",
            f"{images}; {_extraction(extractor, measured.images)}",
            "lower",
        ),
    ]
    if measured.alignment is not None:
        protocol = f"{images}; projected latents against features of {config.teacher.name}"
        metrics.append(Metric("alignment_cosine", measured.alignment, "", protocol, "higher"))
    return metrics


def distance_metric(
    distance: float, generated: int, reference: int, extractor: FeatureExtractor, config: RunConfig
) -> Metric:
    """Of the generated images."""
    protocol = f"{generation_protocol(generated, config)} against {reference:,} held-out images"
    extraction = _extraction(extractor, min(generated, reference))
    return Metric("generation_frechet_distance", distance, "", f"{protocol}; {extraction}", "lower")


def judgement_metrics(judged: Judgement, generated: int, real: LabelledImages, config: RunConfig) -> list[Metric]:
    """Of the generated images, by a classifier of real ones."""
    protocol = generation_protocol(generated, config)
    classifier = f"support vector machine on the pixels of {len(real.images):,} training images"
    return [
        Metric("class_agreement", judged.class_agreement, "", f"{protocol}; {classifier}", "higher"),
        Metric("class_agreement_of_real_images", judged.ceiling, "", f"held-out images; {classifier}", "higher"),
        Metric(
            "within_class_variety",
            judged.within_class_variety,
            "",
            f"{protocol}; mean pixel distance within a class, over that of {len(real.images):,} training images",
            "higher",
        ),
    ]


def generation_protocol(generated: int, config: RunConfig) -> str:
    """How images were generated, in words."""
    return f"{config.sample.in_words(generated)}, {config.solver.summary}, {config.guidance.summary}"


def _extraction(extractor: FeatureExtractor, images: int) -> str:
    few = f"; only {images:,} images for {extractor.num_features:,} dimensions, so compare equal numbers only"
    return extractor.protocol + (few if images <= extractor.num_features else "")
