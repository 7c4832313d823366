"""The line of progress, and the rate behind it."""

import io

import pytest
from rich.console import Console

from vavae import progress
from vavae.progress import LINE_SECONDS, Progress, Rate, clock, display


@pytest.fixture
def now(monkeypatch):
    time = {"now": 100.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: time["now"])

    def advance(seconds):
        time["now"] += seconds

    return advance


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (293, "4:53"),
        (3599, "59:59"),
        (3723, "1:02:03"),
        (90_000, "25:00:00"),
    ],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("moment", "line"),
    [
        (Progress("sample", 5, None), "sample             5 images"),
        (Progress("sample", 5, 1234, unit="shards"), "sample             5/1,234 shards"),
        (
            Progress("train_vavae", 1280, 19_200, rate=61.16, terms={"loss": 0.12345, "lr": 1e-4}),
            "train_vavae        1,280/19,200 images  61.2 images/s  4:53 left  loss 0.1235  lr 0.0001",
        ),
        (Progress("sample", 5, None, rate=0.5), "sample             5 images  0.5 images/s"),
        (Progress("sample", 0, 9, rate=0.0), "sample             0/9 images"),
        (
            Progress("latents", 10, 98_775, rate=12_345.6),
            "latents            10/98,775 images  12,346 images/s  0:08 left",
        ),
        (Progress("evaluate", 0, None, doing="report"), "evaluate           report"),
        (Progress("evaluate", 2, 10, "maps", doing="mapping latents"), "evaluate           mapping latents  2/10 maps"),
        (Progress("train_vavae", 1024, 1000, rate=10), "train_vavae        1,024/1,000 images  10 images/s  0:00 left"),
    ],
)
def test_line(moment, line):
    assert moment.line() == line


def test_the_rate_looks_at_the_window_alone(now):
    rate, done = Rate(window_seconds=20), 0
    assert rate.update(done) is None
    for per_second in (1, 1, 1, 7, 7):
        now(10)
        done += 10 * per_second
        found = rate.update(done)
    assert found == 7, "the slow start counts no longer"


def test_updates_further_apart_than_the_window_still_have_a_rate(now):
    rate = Rate(window_seconds=20)
    rate.update(0)
    now(50)
    assert rate.update(100) == 2
    now(50)
    assert rate.update(400) == 6


def test_two_updates_at_one_moment_have_no_rate(now):
    rate = Rate()
    rate.update(0)
    assert rate.update(5) is None


def test_what_is_waited_for_is_a_share():
    assert Progress("a", 1, None, terms={"data_wait": 0.1234}).line().endswith("data_wait 12.3%")


def lines_of(moments, now, capsys):
    with display("sample") as move:
        for moment in moments:
            move(moment)
            now(LINE_SECONDS / 4)
    return capsys.readouterr().out.splitlines()


def test_without_a_terminal_a_line_comes_every_ten_seconds_at_most(now, capsys):
    lines = lines_of([Progress("sample", done, 90) for done in range(9)], now, capsys)
    assert lines == [f"sample             {done}/90 images" for done in (0, 4, 8)]


def test_without_a_terminal_no_line_repeats_itself(now, capsys):
    moments = ["starting"] * 40 + [Progress("sample", 9, 9, rate=9 / (1 + at)) for at in range(40)]
    moments += [Progress("sample", 0, None, doing="report")] * 40
    assert lines_of(moments, now, capsys) == [
        "sample             starting",
        "sample             9/9 images  9 images/s  0:00 left",
        "sample             report",
    ]


def test_on_a_terminal_a_bar_moves_and_vanishes():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None, _environ={})
    with display("sample", console) as move:
        move("starting")
        move(Progress("sample", 5, 20, rate=2.5, terms={"data_wait": 0.5}))
    *shown, erased = screen.getvalue().replace("\r", "\n").splitlines()
    (line,) = {text.removeprefix("\x1b[2K") for text in shown if "5/20" in text}
    assert line.startswith("sample ")
    assert line.rstrip().endswith(" 25% 5/20 images  2.5 images/s  0:06 left  data_wait 50.0%")
    assert erased.endswith("\x1b[2K")


def test_on_a_terminal_the_bar_stays_where_it_is_while_something_else_is_done():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None, _environ={})
    with display("sample", console) as move:
        move(Progress("sample", 5, 20))
        move(Progress("sample", 0, None, doing="report"))
    assert " 25% report" in screen.getvalue()
