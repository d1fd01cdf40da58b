"""Answers for many pairs beside the floor of their parts: ``htnet profile predict``.

Onset and apex of synthetic clips, with landmarks from a table, go through what ``htnet predict`` does after its start:
reading, flow, network with each region left out, picture, page. The floor is the time of reading and flow alone, by the
code of ``prepare``, for the same clips. The start is that of the whole program for two clips.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from htnet.config import Config, HTNetConfig, PrepareConfig
from htnet.cpu import configure_cpu
from htnet.data.extraction import EXTRACTION_VERSION, extract, recipe_of
from htnet.data.inputs import add_landmarks, read_inputs
from htnet.data.synth.generate import generate
from htnet.data.transform import FlowTransform
from htnet.model import HTNet
from htnet.model_folder import ModelFacts, TrainedOn, save_model
from kernels.benchmarks.race import race
from kernels.benchmarks.record import Layout
from launch.benchmarks.frame import Frame, table_of
from launch.commands.predict import predict

__all__ = ["LAYOUT", "run"]

LAYOUT: Final = Layout(
    file="predict.csv",
    unit="ms",
    case=("what", "clips"),
    figures=("pairs_per_second", "floor_ms", "read_ms", "flow_ms"),
)


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure start and throughput; return the exit code."""
    frame = Frame(LAYOUT, options, console)
    steps = {
        f"start of the program, {options.rounds} times": partial(_start, frame, options),
        f"{options.subjects * options.clips} pairs, {options.rounds} times": partial(_throughput, frame, options),
    }
    columns = {"pairs/s": "pairs_per_second", "floor ms": "floor_ms", "read": "read_ms", "flow": "flow_ms"}
    return frame.run(steps, partial(table_of, title="htnet predict", case=("what",), columns=columns))


def _start(frame: Frame, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, table, landmarks = _make(Path(folder), subjects=1, clips=2)
        places = iter(range(options.rounds))
        command = [sys.executable, "-m", "launch.cli", "predict", str(model), str(table), "--landmarks", str(landmarks)]

        def start() -> float:
            begin = time.perf_counter()
            subprocess.run([*command, "--out", f"{folder}/out{next(places)}"], check=True, capture_output=True)
            return 1e3 * (time.perf_counter() - begin)

        samples = race({"program": start}, rounds=options.rounds, clock=frame.clock)["program"]
    frame.add({"what": "start", "clips": 2}, "program", samples)


def _throughput(frame: Frame, options: argparse.Namespace) -> None:
    count: int = options.subjects * options.clips
    with tempfile.TemporaryDirectory() as folder:
        model, table, landmarks = _make(Path(folder), subjects=options.subjects, clips=options.clips)
        configure_cpu(1)
        clips = [item.clip for item in add_landmarks(read_inputs([str(table)]), landmarks) if item.clip is not None]
        prepare = PrepareConfig(keep_frames=True)
        extract(clips[:2], prepare)  # compiles
        seconds = extract(clips, prepare).seconds
        places = iter(range(options.rounds))

        def answer() -> float:
            begin, out = time.perf_counter(), Path(folder, f"out{next(places)}")
            quiet = Console(file=io.StringIO())
            predict(
                model, [str(table)], out, quiet, landmarks=landmarks, detector="none", detector_model=None, device="cpu"
            )
            return 1e3 * (time.perf_counter() - begin) / count

        samples = race({"answers": answer}, rounds=options.rounds, clock=frame.clock)["answers"]
    read, flow = (1e3 * seconds[stage] / count for stage in ("read", "flow"))
    rate = {"pairs_per_second": 1e3 / sorted(samples)[len(samples) // 2]} if samples else {}
    frame.add(
        {"what": "a pair", "clips": count}, "answers", samples, floor_ms=read + flow, read_ms=read, flow_ms=flow, **rate
    )


def _make(folder: Path, *, subjects: int, clips: int) -> tuple[Path, Path, Path]:
    """Make clips of a table with landmarks, and a model that nobody trained: model, table, landmarks."""
    generate(folder / "raw", datasets=["csv"], subjects=subjects, clips=clips, seed=0)
    config = Config(model=HTNetConfig(dim=24, depths=(2, 2, 4)))
    torch.manual_seed(0)
    facts = ModelFacts(
        classes=("negative", "positive", "surprise"),
        recipe={**recipe_of(PrepareConfig()), "extraction_version": EXTRACTION_VERSION},
        transform=FlowTransform(mosaic_size=28, minmax=True, mean=(127.0,) * 3, std=(40.0,) * 3),
        crop="anatomical",
        trained_on=TrainedOn(stores=(), subjects=(), samples={}),
        selection="final",
        epoch=1,
        scores={},
        versions={},
    )
    save_model(folder / "model", HTNet(config.model).state_dict(), config, facts)
    table = folder / "raw" / "csv"
    return folder / "model", table / "samples.csv", table / "landmarks.csv"
