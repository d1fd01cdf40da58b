"""Grid: ``htnet sweep`` of several configurations and seeds, one run folder each, and the page that compares them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from htnet.config import Config
from htnet.errors import InputError
from htnet.files import write_json, write_whole
from htnet.scoring.grid import Grid, summarise_grid
from htnet.scoring.record import FoldRecord, read_records
from htnet.scoring.summary import Summary
from launch.commands.sweep import Planned, sweep_all
from launch.report.grid import grid_page
from launch.run.folder import RunFolder
from launch.screen import say

__all__ = ["SUMMARY", "parse_seeds", "plan_grid", "rescore_grid", "sweep_grid"]

SUMMARY = "grid.json"
PAGE = "grid.html"
_DRAWS = 5000


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read seeds: ``0..4``, ``7``, or ``1,5,9``.

    Raises:
        InputError: it is none of these, or a seed comes twice.
    """
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        seeds = tuple(range(int(found[1]), int(found[2]) + 1))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        seeds = tuple(map(int, text.split(",")))
    else:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(
            f"--seeds {text}: must be FIRST..LAST or numbers with commas, each once, such as 0..4 or 1,5,9"
        )
    return seeds


def plan_grid(configs: Mapping[str, Config], seeds: Sequence[int], out: Path) -> list[Planned]:
    """Return the runs: OUT/<configuration>/seed<number>; without seeds each configuration has its own."""
    return [
        Planned(
            config=replace(config, seed=seed),
            out=out / name / f"seed{seed}",
            label=f"{name}/seed{seed}",
        )
        for name, config in configs.items()
        for seed in (seeds or (config.seed,))
    ]


def sweep_grid(
    configs: Mapping[str, Config], seeds: Sequence[int], out: Path, address: str | None, console: Console
) -> int:
    """Finish the runs of a grid in one pool, then write its summary and page; return the exit code."""
    _check_place(out)
    code = sweep_all(plan_grid(configs, seeds, out), address, console)
    _write(out, console)
    return code


def rescore_grid(out: Path, console: Console) -> None:
    """Write a grid's summary and page again from its runs."""
    _write(out, console)


def _check_place(out: Path) -> None:
    """Refuse a folder that holds something else than a grid."""
    if out.is_file():
        raise InputError(f"{out}: is a file; --out names a folder")
    if (out / RunFolder(path=out).config.name).exists():
        raise InputError(f"{out}: is a run; a grid has runs below it, so choose another --out")


def _write(out: Path, console: Console) -> None:
    grid = _read(out)
    write_json(out / SUMMARY, grid.plain())
    write_whole(out / PAGE, grid_page(grid, out.resolve().name))
    for configuration in grid.configurations:
        if configuration.mean:
            mean, spread = configuration.mean["composite"], configuration.spread.get("composite")
            text = f"{configuration.name}: UF1 {mean['uf1']:.3f}"
            text += f" +- {spread['uf1']:.3f} over {len(configuration.runs)} seeds" if spread else ""
            if configuration.ensemble:
                text += f", ensemble {configuration.ensemble['composite']['uf1']:.3f}"
            say(console, text)
    say(console, f"grid: {out / PAGE}")


def _read(out: Path) -> Grid:
    """Read the runs below a grid's folder, sorted by configuration and seed."""
    records: dict[str, dict[int, list[FoldRecord]]] = {}
    folders: dict[tuple[str, int], str] = {}
    totals: dict[tuple[str, int], int] = {}
    paths = [path for path in out.glob("*/seed*") if re.fullmatch(r"seed\d+", path.name)]
    for path in sorted(paths, key=lambda path: (path.parent.name, int(path.name[4:]))):
        run, name, seed = RunFolder(path=path), path.parent.name, int(path.name[4:])
        if run.config.is_file() and run.summary.is_file():
            records.setdefault(name, {})[seed] = read_records(run.folds)
            folders[name, seed] = f"{name}/{path.name}"
            totals[name, seed] = Summary.read(run.summary).folds_total
    if not records:
        raise InputError(f"{out}: no run of a grid; it holds no <configuration>/seed<number> with a summary")
    return summarise_grid(records, folders, totals, draws=_DRAWS)
