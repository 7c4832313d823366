"""A protocol is a promise: what does not keep it is refused before anything starts."""

import pytest
from pydantic import ValidationError

from vavae.config import identity
from vavae.evaluation.config import EvaluateConfig
from vavae.metrics.config import PUBLISHED_DIVISORS

INCEPTION = {"extractor": "inception"}


def test_the_default_promises_nothing():
    config = EvaluateConfig()
    config.check_samples(7, ("cat",))
    assert config.reference_file is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generation_protocol": "adm-50k", "reference": "x.npz"}, "adm-50k looks through inception"),
        ({"reconstruction_protocol": "rfid-val-50k", "images": 50_000}, "rfid-val-50k looks through inception"),
        ({"generation_protocol": "fid-10k", "metrics": INCEPTION}, "fid-10k compares with training images"),
        ({"reconstruction_protocol": "rfid-val-50k", "metrics": INCEPTION}, "takes 50,000 held-out images, .* 10,000"),
        ({"generation_protocol": "fid-50k"}, "generation_protocol"),
        ({"class_agreement": "efficientnet_lite2"}, "class_agreement=efficientnet_lite2 is no extractor: add it to"),
        ({"class_agreement": "pixels"}, "class_agreement"),
        ({"frechet_ratio": {"divisors": {"inception": 1.68}}}, r"frechet_ratio.divisors.inception is of no extractor"),
        ({"frechet_ratio": {"divisors": {"efficientnet_lite0": 0}}}, "greater than 0"),
        (
            {"frechet_ratio": {"divisors": "published"}, "reference": "train"},
            "none for efficientnet_lite0: take incepti",
        ),
        ({"frechet_ratio": {"divisors": "published"}, "metrics": INCEPTION}, "to training images: set reference to"),
        ({"frechet_ratio": {}, "reference": "x.npz"}, "no divisor for efficientnet_lite0, and cannot measure it"),
        ({"frechet_thresholds": [0]}, "greater than 0"),
    ],
)
def test_a_broken_promise_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig(**fields)


@pytest.mark.parametrize(("protocol", "samples"), [("adm-50k", 50_000), ("fid-10k", 10_000)])
def test_the_number_of_samples_is_part_of_it(protocol, samples):
    config = EvaluateConfig(generation_protocol=protocol, metrics=INCEPTION, reference="s3://bucket/adm.npz")
    assert config.reference_file == "s3://bucket/adm.npz"
    config.check_samples(samples, "random")
    config.check_samples(samples, "class_balanced")
    with pytest.raises(ValueError, match=f"{protocol} takes samples of all classes: set sample.labels"):
        config.check_samples(samples, (1, "cat"))
    with pytest.raises(ValueError, match=f"{protocol} takes {samples:,} samples, sample.images is 999"):
        config.check_samples(999, "random")
    assert EvaluateConfig(generation_protocol=protocol, metrics=INCEPTION, reference="train").reference_file is None


def test_divisors_that_are_given_are_not_measured():
    both = {"further_extractors": ("efficientnet_lite2",)}
    given = {"divisors": {"efficientnet_lite0": 12.5}}
    assert EvaluateConfig(metrics=both).measured_divisors == ()
    assert EvaluateConfig(metrics=both, frechet_ratio=given).measured_divisors == ("efficientnet_lite2",)
    assert EvaluateConfig(frechet_ratio=given, reference="x.npz").measured_divisors == ()


def test_published_divisors_are_of_the_networks_of_fdr():
    six = {"extractor": "inception", "further_extractors": [*PUBLISHED_DIVISORS][1:]}
    config = EvaluateConfig(metrics=six, reference="train", frechet_ratio={"divisors": "published"})
    assert config.measured_divisors == ()
    assert config.frechet_ratio.given == PUBLISHED_DIVISORS
    assert len(config.metrics.extractors) == 6
    assert identity(config)["frechet_ratio"] == {"divisors": "published"}


def test_what_is_new_and_off_leaves_the_identity_as_it_was():
    new = {"frechet_ratio", "frechet_thresholds", "mind", "latent_probes"}
    assert not new & identity(EvaluateConfig()).keys()
    assert identity(EvaluateConfig())["class_agreement"] is False
    asked = {"frechet_ratio": {}, "mind": {}, "latent_probes": {}}
    on = EvaluateConfig(frechet_thresholds=(50,), class_agreement="efficientnet_lite0", **asked)
    assert new <= identity(on).keys()
    assert EvaluateConfig.restore(identity(on)) == on
