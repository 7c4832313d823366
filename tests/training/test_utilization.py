"""FLOP/s in the rows: when networks change, they are counted again; the share of the peak has a closed form."""

import pytest
import torch
from support.recipes import recipe_config
from support.training_steps import tiny_config

from vavae.distributed.world import World
from vavae.runs.config import RunConfig
from vavae.training.logging import utilization as utilization
from vavae.training.logging.utilization import Utilization


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where in a training it was counted; the count is a thousand and the place."""
    places: list[int] = []

    def count(config: RunConfig, job: str, images_seen: int) -> float:
        places.append(images_seen)
        return 1000.0 + images_seen

    monkeypatch.setattr(utilization, "training_flops", count)
    return places


def test_a_share_of_the_peak_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch)
    config = tiny_config()
    peak = RunConfig.model_validate({**config.model_dump(), "workers": {"peak_flops": 5000.0}})
    two = World(0, 2)
    assert Utilization(config, "train_lightningdit", two).metrics(0, 8.0) == {"flops_per_second": 8000.0}
    assert Utilization(peak, "train_lightningdit", two).metrics(0, 8.0) == {
        "flops_per_second": 8000.0,
        "model_flop_utilisation": 0.8,
    }


def test_it_counts_once_for_each_set_of_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    places = counted(monkeypatch)
    stages = [{"from_images": 64, "losses": {"adversarial": {"start_images": 100}}}]
    found = Utilization(tiny_config({"stages": stages}), "train_vavae", World())
    flops = [found.metrics(images, 1.0)["flops_per_second"] for images in (0, 63, 64, 99, 100, 800)]
    assert flops == [1000.0, 1000.0, 1064.0, 1064.0, 1100.0, 1100.0]
    assert places == [0, 64, 100]
    places.clear()
    routed = Utilization(recipe_config("routing"), "train_lightningdit", World())
    flops = [routed.metrics(images, 1.0)["flops_per_second"] for images in (0, 8, 11, 12, 800)]
    assert flops == [1000.0, 1000.0, 1000.0, 1012.0, 1012.0]
    assert places == [0, 12]
    constant = Utilization(tiny_config(), "train_lightningdit", World())
    assert [constant.metrics(images, 1.0)["flops_per_second"] for images in (0, 800)] == [1000.0] * 2


@pytest.mark.parametrize(
    ("precision", "tf32", "peak"), [("bf16", False, 989.4e12), ("fp32", True, 494.7e12), ("fp32", False, 66.9e12)]
)
def test_the_peak_is_that_of_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch, precision: str, tf32: bool, peak: float
) -> None:
    counted(monkeypatch)
    config = tiny_config(precision=precision)
    config = RunConfig.model_validate({**config.model_dump(), "workers": {"tf32": tf32}})
    gpu = World(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    metrics = Utilization(config, "train_lightningdit", gpu).metrics(0, 8.0)
    assert metrics["model_flop_utilisation"] == pytest.approx(8000 / peak)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "unheard of")
    assert "model_flop_utilisation" not in Utilization(config, "train_lightningdit", gpu).metrics(0, 8.0)
