"""Configuration of evaluation: metrics, numbers of images, and accepted protocols."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from vavae.config import Config, LocalPath, added, runtime
from vavae.metrics.config import (
    PUBLISHED_DIVISORS,
    ExtractorName,
    LatentProbesConfig,
    LatentSpaceConfig,
    MetricsConfig,
    MindConfig,
)

GENERATION_PROTOCOLS = {"adm-50k": 50_000, "fid-10k": 10_000}
"""Generated images of a protocol, which are compared through Inception with ADM's reference, an npz file, or with what
that was made of, the training images. FID-50K stands in most tables, FID-10K in the ablations of the paper."""

RECONSTRUCTION_PROTOCOLS = {"rfid-val-50k": 50_000}
"""Number of held-out images of a protocol: all of ImageNet's validation set, through Inception."""

HELD_OUT, TRAIN = "validation", "train"


class FrechetRatioConfig(Config):
    """Fréchet distances over that of real images, through every extractor, and the mean of these ratios (FDr)."""

    divisors: Literal["published"] | dict[ExtractorName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Distance of real images to the reference by extractor, or `published` for those of FDr6. One that is not given
    is measured: of as many images as are generated, or as there are, of the split that is not the reference."""

    @property
    def given(self) -> Mapping[ExtractorName, float]:
        """Divisors that are not measured, by extractor."""
        return PUBLISHED_DIVISORS if self.divisors == "published" else self.divisors


class EvaluateConfig(Config):
    """Evaluation of a run."""

    metrics: MetricsConfig = MetricsConfig()
    """The feature extractors."""
    generation_protocol: Literal["custom", "adm-50k", "fid-10k"] = "custom"
    """`custom` is what the other fields say; a name is a promise that is checked."""
    reconstruction_protocol: Literal["custom", "rfid-val-50k"] = "custom"
    """Protocol of reconstructions, likewise."""
    images: int = Field(10_000, ge=2)
    """At most this many held-out images are reconstructed and compared with."""
    reference: Annotated[str, LocalPath(words=(HELD_OUT, TRAIN))] = HELD_OUT
    """Images that generated ones are compared with: the held-out images (`validation`), all training images (`train`),
    or an npz file with statistics as ADM or pytorch-fid publish it, as a path or a storage URL."""
    lpips: bool = False
    """Measure LPIPS too, on VGG16 with the weights that `losses.perceptual.weights` names."""
    class_agreement: bool | ExtractorName = False
    """Fit a classifier to real images and classify the generated ones with it: `true` fits one to their pixels, for
    small images; the name of one of the extractors fits a linear probe to its features."""
    frechet_ratio: FrechetRatioConfig | None = added(None)
    """Divide the Fréchet distances through all extractors by those of real images; null does not."""
    frechet_thresholds: tuple[Annotated[float, Field(gt=0)], ...] = added(())
    """Fréchet distances K: `images_to_frechet/K` and `epochs_to_frechet/K` say when the checkpoints that
    `train_lightningdit.measure` evaluates first fall to each (EP_FD@K)."""
    mind: MindConfig | None = added(None)
    """Measure the distance MIND of generated images, through the main extractor; null does not."""
    latent_probes: LatentProbesConfig | None = added(None)
    """Probe latents and decodings of some held-out images while they are reconstructed; null does not."""
    latent_space: LatentSpaceConfig | None = None
    """Measure how evenly the latents fill their space, as in Table 6; null does not."""
    batch_size: int = runtime(64, ge=1)
    """Images that pass the tokenizer at a time."""
    actors: int = runtime(1, ge=1)
    """Parts of 5,000 images evaluated at the same time, each by `workers.cpus` cores or one GPU."""
    pictures: int = runtime(10, ge=1)
    """Pairs of original and reconstruction in `reconstructions.png`."""

    @property
    def reference_file(self) -> str | None:
        """Path or URL of the npz file, where the reference is one."""
        return None if self.reference in (HELD_OUT, TRAIN) else self.reference

    @property
    def measured_divisors(self) -> tuple[ExtractorName, ...]:
        """Extractors through which the distance of real images is measured, to divide by it."""
        ratio = self.frechet_ratio
        return () if ratio is None else tuple(name for name in self.metrics.extractors if name not in ratio.given)

    def check_samples(self, images: int, labels: str | tuple[int | str, ...]) -> None:
        """Check the number and the labels of the generated images.

        Raises:
            ValueError: they are not those of the protocol.
        """
        if self.generation_protocol != "custom" and not isinstance(labels, str):
            raise ValueError(
                f"evaluate.generation_protocol={self.generation_protocol} takes samples of all classes: set "
                "sample.labels to class_balanced or random, or generation_protocol=custom"
            )
        wanted = GENERATION_PROTOCOLS.get(self.generation_protocol, images)
        if images != wanted:
            raise ValueError(
                f"evaluate.generation_protocol={self.generation_protocol} takes {wanted:,} samples, sample.images is "
                f"{images:,}: set it, or generation_protocol=custom"
            )

    @model_validator(mode="after")
    def _extractors_are_there(self) -> Self:
        classifier, there = self.class_agreement, self.metrics.extractors
        divisors = {} if self.frechet_ratio is None else self.frechet_ratio.divisors
        missing = [] if divisors == "published" else [name for name in divisors if name not in there]
        if not isinstance(classifier, bool) and classifier not in there:
            raise ValueError(f"class_agreement={classifier} is no extractor: add it to metrics.further_extractors")
        if missing:
            raise ValueError(
                f"frechet_ratio.divisors.{missing[0]} is of no extractor: leave it out, or add it to "
                "metrics.further_extractors"
            )
        if divisors == "published" and self.measured_divisors:
            raise ValueError(
                f"frechet_ratio.divisors=published has none for {self.measured_divisors[0]}: take "
                f"{', '.join(PUBLISHED_DIVISORS)}, or give divisors"
            )
        if divisors == "published" and self.reference == HELD_OUT:
            raise ValueError(
                "frechet_ratio.divisors=published are distances to training images: set reference to train, or to a "
                "file of them"
            )
        if self.reference_file is not None and self.measured_divisors:
            raise ValueError(
                f"frechet_ratio has no divisor for {self.measured_divisors[0]}, and cannot measure it against a file: "
                "give it in frechet_ratio.divisors, or set reference to train or validation"
            )
        return self

    @model_validator(mode="after")
    def _protocols_hold(self) -> Self:
        for field in ("generation_protocol", "reconstruction_protocol"):
            name = getattr(self, field)
            if name != "custom" and self.metrics.extractor != "inception":
                raise ValueError(f"{field}={name} looks through inception: set metrics.extractor=inception, or custom")
        if self.generation_protocol != "custom" and self.reference == HELD_OUT:
            raise ValueError(
                f"generation_protocol={self.generation_protocol} compares with training images: set reference to ADM's "
                "npz file or to train"
            )
        wanted = RECONSTRUCTION_PROTOCOLS.get(self.reconstruction_protocol, self.images)
        if self.images != wanted:
            raise ValueError(
                f"reconstruction_protocol={self.reconstruction_protocol} takes {wanted:,} held-out images, images is "
                f"{self.images:,}: set it, or reconstruction_protocol=custom"
            )
        return self
