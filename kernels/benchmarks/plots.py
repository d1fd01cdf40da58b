"""Two pictures of a run: where each provider stands under the device's roofs, and how long each takes.

Where a mode was timed eagerly and inside a CUDA graph, the graph's figure is drawn: the time of the kernels without the
time of launching them. The table and the CSV file have both.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kernels.benchmarks.providers import PROVIDERS
from kernels.benchmarks.record import Row

__all__ = ["bars", "roofline", "write_pictures"]

_OURS: Final = ("triton", "block-triton")
_OURS_COLOUR: Final = "#d62728"
_COLOURS: Final = (
    *("#1f77b4", "#7f3c8d", "#ff7f0e", "#2ca02c", "#17becf", "#8c564b", "#e377c2"),
    *("#bcbd22", "#0b3d91", "#9edae5", "#c49c94", "#98df8a", "#c5b0d5", "#ffbb78"),
)
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
    if not rows:
        return None
    modes = _modes(rows)
    figure = Figure(figsize=(6.2 * len(modes), 5.8))
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(wspace=0.06)
    unit, factor = ("TFLOP/s", 1.0) if max(row.matrix_tflop_s or 0.0 for row in rows) >= 1 else ("GFLOP/s", 1e3)
    cases = list(dict.fromkeys(row.case for row in rows))
    for panel, mode in zip(panels, modes, strict=True):
        _roofs(panel, rows, unit, factor)
        for row in rows:
            if row.mode == mode:
                _point(panel, row, cases.index(row.case), factor)
        panel.set_title(mode, fontsize=10)
        panel.set_xlabel("arithmetic over least traffic, FLOP per byte")
    panels[0].set_ylabel(f"arithmetic rate, {unit}")
    _legends(figure, rows, cases)
    figure.suptitle(_title("Local attention against the device's two limits", rows), y=0.95, va="bottom", fontsize=11)
    return figure


def _modes(rows: Sequence[Row]) -> list[str]:
    """Forward and backward; their sum only where it is all there is."""
    return [mode for mode in ("forward", "backward") if any(row.mode == mode for row in rows)] or ["both"]


def _roofs(panel: Axes, rows: Sequence[Row], unit: str, factor: float) -> None:
    """The medians of the copy bandwidth and the matrix rate measured during the run."""
    bandwidth = statistics.median(row.copy_gb_s or 0.0 for row in rows)
    rate = statistics.median(row.matrix_tflop_s or 0.0 for row in rows)
    intensities = [row.flops / row.bytes for row in rows]
    ridge = rate * 1e3 / bandwidth
    left, right = min(*intensities, ridge) / 2.5, max(*intensities, ridge) * 2.5
    slope = bandwidth * factor / 1e3  # of the roof, in the unit of the axis per FLOP per byte
    roof = rate * factor
    panel.loglog([left, ridge, right], [left * slope, roof, roof], color="black", linewidth=1.4, zorder=1)
    here = (left * ridge) ** 0.5
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
    panel.annotate(f"copy {_short(bandwidth)} GB/s", (here, here * slope), (-6, 6), ha="right", va="bottom", **style)
    panel.annotate(f"matrix product {_short(roof)} {unit}", (right, roof), (-4, 5), ha="right", **style)
    panel.set_xlim(left / 4, right)
    lowest = min((row.tflop_s or rate) * factor for row in rows)
    panel.set_ylim(min(lowest, left * slope) / 1.6, roof * 2)
    panel.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)


def _point(panel: Axes, row: Row, case: int, factor: float) -> None:
    """A point; the levels of a network, often of one intensity, stand beside each other, a few per cent apart."""
    assert row.tflop_s is not None
    level = row.case.partition("/")[2]
    ours = row.provider in _OURS
    panel.plot(
        row.flops / row.bytes * 1.07 ** int(level or 0),
        row.tflop_s * factor,
        marker=_MARKERS[case % len(_MARKERS)],
        color=_colour(row.provider),
        markersize=9 if ours else 6,
        markeredgecolor="black" if ours else "white",
        markeredgewidth=0.8 if ours else 0.4,
        linestyle="none",
        zorder=3 if ours else 2,
    )


def _legends(figure: Figure, rows: Sequence[Row], cases: Sequence[str]) -> None:
    plain: dict[str, Any] = {"linestyle": "none", "markersize": 6}
    names = dict.fromkeys(row.provider for row in rows)
    providers = [Line2D([], [], marker="o", color=_colour(name), label=name, **plain) for name in names]
    shapes = [
        Line2D([], [], marker=_MARKERS[place % len(_MARKERS)], color="0.35", label=case, **plain)
        for place, case in enumerate(cases)
    ]
    style: dict[str, Any] = {"fontsize": 8, "title_fontsize": 9, "frameon": False, "alignment": "left"}
    figure.legend(handles=providers, title="provider", loc="upper left", bbox_to_anchor=(0.91, 0.9), **style)
    figure.legend(handles=shapes, title="case", loc="lower left", bbox_to_anchor=(0.91, 0.08), **style)


def bars(rows: Sequence[Row]) -> Figure:
    """Median time per provider with the 20 % to 80 % range; a panel per case and operation, quickest at the top."""
    keys = dict.fromkeys((row.operation, row.case) for row in rows)
    panels = sorted(keys, key=lambda key: key[0] != "core")  # operations one after the other, cases in their order
    kept = {panel: [row for row in rows if (row.operation, row.case) == panel] for panel in panels}
    columns = min(3, len(panels))
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    slots = [max(len({row.provider for row in kept[panel]}) for panel in line) for line in lines]
    heights = [0.36 * count for count in slots]  # inches
    between = 1.25  # inches for titles and axes
    figure = Figure(figsize=(5.6 * columns, sum(heights) + between * (len(lines) - 1)))
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    hspace = between / (sum(heights) / len(heights))
    figure.subplots_adjust(wspace=0.42, hspace=hspace, left=0, right=1, bottom=0, top=1)
    for axes, line, count in zip(grid, lines, slots, strict=True):
        for panel, key in zip(axes, line, strict=False):
            _bar_panel(panel, kept[key], _modes(rows), count)
        for panel in axes[len(line) :]:
            panel.set_axis_off()
    title = _title("Time of local attention; lines from the 20 % to the 80 % quantile", rows)
    figure.suptitle(title, y=1 + 0.8 / figure.get_figheight(), va="bottom", fontsize=12)
    return figure


def _bar_panel(panel: Axes, rows: Sequence[Row], modes: Sequence[str], slots: int) -> None:
    rows = [row for row in rows if row.mode in modes]
    total = {name: sum(r.median_us or 0.0 for r in rows if r.provider == name) for name in {r.provider for r in rows}}
    names = sorted(total, key=lambda name: total[name])
    widest = max((row.p80_us or 0.0 for row in rows), default=1.0)
    unit, factor = ("ms", 1e3) if widest >= 2000 else ("us", 1.0)
    height = 0.8 / len(modes)
    for row in rows:
        middle, low, high = (value / factor for value in (row.median_us, row.p20_us, row.p80_us) if value is not None)
        place = names.index(row.provider) + (modes.index(row.mode) - (len(modes) - 1) / 2) * height
        style = {"color": _colour(row.provider), "hatch": _HATCHES[row.mode], "edgecolor": "white"}
        panel.barh(place, middle, height * 0.92, **style)
        panel.plot([low, high], [place, place], color="black", linewidth=1.1, marker="|", markersize=4)
        beside = (max(high, middle), place)
        panel.annotate(_short(middle), beside, (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    panel.set_yticks(range(len(names)), names, fontsize=8.5)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in _OURS else "normal")
    panel.set_ylim(slots - 0.4, -0.6)  # quickest at the top; bars are as thick in every panel
    panel.set_xlim(0, 1.18 * widest / factor)
    panel.set_xlabel(f"{unit} per run", fontsize=8.5)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    if rows:
        panel.set_title(_shape_line(rows[0], modes), fontsize=9)


def _shape_line(row: Row, modes: Sequence[str]) -> str:
    blocks = f"{row.batch * row.blocks_per_side**2:,} blocks of {_counted(row.tokens_per_block, 'token')}"
    heads = f"{_counted(row.heads, 'head')} of {row.head_dim}"
    width = f", {row.dim} channels" if row.operation == "block" else ""
    drawn = "forward (plain), backward (hatched)" if len(modes) > 1 else modes[0]
    return f"{row.case}, {row.operation}, {row.dtype}\n{blocks}, {heads}{width}\n{drawn}"


def _colour(provider: str) -> Any:
    """The same in every picture, and for a core and the block around it; ours are red, the copy is grey."""
    if provider in _OURS:
        return _OURS_COLOUR
    if provider == _COPY:
        return "0.6"
    names = list(dict.fromkeys(name.removeprefix("block-") for name in PROVIDERS))
    name = provider.removeprefix("block-")
    return _COLOURS[names.index(name) % len(_COLOURS)] if name in names else "black"


def _title(what: str, rows: Sequence[Row]) -> str:
    first = rows[0]
    graph = ", inside a CUDA graph" if all(row.graph or row.provider == _COPY for row in rows) else ""
    samples = sorted({row.n for row in rows})
    count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    facts = f"{first.card}, torch {first.torch}, {first.date[:10]}{graph}"
    return f"{what}\n{facts}; medians of {count} samples"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
