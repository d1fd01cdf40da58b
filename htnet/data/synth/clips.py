"""One synthetic clip: what is decided about it, its true flow and its frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from htnet.data.samples import Emotion, Landmarks
from htnet.data.synth.faces import Look, draw_face, draw_look, look_landmarks
from htnet.data.synth.layouts import LAYOUTS
from htnet.data.synth.layouts.base import Damage, Layout, Trap
from htnet.data.synth.layouts.files import DAMAGES
from htnet.data.synth.like import ListedClip, ListedFrames
from htnet.data.synth.motion import (
    Field,
    Style,
    backward_field,
    course,
    draw_style,
    expression,
    forward_flow,
    warp_face,
)

DEFAULTS = {"subjects": 4, "clips": 5}
"""Sizes where neither they nor a list are given."""
_SENSOR_NOISE = 1.2

Difficulty = Literal["easy", "realistic"]


@dataclass(frozen=True, kw_only=True)
class _Motion:
    """Strength of motion. ``amplitude`` and ``sway`` in pixels of a 160-pixel frame, ``strength`` as of Style."""

    amplitude: tuple[float, float]
    sway: float
    strength: tuple[float, float]
    hardly: float
    """Share of the clips in which hardly anything moves."""


_MOTION: dict[str, _Motion] = {
    # the strongest part moves 2 to 3 pixels, and no part of an expression rests
    "easy": _Motion(amplitude=(2.0, 3.0), sway=0.25, strength=(0.8, 1.0), hardly=0.0),
    "realistic": _Motion(amplitude=(0.6, 2.0), sway=0.6, strength=(0.1, 1.0), hardly=0.15),
}


@dataclass(frozen=True, kw_only=True)
class SynthClip:
    """One planned clip: everything its frames are made of.

    ``dataset``, ``subject`` and ``clip`` are the identity that an adapter should give it. ``numbers`` are those of its
    frames' files. ``amplitude``, ``sway`` and ``jitter`` are in pixels of a frame; ``jitter`` is the (phase, period) of
    the head's sway per axis. ``folder``: where its frames lie below the dataset's folder if an annotation decides it.
    ``trap`` and ``damage``: what is wrong with its annotation or files on purpose.
    """

    dataset: str
    subject: str
    clip: str
    label: int
    emotion: str
    image_size: int
    numbers: tuple[int, ...]
    onset: int
    apex: int
    offset: int
    amplitude: float
    sway: float
    jitter: tuple[tuple[float, float], tuple[float, float]]
    style: Style
    look: Look
    noise_seed: int
    folder: Path | None = None
    trap: Trap | None = None
    damage: Damage | None = None

    @property
    def landmarks(self) -> Landmarks:
        """Five landmarks of the onset frame, in its pixels."""
        return look_landmarks(self.look, self.image_size)


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """A clip of which nothing is drawn yet.

    ``name``, subject and clip, and ``frames`` are None where the layout decides.
    """

    label: int
    trap: Trap | None = None
    name: tuple[str, str] | None = None
    frames: ListedFrames | None = None


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A subject's clip ``index`` of a layout's ``subject``, from 0; ``number``-th of its label, from 1."""

    subject: int
    index: int
    label: int
    number: int


def plan_clips(
    dataset: str,
    *,
    subjects: int = DEFAULTS["subjects"],
    clips: int = DEFAULTS["clips"],
    seed: int,
    image_size: int,
    difficulty: Difficulty = "easy",
    traps: bool = False,
    damaged: float = 0.0,
    xls: bool = False,
    like: Sequence[ListedClip] | None = None,
) -> tuple[SynthClip, ...]:
    """Decide every clip of a layout without drawing anything; parameters as in ``synth.generate``.

    Traps are clips of their own: the others are the same with and without them. ``like``: these clips instead of
    ``subjects`` with ``clips`` each, and those that the list is known to leave out.

    Returns:
        The clips in the order of the dataset's annotation file, a subject's traps after its other clips.
    """
    layout = LAYOUTS[dataset]
    wanted = [trap for trap in layout.traps if traps and (xls or not trap.old_workbook)]
    slots = _slots(subjects, clips, wanted) if like is None else _listed_slots(like)
    plan: list[SynthClip] = []
    for subject, found in enumerate(slots):
        key = [seed, list(LAYOUTS).index(dataset), subject]
        look = draw_look(np.random.default_rng(key))
        seen: dict[int, int] = {}
        for index, slot in enumerate(found):
            seen[slot.label] = seen.get(slot.label, 0) + 1
            rng = np.random.default_rng([*key, index])
            place = _Place(subject=subject, index=index, label=slot.label, number=seen[slot.label])
            clip = _scaled(_plan_clip(layout, _MOTION[difficulty], rng, look, place), image_size)
            name = slot.name or (clip.subject, clip.clip)
            where = {} if slot.frames is None else vars(slot.frames)
            plan.append(replace(clip, trap=slot.trap, subject=name[0], clip=name[1], **where))
    return _damage(plan, layout, damaged, [seed, list(LAYOUTS).index(dataset)])


