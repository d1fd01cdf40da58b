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
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, get_args

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
from htnet.errors import EXIT_DONE
from kernels.benchmarks.race import OVER, Clock, race
from kernels.benchmarks.record import Layout, Record, figures_of, this_machine
from launch.benchmarks.frame import Frame, digits

__all__ = ["LAYOUT", "PROVIDERS", "run"]

LAYOUT: Final = Layout(
    file="apex_cpu.csv",
    case=("difficulty", "image_size"),
    figures=("exact", "mean_error_frames", "largest_error_frames"),
)
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
    difficulties = get_args(Difficulty)
    frame = Frame(LAYOUT, options, console, steps=len(difficulties))
    sizes = {name: getattr(options, name) for name in ("subjects", "clips", "image_size", "seed")}
    if options.dry_run:
        frame.say(f"{len(_plans('easy', sizes))} clips each, {' and '.join(difficulties)}: {', '.join(PROVIDERS)}")
        return EXIT_DONE
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    for difficulty in difficulties:
        frame.clock.begin(f"{difficulty} clips")
        frame.keep(_measure(difficulty, sizes, frame.clock))
    columns = {
        "exact": lambda record: str(record.figures["exact"]),
        "mean error": lambda record: digits(record.figures["mean_error_frames"]),
        "largest": lambda record: str(record.figures["largest_error_frames"]),
    }
    title = "apexes of synthetic clips: CPU time of one thread, errors in frames"
    frame.show(frame.records, title, case=("difficulty",), columns=columns)
    return frame.exit_code()


def _measure(difficulty: Difficulty, sizes: dict[str, Any], clock: Clock) -> Iterator[Record]:
    """Find the apexes of all layouts' clips by each provider in turn; sizes as of ``synth.generate``."""
    errors: dict[str, list[int]] = {name: [] for name in PROVIDERS}
    planned = _plans(difficulty, sizes)
    rendered = (_rendered(clip) for clip in planned)
    current: dict[str, tuple[SynthClip, _Rendered, FaceCrop]] = {}

    def find(name: str) -> float:
        clip, frames, crop = current["clip"]
        start = time.process_time()
        apex = PROVIDERS[name](frames, clip.onset, clip.offset, crop, clip.landmarks)
        seconds = time.process_time() - start
        errors[name].append(abs(apex - clip.apex))
        return seconds

    ways = {name: partial(find, name) for name in PROVIDERS}
    seconds = race(ways, rounds=len(planned), clock=clock, prepare=lambda: current.update(clip=next(rendered)))
    machine = this_machine(torch.device("cpu"))
    case = {"difficulty": difficulty, "image_size": sizes["image_size"]}
    for name, found in errors.items():
        measured: dict[str, Any] = {"status": "skipped", "reason": OVER}
        if found:
            figures = (found.count(0), statistics.mean(found), max(found))
            measured = {**figures_of(seconds[name]), "figures": dict(zip(LAYOUT.figures, figures, strict=True))}
        yield Record(case=case, provider=name, unit="s", machine=machine, **measured)


def _plans(difficulty: Difficulty, sizes: dict[str, Any]) -> list[SynthClip]:
    layouts = [layout for layout in LAYOUTS if layout != _WITHOUT_FRAMES]
    return [clip for layout in layouts for clip in plan_clips(layout, difficulty=difficulty, **sizes)]


def _rendered(clip: SynthClip) -> tuple[SynthClip, _Rendered, FaceCrop]:
    pictures = {number: render_frame(clip, number) for number in range(clip.onset, clip.offset + 1)}
    return clip, _Rendered(pictures), face_crop(clip.landmarks, (clip.image_size, clip.image_size))
