"""The benchmark of a training under Ray, but for Ray: its sides differ in the module alone."""

from pathlib import Path

import pytest

from vavae.bench.ray import ray_benchmark
from vavae.errors import UserError

CONFIG = str(Path(__file__).parents[2] / "vavae" / "bench" / "configs" / "training.yaml")
SHORT = ["shards.image_size=16", "train_vavae.images=12", "train_vavae.checkpoint_images=12", "workers.threads=1"]


def test_the_rate_is_that_of_the_rows_after_the_first() -> None:
    benchmark = ray_benchmark(CONFIG, [*SHORT, "train_vavae.log_images=4"])
    assert [*benchmark.sides] == ["vavae", "a bare loop"]
    assert benchmark.sides["a bare loop"]() > 0


def test_a_training_without_enough_rows_is_refused() -> None:
    with pytest.raises(UserError, match=r"1 rows of the log are too few to measure: lower train_vavae.log_images"):
        ray_benchmark(CONFIG, [*SHORT, "train_vavae.log_images=12"]).sides["a bare loop"]()


def test_a_training_that_fails_is_told_in_its_own_words() -> None:
    wrong = [*SHORT, "train_vavae.start_from=nowhere.pt"]
    with pytest.raises(UserError, match=r"vavae train vavae .*nowhere.pt"):
        ray_benchmark(CONFIG, wrong).sides["a bare loop"]()
