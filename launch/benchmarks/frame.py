"""The frame of every benchmark: its file, looked at before anything is measured, its clock, table and exit code."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from kernels.benchmarks.race import Clock
from kernels.benchmarks.record import Layout, Record, append_records, check_columns

__all__ = ["Frame", "compact_table", "digits", "percent", "results_file"]

Columns = Mapping[str, Callable[[Record], str]]


class Frame:
    """One run of a benchmark: keeps every record as it comes and speaks on the terminal."""

    def __init__(self, layout: Layout, options: argparse.Namespace, console: Console, *, steps: int = 1) -> None:
        """Look at the place for results and start the clock.

        Raises:
            InputError: results cannot be written there.
        """
        self.layout = layout
        self.console = console
        self.path = results_file(options.out, layout)
        self.records: list[Record] = []
        self.clock = Clock(options.time_limit, steps=steps, say=self.say)

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def keep(self, records: Iterable[Record]) -> list[Record]:
        """Append records to the file one by one, as they come; return them."""
        kept = []
        for record in records:
            if self.path is not None:
                append_records(self.path, self.layout, [record])
            kept.append(record)
        self.records += kept
        return kept

    def show(
        self, records: Sequence[Record], title: str, *, case: Sequence[str], columns: Columns, notes: Sequence[str] = ()
    ) -> None:
        """Print a line per measured record, with fields of its case and further columns, and the others' reasons."""
        measured = [record for record in records if record.status == "ok"]
        unit = measured[0].unit if measured else ""
        table = compact_table(
            escape(title),
            *(*case, "provider", unit, measured[0].spread if measured else "", "n", *columns),
            words=len(case) + 1,
            caption=escape("\n".join((*notes, *_reasons(records, case)))),
        )
        before: list[str] = []
        for record in measured:
            words = [*(str(record.case[name]) for name in case), record.provider]
            spread = f"{digits(record.low)} .. {digits(record.high)}"
            figures = (digits(record.median), spread, str(record.n), *(of(record) for of in columns.values()))
            shown = [
                "" if words[: place + 1] == before[: place + 1] else words[place] for place in range(len(words) - 1)
            ]
            table.add_row(*map(escape, (*shown, words[-1])), *figures)
            before = words
        self.console.print(table)

    def exit_code(self) -> int:
        """Return 1 when nothing was measured, or when something was refused or failed; else 0."""
        states = {record.status for record in self.records}
        return EXIT_DONE if "ok" in states and not states & {"refused", "failed"} else EXIT_PARTIAL


def results_file(folder: Path | None, layout: Layout) -> Path | None:
    """Return the file in the folder of ``--out``, which may be new; None where nothing is to be written.

    Raises:
        InputError: no such file can be there, or one with other columns is. Nothing is made for the answer.
    """
    if folder is None:
        return None
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"--out {folder}: {there} is a file, where a folder is needed")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: no right to write in {there}")
    path: Path = folder / layout.file
    if path.is_dir():
        raise InputError(f"--out {folder}: {path} is a folder, where the results are to be a file")
    try:
        check_columns(path, layout)
    except ValueError as error:
        raise InputError(str(error)) from None
    return path


def compact_table(title: str, *columns: str, words: int = 1, caption: str = "") -> Table:
    """Return a table that fits 80 columns: no lines between columns, the first ``words`` columns to the left."""
    table = Table(title=title, caption=caption or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    for place, column in enumerate(columns):
        left = place < words
        table.add_column(column, justify="left" if left else "right", no_wrap=place == 0 or (left and words == 2))
    return table


def digits(value: float | None) -> str:
    """Return three digits, or whole numbers with separators."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else "<0.001" if 0 < value < 0.001 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """Return a share in per cent."""
    return "" if value is None else f"{value:.0f} %" if value >= 10 else f"{value:.1f} %"


def _reasons(records: Sequence[Record], case: Sequence[str]) -> list[str]:
    """Return a line per reason for which something was not measured, with all that it holds for."""
    held: dict[str, list[str]] = {}
    for record in records:
        if record.status != "ok":
            names = [record.provider, *(str(record.case[name]) for name in case if record.case[name] not in ("", None))]
            held.setdefault(f"{record.status}: {record.reason}", []).append(" ".join(names))
    return [f"{reason}: {', '.join(names)}" for reason, names in held.items()]
