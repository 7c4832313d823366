import base64
import hashlib
import math
import re

import pytest
import torch
from support.html_page import HOSTILE, Page

from vavae.data.image import png_bytes
from vavae.data.pixels import image_grid
from vavae.evaluation.metric import Metric
from vavae.report.figures import Picture, training_curves
from vavae.report.html import HEADLINES, Report, render

PNG = png_bytes(image_grid(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 2))


def report(words: str) -> Report:
    rows = [{"stage": words, "images": images, f"loss/{words}": 1 / images} for images in range(1, 20)]
    return Report(
        title=words,
        summary=words,
        facts={words: words},
        metrics=[Metric(words, 12.34567, words, words, "higher"), Metric("rFID", math.nan)],
        pictures=[Picture(words, words, PNG, words), Picture("Reconstructions", "", PNG, "pairs of digits")],
        curves=training_curves(rows),
        config=words,
    )


@pytest.fixture(scope="module")
def html() -> str:
    return render(report(HOSTILE))


def test_the_page_is_well_formed_and_says_everything(html: str):
    page = Page(html)
    assert page.open == []
    assert [attributes.get("lang") for attributes in page.all("html")] == ["en"]
    for heading in ("Results", "Pictures", "Training", "Run", "Configuration"):
        assert heading in page.text
    assert "12.35" in page.text
    assert "nan" in page.text


def test_nothing_comes_from_elsewhere(html: str):
    page = Page(html)
    links = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert links
    assert all(link and link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert all(link in ("", "#") for link in re.findall(r"url\(['\"]?(.)", html))
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert page.all("script") == [{}]
    assert "@import" not in html
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)


def test_a_browser_runs_the_script_of_the_page_and_no_other(html: str):
    (policy,) = [meta["content"] for meta in Page(html).all("meta") if "http-equiv" in meta]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert policy.endswith(f"script-src 'sha256-{digest}'")


def test_everything_is_escaped(html: str):
    page = Page(html)
    # title twice, summary, headline with unit, stage, curve, fact twice, metric with unit and protocol, the name with
    # that, picture twice, configuration
    assert page.text.count(HOSTILE) == 16
    assert html.count("<script") == 1


def test_every_picture_has_words_and_its_bytes(html: str):
    page = Page(html)
    found = page.all("img")
    assert [image["alt"] for image in found] == [HOSTILE, "pairs of digits"]
    assert all(base64.b64decode((image["src"] or "").split(",")[1]) == PNG for image in found)
    (chart,) = [svg for svg in page.all("svg") if svg["class"] != "inner"]
    assert chart["role"] == "img"
    assert chart["aria-label"]


def test_every_section_can_be_reached(html: str):
    page = Page(html)
    links = [attributes["href"] for attributes in page.all("a")]
    assert links == [f"#{attributes['id']}" for attributes in page.all("section")]
    assert len({*links}) == len(links) == 5


def test_a_figure_of_several_draws_shows_its_spread():
    page = Page(render(Report("r", metrics=[Metric("cv", 0.17512, spread=0.01234), Metric("psnr", 30.0, "dB")])))
    assert "0.1751\u202f±\u202f0.012 ↓" in page.text
    assert "30\u202fdB ↓" in page.text


def test_light_dark_phone_and_paper(html: str):
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html
    assert "@media print" in html


def test_the_page_opens_with_five_figures_in_words_and_the_pictures():
    names = ("ssim", "class_agreement", "x", "generation_frechet_distance", "psnr", "reconstruction_frechet_distance")
    metrics = [Metric(name, 1.0, protocol="the protocol") for name in names]
    text = render(Report("run", byline="2026", metrics=metrics, pictures=[Picture("Samples", "", PNG, "a grid")]))
    words = re.findall(r"<dt>(.*?)</dt><dd>", text.split('id="results"')[0])
    assert words == [HEADLINES[name] for name in HEADLINES if name in names] + ["ssim"]
    places = [text.index(part) for part in ("2026", 'class="headlines"', "<img", 'id="results"')]
    assert places == sorted(places)
    assert text.count("the protocol") == 1


def test_losses_are_open_and_counters_of_storage_folded_and_last():
    rows = [{"stage": "s", "images": n, "storage/requests": n, "loss/total": n, "learning_rate": n} for n in (1, 2)]
    text = render(Report("run", curves=training_curves(rows)))
    assert re.findall(r'<details( open)?><summary class="heading">(\w+)', text) == [
        (" open", "losses"), ("", "optimization"), ("", "storage"),
    ]  # fmt: skip


def test_empty_parts_are_left_out():
    page = Page(render(Report(title="bare")))
    assert page.all("section") == []
    assert page.text.count("bare") == 2
