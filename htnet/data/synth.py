"""Synthetic raw datasets in the layouts of CASME II, SAMM and SMIC-HS, with known motion.

For demonstrations and tests of the whole chain: the faces are drawn (:mod:`htnet.data.synth_faces`),
the motion of each class is known (:mod:`htnet.data.synth_motion`), files and annotations stand where
the owners of the real datasets put them (:mod:`htnet.data.synth_layouts`). Nothing about
micro-expressions of people can be learned from it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from htnet.data.synth_faces import Look, draw_face, draw_look, look_landmarks
from htnet.data.synth_layouts import LAYOUTS, ClipFiles, Layout
from htnet.data.synth_motion import (
    Field,
    Style,
    backward_field,
    course,
    draw_style,
    expression,
    forward_flow,
    warp_face,
)
from htnet.data.types import Emotion, Landmarks
from htnet.errors import InputError

DATASETS = tuple(LAYOUTS)
"""Names of the datasets that can be generated, in the order of their layouts."""
_FORMAT = 1
_SENSOR_NOISE = 1.2
_HEAD_JITTER_PX = 0.25
_MAX_SUBJECTS = 90
_MAX_CLIPS = 60


@dataclass(frozen=True, kw_only=True)
class SynthClip:
    """One planned clip: everything its frames are made of.

    Frame numbers are those of the files. ``amplitude`` and ``jitter`` are in pixels of a frame; ``jitter``
    is the (phase, period) of the head's sway per axis.
    """

    dataset: str
    subject: str
    clip: str
    label: int
    emotion: str
    image_size: int
    first: int
    onset: int
    apex: int
    offset: int
    last: int
    amplitude: float
    jitter: tuple[tuple[float, float], tuple[float, float]]
    style: Style
    look: Look
    noise_seed: int

    @property
    def landmarks(self) -> Landmarks:
        """Five landmarks of the onset frame, in its pixels."""
        return look_landmarks(self.look, self.image_size)


@dataclass(frozen=True, kw_only=True)
class SynthSummary:
    """What :func:`generate` left on disk. ``created`` is False where the same data lay there already."""

    out: Path
    clips: dict[str, int]
    frames: int
    created: bool

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {number} clips" for name, number in self.clips.items())
        state = "written" if self.created else "there already, made from the same parameters: nothing done"
        return f"{self.out}: {counts}, {self.frames} frames; {state}"


def generate(
    out: Path,
    *,
    datasets: Sequence[str] = DATASETS,
    subjects: int = 4,
    clips: int = 5,
    seed: int = 0,
    image_size: int = 160,
) -> SynthSummary:
    """Write synthetic datasets to ``out/casme2``, ``out/samm`` and ``out/smic``.

    The same parameters give the same bytes with the same library versions. Everything is written under a
    temporary name beside ``out`` and renamed when whole.

    Args:
        out: folder to make; it may be absent, empty, or hold what the same parameters made.
        datasets: which of :data:`DATASETS`.
        subjects: subjects per dataset, 1 to 90.
        clips: clips per subject, 2 to 60; labels rotate, so each subject shows at least two classes.
        seed: seed of looks, motion and noise.
        image_size: side of the square frames in pixels, 64 to 1024.

    Returns:
        What lies there, and whether this call made it.

    Raises:
        InputError: a parameter out of range, or ``out`` holds something else.
    """
    chosen = _check(datasets, subjects, clips, seed, image_size)
    sizes = {"subjects": subjects, "clips": clips, "seed": seed, "image_size": image_size}
    parameters: dict[str, object] = {"format": _FORMAT, "datasets": list(chosen), **sizes}
    planned = {name: plan_clips(name, **sizes) for name in chosen}
    frames = sum(clip.last - clip.first + 1 for plan in planned.values() for clip in plan)
    counts = {name: len(plan) for name, plan in planned.items()}
    created = not _is_there(out, parameters)
    if created:
        _write(out, planned, parameters)
    return SynthSummary(out=out, clips=counts, frames=frames, created=created)


def plan_clips(dataset: str, *, subjects: int, clips: int, seed: int, image_size: int) -> tuple[SynthClip, ...]:
    """Decide every clip of a dataset without drawing anything; parameters as in :func:`generate`.

    Returns:
        The clips in the order of the dataset's annotation file.
    """
    layout = LAYOUTS[dataset]
    plan: list[SynthClip] = []
    for subject in range(subjects):
        key = [seed, DATASETS.index(dataset), subject]
        look = draw_look(np.random.default_rng(key))
        seen: dict[int, int] = {}
        for index in range(clips):
            label = (subject + index) % len(Emotion)
            seen[label] = seen.get(label, 0) + 1
            name = layout.clip_name(subject, index, label, seen[label])
            rng = np.random.default_rng([*key, index])
            plan.append(_plan_clip(layout, rng, look, subject=subject, label=label, clip=name, image_size=image_size))
    return tuple(plan)


def true_flow(clip: SynthClip, frame: int) -> Field:
    """True optical flow from the onset frame to ``frame``.

    Args:
        clip: a clip of :func:`plan_clips`.
        frame: a frame number of the clip, ``clip.first`` to ``clip.last``.

    Returns:
        (S, S, 2) float32 pixels, channels flow_u (x to the right) and flow_v (y down).
    """
    return forward_flow(_backward(clip, frame))


def render_frame(clip: SynthClip, frame: int) -> NDArray[np.uint8]:
    """Draw one frame of a clip: (S, S, 3) uint8, blue-green-red, with sensor noise."""
    warped = warp_face(_base(clip.look, clip.image_size), _backward(clip, frame))
    rng = np.random.default_rng([clip.noise_seed, frame])
    noise = _SENSOR_NOISE * rng.standard_normal(warped.shape[:2], dtype=np.float32)
    return np.clip(np.rint(warped + noise[..., None]), 0, 255).astype(np.uint8)


def _plan_clip(
    layout: Layout, rng: np.random.Generator, look: Look, *, subject: int, label: int, clip: str, image_size: int
) -> SynthClip:
    low, high = layout.length
    rise, fall = (int(rng.integers(low, high + 1)) for _ in range(2))
    first = layout.first_frame(rng)
    onset = first + layout.margin
    emotions = layout.emotions[label]
    periods = rng.uniform(30.0, 60.0, 2)
    phases = rng.uniform(0.0, 2 * np.pi, 2)
    return SynthClip(
        dataset=layout.dataset,
        subject=layout.subject_name(subject),
        clip=clip,
        label=label,
        emotion=emotions[int(rng.integers(len(emotions)))],
        image_size=image_size,
        first=first,
        onset=onset,
        apex=onset + rise,
        offset=onset + rise + fall,
        last=onset + rise + fall + layout.margin,
        # the strongest part moves 1 to 3 pixels of a 160-pixel frame, the same share of the face at any other size
        amplitude=float(rng.uniform(2.0, 3.0)) * image_size / 160,
        jitter=((float(phases[0]), float(periods[0])), (float(phases[1]), float(periods[1]))),
        style=draw_style(rng),
        look=look,
        noise_seed=int(rng.integers(2**31)),
    )


def _backward(clip: SynthClip, frame: int) -> Field:
    if not clip.first <= frame <= clip.last:
        raise ValueError(f"frame must be in {clip.first}..{clip.last} of {clip.clip}, got {frame}")
    bumps = expression(clip.look, clip.label, clip.style)
    amplitude = clip.amplitude * course(frame, clip.onset, clip.apex, clip.offset)
    sway = [
        _HEAD_JITTER_PX * (np.sin(phase + 2 * np.pi * frame / period) - np.sin(phase + 2 * np.pi * clip.onset / period))
        for phase, period in clip.jitter
    ]
    return backward_field(bumps, clip.image_size, amplitude, (float(sway[0]), float(sway[1])))


@lru_cache(maxsize=4)
def _base(look: Look, image_size: int) -> NDArray[np.uint8]:
    # a subject's clips follow each other, so a few pictures are enough
    base = draw_face(look, image_size)
    base.setflags(write=False)
    return base


def _check(datasets: Sequence[str], subjects: int, clips: int, seed: int, image_size: int) -> tuple[str, ...]:
    for name in datasets:
        if name not in LAYOUTS:
            raise InputError(f"synth: dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if not datasets or len(set(datasets)) != len(datasets):
        raise InputError(f"synth: datasets must be one or more different names, got {list(datasets)}")
    limits = (
        ("subjects", subjects, 1, _MAX_SUBJECTS),
        ("clips", clips, 2, _MAX_CLIPS),
        ("seed", seed, 0, 2**31 - 1),
        ("image_size", image_size, 64, 1024),
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise InputError(f"synth: {name} must be in {low}..{high}, got {value}")
    return tuple(name for name in DATASETS if name in datasets)


def _is_there(out: Path, parameters: dict[str, object]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "synth.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{out}: exists and was not made by htnet synth (no readable synth.json); name another folder"
        raise InputError(message) from error
    if found != parameters:
        raise InputError(f"{out}: holds synthetic data of other parameters ({found}, asked for {parameters})")
    return True


def _write(out: Path, planned: dict[str, tuple[SynthClip, ...]], parameters: dict[str, object]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)  # a killed process of this number may have left one
    partial.mkdir()
    try:
        for name, plan in planned.items():
            LAYOUTS[name].write(partial / name, [_files(clip) for clip in plan])
        text = json.dumps(parameters, indent=2) + "\n"
        (partial / "synth.json").write_text(text, encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(clip: SynthClip) -> ClipFiles:
    fields = ("subject", "clip", "label", "emotion", "first", "onset", "apex", "offset", "last", "landmarks")
    return ClipFiles(render=lambda frame: render_frame(clip, frame), **{name: getattr(clip, name) for name in fields})
