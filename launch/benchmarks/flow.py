"""TV-L1 flow of face crops, ours against others': ``python -m launch.benchmarks.flow --out FILE.csv``.

64 pairs of synthetic face crops of 128 pixels, whose true flow is known (:mod:`htnet.data.synth.pairs`). Accuracy
first: the mean end-point error of ours may be at most 5 % above each rival's, or nothing is timed. Then rounds: each
provider computes its pairs, in turn, so that what else the machine does hits all alike; the rivals, which take a pair
at a time, compute eight. Reported per pair: median, n, minimum, maximum, and the ratio to ours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from htnet.data.flow.tvl1 import tvl1
from htnet.data.synth.pairs import synth_pairs
from htnet.errors import InputError
from kernels.benchmarks.record import append_lines
from launch.benchmarks.end_to_end import environment
from launch.benchmarks.results import results_file

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
    """Mean end-point error in pixels."""
    return float(np.hypot(*np.moveaxis(found - truth, -1, 0)).mean())


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, append to the CSV file and print; 0 when the check passed, 1 when ours is less accurate."""
    parser = argparse.ArgumentParser(description="Time TV-L1 flow per pair, by provider.")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to append to")
    parser.add_argument("--rounds", type=int, default=5, help="rounds timed per provider")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of a round for ours")
    parser.add_argument("--side", type=int, default=128, help="side of the crops in pixels")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(arguments)
    columns = list(_lines({OURS: [1.0]}, {OURS: 0.0}, options)[0])
    try:
        results_file(options.out.parent, options.out.name, columns)
    except InputError as refusal:
        parser.error(str(refusal))
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    console = Console()
    onsets, apexes, truth = synth_pairs(options.pairs, options.side)
    probe = slice(None, _RIVAL_PAIRS)
    errors = {
        name: end_point_error(run(onsets[probe], apexes[probe]), truth[probe]) for name, (run, _) in PROVIDERS.items()
    }
    for name, error in errors.items():
        if errors[OURS] > SLACK * error:
            console.print(f"ours is off by {errors[OURS]:.4f} px, {name} by {error:.4f}: nothing is timed")
            return 1
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for _ in range(options.rounds):
        for name, (run, count) in PROVIDERS.items():
            pairs = onsets[:count], apexes[:count]
            start = time.perf_counter()
            run(*pairs)
            seconds[name].append((time.perf_counter() - start) / len(pairs[0]))
    append_lines(options.out, columns, _lines(seconds, errors, options))
    console.print(_table(seconds, errors, options))
    return 0


def _lines(
    seconds: dict[str, list[float]], errors: dict[str, float], options: argparse.Namespace
) -> list[dict[str, object]]:
    """A line of the file per provider."""
    where = asdict(environment()) | {"threads": options.threads, "load": round(os.getloadavg()[0], 2)}
    ours = statistics.median(seconds[OURS])
    return [
        {
            "provider": name,
            "side": options.side,
            "n": len(values),
            "median_s_per_pair": round(statistics.median(values), 5),
            "min_s": round(min(values), 5),
            "max_s": round(max(values), 5),
            "end_point_error_px": round(errors[name], 4),
            "times_ours": round(statistics.median(values) / ours, 3),
            **where,
        }
        for name, values in seconds.items()
    ]


def _table(seconds: dict[str, list[float]], errors: dict[str, float], options: argparse.Namespace) -> Table:
    out = Table(title=f"TV-L1, milliseconds per pair of {options.side} pixels, {options.threads} threads")
    for column in ("provider", "median", "n", "min .. max", "end-point error, px", "x ours"):
        out.add_column(column, justify="left" if column == "provider" else "right")
    ours = statistics.median(seconds[OURS])
    for name, values in seconds.items():
        spread = f"{1000 * min(values):.1f} .. {1000 * max(values):.1f}"
        median = statistics.median(values)
        out.add_row(
            name, f"{1000 * median:.1f}", str(len(values)), spread, f"{errors[name]:.3f}", f"{median / ours:.2f}"
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
