"""What the driver prints while workers are silent, busy and done."""

import threading

from ray_jobs import _board as board
from vavae.progress import Progress


class Silent:
    def __init__(self, *answers):
        self._answers = list(answers)

    def read(self):
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def lines_of(answers, total, capsys, monkeypatch, count):
    monkeypatch.setattr(board, "_LINE_SECONDS", 0.01)
    ended = threading.Event()
    printer = threading.Thread(target=board._print_lines, args=(Silent(*answers), "sample", total, "images", ended))
    printer.start()
    lines = []
    while len(lines) < count:
        lines += capsys.readouterr().out.splitlines()
    ended.set()
    printer.join()
    return lines


def test_a_line_comes_even_when_nothing_is_reported(capsys, monkeypatch):
    lines = lines_of([(None, 0)], 8, capsys, monkeypatch, 3)
    assert all(line.split()[:2] == ["sample", "starting"] for line in lines)


def test_advances_of_pooled_tasks_add_up_to_progress(capsys, monkeypatch):
    lines = lines_of([(None, 2), (None, 4), (None, 4)], 8, capsys, monkeypatch, 3)
    assert lines[0].split() == ["sample", "2/8", "images"]
    assert "images/s" in lines[1]
    assert "left" in lines[1]


def test_a_finished_stage_says_that_it_is_finishing(capsys, monkeypatch):
    done = Progress("train_vavae", 8, 8)
    lines = lines_of([(done, 0)], None, capsys, monkeypatch, 3)
    assert lines[0] == done.line()
    assert lines[1].split()[:2] == ["sample", "finishing"]


def test_stages_are_shown_by_their_own_progress(capsys, monkeypatch):
    lines = lines_of([(Progress("train_vavae", 4, 8, rate=2.0), 0)], None, capsys, monkeypatch, 2)
    assert lines[0] == "train_vavae        4/8 images  2 images/s  0:02 left"
