"""Scores with and without the head's motion in the flow: ``htnet profile head-motion``.

The demo's realistic clips (``htnet synth``), of other faces and other weights with each seed, prepared with
each ``prepare.head_motion`` and trained as ``configs/demo.yaml`` says, with both ``data.scaling``. Their heads only
sway: to each seed belong the same clips with all frames but the onset turned and scaled, too. Stores and folds are
made by the functions that ``htnet prepare`` and ``htnet sweep`` call, one after the other in this process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal, get_args

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from htnet.config import Config
from htnet.config.data import Scaling
from htnet.config.load import load_config
from htnet.config.prepare import HeadMotion
from htnet.data.entries import clips_of
from htnet.data.extraction import extract
from htnet.data.frames import list_frames, read_frame
from htnet.data.plan import make_plan
from htnet.data.samples import COMPOSITE
from htnet.data.store.reader import Store
from htnet.data.store.writer import write_store
from htnet.data.synth.generate import generate
from htnet.scoring.record import read_records
from htnet.scoring.summary import summarise
from kernels.benchmarks.record import Layout, Record
from launch.benchmarks.frame import Frame, compact_table
from launch.commands.sweep import check_folds
from launch.run.folder import open_run
from launch.tasks.fold import FoldSpec, run_fold

__all__ = ["LAYOUT", "run"]

LAYOUT: Final = Layout(
    file="head_motion.csv",
    unit="UF1",
    case=("motion", "scaling", "seed", "samples", "subjects", "clips", "image_size"),
    figures=("uar",),
)

Motion = Literal["sway", "turn"]
"""As the generator has it: shifts alone; or shifts, turns and changes of scale."""

_TURN: Final = 0.6
"""Largest turn to each side in degrees, and largest change of scale in hundredths."""
_PERIODS: Final = (30.0, 60.0)
"""Frames of a turn there and back, as of the generator's sway."""


def _measure(frame: Frame, config: Config, options: argparse.Namespace, seed: int) -> None:
    """Make the seed's clips and score every case of them."""
    sizes = {name: getattr(options, name) for name in ("subjects", "clips", "image_size")}
    with tempfile.TemporaryDirectory() as folder:
        for motion in get_args(Motion):
            work = Path(folder) / motion
            generate(work / "raw", seed=seed, difficulty="realistic", **sizes)
            sources = [replace(source, root=str(work / "raw" / source.adapter)) for source in config.prepare.sources]
            seeded = replace(config, seed=seed, prepare=replace(config.prepare, sources=tuple(sources)))
            if motion != "sway":
                _turn_frames(seeded, np.random.default_rng(seed))
            for kind in get_args(HeadMotion):
                prepared = replace(seeded, prepare=replace(seeded.prepare, head_motion=kind))
                store = _store(prepared, work / f"store {kind}")
                for scaling in get_args(Scaling):
                    data = replace(prepared.data, store=str(store.path), scaling=scaling)
                    case = {"motion": motion, "scaling": scaling, "seed": seed, "samples": len(store.rows), **sizes}
                    frame.say(f"  {motion}, {kind}, {scaling}")
                    found: dict[str, Any] = {}
                    if not frame.clock.over():
                        uf1, uar = _final(replace(prepared, data=data), store, work / f"run {kind} {scaling}")
                        found = {"samples": [uf1], "uar": uar}
                    frame.add(case, kind, **found)


def _turn_frames(config: Config, rng: np.random.Generator) -> None:
    """Turn and scale every frame about its middle; onset frames stay, so that their landmarks hold."""
    for entry in clips_of(make_plan(config.prepare).entries):
        frames = list_frames(entry.frames)
        onset = min(frames) if entry.onset is None else entry.onset
        phases, periods = rng.uniform(0, 2 * np.pi, 2), rng.uniform(*_PERIODS, 2)
        for number, path in frames.items():
            turns = 2 * np.pi * np.array([[number], [onset]]) / periods + phases
            angle, growth = _TURN * (np.sin(turns[0]) - np.sin(turns[1]))
            frame = read_frame(path)
            height, width = frame.shape[:2]
            middle = ((width - 1) / 2, (height - 1) / 2)
            matrix = cv2.getRotationMatrix2D(middle, float(angle), 1 + float(growth) / 100)
            moved = cv2.warpAffine(frame, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
            if number != onset:
                cv2.imwrite(str(path), moved)


def _store(config: Config, path: Path) -> Store:
    plan = make_plan(config.prepare)
    found = [extract(entries, config.prepare, strict=True) for entries in plan.subjects.values()]
    return write_store(path, (sample for part in found for sample in part.samples), plan.recipe)


def _final(config: Config, store: Store, path: Path) -> tuple[float, float]:
    """UF1 and UAR of a sweep."""
    with open_run(path, config, store) as run:
        folds = check_folds(config, store)
        for fold in folds:
            spec = FoldSpec(config=config, fold=fold, run_dir=run.path, config_hash=run.config_hash, attempt=1)
            if (outcome := run_fold(spec)).reason is not None:
                raise RuntimeError(f"{fold.subject}: {outcome.reason}")
        summary = summarise(
            read_records(run.folds), folds_total=len(folds), failed={}, num_classes=config.model.num_classes,
            bootstrap=0, chance_trials=0, seed=config.seed,
        )  # fmt: skip
    scores = summary.selections["final"][COMPOSITE]
    return scores.uf1, scores.uar


def run(options: argparse.Namespace, console: Console) -> int:
    """Score every case of every seed; return the exit code.

    Raises:
        InputError: the configuration is wrong.
    """
    frame = Frame(LAYOUT, options, console)
    measure = partial(_measure, frame, load_config(options.config), options)
    steps = {f"seed {seed}: sweeps with {options.config}": partial(measure, seed) for seed in range(options.seeds)}
    return frame.run(steps, _table)


def _table(records: Sequence[Record]) -> Table:
    """Return means over seeds; the difference from ``none`` is of the same clips and weights."""
    title = "final UF1 and UAR of synthetic clips: mean (standard deviation) over seeds"
    out = compact_table(title, *("motion", "scaling", "head_motion", "n", "UF1", "UAR", "UF1 - none"), words=3)
    done = [record for record in records if record.status == "ok"]
    for motion, scaling, kind in product(get_args(Motion), get_args(Scaling), get_args(HeadMotion)):
        alike = [record for record in done if (record.case["motion"], record.case["scaling"]) == (motion, scaling)]
        none = {record.case["seed"]: record.median or 0.0 for record in alike if record.provider == "none"}
        found = [record for record in alike if record.provider == kind]
        uf1 = {record.case["seed"]: record.median or 0.0 for record in found}
        gains = [value - none[seed] for seed, value in uf1.items() if seed in none]
        cells = [_spread([*uf1.values()]), _spread([record.figures["uar"] for record in found])]
        out.add_row(motion, scaling, kind, str(len(uf1)), *cells, "" if kind == "none" else _spread(gains, "+"))
    return out


def _spread(values: list[float], sign: str = "") -> str:
    """Return mean and standard deviation."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.3f} ({deviation:.3f})"
