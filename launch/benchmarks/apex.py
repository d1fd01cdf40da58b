"""Finding apexes, by flow and by grey differences: ``python -m launch.benchmarks.apex --out FILE.csv``.

Synthetic clips of every layout that has frames, whose apexes are known (:mod:`htnet.data.synth.clips`), rendered
before anything is timed. Reported per provider and difficulty: clips, exact hits, the mean and largest distance from
the true apex in frames, and seconds of CPU time per clip on one thread: median, minimum, maximum.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from htnet.data.faces.landmarks import FaceCrop, face_crop
from htnet.data.flow.apex import find_apex
from htnet.data.frames import Frames, to_gray
from htnet.data.samples import Landmarks
from htnet.data.synth.clips import Difficulty, SynthClip, plan_clips, render_frame
from htnet.data.synth.layouts import LAYOUTS
from htnet.errors import InputError
from kernels.benchmarks.record import append_lines
from launch.benchmarks.end_to_end import environment
from launch.benchmarks.results import results_file

_WITHOUT_FRAMES = "htnet_release"
Finder = Callable[[Frames, int, int, FaceCrop, Landmarks], int]


@dataclass(frozen=True)
class _Rendered:
    """Frames in memory."""

    pictures: dict[int, NDArray[np.uint8]]

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(self.pictures)

    def read(self, number: int) -> NDArray[np.uint8]:
        return self.pictures[number]

    def read_each(self, numbers: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
        return (self.read(number) for number in numbers)


def by_grey(frames: Frames, onset: int, offset: int, crop: FaceCrop, landmarks: Landmarks) -> int:
    """The frame whose grey values differ most from the onset's, less what a shift and a change of brightness explain.

    How apexes were found before; a least squares fit on the onset's gradients takes the shift out.
    """
    rest = _smooth(crop, frames.read(onset))
    down, right = np.gradient(rest)
    head = np.stack([right.ravel(), down.ravel(), np.ones(rest.size, np.float32)], axis=1)
    fit = np.linalg.pinv(head)
    between = [number for number in frames.numbers if onset < number <= offset]
    changes = ((_smooth(crop, frames.read(number)) - rest).ravel() for number in between)
    return between[int(np.argmax([float(np.abs(change - head @ (fit @ change)).mean()) for change in changes]))]


def _smooth(crop: FaceCrop, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    gray = crop.cut(to_gray(frame)).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(gray, (0, 0), 1.0), np.float32)


PROVIDERS: Final[dict[str, Finder]] = {"flow": find_apex, "grey differences": by_grey}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Results of a provider on the clips of a difficulty: distances in frames, seconds of CPU time per clip."""

    provider: str
    difficulty: str
    errors: tuple[int, ...]
    seconds: tuple[float, ...]

    def row(self) -> dict[str, object]:
        """As a row of the CSV file."""
        return {
            "provider": self.provider,
            "difficulty": self.difficulty,
            "clips": len(self.errors),
            "exact": self.errors.count(0),
            "mean_error_frames": round(statistics.mean(self.errors), 3),
            "largest_error_frames": max(self.errors),
            "median_cpu_s_per_clip": round(statistics.median(self.seconds), 4),
            "min_cpu_s": round(min(self.seconds), 4),
            "max_cpu_s": round(max(self.seconds), 4),
        }


def measure(difficulty: Difficulty, *, subjects: int, clips: int, image_size: int, seed: int) -> tuple[Found, ...]:
    """Find the apexes of all layouts' clips by each provider in turn; sizes as of ``synth.generate``."""
    errors: dict[str, list[int]] = {name: [] for name in PROVIDERS}
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    sizes: dict[str, Any] = {"subjects": subjects, "clips": clips, "image_size": image_size, "seed": seed}
    for clip, frames in _clips(difficulty, sizes):
        crop = face_crop(clip.landmarks, (clip.image_size, clip.image_size))
        for name, find in PROVIDERS.items():
            start = time.process_time()
            apex = find(frames, clip.onset, clip.offset, crop, clip.landmarks)
            seconds[name].append(time.process_time() - start)
            errors[name].append(abs(apex - clip.apex))
    return tuple(
        Found(provider=name, difficulty=difficulty, errors=tuple(errors[name]), seconds=tuple(seconds[name]))
        for name in PROVIDERS
    )


def _clips(difficulty: Difficulty, sizes: dict[str, Any]) -> Iterator[tuple[SynthClip, _Rendered]]:
    for layout in LAYOUTS:
        if layout != _WITHOUT_FRAMES:
            for clip in plan_clips(layout, difficulty=difficulty, **sizes):
                numbers = range(clip.onset, clip.offset + 1)
                yield clip, _Rendered({number: render_frame(clip, number) for number in numbers})


def main(arguments: list[str] | None = None) -> int:
    """Measure, append to the CSV file and print."""
    parser = argparse.ArgumentParser(description="Find the apexes of synthetic clips, by provider.")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to append to")
    parser.add_argument("--subjects", type=int, default=5, help="subjects of each layout")
    parser.add_argument("--clips", type=int, default=4, help="clips of a subject")
    parser.add_argument("--image-size", type=int, default=160, help="side of the frames in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of faces and motion")
    options = parser.parse_args(arguments)
    columns = list(_line(Found(provider="", difficulty="", errors=(0,), seconds=(0.0,)), options))
    try:
        results_file(options.out.parent, options.out.name, columns)
    except InputError as error:
        parser.error(str(error))
    cv2.setNumThreads(1)
    sizes = {name: getattr(options, name) for name in ("subjects", "clips", "image_size", "seed")}
    found = [item for difficulty in get_args(Difficulty) for item in measure(difficulty, **sizes)]
    append_lines(options.out, columns, [_line(item, options) for item in found])
    Console().print(_table(found))
    return 0


def _line(found: Found, options: argparse.Namespace) -> dict[str, object]:
    where = {**asdict(environment()), "threads": 1, "load": round(os.getloadavg()[0], 2)}
    return {**found.row(), "image_size": options.image_size, **where}


def _table(found: list[Found]) -> Table:
    out = Table(title="apexes of synthetic clips: errors in frames, CPU milliseconds a clip on one thread")
    for column in ("provider", "difficulty", "exact", "mean", "largest", "CPU ms", "min .. max"):
        out.add_column(column, justify="left" if column in ("provider", "difficulty") else "right")
    for item in found:
        milliseconds = [1000 * value for value in item.seconds]
        out.add_row(
            item.provider,
            item.difficulty,
            f"{item.errors.count(0)} of {len(item.errors)}",
            f"{statistics.mean(item.errors):.3f}",
            str(max(item.errors)),
            f"{statistics.median(milliseconds):.0f}",
            f"{min(milliseconds):.0f} .. {max(milliseconds):.0f}",
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
