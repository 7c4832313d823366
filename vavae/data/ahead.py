"""Work ahead of its use: threads that decode what comes next and write what came before, while the caller computes.

Threads suffice: Pillow and libjpeg work without the interpreter's lock, and no pixel is copied to another process.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

THREAD = "vavae-ahead"

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int, threads: int = 1
) -> Generator[Result, None, None]:
    """Yield `function(item)` of every item, in order, while threads work on the ones that follow.

    The caller's thread draws the items, so it may compute them while the threads work on those before. An error is
    raised in its place in the order; what was begun by then is finished, the rest is not begun.

    Args:
        function: called in the threads; with one thread, for one item after another.
        items: drawn in the caller's thread.
        ahead: most results that are waiting or worked on while the caller draws or uses one, at least 1.
        threads: their number changes no result.
    """
    pool, begun = ThreadPoolExecutor(threads, THREAD), deque[Future[Result]]()
    try:
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_turn(turn: Lock, items: Iterable[Item]) -> Generator[Item, None, None]:
    """Yield all items while holding a lock, from before the first is drawn until after the last one."""
    with turn:
        yield from items


def threads_of(cpus: float) -> int:
    """Number of threads for so many CPU cores: one for each, at least one."""
    return max(1, int(cpus))
