"""Finding apexes, by flow and by grey differences: ``htnet profile apex``.

Synthetic clips of every layout that has frames, whose apexes are known (:mod:`htnet.data.synth.clips`), rendered
before anything is timed. Reported per provider and difficulty: exact hits, the mean and largest distance from the true
apex in frames, and seconds of CPU time per clip on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final, get_args

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from htnet.data.faces.landmarks import FaceCrop, face_crop
from htnet.data.flow.apex import find_apex
from htnet.data.frames import Frames, to_gray
from htnet.data.samples import Landmarks
from htnet.data.synth.clips import Difficulty, SynthClip, plan_clips, render_frame
from htnet.data.synth.layouts import LAYOUTS
from kernels.benchmarks.race import race
from kernels.benchmarks.record import Layout
from launch.benchmarks.frame import Frame, table_of

__all__ = ["LAYOUT", "PROVIDERS", "run"]

_DIFFICULTIES: Final = get_args(Difficulty)
_FIGURES: Final = ("exact", "mean_error_frames", "largest_error_frames")
LAYOUT: Final = Layout(file="apex_cpu.csv", unit="s", case=("difficulty", "image_size"), figures=_FIGURES)
Finder = Callable[[Frames, int, int, FaceCrop, Landmarks], int]


class _Rendered(dict[int, NDArray[np.uint8]]):
    """Frames in memory, by number."""

    def __init__(self, clip: SynthClip) -> None:
        super().__init__((number, render_frame(clip, number)) for number in range(clip.onset, clip.offset + 1))
        self.clip = clip
        self.crop = face_crop(clip.landmarks, (clip.image_size, clip.image_size))

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(self)

    def read(self, number: int) -> NDArray[np.uint8]:
        return self[number]

    def read_each(self, numbers: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
        return map(self.read, numbers)


def by_grey(frames: Frames, onset: int, offset: int, crop: FaceCrop, landmarks: Landmarks) -> int:
    """Return the frame whose grey values differ most from the onset's, shift and change of brightness taken out.

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


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure both difficulties; return the exit code."""
    frame = Frame(LAYOUT, options, console)
    steps = {f"{kind} clips: {', '.join(PROVIDERS)}": partial(_measure, frame, options, kind) for kind in _DIFFICULTIES}
    title = "apexes of synthetic clips: CPU time of one thread, errors in frames"
    columns = {"exact": "exact", "mean error": "mean_error_frames", "largest": "largest_error_frames"}
    return frame.run(steps, partial(table_of, title=title, case=("difficulty",), columns=columns))


def _measure(frame: Frame, options: argparse.Namespace, difficulty: Difficulty) -> None:
    """Find the apexes of the clips of all layouts with frames by each provider in turn."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    sizes = {name: getattr(options, name) for name in ("subjects", "clips", "image_size", "seed")}
    with_frames = [layout for layout in LAYOUTS if layout != "htnet_release"]
    clips = [clip for layout in with_frames for clip in plan_clips(layout, difficulty=difficulty, **sizes)]
    errors: dict[str, list[int]] = {name: [] for name in PROVIDERS}
    rendered = map(_Rendered, clips)
    current: list[_Rendered] = []

    def find(name: str) -> float:
        [frames] = current
        clip, start = frames.clip, time.process_time()
        apex = PROVIDERS[name](frames, clip.onset, clip.offset, frames.crop, clip.landmarks)
        seconds = time.process_time() - start
        errors[name].append(abs(apex - clip.apex))
        return seconds

    def follow() -> None:
        current[:] = [next(rendered)]

    ways = {name: partial(find, name) for name in PROVIDERS}
    for name, seconds in race(ways, rounds=len(clips), clock=frame.clock, prepare=follow).items():
        found = errors[name]
        figures = (found.count(0), statistics.mean(found), max(found)) if found else (None, None, None)
        case = {"difficulty": difficulty, "image_size": options.image_size}
        frame.add(case, name, seconds, **dict(zip(_FIGURES, figures, strict=True)))
