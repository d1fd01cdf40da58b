"""Pictures of records: bars of any benchmark, and where attention stands under the device's roofs.

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

from kernels.benchmarks.attention import COPY
from kernels.benchmarks.record import Record

__all__ = ["bars", "roofline", "write_pictures"]

_OURS: Final = ("triton", "block-triton", "FlowStream")
_COLOURS: Final = dict.fromkeys(_OURS, "#d62728") | {
    **{COPY: "0.6", "reference": "#7f3c8d", "einsum": "#ff7f0e", "compile": "#c49c94", "flex": "#98df8a"},
    **{"sdpa": "#2ca02c", "sdpa-flash": "#17becf", "sdpa-efficient": "#8c564b", "sdpa-cudnn": "#e377c2"},
    **{"sdpa-math": "#bcbd22", "sdpa-pad8": "#0b3d91", "sdpa-pad32": "#9edae5", "unfused": "#1f77b4"},
    **{"DataLoader": "#7f3c8d", "DataLoader x2": "#ff7f0e"},
}
"""The same for a core and the block around it."""
_MARKERS: Final = "osD^vP*Xh<>8"
_HATCHES: Final = {"forward": "", "backward": "////", "both": "....", "": ""}


def write_pictures(records: Iterable[Record], folder: Path, *, title: str, **names: str) -> list[Path]:
    """Draw the records that hold a figure, by ``names`` of files: ``bars``, ``roofline``; nothing where none do.

    ``title`` stands above the bars. Returns the files written.
    """
    drawn = _drawn(records)
    figures = {"bars": lambda: bars(drawn, title), "roofline": lambda: roofline(drawn)}
    written = []
    for kind, name in names.items():
        figure = figures[kind]() if drawn else None
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name, dpi=130, bbox_inches="tight", facecolor="white")
            written.append(folder / name)
    return written


def _drawn(records: Iterable[Record]) -> list[Record]:
    """Return the measured records; of a mode with and without a graph, the one with."""
    chosen: dict[tuple[str, ...], Record] = {}
    for record in records:
        key = (*_panel(record), record.provider, _mode(record))
        if record.status == "ok" and (record.case.get("graph") or key not in chosen):
            chosen[key] = record
    return list(chosen.values())


def _panel(record: Record) -> tuple[str, str]:
    return record.case.get("operation", ""), record.case["case"]


def _mode(record: Record) -> str:
    return str(record.case.get("mode", ""))


def _colour(provider: str) -> str:
    return _COLOURS.get(provider) or _COLOURS.get(provider.removeprefix("block-"), "black")


def roofline(records: Sequence[Record]) -> Figure | None:
    """Return arithmetic rate over intensity, both logarithmic, a panel per mode; None if nothing does arithmetic."""
    records = [record for record in records if record.figures["flops"] and record.figures["tflop_s"]]
    if not records:
        return None
    modes = _modes(records)
    figure = Figure(figsize=(6.2 * len(modes), 5.8))
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(wspace=0.06)
    fast = max(record.figures["matrix_tflop_s"] for record in records) >= 1
    unit, factor = ("TFLOP/s", 1.0) if fast else ("GFLOP/s", 1e3)
    markers = dict(zip(dict.fromkeys(record.case["case"] for record in records), 9 * _MARKERS, strict=False))
    for panel, mode in zip(panels, modes, strict=True):
        _roofs(panel, records, unit, factor)
        for record in records:
            if _mode(record) == mode:
                _point(panel, record, markers[record.case["case"]], factor)
        panel.set_title(mode, fontsize=10)
        panel.set_xlabel("arithmetic over least traffic, FLOP per byte")
    panels[0].set_ylabel(f"arithmetic rate, {unit}")
    _legends(figure, records, markers)
    title = _title("Local attention against the device's two limits", records)
    figure.suptitle(title, y=0.95, va="bottom", fontsize=11)
    return figure


def _modes(records: Sequence[Record]) -> list[str]:
    """Return forward and backward; their sum, or no mode at all, only where it is all there is."""
    found = [mode for mode in ("forward", "backward") if any(_mode(record) == mode for record in records)]
    return found or [_mode(records[0])]


def _roofs(panel: Axes, records: Sequence[Record], unit: str, factor: float) -> None:
    """Draw the medians of the copy bandwidth and the matrix rate measured during the run."""
    bandwidth = statistics.median(record.figures["copy_gb_s"] for record in records)
    rate = statistics.median(record.figures["matrix_tflop_s"] for record in records)
    intensities = [_intensity(record) for record in records]
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
    lowest = min(record.figures["tflop_s"] * factor for record in records)
    panel.set_ylim(min(lowest, left * slope) / 1.6, roof * 2)
    panel.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)


def _point(panel: Axes, record: Record, marker: str, factor: float) -> None:
    """Draw a point; levels of a network, often of one intensity, stand beside each other, a few per cent apart."""
    level = int(record.case["case"].partition("/")[2] or 0)
    size, edge, width, order = (9, "black", 0.8, 3) if record.provider in _OURS else (6, "white", 0.4, 2)
    style: dict[str, Any] = {"markersize": size, "markeredgecolor": edge, "markeredgewidth": width, "zorder": order}
    style |= {"marker": marker, "color": _colour(record.provider), "linestyle": "none"}
    panel.plot(_intensity(record) * 1.07**level, record.figures["tflop_s"] * factor, **style)


def _legends(figure: Figure, records: Sequence[Record], markers: dict[str, str]) -> None:
    plain: dict[str, Any] = {"linestyle": "none", "markersize": 6}
    names = dict.fromkeys(record.provider for record in records)
    providers = [Line2D([], [], marker="o", color=_colour(name), label=name, **plain) for name in names]
    shapes = [Line2D([], [], marker=marker, color="0.35", label=case, **plain) for case, marker in markers.items()]
    style: dict[str, Any] = {"fontsize": 8, "title_fontsize": 9, "frameon": False, "alignment": "left"}
    figure.legend(handles=providers, title="provider", loc="upper left", bbox_to_anchor=(0.91, 0.9), **style)
    figure.legend(handles=shapes, title="case", loc="lower left", bbox_to_anchor=(0.91, 0.08), **style)


def _intensity(record: Record) -> float:
    return float(record.figures["flops"] / record.figures["bytes"])


def bars(records: Sequence[Record], title: str) -> Figure:
    """Return medians per provider with their spread; a panel per case and operation, the best at the top."""
    keys = dict.fromkeys(map(_panel, records))
    panels = sorted(keys, key=lambda key: key[0] not in ("core", ""))  # one operation after the other
    kept = {panel: [record for record in records if _panel(record) == panel] for panel in panels}
    columns = min(3, len(panels))
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    slots = [max(len({record.provider for record in kept[panel]}) for panel in line) for line in lines]
    heights = [0.36 * count for count in slots]  # inches
    between = 1.25  # inches for titles and axes
    figure = Figure(figsize=(5.6 * columns, sum(heights) + between * (len(lines) - 1)))
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    hspace = between / (sum(heights) / len(heights))
    figure.subplots_adjust(wspace=0.42, hspace=hspace, left=0, right=1, bottom=0, top=1)
    for axes, line, count in zip(grid, lines, slots, strict=True):
        for panel, key in zip(axes, line, strict=False):
            _bar_panel(panel, kept[key], _modes(records), count)
        for panel in axes[len(line) :]:
            panel.set_axis_off()
    figure.suptitle(_title(title, records), y=1 + 0.8 / figure.get_figheight(), va="bottom", fontsize=12)
    return figure


def _bar_panel(panel: Axes, records: Sequence[Record], modes: Sequence[str], slots: int) -> None:
    records = [record for record in records if _mode(record) in modes]
    total: dict[str, float] = {}
    for record in records:
        total[record.provider] = total.get(record.provider, 0.0) + (record.median or 0.0)
    rates = records[0].unit.endswith("/s") if records else False  # of which the largest is the best
    names = sorted(total, key=lambda name: -total[name] if rates else total[name])
    widest = max((record.high or 0.0 for record in records), default=1.0)
    height = 0.8 / len(modes)
    for record in records:
        middle, low, high = record.median or 0.0, record.low or 0.0, record.high or 0.0
        place = names.index(record.provider) + (modes.index(_mode(record)) - (len(modes) - 1) / 2) * height
        style = {"color": _colour(record.provider), "hatch": _HATCHES[_mode(record)], "edgecolor": "white"}
        panel.barh(place, middle, height * 0.92, **style)
        panel.plot([low, high], [place, place], color="black", linewidth=1.1, marker="|", markersize=4)
        beside = (max(high, middle), place)
        panel.annotate(_short(middle), beside, (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    panel.set_yticks(range(len(names)), names, fontsize=8.5)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in _OURS else "normal")
    panel.set_ylim(slots - 0.4, -0.6)  # bars are as thick in every panel
    panel.set_xlim(0, 1.18 * widest)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    if records:
        panel.set_xlabel(records[0].unit, fontsize=8.5)
        panel.set_title(_shape_line(records[0], modes), fontsize=9)


def _shape_line(record: Record, modes: Sequence[str]) -> str:
    """Return the fields of the case in words."""
    case = record.case
    if "operation" not in case:
        return f"{case['case']}, batch {case['batch']}"
    blocks = f"{case['batch'] * case['blocks_per_side'] ** 2:,} blocks of {_counted(case['tokens_per_block'], 'token')}"
    heads = f"{_counted(case['heads'], 'head')} of {case['head_dim']}"
    width = f", {case['dim']} channels" if case["operation"] == "block" else ""
    drawn = "forward (plain), backward (hatched)" if len(modes) > 1 else modes[0]
    return f"{case['case']}, {case['operation']}, {case['dtype']}\n{blocks}, {heads}{width}\n{drawn}"


def _title(what: str, records: Sequence[Record]) -> str:
    first = records[0].machine
    graph = ", inside a CUDA graph" if all(r.case.get("graph") or r.provider == COPY for r in records) else ""
    samples = sorted({record.n for record in records})
    count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    facts = f"{first['card'] or first['processor']}, torch {first['torch']}, {first['date'][:10]}{graph}"
    return f"{what}\n{facts}; medians of {count} samples, lines: {records[0].spread}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
