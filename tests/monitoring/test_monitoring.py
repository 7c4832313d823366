"""The dashboard and the alerts ask for metrics and labels that jobs really have."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support.metric_names import EXPORTED, OF_NODES

from ray_jobs.runtime.prometheus import TAGS

FOLDER = Path(__file__).parents[2] / "cluster" / "monitoring"
BOARD = json.loads((FOLDER / "board.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
QUERIES = {
    **{f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]},
    **{rule["alert"]: rule["expr"] for rule in RULES},
    **{v["name"]: v["query"]["query"] for v in BOARD["templating"]["list"] if v["type"] == "query"},
}


def metrics_of(query):
    return set(re.findall(r"\bray_\w+", query))


def labels_of(query):
    """Labels that a query selects by, groups by, or asks the values of."""
    selected = {name for braces in re.findall(r"\{(.*?)\}", query) for name in re.findall(r"(\w+)=", braces)}
    grouped = {name for names in re.findall(r"\b(?:by|on) \((.*?)\)", query) for name in names.split(", ")}
    return selected | grouped | set(re.findall(r"label_values\(.*, (\w+)\)", query))


@pytest.mark.parametrize(
    ("query", "metrics", "labels"),
    [
        ('sum by (run, x) (rate(ray_a{rank="0",y=~"b"}[5m]))', {"ray_a"}, {"run", "x", "rank", "y"}),
        ("label_values(ray_a, run)", {"ray_a"}, {"run"}),
        ("ray_a > ray_b_total", {"ray_a", "ray_b_total"}, set()),
    ],
)
def test_metrics_and_labels_are_found_in_queries(query, metrics, labels):
    assert (metrics_of(query), labels_of(query)) == (metrics, labels)


@pytest.mark.parametrize("title", QUERIES)
def test_a_query_asks_for_what_there_is(title):
    metrics = metrics_of(QUERIES[title])
    assert metrics
    assert metrics <= EXPORTED | OF_NODES
    assert labels_of(QUERIES[title]) <= {*TAGS}


def test_the_board_shows_all_that_jobs_tell():
    shown = {metric for title, query in QUERIES.items() for metric in metrics_of(query)}
    assert EXPORTED - shown == set()


def test_panels_have_places_of_their_own():
    taken = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_alerts_say_what_to_do_about_which_run():
    assert [rule["alert"] for rule in RULES] == [
        "NoProgress",
        "StepsNotFinite",
        "WaitingForData",
        "CheckpointTooOld",
        "WorkersRestarted",
    ]
    for rule in RULES:
        assert {"$labels.run", "$labels.stage"} <= set(re.findall(r"\$labels\.\w+", rule["annotations"]["summary"]))
        assert rule["annotations"]["description"]


def test_prometheus_reads_the_alerts_and_the_list_that_ray_keeps():
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"]
    (job,) = config["scrape_configs"]
    (files,) = job["file_sd_configs"]
    assert files["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "--syntax-only", FOLDER / "prometheus.yml"],
        ["check", "rules", FOLDER / "alerts.yml"],
        ["test", "rules", Path(__file__).with_name("alerts_test.yml")],
    ],
)
def test_promtool_has_nothing_against_it(command):
    found = subprocess.run(["promtool", *command], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
