"""`vavae report` on runs as they lie on storage, finished or not."""

import json
import urllib.request
import uuid
from pathlib import Path

import pytest
from PIL import Image
from support.browser import browser_page, on_desk_and_phone
from support.html_page import Page
from support.training_steps import tiny_config

from vavae.cli.main import main
from vavae.config.load import dump
from vavae.data.image import png_bytes
from vavae.report.run_facts import run_summary, training_seconds
from vavae.runs.run import Run
from vavae.storage.artifact import Artifact, FileInfo, commit
from vavae.storage.storage import Storage
from vavae.training.hardware import HARDWARE, Hardware


@pytest.fixture
def make(tmp_path: Path):
    """A run of which only the tokenizer's training has begun."""

    def make_run(root: str = "runs", name: str = "tiny", **training) -> Run:
        config = tiny_config(train_vavae=training).model_copy(update={"name": name})
        config = config.model_copy(update={"storage": config.storage.model_copy(update={"root": str(tmp_path / root)})})
        run = Run(config)
        run.storage.write_bytes("config.yaml", dump(config).encode())
        run.storage.write_bytes("shards/data", b"x")
        shards = Artifact(kind="shards", digest="d" * 64, config="c", files={"data": FileInfo(bytes=1, sha256="s")})
        commit(run.storage, "shards", shards)
        rows = [
            {"stage": "train_vavae", "images": images, "loss/total": 1.0, "images_per_second": rate}
            for images, rate in ((400, 4.0), (600, 2.0))
        ]
        folder = run.training_prefix("train_vavae")
        run.storage.write_bytes(
            f"{folder}/log/000000000600.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode()
        )
        hardware = Hardware(workers=3, device="Abacus", threads=1, torch="9.9")
        run.storage.write_json(f"{folder}/{HARDWARE}", hardware.model_dump())
        return run

    return make_run


def text_of(path: Path) -> str:
    page = Page(path.read_text())
    assert page.open == []
    return page.text


def test_a_run_that_has_only_begun_has_a_report_with_time_and_cost(make, tmp_path, capsys):
    run, output = make(), tmp_path / "page.html"
    assert main(["report", run.storage.url(), "--out", str(output), "--hourly-price", "2"]) == 0
    assert str(output) in capsys.readouterr().out
    text = text_of(output)
    # 100 s for the first 400 images and 100 s for 200 more, of three workers at 2 an hour
    assert "600 of 1,000 images in 3:20; 3 images/s; 3 workers, Abacus, torch 9.9; cost 0.33 at 2 per" in text
    assert run_summary(run.config) in text
    assert "loss/total" in text
    assert "d" * 12 in text


def test_the_newest_preview_is_shown_until_there_is_the_final_picture(make, tmp_path):
    run, output = make(), tmp_path / "page.html"
    folder = f"{run.training_prefix('train_vavae')}/previews"
    for seen in (900, 1_200):
        run.storage.write_bytes(f"{folder}/{seen:012d}.png", png_bytes(Image.new("RGB", (2, 2))))
    assert main(["report", run.storage.url(), "--out", str(output)]) == 0
    assert "Reconstructions after 1,200 images" in text_of(output)
    assert "900 images" not in text_of(output)
    run.storage.write_bytes("reconstructions.png", png_bytes(Image.new("RGB", (2, 2))))
    assert main(["report", run.storage.url(), "--out", str(output)]) == 0
    assert "1,200" not in text_of(output)
    assert "Held-out images above" in text_of(output)


def test_runs_side_by_side_by_folder_and_by_configuration(make, tmp_path):
    one, other = make(name="one"), make(name="other", ema_decay=None)
    other.storage.write_json(
        "metrics.json", {"psnr": {"value": 30.5, "unit": "dB", "better": "higher", "protocol": "p"}}
    )
    output = tmp_path / "page.html"
    assert main(["report", f"{one.storage.url()}/config.yaml", other.storage.url(), "--out", str(output)]) == 0
    text = text_of(output)
    assert "one · other" in text
    assert "train_vavae.ema_decay" in text
    assert "30.5" in text


