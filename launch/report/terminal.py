"""Table that a sweep prints when it ends."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from htnet.data.samples import COMPOSITE
from htnet.scoring.metrics import Rates
from htnet.scoring.summary import ScoreRow, Summary

EXPLAINED = {
    "final": "last epoch, no choice made",
    "validated": "epoch chosen on held-out training subjects",
    "test_selected": "epoch chosen on the test subject: leaks",
}
"""Short explanation of each selection, for every place that shows one."""

_FAILURES_SHOWN = 10  # if every fold fails for one reason, the table must stay on the screen


def _cell(row: Rates) -> str:
    return f"{row.uf1:.3f} / {row.uar:.3f}"


def _interval(row: ScoreRow, key: str) -> str:
    return "{:.2f} - {:.2f}".format(*getattr(row.interval, key)) if row.interval else ""


def summary_table(summary: Summary) -> Table:
    """Make a table of UF1 / UAR under each selection, with the chance level; 80 columns wide.

    Its rows are the composite and each dataset; there are none while no fold is done.
    """
    selections = summary.selections
    table = Table(
        title="UF1 / UAR, counts pooled over all folds", title_justify="left", caption_justify="left", min_width=64
    )
    table.add_column("epoch chosen")
    for selection in selections:
        table.add_column(selection, justify="right", style="yellow" if selection == "test_selected" else None)
    for name in next(iter(selections.values()), {}):
        scored = [rows[name] for rows in selections.values()]
        table.add_row(escape(name), *map(_cell, scored), style="bold" if name == COMPOSITE else None)
        if name == COMPOSITE and scored[0].interval:
            for key in ("uf1", "uar"):
                label = f"  95 % of {key.upper()} over subjects"
                table.add_row(label, *(_interval(row, key) for row in scored), style="dim")
    if summary.chance:
        table.add_section()
        chance = summary.chance
        table.add_row("chance, composite", *(_cell(chance.selections[name][COMPOSITE]) for name in selections))
        table.add_row("  best of so many tries", *(str(chance.tries[name]) for name in selections), style="dim")
    table.caption = _caption(summary)
    return table


def _caption(summary: Summary) -> str:
    lines = [f"{name}: {EXPLAINED[name]}" for name in summary.selections]
    lines.append(f"{summary.folds_done} of {summary.folds_total} folds, {summary.samples} samples")
    failed = summary.folds_failed
    lines += [escape(f"failed {entry.fold}: {entry.reason}") for entry in failed[:_FAILURES_SHOWN]]
    if len(failed) > _FAILURES_SHOWN:
        lines.append(f"and {len(failed) - _FAILURES_SHOWN} more failed folds, named in summary.json")
    return "\n".join(lines)
