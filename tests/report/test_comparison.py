"""Runs side by side: what is marked best, what differs, and that everything is said."""

import pytest
import torch
from support.html_page import HOSTILE, Page
from support.training_steps import tiny_config

from vavae.data.image import png_bytes
from vavae.data.pixels import image_grid
from vavae.evaluation.metric import Metric
from vavae.report.comparison import Comparison, compare_configurations, render_comparison
from vavae.report.figures import Picture, compared_curves
from vavae.report.html import Report

PNG = png_bytes(image_grid(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 2))


def rendered(**metrics: list[Metric]) -> str:
    return render_comparison(Comparison({name: Report(name, metrics=of) for name, of in metrics.items()}, [], []))


def best(page: str) -> list[str]:
    """Figures that are marked."""
    return [part.split("<")[0] for part in page.split('<strong class="best">')[1:]]


def test_the_best_is_the_highest_or_the_lowest():
    page = rendered(
        a=[Metric("fid", 3.0, protocol="p"), Metric("psnr", 30.0, protocol="p", better="higher")],
        b=[Metric("fid", 2.0, protocol="p"), Metric("psnr", 29.0, protocol="p", better="higher")],
        c=[Metric("fid", 2.0, protocol="p"), Metric("psnr", float("nan"), protocol="p", better="higher")],
    )
    assert best(page) == ["30", "2", "2"], "psnr is one of the headlines"


def test_figures_of_different_protocols_are_not_compared():
    page = rendered(a=[Metric("fid", 3.0, protocol="first")], b=[Metric("fid", 2.0, protocol="second")])
    assert best(page) == []
    text = Page(page).text
    assert "not to be compared" in text
    assert "a: first" in text
    assert "b: second" in text


def test_a_figure_that_only_one_run_has_is_not_the_best():
    page = rendered(a=[Metric("fid", 3.0, protocol="p")], b=[Metric("ssim", 0.5)], c=[])
    assert best(page) == []
    assert Page(page).open == []


def test_differences_are_all_keys_that_change_results_first():
    configs = [
        tiny_config(train_vavae={"images": 500}),
        tiny_config(train_vavae={"ema_decay": None}),
        tiny_config(train_vavae={"optimizer": {"learning_rate": 0.5}}).model_copy(update={"name": "other"}),
    ]
    found = compare_configurations(configs)
    assert [(each.key, each.values, each.identity) for each in found] == [
        ("train_vavae.ema_decay", ("0.9", "null", "0.9"), True),
        ("train_vavae.optimizer.learning_rate", ("0.001", "0.001", "0.5"), True),
        ("train_vavae.images", ("500", "1000", "1000"), False),
    ]
    assert compare_configurations([configs[0]] * 3) == []


def test_a_section_that_one_run_does_not_have_is_shown_whole_and_by_key():
    with_stages = {"evaluate": {"latent_space": {"tokens": 200}}}
    configs = [
        tiny_config(),
        *(
            tiny_config().model_validate(tiny_config().model_dump() | {"evaluate": {"latent_space": each}})
            for each in (with_stages["evaluate"]["latent_space"], {"tokens": 300})
        ),
    ]
    (whole,) = [each for each in compare_configurations(configs) if each.key == "evaluate.latent_space"]
    assert whole.values[0] == "null"
    assert "200" in whole.values[1]
    assert "300" in whole.values[2]


@pytest.fixture(scope="module")
def page() -> Page:
    names = (HOSTILE, "b")
    rows = {name: [{"stage": "s", "images": n, "loss/total": 1 / n} for n in (1, 2)] for name in names}
    reports = {
        name: Report(
            name,
            summary=HOSTILE,
            facts={HOSTILE: HOSTILE},
            metrics=[Metric(HOSTILE, 1.0, HOSTILE, f"{HOSTILE} {name}")],
            pictures=[Picture(HOSTILE, HOSTILE, PNG, HOSTILE)],
        )
        for name in names
    }
    differences = compare_configurations([tiny_config(), tiny_config(batch_size=16)])
    text = render_comparison(Comparison(reports, differences, compared_curves(rows)))
    assert text.count("<script") == 1
    return Page(text)


def test_the_page_is_well_formed_and_has_every_part(page: Page):
    assert page.open == []
    assert [attributes["id"] for attributes in page.all("section")] == [
        "results", "pictures", "differences-of-configuration", "training", "runs",
    ]  # fmt: skip
    assert "train_vavae.batch_size" in page.text
    assert len(page.all("img")) == 2
    roles = [svg.get("role") or svg.get("aria-hidden") for svg in page.all("svg") if svg.get("class") != "inner"]
    assert roles == ["true", "true", "img"]


def test_cells_name_their_run_for_narrow_screens(page: Page):
    named = {attributes.get("data-run") for attributes in page.all("td")}
    assert named == {HOSTILE, "b", None}
