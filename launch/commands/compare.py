"""``htnet compare``: differences of runs over the same clips, paired by subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from htnet.config.load import load_config
from htnet.data.samples import COMPOSITE
from htnet.errors import InputError
from htnet.files import csv_text, whole_folder
from htnet.scoring.comparison import (
    COMPARED,
    Difference,
    Labels,
    check_same_samples,
    compare_runs,
    differing_clips,
    selected_labels,
)
from htnet.scoring.record import read_records
from htnet.scoring.selection import Selection
from launch.run.folder import RunFolder
from launch.screen import say

__all__ = ["compare"]

_DRAWS = 10_000
_COLOURS = {"uf1": "#004c7f", "uar": "#b34700"}

Differences = Mapping[str, Mapping[str, Mapping[str, Difference]]]
"""Differences from the first run, by run, row and score."""


def compare(paths: Sequence[Path], out: Path | None, console: Console, *, selection: Selection) -> None:
    """Compare each run with the first one; print the differences, and write clips and a picture into ``out``.

    Raises:
        InputError: fewer than two runs, the same run twice, no run, damaged records, other samples or classes, a
            selection that a run does not allow; ``out`` is not empty.
    """
    names = _names(paths)
    runs, classes = {}, {}
    for name, path in zip(names, paths, strict=True):
        folder = RunFolder(path=path)
        if not folder.config.is_file():
            raise InputError(f"{path}: not a run: it holds no {folder.config.name}")
        records = read_records(folder.folds)
        if not records:
            raise InputError(f"{path}: no finished fold yet: {folder.folds} holds no record")
        runs[name] = selected_labels(records, selection, name)
        classes[name] = load_config(folder.config).model.num_classes
    first, *others = names
    for name in others:
        if classes[name] != classes[first]:
            raise InputError(f"{name}: {classes[name]} classes, {first} has {classes[first]}")
        check_same_samples(runs[first], runs[name], (first, name))
    found = {
        name: compare_runs(runs[first], runs[name], num_classes=classes[first], draws=_DRAWS, seed=0) for name in others
    }
    for name, rows in found.items():
        console.print(_table(first, name, rows))
    say(
        console,
        f"selection {selection}; p: share of {_DRAWS:,} random exchanges of a subject's predictions between the",
    )
    say(console, "two runs that make a difference as large, either way")
    clips = differing_clips(runs)
    say(console, f"{len(clips)} of {len(runs[first])} clips are told differently")
    if out is not None:
        _write(out, first, found, runs)
        say(console, f"clips and picture: {out}")


def _names(paths: Sequence[Path]) -> list[str]:
    """Name the runs by their folders, or by their paths where two folders have one name."""
    if len(paths) < 2:
        raise InputError(f"two runs or more are compared, got {len(paths)}")
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"a run is named twice: {', '.join(map(str, paths))}")
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _table(first: str, run: str, rows: Mapping[str, Mapping[str, Difference]]) -> Table:
    """Make a table of one run's differences; 80 columns wide where the names are short."""
    table = Table(title=f"{escape(run)} less {escape(first)}", title_justify="left", caption_justify="left")
    for head in ("", "score", "first", "second", "difference", "95 % over subjects", "p"):
        table.add_column(head, justify="left" if head in ("", "score") else "right")
    for row, scores in rows.items():
        for name, difference in scores.items():
            interval = "" if difference.interval is None else "{:+.3f} to {:+.3f}".format(*difference.interval)
            probability = "" if difference.probability is None else f"{difference.probability:.3f}"
            figures = (f"{difference.first:.3f}", f"{difference.second:.3f}", f"{difference.value:+.3f}")
            style = "bold" if row == COMPOSITE else None
            table.add_row(escape(row), name.upper(), *figures, interval, probability, style=style)
    return table


def _write(out: Path, first: str, found: Differences, runs: Mapping[str, Labels]) -> None:
    clips = [(*facts, *guesses) for *facts, guesses in differing_clips(runs)]
    header = ("dataset", "subject", "clip", "label", *runs)
    with whole_folder(out) as folder:
        (folder / "clips.csv").write_text(csv_text([header, *clips]), encoding="utf-8")
        _picture(first, found).savefig(folder / "differences.png", dpi=130, bbox_inches="tight", facecolor="white")


def _picture(first: str, found: Differences) -> Figure:
    """Draw a line for each run and row: both differences with their intervals."""
    rows = [(run, row, scores) for run, part in found.items() for row, scores in part.items()]
    figure = Figure(figsize=(7.0, 1.2 + 0.42 * len(rows)))
    axes = figure.add_subplot()
    for number, name in enumerate(COMPARED):
        places = [-index + 0.14 * (1 - 2 * number) for index in range(len(rows))]
        values = [scores[name].value for _, _, scores in rows]
        axes.plot(values, places, "os"[number], color=_COLOURS[name], label=name.upper())
        for place, (_, _, scores) in zip(places, rows, strict=True):
            if (interval := scores[name].interval) is not None:
                axes.plot(interval, (place, place), "-" if number == 0 else "--", color=_COLOURS[name], linewidth=1.5)
    axes.axvline(0.0, color="0.5", linewidth=1.0)
    axes.set_yticks([-index for index in range(len(rows))], [f"{run}: {row}" for run, row, _ in rows])
    axes.set_xlabel(f"difference from {first}, with 95 % over subjects")
    axes.grid(axis="x", color="0.9")
    axes.legend(loc="best", frameon=False)
    return figure