def _slots(subjects: int, clips: int, traps: list[Trap]) -> list[list[_Slot]]:
    """Lay out the subjects' clips: labels rotate and traps go round the subjects."""
    return [
        [
            _Slot(label=(subject + index) % len(Emotion), trap=trap)
            for index, trap in enumerate([*[None] * clips, *traps[subject::subjects]])
        ]
        for subject in range(subjects)
    ]


def _listed_slots(like: Sequence[ListedClip]) -> list[list[_Slot]]:
    """Return the list's clips by subject."""
    subjects: dict[str, list[_Slot]] = {}
    for clip in like:
        slot = _Slot(label=clip.label, name=(clip.subject, clip.clip), frames=clip.frames)
        subjects.setdefault(clip.subject, []).append(slot)
    return list(subjects.values())


def true_flow(clip: SynthClip, frame: int) -> Field:
    """Return the true optical flow from the onset frame to ``frame``.

    Args:
        clip: a clip of :func:`plan_clips`.
        frame: a frame number of the clip, within ``clip.numbers``.

    Returns:
        (S, S, 2) float32 pixels, channels flow_u (x to the right) and flow_v (y down).
    """
    first, last = clip.numbers[0], clip.numbers[-1]
    if not first <= frame <= last:
        raise ValueError(f"frame must be in {first}..{last} of {clip.clip}, got {frame}")
    return forward_flow(_backward(clip, frame))


def render_frame(clip: SynthClip, frame: int) -> NDArray[np.uint8]:
    """Draw one frame of a clip, or of the resting face around it: (S, S, 3) uint8, blue-green-red, sensor noise."""
    warped = warp_face(_base(clip.look, clip.image_size), _backward(clip, frame))
    rng = np.random.default_rng([clip.noise_seed, frame])
    noise = _SENSOR_NOISE * rng.standard_normal(warped.shape[:2], dtype=np.float32)
    return np.clip(np.rint(warped + noise[..., None]), 0, 255).astype(np.uint8)


def _plan_clip(
    layout: Layout,
    motion: _Motion,
    rng: np.random.Generator,
    look: Look,
    place: _Place,
) -> SynthClip:
    """Plan a clip, lengths in pixels of a 160-pixel frame."""
    subject, index, label = place.subject, place.index, place.label
    low, high = layout.length
    rise, fall = (int(rng.integers(low, high + 1)) for _ in range(2))
    first = layout.first_frame(rng, index)
    onset = first + layout.margin
    emotions = layout.words(label)
    periods = rng.uniform(30.0, 60.0, 2)
    phases = rng.uniform(0.0, 2 * np.pi, 2)
    clip = SynthClip(
        dataset=layout.dataset_name(subject),
        subject=layout.subject_name(subject),
        clip=layout.clip_name(subject, index, label, place.number, onset),
        label=label,
        emotion=emotions[int(rng.integers(len(emotions)))],
        image_size=160,
        numbers=tuple(range(first, onset + rise + fall + layout.margin + 1)),
        onset=onset,
        apex=onset + rise,
        offset=onset + rise + fall,
        amplitude=float(rng.uniform(*motion.amplitude)),
        sway=motion.sway,
        jitter=((float(phases[0]), float(periods[0])), (float(phases[1]), float(periods[1]))),
        style=draw_style(rng, *motion.strength),
        look=look,
        noise_seed=int(rng.integers(2**31)),
    )
    return replace(clip, amplitude=0.15 * clip.amplitude) if rng.random() < motion.hardly else clip


def _scaled(clip: SynthClip, image_size: int) -> SynthClip:
    # an expression moves the same share of the face at any size; sway is the camera's, in its pixels
    return replace(clip, image_size=image_size, amplitude=clip.amplitude * image_size / 160)


def _damage(plan: list[SynthClip], layout: Layout, share: float, key: list[int]) -> tuple[SynthClip, ...]:
    """Choose clips without a trap, at least one where any share is asked for."""
    whole = [index for index, clip in enumerate(plan) if clip.trap is None]
    if not share or not layout.damaged:
        return tuple(plan)
    rng = np.random.default_rng([*key, 2**31])
    chosen = rng.choice(whole, size=min(len(whole), int(np.ceil(share * len(whole)))), replace=False)
    for index in chosen:
        which = layout.damaged[int(rng.integers(len(layout.damaged)))]
        how = tuple(DAMAGES)[int(rng.integers(len(DAMAGES)))]
        frame = plan[index].onset if which == "onset" else plan[index].apex
        plan[index] = replace(plan[index], damage=Damage(frame=frame, how=how))
    return tuple(plan)


def _backward(clip: SynthClip, frame: int) -> Field:
    bumps = expression(clip.look, clip.label, clip.style)
    amplitude = clip.amplitude * course(frame, clip.onset, clip.apex, clip.offset)
    sway = [
        clip.sway * (np.sin(phase + 2 * np.pi * frame / period) - np.sin(phase + 2 * np.pi * clip.onset / period))
        for phase, period in clip.jitter
    ]
    return backward_field(bumps, clip.image_size, amplitude, (float(sway[0]), float(sway[1])))


@lru_cache(maxsize=4)
def _base(look: Look, image_size: int) -> NDArray[np.uint8]:
    # a subject's clips follow each other, so a few pictures are enough
    base = draw_face(look, image_size)
    base.setflags(write=False)
    return base
