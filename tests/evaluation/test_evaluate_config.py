"""A protocol is a promise: what does not keep it is refused before anything starts."""

import pytest
from pydantic import ValidationError

from vavae.evaluation.config import EvaluateConfig

INCEPTION = {"extractor": "inception"}


def test_the_default_promises_nothing():
    config = EvaluateConfig()
    config.check_samples(7)
    assert config.reference_file is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generation_protocol": "adm-50k", "reference": "x.npz"}, "adm-50k looks through inception"),
        ({"reconstruction_protocol": "rfid-val-50k", "images": 50_000}, "rfid-val-50k looks through inception"),
        ({"generation_protocol": "fid-10k", "metrics": INCEPTION}, "fid-10k compares with training images"),
        ({"reconstruction_protocol": "rfid-val-50k", "metrics": INCEPTION}, "takes 50,000 held-out images, .* 10,000"),
        ({"generation_protocol": "fid-50k"}, "generation_protocol"),
    ],
)
def test_a_broken_promise_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig(**fields)


@pytest.mark.parametrize(("protocol", "samples"), [("adm-50k", 50_000), ("fid-10k", 10_000)])
def test_the_number_of_samples_is_part_of_it(protocol, samples):
    config = EvaluateConfig(generation_protocol=protocol, metrics=INCEPTION, reference="s3://bucket/adm.npz")
    assert config.reference_file == "s3://bucket/adm.npz"
    config.check_samples(samples)
    with pytest.raises(ValueError, match=f"{protocol} takes {samples:,} samples, sample.images is 999"):
        config.check_samples(999)
    assert EvaluateConfig(generation_protocol=protocol, metrics=INCEPTION, reference="train").reference_file is None
