"""Rows of finished trials in a file beside the sweep, from which it goes on where its storage is not there."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vavae.errors import UserError, one_line
from vavae.runs.config import RunConfig
from vavae.sweep.sharing import SOURCES
from vavae.sweep.space import Point
from vavae.sweep.sweep import Sweep, name_of_trial
from vavae.sweep.trial import Entry, metrics_by_rung, read_ledger, trial_key, write_entry, write_rung

_log = logging.getLogger(__name__)


def new_rows(sweep: Sweep) -> dict[str, Mapping[str, Any]]:
    """Rows of trials that are not finished in the sweep's storage, by their names.

    Rows of other points, or of trials that are run in another way now, are left out.

    Raises:
        UserError: a line of the file is no row.
    """
    finished = {name for name, entry in read_ledger(sweep).items() if entry.state == "finished"}
    points = ((row, sweep.space.known_point(row["point"])) for row in _read(sweep))
    return {
        row["trial"]: row
        for row, point in points
        if point is not None and name_of_trial(point) not in finished and row["key"] == _key(sweep, point)
    }


def restore_rows(sweep: Sweep) -> None:
    """Enter the trials of new rows into the ledger, with their metrics."""
    for row in new_rows(sweep).values():
        for seed, run in zip(sweep.config.seeds, sweep.runs(row["point"]), strict=True):
            for images, metrics in row["seeds"][str(seed)].items():
                write_rung(run.config, int(images), metrics)
        write_entry(sweep, Entry(row["point"], "finished"))


def write_rows(sweep: Sweep) -> None:
    """Write the finished trials into the file, with a warning where it can't be; rows of other points stay."""
    path = sweep.rows
    if path is None:
        return
    rows = {row["trial"]: row for row in _read(sweep)}
    for name, entry in read_ledger(sweep).items():
        if entry.state == "finished":
            rows[name] = {
                "trial": name,
                "point": entry.point,
                "key": _key(sweep, entry.point),
                "seeds": {
                    str(seed): {str(images): metrics for images, metrics in metrics_by_rung(run).items()}
                    for seed, run in zip(sweep.config.seeds, sweep.runs(entry.point), strict=True)
                },
            }
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows.values())
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:  # its folder may be an installed package's; the sweep has its results all the same
        _log.warning("no rows are written: %s", one_line(error))


def _read(sweep: Sweep) -> list[Mapping[str, Any]]:
    path = sweep.rows
    if path is None or not path.exists():
        return []
    return [_row(line, path, number) for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]


def _row(line: str, path: Path, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: no row of a trial ({error}); delete the line") from error
    if not isinstance(row, dict) or not {"trial", "point", "key", "seeds"} <= row.keys():
        raise UserError(f"{path}:{number}: no row of a trial; delete the line")
    return row


def _key(sweep: Sweep, point: Point) -> str:
    """Digest of all that the result of a trial depends on, equal wherever the sources lie."""
    if sweep.refusal(point) is not None:
        return ""
    return trial_key(sweep, [_with_names_of_sources(run.config) for run in sweep.runs(point)])


def _with_names_of_sources(config: RunConfig) -> RunConfig:
    places = {name: place for name in (*SOURCES, "labels") if (place := getattr(config.shards, name)) is not None}
    names = {name: place.rstrip("/").rpartition("/")[2] for name, place in places.items()}
    return config.model_copy(update={"shards": config.shards.model_copy(update=names)})