def test_a_folder_of_runs_is_a_table_of_them(make, tmp_path, capsys):
    one, other, torn = make(name="one"), make(name="other"), make(name="torn")
    torn.storage.write_bytes("events/0.jsonl", b'{"ev')
    one.storage.write_json("metrics.json", {"psnr": {"value": 30.5, "unit": "dB", "better": "higher", "protocol": "p"}})
    other.storage.write_bytes("config.yaml", b"name: other\nno_such_key: 1\n")
    output = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "runs"), "--out", str(output)]) == 0
    text = text_of(output)
    assert "3 runs" in text
    assert run_summary(one.config) in text
    assert "30.5" in text
    assert main(["status", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == "one  train_vavae"
    assert lines[1].startswith("other  ")
    assert "no_such_key" in lines[1]
    assert lines[2].startswith("torn  can't be read: JSONDecodeError: ")


def test_a_run_that_was_moved_is_read_where_it_lies(make, tmp_path):
    run = make()
    Path(run.storage.url()).rename(tmp_path / "archive")
    output = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "archive"), "--out", str(output)]) == 0
    assert "600 of 1,000 images" in text_of(output)


def test_runs_of_one_name_are_told_apart_by_their_places(make, tmp_path):
    runs = [make(root) for root in ("here", "there")]
    output = tmp_path / "page.html"
    assert main(["report", *(run.storage.url() for run in runs), "--out", str(output)]) == 0
    assert all(run.storage.url() in text_of(output) for run in runs)


def test_what_is_no_run_is_refused_in_one_line(make, tmp_path, capsys):
    run = make()
    for arguments, words in (
        ([str(tmp_path)], "no config.yaml there, so this is not the folder of a run"),
        ([run.storage.url()] * 2, "named twice"),
        ([run.storage.url(), "--out", str(tmp_path / "none" / "page.html")], "No such file or directory"),
    ):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1


def test_without_a_place_the_page_goes_to_the_temporary_folder(make, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    assert main(["report", make().storage.url()]) == 0
    page = Path(capsys.readouterr().out.removeprefix("report: ").strip())
    assert page.name == "tiny.html"
    assert "600 of 1,000 images" in text_of(page)
    assert not [*Path.cwd().iterdir()]


def test_the_report_in_a_store_has_a_link_that_needs_no_keys(s3, make, capsys, tmp_path):
    run = make()
    store = Storage(f"s3://{s3.bucket}/{uuid.uuid4().hex}/tiny", str(tmp_path / "cache"))
    for path in run.storage.sizes():
        store.put_file(run.storage.local_file(path), path)
    store.write_bytes("report.html", b"<p>made</p>")
    assert main(["report", store.url(), "--out", str(tmp_path / "page.html")]) == 0
    link = capsys.readouterr().out.rpartition(" ")[2].strip()
    with urllib.request.urlopen(link) as answer:
        assert (answer.read(), answer.headers["Content-Type"]) == (b"<p>made</p>", "text/html")


def test_rows_without_a_rate_take_no_time():
    rows = [
        {"images": 10, "images_per_second": 5.0},
        {"images": 15, "latent/x": 1.0},
        {"images": 30, "images_per_second": 4.0},
    ]
    assert training_seconds(rows) == pytest.approx(2 + 5)
    assert training_seconds([]) == 0


@pytest.mark.integrations
@on_desk_and_phone
def test_pages_answer_the_pointer(make, tmp_path, width, scheme):
    pages = {"run": [make(name="one")], "comparison": [make(name="two"), make(name="three", ema_decay=None)]}
    for name, runs in pages.items():
        path = tmp_path / f"{name}.html"
        assert main(["report", *(run.storage.url() for run in runs), "--out", str(path)]) == 0
        with browser_page(width, scheme) as page:
            page.goto(path.as_uri())
            curve = page.locator("svg[data-chart]").first
            curve.hover()
            assert "images" in page.locator(".tip").inner_text()
            area = curve.bounding_box()
            row = area["y"] + area["height"] / 2
            page.mouse.move(area["x"] + 0.4 * area["width"], row)
            page.mouse.down()
            page.mouse.move(area["x"] + 0.8 * area["width"], row)
            page.mouse.up()
            assert float(page.locator("input[data-zoom=from]").input_value()) > 0
    path = tmp_path / "runs.html"
    assert main(["report", str(tmp_path / "runs"), "--out", str(path)]) == 0
    with browser_page(width, scheme) as page:
        page.goto(path.as_uri())
        rows = page.locator("tbody tr:visible th")
        page.get_by_role("button", name="run", exact=True).click()
        assert rows.all_inner_texts() == ["one", "three", "two"]
        page.locator("input[type=search]").fill("two")
        assert "1 of 3" in page.locator(".tools").inner_text()
        assert rows.all_inner_texts() == ["two"]
