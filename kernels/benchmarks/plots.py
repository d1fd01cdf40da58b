"""Two pictures of a run: where each provider stands under the device's roofs, and how long each takes.

Where a mode was timed eagerly and inside a CUDA graph, the graph's figure is drawn: the time of the kernels without the
time of launching them. The table and the CSV file have both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kernels.benchmarks.record import Row

__all__ = ["bars", "roofline", "write_pictures"]

_OURS: Final = ("triton", "block-triton")
_OURS_COLOUR: Final = "#d62728"
_COPY: Final = "copy"
_MARKERS: Final = "osD^vP*Xh<>8"
_HATCHES: Final = {"forward": "", "backward": "////", "both": "...."}


def write_pictures(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw ``roofline.png`` and ``bars.png`` of the rows that hold a time; nothing where there are none."""
    timed = _drawn(rows)
    written = []
    for name, draw in (("roofline.png", roofline), ("bars.png", bars)):
        figure = draw(timed) if timed else None
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name, dpi=130, bbox_inches="tight", facecolor="white")
            written.append(folder / name)
    return written


def _drawn(rows: Iterable[Row]) -> list[Row]:
    """The timed rows; of a mode with and without a graph, the one with."""
    chosen: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.case, row.operation, row.provider, row.mode)
        if row.status == "ok" and (row.graph or key not in chosen):
            chosen[key] = row
    return list(chosen.values())


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Arithmetic rate over intensity, both axes logarithmic; a panel per mode. None if nothing does arithmetic."""
    rows = [row for row in rows if row.flops and row.tflop_s]
    modes = [mode for mode in ("forward", "backward", "both") if any(row.mode == mode for row in rows)]
    if not modes:
        return None
    figure = Figure(figsize=(1.5 + 5.2 * len(modes), 5.6))
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    cases = list(dict.fromkeys((row.case, row.operation) for row in rows))
    colours = _colours(rows)
    for panel, mode in zip(panels, modes, strict=True):
        _roofs(panel, rows)
        for row in rows:
            if row.mode == mode:
                place = cases.index((row.case, row.operation))
                _point(panel, row, _MARKERS[place % len(_MARKERS)], colours[row.provider])
        panel.set_title(mode)
        panel.set_xlabel("arithmetic over least traffic, FLOP per byte")
    panels[0].set_ylabel("arithmetic rate, TFLOP/s")
    _legends(figure, colours, [f"{case}, {operation}" for case, operation in cases])
    figure.suptitle(_title("Attention against the device's two limits", rows), y=1.0, fontsize=11)
    return figure


def _roofs(panel: Axes, rows: Sequence[Row]) -> None:
    """The median of the rates measured during the run; a different rate per dtype would be a different picture."""
    bandwidth = sorted(row.copy_gb_s or 0.0 for row in rows)[len(rows) // 2] / 1e3
    rate = sorted(row.matrix_tflop_s or 0.0 for row in rows)[len(rows) // 2]
    intensities = [row.flops / row.bytes for row in rows]
    left, ridge = min(intensities) / 3, rate / bandwidth
    right = max(max(intensities), ridge) * 3
    panel.loglog([left, ridge, right], [left * bandwidth, rate, rate], color="black", linewidth=1.4, zorder=1)
    slope = f"copy {_short(bandwidth * 1e3)} GB/s"
    panel.annotate(slope, (left, left * bandwidth), (6, 16), textcoords="offset points", fontsize=8)
    roof = f"matrix product {_short(rate)} TFLOP/s"
    panel.annotate(roof, (right, rate), (-4, 5), textcoords="offset points", ha="right", fontsize=8)
    panel.set_xlim(left, right)
    panel.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)


def _point(panel: Axes, row: Row, marker: str, colour: Any) -> None:
    ours = row.provider in _OURS
    panel.plot(
        row.flops / row.bytes,
        row.tflop_s,
        marker=marker,
        color=colour,
        markersize=9 if ours else 6,
        markeredgecolor="black" if ours else "white",
        markeredgewidth=0.8 if ours else 0.4,
        linestyle="none",
        zorder=3 if ours else 2,
    )


def _legends(figure: Figure, colours: dict[str, Any], cases: Sequence[str]) -> None:
    plain: dict[str, Any] = {"linestyle": "none", "markersize": 6}
    names = [Line2D([], [], marker="o", color=colour, label=name, **plain) for name, colour in colours.items()]
    shapes = [
        Line2D([], [], marker=_MARKERS[place % len(_MARKERS)], color="0.35", label=case, **plain)
        for place, case in enumerate(cases)
    ]
    style: dict[str, Any] = {"fontsize": 8, "frameon": False, "bbox_transform": figure.transFigure}
    figure.legend(handles=names, title="provider", loc="upper left", bbox_to_anchor=(0.92, 0.9), **style)
    figure.legend(handles=shapes, title="case", loc="lower left", bbox_to_anchor=(0.92, 0.08), **style)


def bars(rows: Sequence[Row]) -> Figure:
    """Median time per provider with the 20 % to 80 % range; a panel per case and operation, quickest at the top."""
    panels = list(dict.fromkeys((row.case, row.operation) for row in rows))
    kept = {panel: [row for row in rows if (row.case, row.operation) == panel] for panel in panels}
    modes = [mode for mode in ("forward", "backward") if any(row.mode == mode for row in rows)] or ["both"]
    columns = min(3, len(panels))
    tallest = max(len({row.provider for row in found}) for found in kept.values())
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.4 * columns, lines * (1.2 + 0.32 * tallest) + 0.6))
    grid = figure.subplots(lines, columns, squeeze=False)
    figure.subplots_adjust(wspace=0.5, hspace=1.4 / (1.0 + 0.32 * tallest), top=1 - 0.75 / figure.get_figheight())
    colours = _colours(rows)
    for place, panel in enumerate(panels):
        _bar_panel(grid[place // columns][place % columns], kept[panel], modes, colours)
    for place in range(len(panels), lines * columns):
        grid[place // columns][place % columns].set_axis_off()
    figure.suptitle(_title("Time of local attention; lines: 20 % to 80 % of samples", rows), fontsize=11)
    return figure


def _bar_panel(panel: Axes, rows: Sequence[Row], modes: Sequence[str], colours: dict[str, Any]) -> None:
    first = rows[0]
    total = {name: sum(r.median_us or 0.0 for r in rows if r.provider == name) for name in {r.provider for r in rows}}
    names = sorted(total, key=lambda name: total[name])
    widest = max(row.p80_us or 0.0 for row in rows)
    unit, factor = ("ms", 1e3) if widest >= 2000 else ("us", 1.0)
    height = 0.8 / len(modes)
    for row in rows:
        if row.mode not in modes:
            continue
        middle, low, high = (value / factor for value in (row.median_us, row.p20_us, row.p80_us) if value is not None)
        place = names.index(row.provider) + (modes.index(row.mode) - (len(modes) - 1) / 2) * height
        style = {"color": colours[row.provider], "hatch": _HATCHES[row.mode], "edgecolor": "white"}
        panel.barh(place, middle, height * 0.92, **style)
        panel.plot([low, high], [place, place], color="black", linewidth=1.2, marker="|", markersize=4)
        panel.annotate(
            _short(middle), (max(high, middle), place), (4, 0), textcoords="offset points", va="center", fontsize=7
        )
    panel.set_yticks(range(len(names)), names, fontsize=8)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in _OURS else "normal")
    panel.invert_yaxis()
    panel.set_xlim(0, 1.18 * widest / factor)
    panel.set_xlabel(f"{unit} per run", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    blocks = f"{first.batch * first.blocks_per_side**2:,} blocks of {_counted(first.tokens_per_block, 'token')}"
    what = (
        f"{first.case}, {first.operation}, {first.dtype}\n{blocks}, {_counted(first.heads, 'head')} of {first.head_dim}"
    )
    panel.set_title(f"{what}\n{' (plain), '.join(modes)}{' (hatched)' if len(modes) > 1 else ''}", fontsize=8.5)


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    """A colour per provider, in order of appearance; ours are red, the copy is grey."""
    names = list(dict.fromkeys(row.provider for row in rows))
    wheel = iter([c for c in matplotlib.colormaps["tab20"].colors if matplotlib.colors.to_hex(c) != _OURS_COLOUR] * 2)
    return {name: _OURS_COLOUR if name in _OURS else "0.6" if name == _COPY else next(wheel) for name in names}


def _title(what: str, rows: Sequence[Row]) -> str:
    first = rows[0]
    graph = ", inside a CUDA graph" if all(row.graph or row.provider == _COPY for row in rows) else ""
    samples = sorted({row.n for row in rows})
    count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    return f"{what}\n{first.card}, torch {first.torch}, {first.date[:10]}, n = {count}{graph}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
