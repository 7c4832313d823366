import base64
import math
import re

import pytest
import torch
from support.html_page import HOSTILE, Page

from vavae.data.image import png_bytes
from vavae.data.pixels import image_grid
from vavae.evaluation.metric import Metric
from vavae.report.figures import Picture, training_curves
from vavae.report.html import Report, render

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
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "@import" not in html


def test_everything_is_escaped(html: str):
    page = Page(html)
    # title twice, summary, stage, curve, fact twice, metric three times, picture twice, configuration
    assert page.text.count(HOSTILE) == 13
    assert "<script" not in html


def test_every_picture_has_words_and_its_bytes(html: str):
    page = Page(html)
    found = page.all("img")
    assert [image["alt"] for image in found] == [HOSTILE, "pairs of digits"]
    assert all(base64.b64decode((image["src"] or "").split(",")[1]) == PNG for image in found)
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert len(page.all("svg")) == 1


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


def test_empty_parts_are_left_out():
    page = Page(render(Report(title="bare")))
    assert page.all("section") == []
    assert page.text.count("bare") == 2
