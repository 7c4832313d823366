"""Trials, from their runs to the table, on jobs that take no time."""

import csv
import io
import itertools
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support.html_page import Page
from support.toy_trials import InProcess, generation, made, reconstruction, toy_sweep_file

from vavae.config import load
from vavae.errors import UserError
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.sweep.results import write_sweep
from vavae.sweep.rows import new_rows, restore_rows, write_rows
from vavae.sweep.sweep import Sweep, name_of_trial
from vavae.sweep.trial import Entry, Task, read_ledger, run_trial, write_entry
from vavae.sweep.trial_results import SeedMean, TrialResult, collect, front, importances, speed_ups, twins

_BASE = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def _sweep(root: Path, *overrides: str) -> Sweep:
    return Sweep.load(toy_sweep_file(root, _BASE), [f"run.storage.root={root}", *overrides])


def _run_all(sweep: Sweep, root: Path) -> list[list[dict[str, float]]]:
    """Run all trials in this process; returns the reports of each."""
    reports: list[list[dict[str, float]]] = []
    for point in sweep.points():
        reports.append([])
        run_trial(sweep, point, InProcess(sweep, root).request, reports[-1].append)
    return reports


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="module")
def reports(root: Path) -> list[list[dict[str, float]]]:
    """Reports of four trials with two seeds each, all finished."""
    return _run_all(_sweep(root, "seeds=[0, 1]"), root)


def test_a_trial_reports_the_mean_over_its_seeds_at_every_rung(root: Path, reports) -> None:
    sweep = _sweep(root, "seeds=[0, 1]")
    for point, rows in zip(sweep.points(), reports, strict=True):
        configs = [sweep.run_config(point, seed) for seed in (0, 1)]
        assert [row["images_seen"] for row in rows] == [128, 256]
        for row in rows:
            values = [generation(config, int(row["images_seen"])) for config in configs]
            assert row["generation_frechet_distance"] == pytest.approx(sum(values) / 2)
            assert row["reconstruction_frechet_distance"] == pytest.approx(sum(map(reconstruction, configs)) / 2)


def test_trials_share_tokenizers_and_latents_and_nothing_else(root: Path, reports) -> None:
    lines = made(root)
    once = [line for line in lines if not line.startswith(("sample", "evaluate"))]  # these two at every rung
    assert len(once) == len(set(once)), "nothing is made twice"
    counts = {job: sum(line.startswith(job) for line in lines) for job in ("prepare", "train_v", "precompute")}
    assert counts == {"prepare": 1, "train_v": 4, "precompute": 4}, "two numbers of channels, two seeds"
    assert sum(line.startswith("train_lightningdit") for line in lines) == 16, "each run is trained to both rungs"


def test_a_trials_runs_are_ordinary_runs(root: Path, reports) -> None:
    folders = sorted((root / "toy" / "trials").iterdir())
    assert len(folders) == 8
    for folder in folders:
        run = Run(load(RunConfig, folder / "config.yaml"))
        assert run.config.train_lightningdit.images == 256
        # The toy's shards have no manifest, which only the plan of the first job reads.
        assert all(run.plan(job).done for job in ("train_vavae", "precompute_latents", "train_lightningdit", "sample"))


def test_what_is_there_is_reported_again_and_not_made_again(root: Path, reports) -> None:
    before = made(root)
    assert _run_all(_sweep(root, "seeds=[0, 1]"), root) == reports
    assert made(root) == before


