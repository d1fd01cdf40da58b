"""What a sweep shows while it runs: a board on a terminal, a line per fold in a log file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from htnet.scoring import metrics
from htnet.scoring.record import FoldRecord
from htnet.scoring.selection import selected_predictions
from launch.pool import Flight
from launch.tasks.fold import FoldOutcome

SHOWN_FLIGHTS = 16


class LiveBoard:
    """Folds, epochs, remaining time and running UF1; a context manager around a sweep's folds."""

    def __init__(
        self, console: Console, *, total: int, done: Sequence[FoldRecord], epochs: int, num_classes: int
    ) -> None:
        self._console = console
        self._total, self._epochs, self._num_classes = total, epochs, num_classes
        self._records = list(done)
        self._failed = 0
        self._trained = 0  # epochs of finished folds, without those that a checkpoint held
        self._flights: Sequence[Flight] = ()
        self._start = time.monotonic()
        self._live = Live(console=console, refresh_per_second=2, transient=True, get_renderable=self._render)

    def __enter__(self) -> LiveBoard:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def poll(self, flights: Sequence[Flight]) -> None:
        """Take note of the folds in flight."""
        self._flights = flights

    def finished(self, outcome: FoldOutcome, records: Sequence[FoldRecord]) -> None:
        """Take note of a fold's end; in a log file this is a line."""
        self._records = list(records)
        if outcome.reason is None:
            self._trained += self._epochs - outcome.resumed_epoch
        if outcome.reason is not None:
            self._failed += 1
            self._console.print(
                f"fold {outcome.fold} failed: {outcome.reason}",
                style="red",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        elif not self._console.is_terminal:
            self._console.print(
                f"fold {outcome.fold} done in {outcome.seconds:.0f} s  {self._headline()}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _headline(self) -> str:
        parts = [f"{len(self._records)}/{self._total} folds"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        if self._records:
            parts.append(f"running UF1 {self._running_uf1():.3f} (final epochs, {len(self._records)} folds)")
        parts.append(f"left {self._remaining()}")
        return "  ".join(parts)

    def _running_uf1(self) -> float:
        labels = [label for record in self._records for label in record.labels]
        guesses = [guess for record in self._records for guess in selected_predictions(record, "final")]
        return metrics.scores(labels, guesses, self._num_classes).uf1

    def _remaining(self) -> str:
        """Time to the end at the pace so far, in epochs of all folds; what a checkpoint held was no work."""
        running = [flight for flight in self._flights if flight.epoch >= 0]
        trained = self._trained + sum(flight.epoch - flight.start for flight in running)
        open_folds = self._total - len(self._records) - self._failed
        left = max(0, open_folds * self._epochs - sum(flight.epoch for flight in running))
        if left and not trained:
            return "?"
        seconds = round((time.monotonic() - self._start) * left / max(1, trained))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        running = [flight for flight in self._flights if flight.epoch >= 0]
        for flight in running[:SHOWN_FLIGHTS]:
            attempt = "" if flight.spec.attempt == 1 else f"attempt {flight.spec.attempt}"
            bar = ProgressBar(total=self._epochs, completed=flight.epoch, width=30)
            table.add_row(Text(flight.spec.fold.subject), bar, f"epoch {flight.epoch}/{self._epochs}", attempt)
        hidden, waiting = len(running) - SHOWN_FLIGHTS, len(self._flights) - len(running)
        notes = [f"and {hidden} more"] if hidden > 0 else []
        notes += [f"{waiting} waiting for a free place"] if waiting else []
        return Group(Text(self._headline()), table, *notes)
