import json
import math
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from vavae.report.figures import compared_curves, legend, smooth, training_curves


def rows(name: str, values: list, stage: str = "tokenizer") -> list[dict]:
    return [{"stage": stage, "images": 64 * (index + 1), name: value} for index, value in enumerate(values)]


def lines(svg: str) -> list[str]:
    """Outlines of the faint and of the bold line."""
    return re.findall(r'<path d="([^"]*)"[^>]*stroke="#3f87d9', svg)


def test_nothing_makes_no_curves():
    assert training_curves([]) == []
    assert training_curves(rows("loss/total", [math.nan, None, math.inf])) == []


def test_stages_groups_and_names_in_order():
    row = {"data_wait": 0.1, "loss/vf_weight": 3.0, "loss/total": 1.0, "learning_rate": 1e-4, "loss/kl": 2, "x": 0.5}
    found = training_curves(
        [{"stage": stage, "images": images, **row} for stage in ("tokenizer", "diffusion") for images in (1, 2)]
    )
    expected = [
        ("losses", "loss/total"),
        ("losses", "loss/kl"),
        ("adaptive weights", "loss/vf_weight"),
        ("optimization", "learning_rate"),
        ("throughput", "data_wait"),
        ("others", "x"),
    ]
    assert [(curve.stage, curve.group, curve.name) for curve in found] == [
        (stage, *pair) for stage in ("tokenizer", "diffusion") for pair in expected
    ]


def test_a_curve_is_a_named_picture_in_the_colors_of_the_page():
    (curve,) = training_curves(rows('loss/"<total>"', [3.0, 2.0, 1.0]))
    element = ElementTree.fromstring(curve.svg)
    assert element.attrib["role"] == "img"
    assert element.attrib["aria-label"] == 'loss/"<total>" of tokenizer over 192 images: from 3 to 1'
    assert {*re.findall(r"#[0-9a-f]{3,6}", curve.svg)} == {"#3f87d9"}, "the line; the rest is of the page"
    assert [line.count("L") for line in lines(curve.svg)] == [2, 2]


def test_missing_values_are_bridged_and_non_finite_ones_leave_a_gap():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 1.0, 5.0]
    missing = [row for row in rows("loss/total", values) if row["images"] != 4 * 64]
    broken = rows("loss/total", [*values[:3], math.nan, *values[4:]])
    for records, pieces in ((missing, 1), (broken, 2)):
        (curve,) = training_curves(records)
        assert [line.count("M") for line in lines(curve.svg)] == [pieces, pieces]


def test_of_two_rows_of_one_position_the_later_counts():
    once = rows("loss/total", [1.0, 2.0, 3.0])
    assert training_curves(rows("loss/total", [9.0, 9.0]) + once) == training_curves(once)
    assert training_curves(once[::-1]) == training_curves(once)


@pytest.mark.parametrize("values", [[0.5], [2e-4, 2e-4 * (1 + 1e-12)], [0.0] * 5, [1e-5, 1e-3, 1.0, 1e3]])
def test_single_constant_and_wide_values_are_drawn(values: list[float]):
    (curve,) = training_curves(rows("learning_rate", values))
    assert len(lines(curve.svg)) == 2
    assert "1e" not in "".join(ElementTree.fromstring(curve.svg).itertext())  # no offset of the axis


def test_a_script_finds_the_values_that_were_logged_in_the_picture():
    (curve,) = training_curves(rows("loss/total", [4.0, math.nan, 2.0]))
    data = json.loads(ElementTree.fromstring(curve.svg).attrib["data-chart"])
    assert data["lines"] == [{"name": "", "x": [64.0, 128.0, 192.0], "y": [4.0, None, 2.0]}]
    assert data["smooth"]


def test_long_runs_make_no_large_pages():
    (curve,) = training_curves(rows("loss/total", [index * 7919 % 1000 for index in range(4_000)]))
    assert len(curve.svg) < 30_000


def test_runs_share_a_frame_and_differ_in_color_and_dashes():
    by_run = {"a": rows("loss/total", [3.0, 1.0]), "b": [], "c": rows("loss/total", [2.0, math.nan, 4.0])}
    (curve,) = compared_curves(by_run)
    assert curve.meaning == "sum of all losses with their weights"
    label = ElementTree.fromstring(curve.svg).attrib["aria-label"]
    assert label == "loss/total of tokenizer over 192 images: a from 3 to 1; c from 2 to 4"
    assert len(lines(curve.svg)) == 1  # of the first run; alone it has two
    found = legend([*by_run])
    strokes = re.findall(r'stroke="(#\w+)".*?stroke-dasharray="([^"]*)"', found)
    assert len({*strokes}) == 3
    assert strokes[2][0] in curve.svg
    assert strokes[1][0] not in curve.svg
    assert [name in found for name in by_run] == [True] * 3


def test_names_in_a_legend_are_escaped():
    assert "<b>" not in legend(["<b>"])


def test_lines_can_be_seen_on_light_and_dark_pages():
    """Contrast of 3 to 1 (WCAG 1.4.11) with white, the panels and a near-black page."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    colors = {color for color, _ in re.findall(r'stroke="(#\w+)".*?dasharray="([^"]*)"', legend(["r"] * 4))}
    assert len(colors) == 4
    for color in colors:
        for page in ("#ffffff", "#f5f7f9", "#14171a", "#1d2226"):
            dark, light = sorted((luminance(color), luminance(page)))
            assert (light + 0.05) / (dark + 0.05) >= 3, (color, page)


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30}):
        before = dict(matplotlib.rcParams)
        training_curves(rows("loss/total", [1.0, 2.0]))
        assert dict(matplotlib.rcParams) == before


def test_smoothing_has_no_lag_and_keeps_constants():
    ramp = np.arange(100.0)
    np.testing.assert_allclose(smooth(ramp)[20:80], ramp[20:80])
    np.testing.assert_allclose(smooth(np.full(9, 3.0)), 3.0)
    np.testing.assert_allclose(smooth(np.array([3.0, np.nan, 3.0])), [3.0, np.nan, 3.0])


def test_smoothing_calms_and_passes_over_gaps():
    values = np.where(np.arange(60) % 2 == 0, 1.0, -1.0)
    values[30] = np.nan
    found = smooth(values)
    assert np.isnan(found[30])
    assert np.nanstd(found) < 0.3
    assert np.isfinite(np.delete(found, 30)).all()


@pytest.mark.parametrize("module", ["vavae.report.figures", "vavae.sweep.plots", "ray_jobs.pipeline"])
def test_a_home_that_can_not_be_written_is_no_matter_of_figures(module, tmp_path):
    (tmp_path / "file").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MPL", "XDG_"))}
    environment["HOME"] = str(tmp_path / "file")
    command = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
