"""The rooms and the arrows between them: who may import whom, and who alone knows which package."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("vavae", "ray_jobs")
    for path in sorted((ROOT / package).rglob("*.py"))
}

LEVELS = (
    {"config"},
    {"storage"},
    {"models.backbones"},
    {"models.tokenizer", "models.dit", "losses", "diffusion", "data", "metrics", "distributed", "tracking"},
    {"runs"},
    {"latents"},
    {"interop"},
    {"sampling"},
    {"training"},
    {"evaluation"},
    {"planning", "bench"},
    {"report"},
    {"sweep"},
    {"cli", "ray_jobs"},
    {"__main__", "__init__"},
)
"""A room imports rooms of earlier levels and none of its own level.

Pretrained backbones lie below the other models, because losses and metrics look through them, too.
"""
RANK = {room: rank for rank, rooms in enumerate(LEVELS) for room in rooms}
COMMANDS_OF_RAY = ("vavae.cli.main", "ray_jobs.submission.command")
"""The console command describes what needs a cluster; Ray itself is imported when such a command runs."""
FREE = {"command", "errors", "finite", "hardware", "matplotlib_compat", "randomness", "progress", "torchvision_compat"}
"""Modules that every room may import and that import none."""
OWNERS = {
    "ray": ("ray_jobs",),
    "deepspeed": ("vavae.distributed",),
    "fsspec": ("vavae.storage",),
    "s3fs": ("vavae.storage",),
    "webdataset": ("vavae.data", "vavae.bench"),
    "wandb": ("vavae.tracking",),
    "mlflow": ("vavae.tracking",),
    "trackio": ("vavae.tracking",),
}


def room_of(module):
    """The room of a module, `vavae.data.shards.tar` → `data`; each kind of model is one, and so are all jobs."""
    package, *parts = module.split(".")
    if package != "vavae":
        return package
    return ".".join(parts[: 2 if parts[0] == "models" else 1]) if parts else "vavae"


def imports_of(source):
    """Dotted names of all that a source imports, inside functions too, with the names that are taken from modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(source):
    """The modules of this project among the imports."""
    return {name for name in imports_of(source) if name in MODULES or f"{name}.__init__" in MODULES}


CONFIGURATION = (".config", ".training_config")
"""Ends of the names of modules that hold configuration, and import nothing else."""


def is_allowed(importer, imported):
    """Whether one of our modules may import another."""
    here, there = room_of(importer), room_of(imported)
    if there == "vavae":
        return False
    if importer.endswith(CONFIGURATION) and here != "config":
        composes = here == there == "runs"  # a run is made of sections and phases, which are of its own room
        return there in FREE | {"config"} or imported.endswith(CONFIGURATION) or composes
    if here == there or there in FREE:
        return True
    if here in FREE:
        return False
    return RANK[there] < RANK[here] or (importer, imported) == COMMANDS_OF_RAY


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("ray_jobs.sample", "vavae.runs.run", True),
        ("vavae.cli.main", "ray_jobs.sample", False),
        ("vavae.cli.main", "ray_jobs.submission.command", True),
        ("vavae.runs.run", "ray_jobs.submission.command", False),
        ("vavae.training.trainer", "ray_jobs.runtime.progress_actor", False),
        ("vavae.training.trainer", "vavae.distributed.world", True),
        ("vavae.runs.config", "vavae.evaluation.config", True),
        ("vavae.runs.training_config", "vavae.sampling.config", True),
        ("vavae.runs.training_config", "vavae.sampling.labels", False),
        ("vavae.runs.run", "vavae.sampling.config", False),
        ("vavae.sampling.config", "vavae.diffusion.config", True),
        ("vavae.sampling.config", "vavae.sampling.labels", False),
        ("vavae.training.train", "vavae", False),
        ("vavae.data.shards.verify", "vavae.latents.manifest", False),
        ("vavae.sampling.sampler", "vavae.interop.export", True),
        ("vavae.interop.export", "vavae.sampling.sampler", False),
        ("vavae.models.dit.model", "vavae.models.tokenizer.autoencoder", False),
        ("vavae.metrics.features", "vavae.models.backbones.load", True),
        ("vavae.models.backbones.load", "vavae.models.tokenizer.config", False),
        ("vavae.storage.config", "vavae.config", True),
        ("vavae.config.base", "vavae.storage.storage", False),
        ("vavae.randomness", "vavae.config", False),
        ("vavae.config.load", "vavae.errors", True),
    ],
)
def test_the_rules_themselves(importer, imported, allowed):
    assert is_allowed(importer, imported) == allowed


def test_imports_are_found_wherever_they_stand():
    source = "import a.b, c\nfrom d import e\ndef f():\n    from g.h import i\n"
    assert set(imports_of(source)) == {"a.b", "c", "d", "d.e", "g.h", "g.h.i"}


def test_every_room_has_its_level():
    assert {room_of(module) for module in MODULES} - FREE - {"models.__init__"} == set(RANK)


def test_arrows_point_one_way():
    imports = {(module, name) for module, path in MODULES.items() for name in ours(path.read_text())}
    assert not sorted(arrow for arrow in imports if not is_allowed(*arrow))


def test_no_imports_run_in_a_circle():
    graph = {module.removesuffix(".__init__"): ours(path.read_text()) - {module} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # it raises where there is a circle


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_is_known_in_one_place(package):
    knowing = {
        module
        for module, path in MODULES.items()
        if package in {name.partition(".")[0] for name in imports_of(path.read_text())}
    }
    assert not [module for module in knowing if not module.startswith(OWNERS[package])]


def test_every_module_says_what_it_is():
    assert not [module for module, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]


def test_rooms_are_light_to_enter():
    """A room's package holds a docstring alone, so that its configuration can be imported without torch.

    `vavae` itself has the table of its interface, from which a name is imported when it is used.
    """
    heavy = [
        module
        for module, path in MODULES.items()
        if module.endswith("__init__")
        and module not in ("vavae.__init__", "vavae.config.__init__")
        and len(ast.parse(path.read_text()).body) > 1
    ]
    assert heavy == []


def test_the_global_generator_is_set_in_one_place():
    setting = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.manual_seed", "torch.random.manual_seed")
    }
    assert setting == {"vavae.training.initialize"}


def test_configurations_are_imported_without_torch():
    configs = [module for module in MODULES if module.endswith(CONFIGURATION)]
    assert "vavae.runs.config" in configs
    check = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    found = subprocess.run([sys.executable, "-c", check, *configs], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
