"""A store whose requests are counted, as S3 would be asked: a folder that every process of a test can reach."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from fsspec import AbstractFileSystem, register_implementation
from fsspec.implementations.local import LocalFileSystem

_KINDS = {
    "info": "head",
    "cat_file": "get",
    "pipe_file": "put",
    "put_file": "put",
    "cp_file": "copy",
    "rm": "delete",
    "find": "list",
    "ls": "list",
}


class Request(NamedTuple):
    """Request for a path."""

    kind: str
    path: str


class CountingStore(AbstractFileSystem):
    """File system of URLs `counting:///folder`, which is to us a store like any other."""

    protocol = "counting"
    cachable = False
    page = 1000
    """Names that one request lists."""
    requests: ClassVar[Counter[Request]] = Counter()
    """Requests of this process so far."""
    _lock = threading.Lock()
    _folder = LocalFileSystem(auto_mkdir=True)


def _counted(name: str) -> Any:
    def method(self: CountingStore, path: str, *args: Any, **kwargs: Any) -> Any:
        found: Any = ()
        try:
            found = getattr(self._folder, name)(path, *args, **kwargs)
        finally:
            pages = max(1, -(-len(found) // self.page)) if _KINDS[name] == "list" else 1
            with self._lock:
                self.requests[Request(_KINDS[name], path)] += pages
        return found

    return method


for _name in _KINDS:
    setattr(CountingStore, _name, _counted(_name))
register_implementation("counting", CountingStore, clobber=True)


def counted(work: Callable[[], Any]) -> tuple[Any, Counter[Request]]:
    """Result of some work in this process, and the requests that it makes."""
    before = CountingStore.requests.copy()
    return work(), CountingStore.requests - before


def by_kind(requests: Counter[Request]) -> dict[str, int]:
    """Number of requests of each kind."""
    counts: Counter[str] = Counter()
    for request, count in requests.items():
        counts[request.kind] += count
    return dict(sorted(counts.items()))
