"""The limits of `recount`, and its rules on a small source."""

import ast

import pytest
import recount

SOURCE = ast.parse("""
class Asked(Protocol):
    def asked(self): ...
class Foreign(Library):
    def foreign(self): ...
class Ours(NamedTuple):
    def method(self, run: Run | None): ...
    def __len__(self): ...
    @cached_property
    def size(self): ...
    def long(self, runs: "list[Run]"):
        # its
        # own
        return 1
def once(config: RunConfig): ...
def twice(*, make: Callable[[Run], None]): ...
def one():
    twice()
def other():
    twice()
(asked, foreign, size, once(), it.method, it.long)
""")


def test_what_is_counted():
    assert recount.one_caller([SOURCE]) == ["once", "method"]
    assert [each.name for each in recount.functions_of(SOURCE) if recount.takes_run(each)] == [
        "twice",
        "method",
        "long",
    ]


@pytest.mark.parametrize(("name", "value"), recount.recount().items())
def test_no_figure_is_above_its_limit(name, value):
    assert value <= recount.LIMITS[name]
