"""The frame of every benchmark: its file, looked at before anything is measured, its clock, table and exit code."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from kernels.benchmarks.race import Clock
from kernels.benchmarks.record import Layout, Record, append_records, this_machine

__all__ = [
    "Columns",
    "Frame",
    "Step",
    "compact_table",
    "digits",
    "fastest_device",
    "known_names",
    "percent",
    "table_of",
]


CPU: Final = torch.device("cpu")
Step = Callable[[], object]
Columns = Mapping[str, str | Callable[[Record], str]]
"""Heads with the figure, or the text, below them."""


class Frame:
    """One run of a benchmark: keeps every record as it comes and speaks on the terminal."""

    def __init__(
        self,
        layout: Layout,
        options: argparse.Namespace,
        console: Console,
        device: torch.device = CPU,
    ) -> None:
        """Look at the place for results and start the clock.

        Raises:
            InputError: results cannot be written there.
        """
        self.layout, self.console, self.device, self.dry = layout, console, device, options.dry_run
        self.path = None if options.out is None else _results_file(options.out, layout)
        self.records: list[Record] = []
        self.clock = Clock(options.time_limit, say=self.say)

    @cached_property
    def machine(self) -> dict[str, Any]:
        """Facts on this machine when the first record is made."""
        facts: dict[str, Any] = this_machine(self.device)
        return facts

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def run(self, steps: Mapping[str, Step], shown: Callable[[Sequence[Record]], Table]) -> int:
        """Do the steps, each said before it begins; show the records and return the exit code. A dry run only says."""
        self.clock.steps = len(steps)
        for text, step in steps.items():
            if self.dry:
                self.say(text)
            else:
                self.clock.begin(text)
                step()
        if self.dry:
            return EXIT_DONE
        self.console.print(shown(self.records))
        return self.exit_code()

    def add(self, case: Mapping[str, Any], provider: str, samples: Sequence[float] = (), **found: Any) -> None:
        """Keep a record; arguments as of :meth:`Layout.record`."""
        self.keep([self.layout.record(self.machine, case, provider, samples, **found)])

    def keep(self, records: Iterable[Record]) -> list[Record]:
        """Append records to the file one by one, as they come; return them."""
        kept = []
        for record in records:
            if self.path is not None:
                append_records(self.path, self.layout, [record])
            kept.append(record)
        self.records += kept
        return kept

    def exit_code(self) -> int:
        """Return 1 when nothing was measured, or when something was refused or failed; else 0."""
        states = {record.status for record in self.records}
        return EXIT_DONE if "ok" in states and not states & {"refused", "failed"} else EXIT_PARTIAL


def table_of(
    records: Sequence[Record], *, title: str, case: Sequence[str], columns: Columns, notes: Sequence[str] = ()
) -> Table:
    """Return a line per measured record, with fields of its case and figures; the others' reasons stand below."""
    measured = [record for record in records if record.status == "ok"]
    unit, spread = (measured[0].unit, measured[0].spread) if measured else ("", "")
    caption = escape("\n".join((*notes, *_reasons(records, case))))
    heads = (*case, "provider", unit, spread, "n", *columns)
    table = compact_table(escape(title), *heads, words=len(case) + 1, caption=caption)
    before: list[str] = []
    for record in measured:
        words = [*(str(record.case[name]) for name in case), record.provider]
        shown = ["" if words[: i + 1] == before[: i + 1] else word for i, word in enumerate(words[:-1])]
        figures = (digits(record.median), f"{digits(record.low)} .. {digits(record.high)}", str(record.n))
        table.add_row(*map(escape, (*shown, words[-1])), *figures, *(_figure(record, of) for of in columns.values()))
        before = words
    return table


def _results_file(folder: Path, layout: Layout) -> Path:
    """Return the file in the folder of ``--out``, which may be new.

    Raises:
        InputError: no such file can be there, or one with other columns is. Nothing is made for the answer.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"--out {folder}: {there} is a file, where a folder is needed")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: no right to write in {there}")
    path: Path = folder / layout.file
    if path.is_dir():
        raise InputError(f"--out {folder}: {path} is a folder, where the results are to be a file")
    try:
        layout.check_columns(path)
    except ValueError as error:
        raise InputError(str(error)) from None
    return path


def fastest_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def known_names(option: str, text: str | None, known: Sequence[str], separator: str = ",") -> list[str]:
    """Return the names in an option's value, all without one; InputError names one that is unknown, and the known."""
    if text is None:
        return list(known)
    names = [name.strip() for name in text.split(separator) if name.strip()]
    for name in names or [text]:
        if name not in known:
            raise InputError(f"{option} {name}: known are {f'{separator} '.join(known)}")
    return names


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


def _figure(record: Record, what: str | Callable[[Record], str]) -> str:
    if callable(what):
        return what(record)
    value = record.figures[what]
    if what.endswith("_share") and value is not None:
        return percent(100 * value)
    return (percent if what.endswith("_percent") else digits)(value)


def _reasons(records: Sequence[Record], case: Sequence[str]) -> list[str]:
    """Return a line per reason for which something was not measured, with all that it holds for."""
    held: dict[str, list[str]] = {}
    for record in records:
        if record.status != "ok":
            names = [record.provider, *(str(record.case[name]) for name in case if record.case[name] not in ("", None))]
            held.setdefault(f"{record.status}: {record.reason}", []).append(" ".join(names))
    return [f"{reason}: {', '.join(names)}" for reason, names in held.items()]
