"""What ``htnet prepare`` shows: progress, counts, what is left out and why, what took how long."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from htnet.data.adapters.base import Clip, FlowPicture, LeftOut
from htnet.data.labels import LabelScheme
from htnet.data.store import Store
from launch.prepare_task import SubjectOutcome


def say(console: Console, line: str) -> None:
    """A line as it is: names of folders and clips are no markup, and are not broken to fit the terminal."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """Clips done, left out and still to come; a line on a terminal, a line per subject in a log file."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        self._console, self._total, self._done, self._before = console, total, done, done
        self._left_out = 0
        self._start = time.monotonic()
        self._live = Live(console=console, refresh_per_second=2, transient=True, get_renderable=self._line)

    def __enter__(self) -> Progress:
        if self._before:
            say(self._console, f"going on: {self._before} of {self._total} clips were done before")
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def advance(self, subject: str, outcome: SubjectOutcome) -> None:
        """A subject is done."""
        self._done += outcome.clips
        self._left_out += outcome.left_out
        if not self._console.is_terminal:
            say(self._console, f"{subject}: {outcome.clips} clips; {self._line()}")

    def _line(self) -> Text:
        seconds = time.monotonic() - self._start
        made = self._done - self._before
        rest = seconds / made * (self._total - self._done) if made else None
        left = "" if rest is None else f", {rest:.0f} s to go"
        out = f", {self._left_out} left out" if self._left_out else ""
        return Text(f"{self._done} of {self._total} clips{out}{left}")


def print_store(store: Store, left_out: Sequence[LeftOut], console: Console) -> None:
    """Counts of a finished store, and every clip that is not in it."""
    pairs = [(sample.id.dataset, sample.subject, sample.label) for sample in store.samples]
    console.print(_counts(str(store.path), pairs, store.classes))
    _print_left_out(left_out, console)


def print_list(
    scheme: LabelScheme, entries: Sequence[Clip | FlowPicture], left_out: Sequence[LeftOut], console: Console
) -> None:
    """Counts of what the sources hold, how annotations were read, and every clip that is left out."""
    pairs = [(entry.id.dataset, f"{entry.id.dataset}/{entry.id.subject}", entry.label) for entry in entries]
    console.print(_counts(f"label scheme {scheme.name}", pairs, scheme.classes, by_subject=True))
    notes = Counter(note for entry in entries if isinstance(entry, Clip) for note in entry.notes)
    for rule, count in sorted(notes.items()):
        say(console, f"read by rule: {rule}: {count} clips")
    _print_left_out(left_out, console)


def _counts(
    title: str, pairs: Iterable[tuple[str, str, int]], classes: Sequence[str], *, by_subject: bool = False
) -> Table:
    """(dataset, subject, label) as a table of a row per subject where asked for, one per dataset, and one for all."""
    pairs = list(pairs)
    table = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False)
    for column in ("dataset", "subjects", "samples", *classes):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    for name in dict.fromkeys(subject for _, subject, _ in pairs) if by_subject else ():
        labels = Counter(label for _, subject, label in pairs if subject == name)
        table.add_row(Text(name), "", str(labels.total()), *(str(labels[index]) for index in range(len(classes))))
    table.add_section()
    for name in (*dict.fromkeys(dataset for dataset, _, _ in pairs), "all"):
        chosen = [pair for pair in pairs if name in (pair[0], "all")]
        labels = Counter(label for _, _, label in chosen)
        subjects = len({subject for _, subject, _ in chosen})
        table.add_row(
            Text(name), str(subjects), str(len(chosen)), *(str(labels[index]) for index in range(len(classes)))
        )
    return table


def _print_left_out(left_out: Sequence[LeftOut], console: Console) -> None:
    for rule, count in sorted(Counter(item.rule for item in left_out).items()):
        say(console, f"left out by rule: {rule}: {count} clips")
    for item in left_out:
        say(console, f"{'FAILED' if item.failed else 'left out'}: {item.clip}: {item.reason} ({item.place})")


def write_report(out: Path, parts: Mapping[tuple[str, str], Mapping[str, Any]], *, seconds: float) -> Path:
    """What took how long, beside the store, which holds nothing that differs from run to run; the file's path."""
    path = out.with_name(f"{out.name}.prepare.json")
    stages: Counter[str] = Counter()
    subjects = {}
    for (dataset, subject), part in sorted(parts.items()):
        stages.update(part["seconds"])
        subjects[f"{dataset}/{subject}"] = {"clips": len(part["rows"]), "seconds": part["seconds"]}
    report = {
        "wall_seconds_of_the_last_run": round(seconds, 3),
        "seconds_by_stage": {name: round(value, 3) for name, value in stages.most_common()},
        "subjects": subjects,
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path
