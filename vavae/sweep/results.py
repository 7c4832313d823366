"""The results of a sweep, beside its trials: the table, the best configurations, and the page that shows them."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from vavae.config.load import dump
from vavae.config.yaml_source import to_text
from vavae.report.html import Picture, Section, facts_table, page, picture, yaml_text
from vavae.sweep.outcomes import (
    GENERATION,
    RECONSTRUCTION,
    Figure,
    Outcome,
    collect,
    front,
    speed_ups,
)
from vavae.sweep.plots import curves_png, frontier_png, sensitivity_png
from vavae.sweep.sweep import Sweep, as_written, describe

FRONTIER, _PICTURE, _TABLE, _BEST = "frontier.html", "frontier.png", "trials.csv", "best"


def write_sweep(sweep: Sweep) -> None:
    """Write what is known of a sweep so far: table, best configurations, picture and page."""
    outcomes = collect(sweep)
    files = {_TABLE: table_csv(sweep, outcomes).encode()}
    best = _write_best(sweep, outcomes)
    frontier = frontier_png(sweep, outcomes)
    if frontier is not None:
        files[_PICTURE] = frontier
    files[FRONTIER] = _page(sweep, outcomes, frontier, best).encode()
    for name, data in files.items():
        sweep.storage.write_bytes(name, data)


def table_csv(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """A row for each trial and rung: what it sets, means and deviations of all measures, whether it is on the front."""
    measures = list(dict.fromkeys(name for one in outcomes for row in one.curve.values() for name in row))
    best = [one.name for one in front(outcomes, sweep.config.objectives)]
    columns = ["trial", "state", "why", *sweep.config.sweep, "seeds", "images_seen", "on_front"]
    columns += [name for measure in measures for name in (measure, f"{measure}_deviation")]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for one in outcomes:
        known = {"trial": one.name, "state": one.state, "why": one.why, "seeds": len(sweep.config.seeds), **one.point}
        for images, row in one.curve.items() or [("", {})]:
            ends = one.state == "finished" and images == max(one.curve)
            figures = {
                name: value
                for measure, figure in row.items()
                for name, value in ((measure, figure.mean), (f"{measure}_deviation", figure.deviation))
            }
            writer.writerow({**known, "images_seen": images, "on_front": ends and one.name in best, **figures})
    return text.getvalue()


def _write_best(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[str]:
    """Write a configuration at full size for every trial on the front: `best.yaml`, or `best/<trial>.yaml` of several.

    Returns:
        The names of the files.
    """
    chosen = {
        f"{_BEST}.yaml" if len(sweep.config.objectives) == 1 else f"{_BEST}/{one.name}.yaml": one
        for one in front(outcomes, sweep.config.objectives)
    }
    for old in sweep.storage.list(_BEST):
        if old not in chosen:
            sweep.storage.delete(old)
    for name, one in chosen.items():
        sweep.storage.write_bytes(name, dump(sweep.full_config(one.point)).encode())
    return list(chosen)


def _page(sweep: Sweep, outcomes: Sequence[Outcome], frontier: bytes | None, best: Sequence[str]) -> str:
    """The page of a sweep, as HTML."""
    states = [one.state for one in outcomes]
    summary = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    facts = {
        "storage": sweep.storage.url(),
        "seeds": ", ".join(map(str, sweep.config.seeds)),
        "objectives": ", ".join(f"{one.measure} ({one.better} is better)" for one in sweep.config.objectives),
        "best": ", ".join(best),
    }
    return page(
        sweep.config.name,
        f"A sweep; trials: {summary}" if states else "A sweep that has not begun",
        [
            Section("Pictures", "".join(map(picture, _pictures(sweep, outcomes, frontier)))),
            Section("Trials", _trials(outcomes)),
            Section("Speed-up by alignment", _speed_ups(sweep, outcomes)),
            Section("Sweep", facts_table(facts)),
            Section("Configuration", yaml_text(to_text(as_written(sweep)))),
        ],
    )


def _trials(outcomes: Sequence[Outcome]) -> str:
    """All trials with their last measures; of those that did not finish, why."""
    measures = list(dict.fromkeys(name for one in outcomes for name in one.last))
    rows = [
        [describe(one.point), " ".join([one.state, one.why]), *(_text(one.last.get(name)) for name in measures)]
        for one in outcomes
    ]
    return _table(["trial", "state", *measures], rows, "Means over the seeds ± their standard deviation.")


def _speed_ups(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    rows = []
    for before, after, found in speed_ups(sweep, outcomes):
        ratio = "never arrives" if found is None else f"{'at least ' if found.at_least else ''}{found.ratio:.2f} times"
        rows.append([describe(before.point), describe(after.point), ratio])
    note = f"How much sooner the aligned trial reaches the {GENERATION} at which its unaligned twin ends."
    return _table(["not aligned", "aligned", "sooner"], rows, note)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div><p class="note">{escape(note)}</p>'


def _pictures(sweep: Sweep, outcomes: Sequence[Outcome], frontier: bytes | None) -> list[Picture]:
    drawn = [
        Picture(
            "Frontier",
            "Filled: aligned with the teacher; open: not. An arrow leads to a trial that differs by the weight of the "
            "alignment alone. Bars are deviations between seeds; dotted is the front.",
            frontier or b"",
            f"{GENERATION} over {RECONSTRUCTION} of {len(outcomes)} trials",
        ),
        Picture(
            "Generation against images seen",
            "Dashed: not aligned. Bars are deviations between seeds.",
            curves_png(sweep, outcomes) or b"",
            f"{GENERATION} of each trial over the images that its LightningDiT has seen",
        ),
    ]
    for path, domain in sweep.config.sweep.items():
        png = sensitivity_png(path, domain, outcomes, sweep.config.objectives)
        drawn.append(Picture(path, "Finished trials; the line joins means.", png or b"", f"Objectives over {path}"))
    return [replace(one, smooth=True) for one in drawn if one.png]


def _text(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{figure.mean:.4g}" if figure.deviation is None else f"{figure.mean:.4g} ± {figure.deviation:.2g}"
