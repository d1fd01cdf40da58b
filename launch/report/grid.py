"""Page of a grid, ``OUT/grid.html``: self-contained, its configurations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from htnet.scoring.grid import Configuration, Grid

__all__ = ["grid_page"]

_LEFT, _RIGHT, _ROW = 8.0, 712.0, 34.0
_DATASETS: Final = "composite"


def grid_page(grid: Grid, name: str) -> str:
    """Return the page as HTML."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=True)
    template = environment.get_template("grid.html.j2")
    rows = sorted({row for found in grid.configurations for row in found.mean}, key=lambda row: (row != _DATASETS, row))
    return template.render(grid=grid, name=name, rows=rows, chart=_chart(grid))


def _chart(grid: Grid) -> dict[str, Any] | None:
    """Return the geometry of the chart: a line for each configuration, a dot for each seed's UF1 of the composite."""
    found = [configuration for configuration in grid.configurations if configuration.mean]
    values = [value for configuration in found for value in _values(configuration)]
    if not values:
        return None
    low, high = max(0.0, min(values) - 0.03), min(1.0, max(values) + 0.03)

    def x(value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (value - low) / max(high - low, 1e-9), 1)

    lines = []
    for index, configuration in enumerate(found):
        seeds = [run.rows[_DATASETS]["uf1"] for run in configuration.runs if run.rows]
        lines.append(
            {
                "name": configuration.name,
                "y": _ROW * (index + 1),
                "seeds": [x(value) for value in seeds],
                "mean": x(configuration.mean[_DATASETS]["uf1"]),
                "ensemble": x(configuration.ensemble[_DATASETS]["uf1"]) if configuration.ensemble else None,
            }
        )
    ticks = [tick / 20 for tick in range(21) if low <= tick / 20 <= high]
    return {
        "lines": lines,
        "height": _ROW * (len(found) + 1) + 16,
        "bottom": _ROW * (len(found) + 0.6),
        "ticks": [(x(tick), f"{tick:.2f}") for tick in ticks],
        "left": _LEFT,
        "right": _RIGHT,
    }


def _values(configuration: Configuration) -> list[float]:
    values = [run.rows[_DATASETS]["uf1"] for run in configuration.runs if run.rows]
    return values + ([configuration.ensemble[_DATASETS]["uf1"]] if configuration.ensemble else [])
