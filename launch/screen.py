"""Terminal output: lines printed unchanged, and the boards of a sweep and of a store in the making."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from htnet.scoring import metrics
from htnet.scoring.record import FoldRecord
from launch.pool import Flight
from launch.tasks.fold import FoldOutcome
from launch.tasks.group import FoldGroup

if TYPE_CHECKING:
    from launch.tasks.subject import SubjectOutcome  # it imports torch, which a sweep's driver does not need

SHOWN_FLIGHTS = 16
LINE_SECONDS = 60.0
RESUME = "Run the same command again to resume."


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line unchanged: names in it are not read as markup, and it is not broken to fit the terminal."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


class Board:
    """Live text at the foot of a terminal, nothing in a log file; a context manager."""

    def __init__(self, console: Console) -> None:
        """Start the clock. Subclasses call it last, because the first text is made here."""
        self._console = console
        self._start = time.monotonic()
        self._live = Live(console=console, refresh_per_second=2, transient=True, get_renderable=self.render)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def render(self) -> RenderableType:
        """Return the text of this moment."""
        raise NotImplementedError

    def _seconds(self) -> float:
        return time.monotonic() - self._start


class SweepBoard(Board):
    """Folds, epochs, remaining time and running UF1."""

    def __init__(
        self, console: Console, *, total: int, done: Collection[FoldRecord], epochs: int, scored: bool = True
    ) -> None:
        """Start with the folds that are done; those of several runs are not ``scored`` together."""
        self._total, self._epochs, self._scored = total, epochs, scored
        self._done = self._failed = 0
        self._trained = 0  # epochs of finished folds, without those found in a checkpoint
        self._confusion = np.zeros((), np.int64)  # (classes, classes) from the first record on
        self._flights: Sequence[Flight[FoldGroup]] = ()
        for record in done:
            self._count(record)
        super().__init__(console)

    def poll(self, flights: Sequence[Flight[FoldGroup]]) -> None:
        """Take note of the folds in flight."""
        self._flights = flights

    def finished(self, outcome: FoldOutcome, record: FoldRecord | None, label: str = "") -> None:
        """Take note of a fold's end, with its record if there is one; in a log file this is a line."""
        name = f"{label} {outcome.fold}".strip()
        for aside in outcome.damage:
            say(self._console, f"fold {name}: {aside}")
        if record is None:
            self._failed += 1
            say(self._console, f"fold {name} failed: {outcome.reason}", style="red")
            return
        self._trained += self._epochs - outcome.resumed_epoch
        self._count(record)
        if not self._console.is_terminal:
            say(self._console, f"fold {name} done in {outcome.seconds:.0f} s  {self._headline()}")

    def _count(self, record: FoldRecord) -> None:
        """Add a record to the pooled counts: pooling all of them at every end would cost more and more."""
        self._done += 1
        if not self._scored:
            return
        final = record.test_predictions[-1]
        self._confusion = self._confusion + metrics.confusion(record.labels, final, record.num_classes)

    def _headline(self) -> str:
        parts = [f"{self._done}/{self._total} folds"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        if self._done and self._scored:
            uf1 = float(metrics.METRICS["uf1"](self._confusion))
            parts.append(f"running UF1 {uf1:.3f} (final epochs, {self._done} folds)")
        parts.append(f"left {self._remaining()}")
        return "  ".join(parts)

    def _remaining(self) -> str:
        """Estimate the time to the end at the pace so far, in epochs of all folds; checkpoints count as no work."""
        running = self._running()
        trained = self._trained + sum(flight.epoch - flight.start for flight in running)
        left = max(0, self._open() * self._epochs - sum(flight.epoch for flight in running))
        if left and not trained:
            return "?"
        return _clock(self._seconds() * left / max(1, trained))

    def _open(self) -> int:
        return self._total - self._done - self._failed

    def _running(self) -> list[Flight[FoldGroup]]:
        return [flight for flight in self._flights if flight.epoch >= 0]

    def render(self) -> RenderableType:
        """Return the headline, a bar per running fold, and the number of folds that wait."""
        table = Table.grid(padding=(0, 2))
        running = self._running()
        for flight in running[:SHOWN_FLIGHTS]:
            attempt = "" if flight.attempt == 1 else f"attempt {flight.attempt}"
            bar = ProgressBar(total=flight.spec.epochs, completed=flight.epoch, width=30)
            table.add_row(Text(flight.spec.name), bar, f"epoch {flight.epoch}/{flight.spec.epochs}", attempt)
        hidden = len(running) - SHOWN_FLIGHTS
        waiting = self._open() - sum(len(flight.spec.specs) for flight in running)
        notes = [f"and {hidden} more"] if hidden > 0 else []
        notes += [f"{waiting} waiting for a free place"] if waiting > 0 else []
        return Group(Text(self._headline()), table, *notes)


class PrepareBoard(Board):
    """Clips and subjects done, left out and to do; a line on a terminal, a line per subject in a log file."""

    def __init__(self, console: Console, *, clips: int, subjects: int, before: Collection[int]) -> None:
        """Start at the subjects that earlier runs have done; ``before``: clips of each of them."""
        self._clips, self._clips_done, self._clips_before = clips, sum(before), sum(before)
        self._subjects, self._subjects_done = subjects, len(before)
        self._left_out = self._failed = 0
        super().__init__(console)

    def __enter__(self) -> Self:
        if self._subjects_done:
            say(self._console, f"going on: {self._clips_done} of {self._clips} clips were done before")
        return super().__enter__()

    def advance(self, subject: str, outcome: SubjectOutcome) -> None:
        """Take note of a subject's end."""
        if outcome.error is None:
            self._clips_done += outcome.clips
            self._subjects_done += 1
            self._left_out += outcome.left_out
        else:
            self._failed += 1
        if not self._console.is_terminal:
            end = "not done" if outcome.error is not None else f"{outcome.clips} clips"
            say(self._console, f"{subject}: {end}; {self.render()}")

    def render(self) -> Text:
        """Return the counts, the pace and the time to the end."""
        parts = [f"{self._clips_done} of {self._clips} clips", f"{self._subjects_done} of {self._subjects} subjects"]
        parts += [f"{self._left_out} clips left out"] if self._left_out else []
        parts += [f"{self._failed} subjects not done"] if self._failed else []
        rate = (self._clips_done - self._clips_before) / max(self._seconds(), 1e-9)
        if rate:
            left = _clock((self._clips - self._clips_done) / rate)
            parts += [f"{rate:.3g} clips a second", f"left {left}"]
        return Text(", ".join(parts))


class TrainBoard(Board):
    """Steps, loss, pace and remaining time of a training; a line per minute in a log file."""

    def __init__(self, console: Console, progress: Callable[[], Mapping[str, Any]]) -> None:
        """Take ``progress`` as the source of the workers' last word."""
        self._read, self._last, self._said = progress, dict[str, Any](), 0.0
        self._first: tuple[float, int] | None = None
        super().__init__(console)

    def look(self) -> None:
        """Read the progress."""
        self._last = dict(self._read())
        if self._last and self._first is None:
            self._first = (time.monotonic(), self._last["steps"])
        if not self._console.is_terminal and self._seconds() - self._said > LINE_SECONDS:
            self._said = self._seconds()
            say(self._console, str(self.render()))

    def render(self) -> Text:
        """Return the line of this moment."""
        if not self._last:
            return Text("the workers are starting")
        steps, total = self._last["steps"], self._last["total"]
        parts = [f"step {steps} of {total}"]
        for name, form in (("loss", "loss {:.4f}"), ("samples_per_second", "{:.3g} samples a second")):
            parts += [form.format(self._last[name])] if name in self._last else []
        if found := self._last.get("validation"):
            parts.append(f"validation UF1 {found['uf1']:.3f} after epoch {self._last['epoch']}")
        since, first = self._first or (time.monotonic(), steps)
        if steps > first:
            parts.append(f"left {_clock((time.monotonic() - since) * (total - steps) / (steps - first))}")
        return Text(", ".join(parts))


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
