"""What the driver prints while workers are silent, busy and done."""

import threading

import pytest

from ray_jobs import _board as board
from vavae.progress import Progress


class Scripted:
    """A board that answers as written, and ends the show with its last answer."""

    def __init__(self, answers, ended):
        self._answers, self._ended = list(answers), ended

    def read(self):
        answer = self._answers.pop(0)
        if not self._answers:
            self._ended.set()
        return answer


@pytest.fixture
def lines_of(capsys, monkeypatch):
    def lines_of(answers, total=None):
        monkeypatch.setattr(board, "_LINE_SECONDS", 0.01)
        ended = threading.Event()
        board._print_lines(Scripted(answers, ended), "sample", total, "images", ended)
        return capsys.readouterr().out.splitlines()

    return lines_of


def test_a_line_comes_even_when_nothing_is_reported(lines_of):
    lines = lines_of([(None, 0)] * 3, 8)
    assert [line.split()[:2] for line in lines] == [["sample", "starting"]] * 3


def test_advances_of_pooled_tasks_add_up_to_progress(lines_of):
    first, second, third = lines_of([(None, 2), (None, 4), (None, 4)], 8)
    assert first.split() == ["sample", "2/8", "images"]
    assert "images/s" in second
    assert "left" in third


def test_a_finished_stage_says_that_it_is_finishing(lines_of):
    done = Progress("train_vavae", 8, 8)
    first, second = lines_of([(done, 0)] * 2)
    assert first == done.line()
    assert second.split()[:2] == ["sample", "finishing"]


def test_stages_are_shown_by_their_own_progress(lines_of):
    assert lines_of([(Progress("train_vavae", 4, 8, rate=2.0), 0)]) == [
        "train_vavae        4/8 images  2 images/s  0:02 left"
    ]
