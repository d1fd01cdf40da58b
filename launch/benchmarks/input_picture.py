"""The picture of ``htnet profile --input``: samples per second by case, each provider a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_COLOURS = ("#d62728", "#1f77b4", "#17becf", "#7f3c8d")


def write_picture(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw rows of the CSV file as a PNG: medians with their quartiles, a panel per case, each with its own scale."""
    cases = list(dict.fromkeys(line["case"] for line in lines))
    providers = list(dict.fromkeys(line["provider"] for line in lines))
    figure = Figure(figsize=(2.3 * len(cases) + 0.6, 3.4))
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for panel, case in zip(panels, cases, strict=True):
        rows = {line["provider"]: line for line in lines if line["case"] == case}
        for place, provider in enumerate(providers):
            median, low, high = (float(rows[provider][name]) for name in ("median_samples_per_s", "q1", "q3"))
            error = [[median - low], [high - median]]
            panel.bar(place, median, yerr=error, color=_COLOURS[place % len(_COLOURS)], capsize=3, label=provider)
            panel.annotate(f"{median:,.0f}", (place, high), ha="center", va="bottom", fontsize=7)
        panel.margins(y=0.12)
        panel.set(title=f"{case}, batch {next(iter(rows.values()))['batch']}", xticks=[])
        panel.title.set_fontsize(9)
        panel.tick_params(labelsize=7)
    panels[0].set_ylabel("samples per second", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(providers), fontsize=8, frameon=False)
    first = lines[0]
    figure.suptitle(f"Input of a fold on {first['cpu'] if first['device'] == 'cpu' else first['device']}", fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130, facecolor="white")
