"""Known local motion of a synthetic face: displacement fields per class, their course in time, frames.

A moved frame samples the resting face at ``q - b(q)``: ``b`` is a backward displacement field, a sum of
Gaussian bumps at facial parts plus a shift of the whole head. The true optical flow ``u`` from rest to
the moved frame therefore solves ``u(p) = b(p + u(p))``.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.samples import Emotion
from htnet.data.synth.faces import OVERSAMPLING, Look

Field = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Bump:
    """A Gaussian bump of displacement: lengths in shares of the picture's side, ``push`` in shares of the amplitude."""

    x: float
    y: float
    sigma_x: float
    sigma_y: float
    push_x: float
    push_y: float


@dataclass(frozen=True, kw_only=True)
class Style:
    """Manner of one person's expression in one clip: strengths of left, right, upper and lower face around 1."""

    left: float
    right: float
    upper: float
    lower: float


def draw_style(rng: np.random.Generator, low: float, high: float) -> Style:
    """Choose a style at random, each strength from ``low`` to ``high``."""
    left, right, upper, lower = (float(value) for value in rng.uniform(low, high, 4))
    return Style(left=left, right=right, upper=upper, lower=lower)


def expression(look: Look, label: int, style: Style) -> tuple[Bump, ...]:
    """Return bumps of a class: which parts move, and where to (x to the right, y down).

    Negative: inner brows down and together, lip corners down (action units 4 and 15). Positive: lip corners
    up and outwards, cheeks up (12, 6). Surprise: brows and upper lids up, lower lip down (1, 2, 5, 26).
    """
    bumps: list[Bump] = []
    for side, eye_x, strength in ((-1, look.eyes_x[0], style.left), (1, look.eyes_x[1], style.right)):
        corner_x = look.centre_x + side * look.mouth_width
        upper, lower = strength * style.upper, strength * style.lower
        inner_brow = (eye_x - side * 0.035, look.brow_y)
        if label == Emotion.NEGATIVE:
            bumps.append(_bump(inner_brow, (0.055, 0.036), (-side * 0.55 * upper, 0.9 * upper)))
            bumps.append(_bump((corner_x, look.mouth_y + 0.01), (0.050, 0.045), (side * 0.15 * lower, 0.9 * lower)))
        elif label == Emotion.POSITIVE:
            bumps.append(_bump((corner_x, look.mouth_y), (0.055, 0.050), (side * 0.65 * lower, -0.8 * lower)))
            bumps.append(_bump((eye_x, look.eye_y + 0.115), (0.055, 0.040), (0.0, -0.5 * upper)))
        else:
            bumps.append(_bump((eye_x, look.brow_y - 0.005), (0.070, 0.036), (0.0, -1.0 * upper)))
            bumps.append(_bump((eye_x, look.eye_y - 0.018), (0.045, 0.014), (0.0, -0.25 * upper)))
    if label == Emotion.SURPRISE:
        bumps.append(_bump((look.centre_x, look.mouth_y + 0.035), (0.085, 0.036), (0.0, 0.9 * style.lower)))
    return tuple(bumps)


def _bump(centre: tuple[float, float], sigma: tuple[float, float], push: tuple[float, float]) -> Bump:
    return Bump(x=centre[0], y=centre[1], sigma_x=sigma[0], sigma_y=sigma[1], push_x=push[0], push_y=push[1])


def course(frame: int, onset: int, apex: int, offset: int) -> float:
    """Return the share of the full expression at a frame: 0 up to the onset, 1 at the apex, then 0; cosine ramps."""
    if frame <= onset or frame >= offset:
        return 0.0
    phase = (frame - onset) / (apex - onset) if frame <= apex else (offset - frame) / (offset - apex)
    return float(0.5 - 0.5 * np.cos(np.pi * phase))


def backward_field(bumps: tuple[Bump, ...], image_size: int, amplitude: float, shift: tuple[float, float]) -> Field:
    """Draw the backward displacement of an expression.

    Args:
        bumps: the expression.
        image_size: side S of the frame in pixels.
        amplitude: pixels of a push of 1.
        shift: whole-head shift (x, y) in pixels.

    Returns:
        (S, S, 2) float32 pixels, channels x and y.
    """
    grid = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    field = np.empty((image_size, image_size, 2), np.float32)
    field[..., 0], field[..., 1] = shift
    for bump in bumps:
        column = np.exp(-0.5 * ((grid - bump.x) / bump.sigma_x) ** 2)
        row = np.exp(-0.5 * ((grid - bump.y) / bump.sigma_y) ** 2)
        weight = amplitude * row[:, None] * column[None, :]
        field[..., 0] += bump.push_x * weight
        field[..., 1] += bump.push_y * weight
    return field


def forward_flow(backward: Field) -> Field:
    """Solve ``u(p) = b(p + u(p))`` for the true flow ``u`` of a backward displacement ``b``; both (S, S, 2) float32."""
    height, width = backward.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    flow = backward
    # b's slope stays under one half, so each round at least halves the error: 12 leave less than 0.001 px of 3
    for _ in range(12):
        moved = x + flow[..., 0], y + flow[..., 1]
        flow = cv2.remap(backward, *moved, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(flow, np.float32)


def warp_face(base: NDArray[np.uint8], backward: Field) -> NDArray[np.float32]:
    """Sample a frame from the resting face.

    Args:
        base: (2 S, 2 S, 3) uint8 base picture of :func:`htnet.data.synth.faces.draw_face`.
        backward: (S, S, 2) float32 displacement in frame pixels.

    Returns:
        (S, S, 3) float32, 0..255.
    """
    side = backward.shape[0]
    x, y = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    # centres of pixels coincide: frame pixel q lies at k q + (k - 1) / 2 of a picture k times as large
    half = (OVERSAMPLING - 1) / 2
    map_x = OVERSAMPLING * (x - backward[..., 0]) + half
    map_y = OVERSAMPLING * (y - backward[..., 1]) + half
    frame = cv2.remap(base, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(frame, np.float32)
