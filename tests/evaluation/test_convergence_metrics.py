"""When measured checkpoints reach a distance, as metrics; and in words where they do not."""

import pytest

from vavae.evaluation.convergence import convergence_metrics, not_reached

FOUND = {
    seen: {"generation_frechet_distance": {"value": value, "protocol": "custom: 8 samples"}}
    for seen, value in ((100, 80.0), (200, 40.0), (300, 20.0))
}


def test_images_and_epochs_with_the_origin_of_the_number() -> None:
    images, epochs = convergence_metrics({**FOUND, 400: {}}, (40, 10), train_images=50)
    assert (images.name, epochs.name) == ("images_to_frechet/40", "epochs_to_frechet/40")
    assert (images.value, epochs.value) == (pytest.approx(200), pytest.approx(4))
    assert images.protocol == (
        "custom: 8 samples; until 40, interpolated between measurements after 100 and 200 images, linearly in images "
        "and in the logarithm of the distance"
    )
    assert epochs.protocol == f"{images.protocol}; epochs of 50 images"


def test_what_is_not_reached_is_said_and_not_guessed() -> None:
    assert not_reached(FOUND, (40, 10)) == {"images_to_frechet/10": "not reached in 300 images; lowest 20 after 300"}
    assert not_reached({100: {}}, (10,)) == {"images_to_frechet/10": "not measured yet"}
