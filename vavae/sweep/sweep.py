"""A sweep with its base: the runs of its points and seeds, all checked before anything starts."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vavae.config import digest, resolve_paths
from vavae.config.load import assign, check, read
from vavae.config.yaml_source import Located, merge, plain
from vavae.errors import UserError
from vavae.randomness import numpy_generator
from vavae.runs.config import RunConfig
from vavae.runs.run import Run
from vavae.storage.config import StorageConfig
from vavae.storage.storage import Storage
from vavae.sweep.config import WHOLE_RUN, SweepConfig
from vavae.sweep.space import Point, Space

TRIALS, SHARED = "trials", "shared"
_NAME_CHARACTERS = 60


@dataclass(frozen=True)
class Sweep:
    """A sweep file and the configuration that it varies."""

    config: SweepConfig
    tree: Located
    """The sweep file."""
    base: Located
    """The configuration of the run that is varied, merged with `run`."""
    folder: str
    """The folder that relative paths are relative to; trials run elsewhere."""

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> "Sweep":
        """Read a sweep file and its base, and check every domain by building configurations with it.

        Args:
            path: the sweep file.
            overrides: `key.path=value`, as on the command line.

        Raises:
            UserError: one line with the key, where it was written and what is wrong with it.
        """
        tree = read(path, overrides)
        config = check(SweepConfig, tree)
        base = read(_beside(tree.value["base"]))
        base = merge(base, tree.value["run"]) if "run" in tree.value else base
        sweep = Sweep(config, tree, base, os.getcwd())
        for point in sweep.space.examples() + sweep.points():
            sweep.run_config(point, config.seeds[0])
            sweep.full_config(point)
        return sweep

    @property
    def space(self) -> Space:
        """The space of the search."""
        return Space(self.config.sweep)

    def points(self) -> list[Point]:
        """The points known before the search begins; none with Optuna, which suggests them in its course."""
        search = self.config.search
        if search.method == "grid":
            return self.space.points()
        if search.method == "random" and search.trials is not None:
            return self.space.draw(numpy_generator(search.seed, "sweep"), search.trials)
        return []

    def run_config(self, point: Point, seed: int) -> RunConfig:
        """The configuration of a trial's run; raises UserError where the point makes none."""
        reduced = self.tree.value.get("reduced")
        config = self._check(self.base if reduced is None else merge(self.base, reduced), point, seed)
        storage = config.storage.model_copy(
            update={"root": Storage.of(config.storage).child(f"{self.config.name}/{TRIALS}").root}
        )
        return config.model_copy(update={"name": f"{name_of_trial(point)}-seed-{seed}", "storage": storage})

    def full_config(self, point: Point) -> RunConfig:
        """The configuration of a point at the size of the base, ready to run; raises UserError where there is none."""
        config = self._check(self.base, point, self.config.seeds[0])
        return config.model_copy(update={"name": f"{self.config.name}-{name_of_trial(point)}"})

    def runs(self, point: Point) -> list[Run]:
        """The runs of a trial, one for each seed."""
        return [Run(self.run_config(point, seed)) for seed in self.config.seeds]

    def refusal(self, point: Point) -> str | None:
        """Reason why a point makes no runs, as a search that chooses points on its way may find; None where it does."""
        try:
            self.runs(point)
        except UserError as error:
            return str(error)
        return None

    @property
    def rows(self) -> Path | None:
        """The file of the rows of finished trials; None where there is none."""
        return None if self.config.rows is None else _beside(self.tree.value["rows"])

    @property
    def storage_config(self) -> StorageConfig:
        """The storage of the sweep."""
        return self._check(self.base, self.space.examples()[0], self.config.seeds[0]).storage

    @property
    def storage(self) -> Storage:
        """The folder of the sweep."""
        return Storage.of(self.storage_config).child(self.config.name)

    @property
    def shared(self) -> str:
        """The `storage.root` of the runs with shared artifacts."""
        return self.storage.child(SHARED).root

    def _check(self, tree: Located, point: Point, seed: int) -> RunConfig:
        """Merge a point into a tree and check the configuration."""
        tree = merge(tree, _located({"name": self.config.name, "seed": seed}, "the sweep"))
        for path, value in self.space.values(point).items():
            item = _located(value, self.tree.value["sweep"].value[path].place)
            tree = merge(tree, item) if path == WHOLE_RUN else assign(tree, path, item)
        try:
            return resolve_paths(check(RunConfig, tree), self.folder)
        except UserError as error:
            raise UserError(f"{error} [{describe(point)}]") from None


def name_of_trial(point: Point) -> str:
    """Name of a trial's folder: the values of its point, shortened, and a digest of the point."""
    words = "-".join(f"{path.rpartition('.')[2]}-{_text(value)}" for path, value in point.items())
    words = re.sub(r"[^A-Za-z0-9._]+", "-", words)[:_NAME_CHARACTERS].strip("-._")
    return f"{words}-{digest(point)[:8]}"


def describe(point: Mapping[str, str | float]) -> str:
    """A point in words: `key=value, ...`."""
    return ", ".join(f"{path}={_text(value)}" for path, value in point.items())


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _beside(name: Located) -> Path:
    """Path of a file named in another one, relative to that; on the command line, to the working directory."""
    file, colon, _ = name.place.rpartition(":")
    return Path(file).parent / name.value if colon else Path(name.value)


def _located(value: Any, place: str) -> Located:
    """Attach a place to a plain value and all within it."""
    if isinstance(value, Mapping):
        return Located({str(key): _located(item, place) for key, item in value.items()}, place)
    if isinstance(value, (list, tuple)):
        return Located([_located(item, place) for item in value], place)
    return Located(value, place)


def as_written(sweep: Sweep) -> Any:
    """The sweep file with defaults and overrides, as plain values."""
    return plain(sweep.tree)