def test_a_deleted_rung_is_made_again_without_the_ones_before(root: Path, reports, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    sweep = _sweep(copy)
    point = sweep.points()[0]
    (run,) = sweep.runs(point)
    run.storage.delete("rungs/000000000128.json")
    found: list[dict[str, float]] = []
    run_trial(sweep, point, InProcess(sweep, copy).request, found.append)
    assert [row["images_seen"] for row in found] == [256], "the run is further already than its first rung"
    assert made(copy) == made(root)


def test_a_trial_is_finished_before_its_last_report(root: Path, reports) -> None:
    sweep = _sweep(root, "seeds=[0, 1]")
    point, states = sweep.points()[0], []
    run_trial(
        sweep, point, InProcess(sweep, root).request,
        lambda row: states.append(read_ledger(sweep)[name_of_trial(point)].state),
    )  # fmt: skip
    assert states == ["running", "finished"], "the callback of the last report may end it"


def test_an_unknown_objective_and_a_lowered_budget_are_named(root: Path, reports, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    other = _sweep(copy, "objectives=[{measure: beauty, better: higher}]")
    with pytest.raises(UserError, match=r"the metrics of a run are generation_frechet_distance, .*, and not beauty"):
        run_trial(other, other.points()[0], InProcess(other, copy).request, lambda row: None)
    lower = _sweep(copy, "run.train_lightningdit.images=192")
    with pytest.raises(UserError, match=r"has seen more than train_lightningdit\.images"):
        run_trial(lower, lower.points()[0], InProcess(lower, copy).request, lambda row: None)


def test_the_table_has_every_trial_and_rung(root: Path, reports) -> None:
    sweep = _sweep(root, "seeds=[0, 1]")
    write_sweep(sweep)
    rows = list(csv.DictReader(io.StringIO((root / "toy" / "trials.csv").read_text())))
    assert len(rows) == 8
    row = next(row for row in rows if row["trial"] == name_of_trial(sweep.points()[3]) and row["images_seen"] == "256")
    config = sweep.run_config(sweep.points()[3], 0)
    assert float(row["generation_frechet_distance"]) == pytest.approx(generation(config, 256) + 0.5)
    assert float(row["generation_frechet_distance_deviation"]) == pytest.approx(0.5**0.5)
    assert (row["tokenizer.latent_dim"], row["lightningdit.depth"], row["seeds"]) == ("8", "3", "2")
    on_front = {row["trial"] for row in rows if row["on_front"] == "True"}
    assert on_front == {name_of_trial(sweep.points()[1]), name_of_trial(sweep.points()[3])}, "the deeper ones"
    assert on_front == {one.name for one in front(collect(sweep), sweep.config.objectives)}


def test_a_distance_that_a_trial_does_not_reach_is_said_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("run.train_lightningdit.measure={every_images: 128}", "run.evaluate.frechet_thresholds=[50]")
    sweep = _sweep(tmp_path, "seeds=[0, 1]", *asked)
    row = {name: SeedMean(60.0, 1.0) for name in ("generation_frechet_distance", "reconstruction_frechet_distance")}
    reached = {"images_to_frechet/50": SeedMean(12_810.4, 9.0), "epochs_to_frechet/50": SeedMean(2.5, 0.1)}
    results = [
        TrialResult(name_of_trial(point), point, "finished", "", {256: {**row, **more}})
        for point, more in zip(itertools.islice(sweep.points(), 2), (reached, {}), strict=True)
    ]
    monkeypatch.setattr("vavae.sweep.results.collect", lambda sweep: results)
    write_sweep(sweep)
    table, page = ((tmp_path / "toy" / name).read_text() for name in ("trials.csv", "frontier.html"))
    found = [row["images_to_frechet/50"] for row in csv.DictReader(io.StringIO(table))]
    assert found == ["12810.4", "not reached with every seed"]
    assert ">12,810 ± 9</td>" in page
    assert page.count("not reached with every seed") == 2, "images and epochs"


def test_a_probe_of_too_few_trials_is_left_out_with_a_word(root: Path, reports, monkeypatch) -> None:
    sweep = _sweep(root, "seeds=[0, 1]")
    monkeypatch.setattr("vavae.sweep.results.collect", lambda sweep: collect(sweep)[:3])
    write_sweep(sweep)
    page, table = ((root / "toy" / name).read_text() for name in ("frontier.html", "probes.csv"))
    assert "<td>too few trials (3 of 4)</td>" in page
    expected = "reconstruction_frechet_distance,generation_frechet_distance,3,"
    assert table.splitlines() == ["probe,distance,trials,rank_correlation", expected]


def test_best_configurations_run_as_they_are(root: Path, reports) -> None:
    write_sweep(_sweep(root, "seeds=[0, 1]"))
    files = sorted((root / "toy" / "best").iterdir())
    configs = [load(RunConfig, file) for file in files]
    assert sorted((config.tokenizer.latent_dim, config.lightningdit.depth) for config in configs) == [(4, 3), (8, 3)]
    assert all(Path(config.storage.root) == root and config.name.startswith("toy-") for config in configs)
    one = _sweep(root, "seeds=[0, 1]", "objectives=[generation_frechet_distance]")
    write_sweep(one)
    assert load(RunConfig, root / "toy" / "best.yaml").tokenizer.latent_dim == 4


def test_the_page_shows_trials_pictures_and_the_sweep_file(root: Path, reports) -> None:
    write_sweep(_sweep(root, "seeds=[0, 1]"))
    html = (root / "toy" / "frontier.html").read_text()
    page = Page(html)
    assert page.open == []
    kinds = Counter(svg["class"] for svg in page.all("svg"))
    assert kinds == {"chart wide": 2, "chart parallel": 1, "chart narrow": 5, "inner": 1}, (
        "frontier and curves; trials across their keys; two keys by two objectives, and a probe"
    )
    assert all(svg["aria-label"] for svg in page.all("svg") if svg["class"] != "inner")
    assert "4 finished" in page.text
    assert "tokenizer.latent_dim=8, lightningdit.depth=3" in page.text
    assert "<td>-0.89 (4 trials)</td>" in html, (
        "ranks 3.5, 3.5, 1.5, 1.5 of reconstruction and 2, 1, 4, 3 of generation"
    )
    heads = [title for title in (head.get("title") for head in page.all("th")) if title]
    assert heads[:3] == ["reconstruction_frechet_distance", "generation_frechet_distance", "state"], "objectives first"
    places = {attributes["id"] for attributes in page.all("details") if "id" in attributes}
    assert places == {f"trial-{number}" for number in (1, 2, 3, 4)}
    links = {link["href"] for link in page.all("a") if (link["href"] or "").startswith("#trial-")}
    assert links == {f"#{place}" for place in places}, "every point leads to its trial"
    for name in ("frontier.png", "ranking.png", "probes.png"):
        assert (root / "toy" / name).read_bytes().startswith(b"\x89PNG")


def test_a_speed_up_is_claimed_where_seeds_and_trend_allow_it(root: Path, reports, monkeypatch) -> None:
    sweep = _sweep(root, "seeds=[0, 1]")
    before, after, *_ = collect(sweep)

    def doubt(slow: list[tuple], fast: list[tuple]) -> str | None:
        def trial(one: TrialResult, row: list[tuple]) -> TrialResult:
            rungs = {images: {"generation_frechet_distance": SeedMean(*each)} for images, each in enumerate(row, 1)}
            return one._replace(curve=rungs)

        pair = trial(before, slow), trial(after, fast)
        monkeypatch.setattr("vavae.sweep.trial_results.twins", lambda sweep, results: [pair])
        (one,) = speed_ups(sweep, [])
        return one.doubt

    assert doubt([(900, 5), (800, 5)], [(700, 5), (600, 5)]) is None
    assert doubt([(900, None), (800, None)], [(700, None), (600, None)]) == "one seed"
    assert "hardly learned" in (doubt([(900, 60), (800, 60)], [(700, 5), (600, 5)]) or "")
    assert "within the deviations" in (doubt([(900, 5), (800, 5)], [(700, 5), (795, 5)]) or "")


def test_a_key_explains_the_variance_between_the_means_of_its_options(root: Path, reports) -> None:
    sweep = _sweep(root, "seeds=[0, 1]")
    found = {(one.path, one.measure): one for one in importances(sweep, collect(sweep))}
    channels = found["tokenizer.latent_dim", "reconstruction_frechet_distance"]
    assert channels.explained == pytest.approx(1), "the toy's distance is a formula of the channels"
    assert found["lightningdit.depth", "reconstruction_frechet_distance"].explained == pytest.approx(0)
    assert (channels.trials, channels.by_chance) == (4, pytest.approx(1 / 3))
    few = importances(sweep, collect(sweep)[:3])
    assert {one.explained for one in few} == {None}


def test_a_page_can_be_written_before_anything_is_known(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path)
    write_entry(sweep, Entry(sweep.points()[0], "failed", "the reason"))
    write_sweep(sweep)
    assert "failed" in (tmp_path / "toy" / "frontier.html").read_text()
    assert not (tmp_path / "toy" / "frontier.png").exists()


def test_what_evaluations_share_is_made_once(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path)
    worker = InProcess(sweep, tmp_path)
    there: dict[str, list[bool]] = {"references/held_out": [], "measuring/reconstructions": []}

    def request(config: RunConfig, task: Task) -> Run:
        if task == "evaluate":
            storage = Run(config).storage
            for path, found in there.items():
                found.append(storage.exists(path))
                if not found[-1]:
                    storage.write_bytes(path, b"features")
        return worker.request(config, task)

    for point in sweep.points():
        run_trial(sweep, point, request, lambda report: None)
    assert there["references/held_out"] == [False] + [True] * 7
    assert there["measuring/reconstructions"] == ([False] + [True] * 3) * 2, "once for each of two tokenizers"
    assert len({path.stat().st_ino for path in (tmp_path / "toy").glob("*/*/references/held_out")}) == 1


def test_trials_that_sample_in_other_ways_share_a_training(tmp_path: Path) -> None:
    text = """
name: toy
base: {base}
sweep:
  run: {{grid: {{plain: {{}}, deep: {{lightningdit: {{depth: 3}}}}}}}}
  guidance.scale: {{grid: [1, 2]}}
"""
    sweep = Sweep.load(toy_sweep_file(tmp_path, _BASE, text), [f"run.storage.root={tmp_path}"])
    plain, guided, deep, _ = _run_all(sweep, tmp_path)
    assert plain == guided != deep, "the toy knows no guidance"
    lines = made(tmp_path)
    assert [sum(line.startswith(job) for line in lines) for job in ("train_l", "sample", "evaluate")] == [2, 4, 4]
    for point in sweep.points():
        (run,) = sweep.runs(point)
        assert run.plan("train_lightningdit").done
        assert run.plan("sample").done


def test_trials_begin_with_different_seeds(root: Path, reports) -> None:
    """Or those that run at once would all wait for the same tokenizer."""
    lines = [line for line in made(root) if line.startswith("train_lightningdit") and line.endswith(" 128")]
    seeds = [line.split()[1].rpartition("-")[2] for line in lines]
    assert seeds == ["0", "1", "1", "0"] * 2


def test_a_sweep_goes_on_elsewhere_from_the_rows_of_its_trials(
    root: Path, reports, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tmp_path / "rows.jsonl"
    here = _sweep(root, "seeds=[0, 1]", f"rows={rows}")
    write_rows(here)
    assert len(rows.read_text().splitlines()) == 4
    (tmp_path / "there").mkdir()
    there = _sweep(tmp_path / "there", "seeds=[0, 1]", f"rows={rows}")
    assert [*new_rows(there)] == [name_of_trial(point) for point in here.points()]
    assert not new_rows(_sweep(tmp_path / "there", "seeds=[0, 1]", f"rows={rows}", "rungs=[64]")), "of another way"
    restore_rows(there)
    assert not new_rows(there)
    assert [one.curve for one in collect(there)] == [one.curve for one in collect(_sweep(root, "seeds=[0, 1]"))]
    assert _run_all(there, tmp_path / "there") == reports
    assert not [line for line in made(tmp_path / "there") if line.startswith("train_l")], "nothing is made again"
    before = rows.read_text()
    write_rows(_sweep(tmp_path / "there", "seeds=[0, 1]", f"rows={rows}", "rungs=[64]"))
    assert rows.read_text() == before, "rows of other trials stay"
    nowhere = _sweep(tmp_path / "there", "seeds=[0, 1]", f"rows={tmp_path / 'none' / 'rows.jsonl'}")
    write_rows(nowhere)
    assert "no rows are written" in caplog.text
    rows.write_text("{}\n")
    with pytest.raises(UserError, match=r"rows.jsonl:1: no row of a trial; delete the line"):
        new_rows(there)


def test_a_threshold_ends_a_trial_before_its_latents(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, "thresholds={psnr: {min: 5}}")
    reports = _run_all(sweep, tmp_path)
    assert list(map(len, reports)) == [0, 0, 2, 2], "the toy's psnr is the number of channels"
    entries = read_ledger(sweep)
    assert [entries[name_of_trial(point)].state for point in sweep.points()] == ["stopped"] * 2 + ["finished"] * 2
    assert entries[name_of_trial(sweep.points()[0])].why == "psnr is 4, and should be at least 5"
    lines = made(tmp_path)
    assert sum(line.startswith("precompute") for line in lines) == 1
    assert sum(line.startswith("evaluate_tokenizer") for line in lines) == 4
    _run_all(sweep, tmp_path)
    assert made(tmp_path) == lines, "the metrics of the tokenizers are stored"


def test_arrows_lead_to_what_differs_by_the_alignment_alone(tmp_path: Path) -> None:
    text = """
name: toy
base: {base}
sweep:
  lightningdit.depth: {{grid: [2, 3]}}
  losses.vision_foundation.weight: {{grid: {{none: 0, some: 0.1}}}}
  losses.vision_foundation:
    grid: {{whole: {{}}, without: {{cos_weight: 0}}}}
    when: {{losses.vision_foundation.weight: some}}
rungs: [64, 128]
"""
    sweep = Sweep.load(toy_sweep_file(tmp_path, _BASE, text), [f"run.storage.root={tmp_path}"])
    _run_all(sweep, tmp_path)
    found = [(dict(before.point), dict(after.point)) for before, after in twins(sweep, collect(sweep))]
    assert [(before["lightningdit.depth"], after["lightningdit.depth"]) for before, after in found] == [
        ("2", "2"), ("3", "3"),
    ]  # fmt: skip
    assert all(after["losses.vision_foundation"] == "whole" for _, after in found)
    ratios = [one.found for one in speed_ups(sweep, collect(sweep))]
    assert [(ratio.ratio, ratio.at_least) for ratio in ratios if ratio] == [(1, False), (1, False)], "the toy is blind"


@pytest.mark.parametrize("change", ["seeds=[0, 1, 2]", "rungs=[64]", "run.losses.kl_weight=1", "seeds=[0, 1]"])
def test_a_trial_that_was_run_in_another_way_is_not_known(root: Path, reports, change: str) -> None:
    same = change == "seeds=[0, 1]"
    assert len(read_ledger(_sweep(root, "seeds=[0, 1]", change))) == (4 if same else 0)


def test_points_of_a_former_space_are_left_out(root: Path, reports) -> None:
    text = "name: toy\nbase: {base}\nsweep: {{tokenizer.latent_dim: {{grid: [4, 8]}}}}\n"
    sweep = Sweep.load(toy_sweep_file(root, _BASE, text), [f"run.storage.root={root}"])
    assert read_ledger(sweep) == {}
