"""The size and the reach of the code in figures, as a Markdown table: ``python tests/recount.py``."""

import ast
import re
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).parents[1]
PACKAGES = ("vavae", "ray_jobs")

WAY = "files on the way of an image"
LIMITS = {
    "functions that take a Run": 51,
    "functions of three lines with one caller": 93,
    "words of the README": 2200,
    "files at the top of vavae/training": 25,
    WAY: 38,
}
"""What each figure may be at most."""

SHORT = 3
"""Lines of a short function, from `def` to its end, the docstring included and decorators not."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> dict[Path, ast.Module]:
    """The code by path relative to the project."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT): ast.parse(path.read_text()) for path in paths}


def room_of(path: Path) -> str:
    """The first folder below the package; the package itself for the modules at its top."""
    return "/".join(path.parts[: min(2, len(path.parts) - 1)])


def functions_of(tree: ast.Module) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def takes_run(function: Function) -> bool:
    """Whether a parameter is annotated with `Run`, in whatever form."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    annotations = [each.annotation for each in every if each is not None and each.annotation is not None]
    return any(re.search(r"\bRun\b", ast.unparse(annotation)) for annotation in annotations)


def is_short(function: Function) -> bool:
    assert function.end_lineno is not None, "parsed from a file"
    return function.end_lineno - function.lineno < SHORT


def one_caller(modules: Iterable[ast.Module]) -> list[str]:
    """Short functions whose name stands in one other function, or once at the top of a module, and nowhere else.

    A name that begins with an underscore is looked for in its own module alone, any other one everywhere. Left out is
    what others call: dunder methods, properties, methods named as one of a Protocol of ours, and methods of classes
    with a base that is not ours, which may override its own.
    """
    modules = list(modules)
    callers = [_callers(module) for module in modules]
    classes = {node.name: node for module in modules for node in ast.walk(module) if isinstance(node, ast.ClassDef)}
    left_out = {
        each
        for one in classes.values()
        if any(base not in {*classes, "NamedTuple", "Generic", "Protocol"} for base in map(_last_name, one.bases))
        for each in one.body
    }
    protocols = [one for one in classes.values() if "Protocol" in map(_last_name, one.bases)]
    asked = {each.name for one in protocols for each in one.body if isinstance(each, Function)}
    return [
        function.name
        for module, own in zip(modules, callers, strict=True)
        for function in functions_of(module)
        if is_short(function)
        and sum(len(each[function.name]) for each in ([own] if function.name.startswith("_") else callers)) == 1
        and not (re.fullmatch(r"__\w+__", function.name) or function.name in asked or function in left_out)
        and not any(_last_name(each).endswith("property") for each in function.decorator_list)
    ]


def _callers(module: ast.Module) -> defaultdict[str, set[ast.AST]]:
    """By name, the innermost functions in which it is used, or the module."""
    found: defaultdict[str, set[ast.AST]] = defaultdict(set)

    def visit(node: ast.AST, scope: ast.AST) -> None:
        if isinstance(node, (ast.Name, ast.Attribute)):
            found[node.id if isinstance(node, ast.Name) else node.attr].add(scope)
        for child in ast.iter_child_nodes(node):
            visit(child, node if isinstance(node, Function) else scope)

    visit(module, module)
    return found


def _last_name(node: ast.expr) -> str:
    """`a.B[c]` → `B`."""
    return ast.unparse(node).partition("[")[0].rpartition(".")[2]


def on_the_way_of_an_image() -> dict[str, set[str]]:
    """The functions that receive an image, its tensor, latent, feature or metric, by file, traced over a whole run.

    All stages of `support.chain` run in this process, at the size of `configs/tiny.yaml` and for a few steps.
    """
    from support.chain import whole_chain

    found: dict[str, set[str]] = {}
    done: set[CodeType] = set()
    calls: Counter[CodeType] = Counter()

    def look(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code in done:
            return
        calls[code] += 1
        ours = code.co_filename.startswith(OURS) and not code.co_filename.endswith(OF_WEIGHTS)
        if calls[code] > ENOUGH or not ours or code.co_name.startswith("<"):
            done.add(code)
            return
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        if any(_carries(frame.f_locals[name]) for name in code.co_varnames[:count] if name in frame.f_locals):
            done.add(code)
            file = code.co_filename.removeprefix(f"{ROOT}/")
            found.setdefault(file, set()).add(
                getattr(code, "co_qualname", code.co_name)
            )  # qualified from Python 3.11 on

    with tempfile.TemporaryDirectory() as folder:
        threading.setprofile(look)
        sys.setprofile(look)
        try:
            whole_chain(Path(folder), *FEW_STEPS)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
    return found


OURS = tuple(f"{ROOT / package}/" for package in PACKAGES)
OF_WEIGHTS = ("/distributed/sharded_tensors.py", "/distributed/shard_files.py", "/interop/export.py")
"""Files whose functions are handed weights alone, which look like images to the trace."""
FEW_STEPS = (
    "train_vavae={images: 32, log_images: 16, checkpoint_images: 32, probe_images: 32, preview_images: 32}",
    "train_lightningdit={images: 64, log_images: 32, checkpoint_images: 64, preview_images: 64}",
    "losses.adversarial.start_images=0",
)
ENOUGH = 100
"""Calls after which a function that was never given an image is taken for one that never is."""
IMAGE_BYTES = (b"\x89PNG", b"\xff\xd8\xff", b"\x93NUMPY")
"""What the bytes of an image or a latent begin with."""


def _carries(value: object) -> bool:
    """Whether a value is what the way of an image is made of, or holds it one level inside."""
    return _is_image(value) or any(map(_is_image, _inside(value)))


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in fields(value)]
    return ()


def _is_image(value: object) -> bool:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor
    from torch.nn import Parameter

    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value[:8]).startswith(IMAGE_BYTES)
    if isinstance(value, Tensor):
        return not (isinstance(value, Parameter) or value.is_meta)
    return isinstance(value, (np.ndarray, Image)) or type(value).__name__ == "Metric"


def recount() -> dict[str, int]:
    """The figures that have a limit, but for the traced one."""
    trees = sources()
    return {
        "functions that take a Run": sum(takes_run(each) for tree in trees.values() for each in functions_of(tree)),
        "functions of three lines with one caller": len(one_caller(trees.values())),
        "words of the README": len((ROOT / "README.md").read_text().split()),
        "files at the top of vavae/training": len([*(ROOT / "vavae" / "training").glob("*.py")]),
    }


def rooms() -> Iterator[tuple[str, int, int, int, int]]:
    """For each room its files, lines, functions that take a `Run`, and short functions; then all of them."""
    trees = sources()
    for room in [*dict.fromkeys(map(room_of, trees)), ""]:
        paths = [path for path in trees if room in ("", room_of(path))]
        functions = [each for path in paths for each in functions_of(trees[path])]
        lines = sum(len((ROOT / path).read_text().splitlines()) for path in paths)
        yield room or "all", len(paths), lines, sum(map(takes_run, functions)), sum(map(is_short, functions))


def report() -> str:
    """All figures as Markdown."""
    traced = on_the_way_of_an_image()
    figures = {**recount(), WAY: len(traced)}
    lines = ["| figure | now | limit |", "|---|---|---|"]
    lines += [f"| {name} | {figures[name]:,} | {limit:,} |" for name, limit in LIMITS.items()]
    lines += ["", "| room | files | lines | functions that take a Run | of three lines |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rooms()]
    lines += ["", "| file on the way of an image | functions |", "|---|---|"]
    lines += [f"| {file} | {', '.join(sorted(names))} |" for file, names in sorted(traced.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    text = report()  # whose trace prints what the jobs print
    print(f"\n{text}")
