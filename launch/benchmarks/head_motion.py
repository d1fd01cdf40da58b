"""Scores with and without the head's motion in the flow: ``python -m launch.benchmarks.head_motion --out FILE.csv``.

The demo's realistic clips (``htnet synth``), of other faces and other weights with each seed, prepared with
each ``prepare.head_motion`` and trained as ``configs/demo.yaml`` says, with both ``data.scaling``. Their heads only
sway: to each seed belong the same clips with all frames but the onset turned and scaled, too. Stores and folds are
made by the functions that ``htnet prepare`` and ``htnet sweep`` call, one after the other in this process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final, Literal, get_args

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from htnet.config import Config, DataConfig
from htnet.config.load import load_config
from htnet.data.entries import clips_of
from htnet.data.extraction import extract
from htnet.data.flow.head_motion import HeadMotion
from htnet.data.frames import list_frames, read_frame
from htnet.data.plan import make_plan
from htnet.data.samples import COMPOSITE
from htnet.data.store.reader import Store
from htnet.data.store.writer import write_store
from htnet.data.synth.generate import generate
from htnet.errors import InputError
from htnet.scoring.record import read_records
from htnet.scoring.summary import summarise
from kernels.benchmarks.record import append_lines
from launch.benchmarks.end_to_end import environment
from launch.benchmarks.results import results_file
from launch.commands.sweep import check_folds
from launch.run.folder import open_run
from launch.tasks.fold import FoldSpec, run_fold

Motion = Literal["sway", "turn"]
"""As the generator has it: shifts alone; or shifts, turns and changes of scale."""
Scaling = Literal["minmax", "stored"]

_TURN: Final = 0.6
"""Largest turn to each side in degrees, and largest change of scale in hundredths."""
_PERIODS: Final = (30.0, 60.0)
"""Frames of a turn there and back, as of the generator's sway."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A sweep's ``final`` scores of the composite."""

    motion: Motion
    scaling: Scaling
    head_motion: HeadMotion
    seed: int
    samples: int
    uf1: float
    uar: float


def measure(config: Config, work: Path, *, seed: int, subjects: int, clips: int, image_size: int) -> Iterator[Scored]:
    """Make the seed's clips in ``work`` and score every case of them; sizes as of ``synth.generate``."""
    for motion in get_args(Motion):
        raw = work / f"raw {motion}"
        generate(raw, subjects=subjects, clips=clips, seed=seed, image_size=image_size, difficulty="realistic")
        sources = tuple(replace(source, root=str(raw / source.adapter)) for source in config.prepare.sources)
        seeded = replace(config, seed=seed, prepare=replace(config.prepare, sources=sources))
        if motion != "sway":
            _turn_frames(seeded, np.random.default_rng(seed))
        for kind in get_args(HeadMotion):
            prepared = replace(seeded, prepare=replace(seeded.prepare, head_motion=kind))
            store = _store(prepared, work / f"store {motion} {kind}")
            for scaling in get_args(Scaling):
                trained = replace(prepared, data=_data(prepared.data, store, scaling))
                uf1, uar = _final(trained, store, work / f"run {motion} {kind} {scaling}")
                yield Scored(
                    motion=motion, scaling=scaling, head_motion=kind, seed=seed, samples=len(store.rows), uf1=uf1,
                    uar=uar,
                )  # fmt: skip


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


def _data(data: DataConfig, store: Store, scaling: Scaling) -> DataConfig:
    return replace(data, store=str(store.path), scaling=scaling)


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


def main(arguments: list[str] | None = None) -> int:
    """Measure, append each sweep to the CSV file and print."""
    parser = argparse.ArgumentParser(description="Final scores of synthetic clips, by prepare.head_motion.")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to append to")
    parser.add_argument(
        "--config", type=Path, default=Path("configs/demo.yaml"), help="how clips are prepared, trained"
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds of faces, motion and weights")
    parser.add_argument("--subjects", type=int, default=3, help="subjects of each layout")
    parser.add_argument("--clips", type=int, default=6, help="clips of a subject")
    parser.add_argument("--image-size", type=int, default=160, help="side of the frames in pixels")
    options = parser.parse_args(arguments)
    empty = Scored(motion="sway", scaling="minmax", head_motion="none", seed=0, samples=0, uf1=0.0, uar=0.0)
    columns = list(_line(empty, options))
    try:
        results_file(options.out.parent, options.out.name, columns)
        config = load_config(options.config)
    except InputError as error:
        parser.error(str(error))
    sizes = {name: getattr(options, name) for name in ("subjects", "clips", "image_size")}
    found: list[Scored] = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as work:
            for scored in measure(config, Path(work), seed=seed, **sizes):
                append_lines(options.out, columns, [_line(scored, options)])
                found.append(scored)
    Console().print(_table(found))
    return 0


def _line(scored: Scored, options: argparse.Namespace) -> dict[str, object]:
    scores = {"uf1": round(scored.uf1, 4), "uar": round(scored.uar, 4)}
    sizes = {"subjects": options.subjects, "clips": options.clips, "image_size": options.image_size}
    return {**asdict(scored), **scores, **sizes, **asdict(environment()), "load": round(os.getloadavg()[0], 2)}


def _table(found: list[Scored]) -> Table:
    """Means over seeds; the difference from ``none`` is of the same clips and weights."""
    out = Table(title="final UF1 and UAR of synthetic clips: mean (standard deviation) over seeds")
    for column in ("motion", "scaling", "head_motion", "n", "UF1", "UAR", "UF1 - none"):
        out.add_column(column, justify="left" if column in ("motion", "scaling", "head_motion") else "right")
    for motion, scaling, kind in product(get_args(Motion), get_args(Scaling), get_args(HeadMotion)):
        cases = {
            name: [item for item in found if (item.motion, item.scaling, item.head_motion) == (motion, scaling, name)]
            for name in (kind, "none")
        }
        uf1 = [item.uf1 for item in cases[kind]]
        gains = [one.uf1 - other.uf1 for one, other in zip(cases[kind], cases["none"], strict=True)]
        scores = _spread(uf1), _spread([item.uar for item in cases[kind]])
        out.add_row(motion, scaling, kind, str(len(uf1)), *scores, "" if kind == "none" else _spread(gains, "+"))
    return out


def _spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.3f} ({deviation:.3f})"


if __name__ == "__main__":
    sys.exit(main())
