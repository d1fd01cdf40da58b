"""TV-L1 flow of face crops, ours against others': ``htnet profile flow``.

64 pairs of synthetic face crops of 128 pixels, whose true flow is known (:mod:`htnet.data.synth.pairs`). Accuracy
first: the mean end-point error of ours may be at most 5 % above each rival's, or nothing is timed. Then rounds: each
provider computes its pairs, in turn; the rivals, which take a pair at a time, compute eight.
"""

from __future__ import annotations

import argparse
import statistics
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
from kernels.benchmarks.race import race
from kernels.benchmarks.record import Layout
from launch.benchmarks.frame import Frame, Step, table_of

__all__ = ["LAYOUT", "OURS", "PROVIDERS", "run"]

LAYOUT: Final = Layout(file="flow_cpu.csv", unit="s/pair", case=("side",), figures=("end_point_error_px", "times_ours"))
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


def run(options: argparse.Namespace, console: Console) -> int:
    """Check, then measure; return 0, or 1 where ours is less accurate or nothing could be timed."""
    frame = Frame(LAYOUT, options, console)
    errors: dict[str, float] = {}
    steps: dict[str, Step] = {
        f"accuracy of {name}": partial(_check, name, frame, errors, options) for name in PROVIDERS
    }
    steps[f"{options.rounds} rounds of pairs of {options.side} pixels"] = partial(_race, frame, errors, options)
    columns = {"end-point error, px": "end_point_error_px", "x ours": "times_ours"}
    return frame.run(
        steps, partial(table_of, title=f"TV-L1, {options.threads} threads", case=("side",), columns=columns)
    )


def _check(name: str, frame: Frame, errors: dict[str, float], options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    if not frame.clock.over():
        onsets, apexes, truth = synth_pairs(options.pairs, options.side)
        off = PROVIDERS[name][0](onsets[:_RIVAL_PAIRS], apexes[:_RIVAL_PAIRS]) - truth[:_RIVAL_PAIRS]
        errors[name] = float(np.hypot(*np.moveaxis(off, -1, 0)).mean())


def _race(frame: Frame, errors: dict[str, float], options: argparse.Namespace) -> None:
    onsets, apexes, _ = synth_pairs(options.pairs, options.side)
    ways = {name: partial(_sample, compute, onsets[:n], apexes[:n]) for name, (compute, n) in PROVIDERS.items()}
    worse = [name for name, error in errors.items() if errors[OURS] > SLACK * error]
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    found: dict[str, Any] = {}
    if worse:
        found = {"status": "refused", "reason": f"ours is off by {errors[OURS]:.4f} px, more than {worse[0]}"}
    else:
        seconds = race(ways, rounds=options.rounds, clock=frame.clock)
    for name, samples in seconds.items():
        times = statistics.median(samples) / statistics.median(seconds[OURS]) if samples and seconds[OURS] else None
        figures = {"end_point_error_px": errors.get(name), "times_ours": times}
        frame.add({"side": options.side}, name, samples, **found, **figures)


def _sample(compute: Callable[[Gray, Gray], Fields], onsets: Gray, apexes: Gray) -> float:
    """Return seconds per pair."""
    start = time.perf_counter()
    compute(onsets, apexes)
    return (time.perf_counter() - start) / len(onsets)
