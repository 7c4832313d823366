"""Work ahead: in order, within its bound, in other threads, with errors in their place."""

import threading
from contextlib import closing
from threading import Lock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vavae.data.ahead import THREAD, in_turn, map_ahead, threads_of


def working():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(), max_size=20), st.integers(1, 6), st.integers(1, 4))
def test_results_come_in_order_whatever_the_threads(items, ahead, threads):
    assert list(map_ahead(lambda item: 3 * item, items, ahead, threads)) == [3 * item for item in items]
    assert not working()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(1, 3))
def test_no_more_is_drawn_than_the_bound_allows(count, ahead, threads):
    drawn = []
    items = (drawn.append(item) for item in range(count))
    for used, _ in enumerate(map_ahead(str, items, ahead, threads), 1):
        assert len(drawn) == min(count, used + ahead)


def test_threads_work_while_the_caller_draws_the_next_item():
    drawn, workers = threading.Event(), []

    def items():
        yield 1
        drawn.set()
        yield 2

    def work(item):
        assert drawn.wait(30), "the second item waits for the first"
        workers.append(threading.current_thread())

    list(map_ahead(work, items(), ahead=1))
    assert len({*workers}) == 1
    assert threading.current_thread() not in workers


def test_one_thread_works_on_one_item_after_another():
    done, busy = [], Lock()

    def work(item):
        assert busy.acquire(blocking=False), "two items at once"
        done.append(item)
        busy.release()

    list(map_ahead(work, range(50), ahead=9))
    assert done == list(range(50))


def test_an_error_comes_in_its_place():
    results = []
    with pytest.raises(ZeroDivisionError):
        results.extend(map_ahead(lambda item: 1 // item, [1, 1, 0, 1], ahead=3, threads=2))
    with pytest.raises(KeyError), closing(map_ahead(str, fails_after(2), ahead=1)) as found:
        results.extend(found)
    assert results == [1, 1, "0"]
    assert not working()


def fails_after(count):
    yield from range(count)
    raise KeyError


def test_what_is_not_drawn_is_not_worked_on():
    done = []
    with closing(map_ahead(done.append, range(100), ahead=2)) as found:
        next(found)
    assert len(done) <= 3
    assert not working()


def test_a_turn_lasts_from_the_first_item_to_the_last_or_until_it_is_closed():
    turn = Lock()
    items = in_turn(turn, [1, 2])
    assert not turn.locked()
    assert next(items) == 1
    assert turn.locked()
    assert list(items) == [2]
    assert not turn.locked()
    with closing(in_turn(turn, [1, 2])) as items:
        next(items)
    assert not turn.locked()


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1.0, 1), (1.9, 1), (8.0, 8)])
def test_there_is_a_thread_for_each_whole_core(cpus, threads):
    assert threads_of(cpus) == threads
