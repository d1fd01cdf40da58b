"""TV-L1 flow of face crops, ours against others': ``htnet profile flow``.

64 pairs of synthetic face crops of 128 pixels, whose true flow is known (:mod:`htnet.data.synth.pairs`). Accuracy
first: the mean end-point error of ours may be at most 5 % above each rival's, or nothing is timed. Then rounds: each
provider computes its pairs, in turn; the rivals, which take a pair at a time, compute eight.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from htnet.data.flow.tvl1 import tvl1
from htnet.data.synth.pairs import synth_pairs
from htnet.errors import EXIT_DONE
from kernels.benchmarks.race import OVER, race
from kernels.benchmarks.record import Layout, Record, figures_of, this_machine
from launch.benchmarks.frame import Frame, digits

__all__ = ["LAYOUT", "OURS", "PROVIDERS", "run"]

LAYOUT: Final = Layout(file="flow_cpu.csv", case=("side",), figures=("end_point_error_px", "times_ours"))
OURS: Final = "ours"
SLACK: Final = 1.05
"""Largest end-point error of ours, as a multiple of a rival's."""
_RIVAL_PAIRS = 8

Gray = NDArray[np.uint8]
Fields = NDArray[np.float32]


def _ours(onsets: Gray, apexes: Gray) -> Fields:
    flow = tvl1(torch.from_numpy(onsets), torch.from_numpy(apexes))
    return np.asarray(flow.permute(0, 2, 3, 1).numpy())


def _skimage(onsets: Gray, apexes: Gray) -> Fields:
    from skimage.registration import optical_flow_tvl1

    unit = (pictures.astype(np.float32) / 255 for pictures in (onsets, apexes))
    return np.stack([np.stack(optical_flow_tvl1(a, b)[::-1], axis=-1) for a, b in zip(*unit, strict=True)])


def _dual_tvl1(onsets: Gray, apexes: Gray) -> Fields:
    solver = cv2.optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined] # not in OpenCV's type stubs
    return np.stack([solver.calc(first, second, None) for first, second in zip(onsets, apexes, strict=True)])


PROVIDERS: Final[dict[str, tuple[Callable[[Gray, Gray], Fields], int | None]]] = {
    OURS: (_ours, None),
    "scikit-image": (_skimage, _RIVAL_PAIRS),
    "OpenCV DualTVL1": (_dual_tvl1, _RIVAL_PAIRS),
}
"""Each with the pairs that it computes in a round; None: all."""


def end_point_error(found: Fields, truth: Fields) -> float:
    """Return the mean end-point error in pixels."""
    return float(np.hypot(*np.moveaxis(found - truth, -1, 0)).mean())


def run(options: argparse.Namespace, console: Console) -> int:
    """Check, then measure; return 0, or 1 where ours is less accurate or nothing could be timed."""
    frame = Frame(LAYOUT, options, console, steps=len(PROVIDERS) + 1)
    if options.dry_run:
        frame.say(f"{options.rounds} rounds of pairs of {options.side} pixels: {', '.join(PROVIDERS)}")
        return EXIT_DONE
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    onsets, apexes, truth = synth_pairs(options.pairs, options.side)
    few = slice(None, _RIVAL_PAIRS)
    errors: dict[str, float] = {}
    for name, (compute, _) in PROVIDERS.items():
        frame.clock.begin(f"accuracy of {name}")
        if not frame.clock.over():
            errors[name] = end_point_error(compute(onsets[few], apexes[few]), truth[few])
    worse = [name for name, error in errors.items() if errors[OURS] > SLACK * error]
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    if not worse:
        frame.clock.begin(f"{options.rounds} rounds")
        ways = {name: partial(_sample, compute, onsets[:n], apexes[:n]) for name, (compute, n) in PROVIDERS.items()}
        seconds = race(ways, rounds=options.rounds, clock=frame.clock)
    ours = figures_of(seconds[OURS])["median"] if seconds[OURS] else None
    machine = this_machine(torch.device("cpu"))
    for name in PROVIDERS:
        measured: dict[str, Any] = {"status": "skipped", "reason": OVER}
        figures = {"end_point_error_px": errors.get(name)}
        if worse:
            measured = {"status": "refused", "reason": f"ours is off by {errors[OURS]:.4f} px, more than {worse[0]}"}
        elif seconds[name]:
            measured = figures_of(seconds[name])
            figures["times_ours"] = measured["median"] / ours if ours else None
        case = {"side": options.side}
        frame.keep([Record(case=case, provider=name, unit="s/pair", figures=figures, machine=machine, **measured)])
    columns = {
        "end-point error, px": lambda record: digits(record.figures["end_point_error_px"]),
        "x ours": lambda record: digits(record.figures.get("times_ours")),
    }
    frame.show(frame.records, f"TV-L1, {options.threads} threads", case=("side",), columns=columns)
    return frame.exit_code()


def _sample(compute: Callable[[Gray, Gray], Fields], onsets: Gray, apexes: Gray) -> float:
    """Return seconds per pair."""
    start = time.perf_counter()
    compute(onsets, apexes)
    return (time.perf_counter() - start) / len(onsets)
