"""Faces drawn by code: per-subject looks, the picture of a resting face and its landmarks.

A face is drawn at several times the source resolution, so that a frame warped by a fraction of a
pixel is as sharp as one that is not: were the resting frame sharper than the moved one, a network
could tell the classes by blur alone. All lengths of a look are shares of the picture's side.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.samples import Landmarks

OVERSAMPLING = 2
"""Side of the base picture over the side of a frame."""
_DRAWING = 4
"""Side of the drawing over the side of a frame; reduced to the base picture, which smooths the edges."""

# light to dark, in OpenCV's order blue, green, red
_SKIN = np.array([(186, 205, 236), (160, 186, 226), (128, 160, 208), (92, 124, 178), (62, 86, 132)], np.float64)
_HAIR = ((28, 26, 30), (30, 44, 70), (60, 100, 150), (90, 92, 96), (22, 30, 48))
_IRIS = ((40, 60, 90), (70, 90, 60), (120, 100, 70), (30, 40, 60))

Point = tuple[float, float]
_Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Look:
    """Features that tell one synthetic subject from another; lengths are shares of the picture's side."""

    face_width: float
    face_height: float
    centre_x: float
    centre_y: float
    eye_distance: float
    eye_width: float
    eye_openness: float
    brow_height: float
    brow_thickness: float
    brow_slope: float
    nose_length: float
    mouth_drop: float
    mouth_width: float
    lip_thickness: float
    skin: tuple[float, float, float]
    hair: tuple[int, int, int]
    iris: tuple[int, int, int]
    hairline: float
    texture_seed: int

    @property
    def eye_y(self) -> float:
        """Height of the eyes' centres."""
        return self.centre_y - 0.105

    @property
    def eyes_x(self) -> tuple[float, float]:
        """Horizontal place of the two eyes' centres."""
        return self.centre_x - self.eye_distance / 2, self.centre_x + self.eye_distance / 2

    @property
    def brow_y(self) -> float:
        """Height of the brows' middle."""
        return self.eye_y - self.brow_height

    @property
    def mouth_y(self) -> float:
        """Height of the line between the lips."""
        return self.eye_y + self.mouth_drop


def draw_look(rng: np.random.Generator) -> Look:
    """Choose a look at random; every field takes part, so that subjects differ in shape and in texture."""
    tone = rng.uniform(0, len(_SKIN) - 1)
    low = min(int(tone), len(_SKIN) - 2)
    skin = _SKIN[low] + (tone - low) * (_SKIN[low + 1] - _SKIN[low]) + rng.uniform(-6, 6, 3)
    return Look(
        face_width=rng.uniform(0.275, 0.325),
        face_height=rng.uniform(0.37, 0.415),
        centre_x=0.5 + rng.uniform(-0.02, 0.02),
        centre_y=0.535 + rng.uniform(-0.015, 0.015),
        eye_distance=rng.uniform(0.245, 0.285),
        eye_width=rng.uniform(0.052, 0.064),
        eye_openness=rng.uniform(0.40, 0.56),
        brow_height=rng.uniform(0.062, 0.078),
        brow_thickness=rng.uniform(0.011, 0.022),
        brow_slope=rng.uniform(-0.006, 0.012),
        nose_length=rng.uniform(0.165, 0.195),
        mouth_drop=rng.uniform(0.275, 0.305),
        mouth_width=rng.uniform(0.085, 0.108),
        lip_thickness=rng.uniform(0.018, 0.030),
        skin=(float(skin[0]), float(skin[1]), float(skin[2])),
        hair=_HAIR[int(rng.integers(2 if tone > 2.5 else len(_HAIR)))],  # light hair vanishes on dark skin
        iris=_IRIS[int(rng.integers(len(_IRIS)))],
        hairline=rng.uniform(0.50, 0.66),
        texture_seed=int(rng.integers(2**31)),
    )


def look_landmarks(look: Look, image_size: int) -> Landmarks:
    """Return the resting face's landmarks in source pixels, ordered as :data:`htnet.data.samples.LANDMARK_NAMES`."""
    left, right = look.eyes_x
    points = (
        (left, look.eye_y),
        (right, look.eye_y),
        (look.centre_x, look.eye_y + look.nose_length),
        (look.centre_x - look.mouth_width, look.mouth_y),
        (look.centre_x + look.mouth_width, look.mouth_y),
    )
    return tuple((x * image_size - 0.5, y * image_size - 0.5) for x, y in points)


def draw_face(look: Look, image_size: int) -> _Picture:
    """Draw the resting face.

    Args:
        look: the subject.
        image_size: side of a frame in pixels.

    Returns:
        (2 S, 2 S, 3) uint8, blue-green-red: the base picture at :data:`OVERSAMPLING` times the frame's side S.
    """
    pen = _Pen(image_size * _DRAWING)
    rng = np.random.default_rng(look.texture_seed)
    _draw_background(pen, look, rng)
    _draw_head(pen, look)
    for side in (-1, 1):
        _draw_eye(pen, look, side)
        _draw_brow(pen, look, side, rng)
    _draw_nose(pen, look)
    _draw_mouth(pen, look)
    _draw_fringe(pen, look)
    side_px = image_size * OVERSAMPLING
    small = cv2.resize(pen.canvas, (side_px, side_px), interpolation=cv2.INTER_AREA).astype(np.float32)
    textured = small * (1.0 + _texture(rng, side_px)[..., None])
    # frames are sampled from this picture at half its rate: what is finer than a frame's pixel would alias
    smooth = cv2.GaussianBlur(textured, (0, 0), 0.9)
    face: _Picture = np.clip(np.rint(smooth), 0, 255).astype(np.uint8)
    return face


class _Pen:
    """Draws in shares of the side on a square canvas."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.canvas: _Picture = np.zeros((side, side, 3), np.uint8)

    def _xy(self, points: NDArray[np.float64]) -> NDArray[np.int32]:
        return np.rint(points * self.side * 16).astype(np.int32)  # 4 fractional bits, cv2's `shift`

    def polygon(self, points: NDArray[np.float64], colour: tuple[float, ...]) -> None:
        """Fill a polygon of (N, 2) points."""
        cv2.fillPoly(self.canvas, [self._xy(points)], colour, cv2.LINE_AA, 4)

    def line(self, points: NDArray[np.float64], colour: tuple[float, ...], thickness: float) -> None:
        """Draw a polyline through (N, 2) points."""
        width = max(1, round(thickness * self.side))
        cv2.polylines(self.canvas, [self._xy(points)], False, colour, width, cv2.LINE_AA, 4)

    def ellipse(self, centre: Point, axes: Point, colour: tuple[float, ...]) -> None:
        """Fill an ellipse of half axes ``axes``."""
        angle = np.linspace(0, 2 * np.pi, 73)
        self.polygon(np.stack([centre[0] + axes[0] * np.cos(angle), centre[1] + axes[1] * np.sin(angle)], 1), colour)

    def shade(self, centre: Point, axes: Point, strength: float) -> None:
        """Lighten (positive) or darken (negative) a soft spot by a share of the brightness."""
        grid = (np.arange(self.side, dtype=np.float32) + 0.5) / self.side
        x = np.exp(-0.5 * ((grid - centre[0]) / axes[0]) ** 2)
        y = np.exp(-0.5 * ((grid - centre[1]) / axes[1]) ** 2)
        factor = 1.0 + strength * (y[:, None] * x[None, :])
        self.canvas = np.clip(self.canvas * factor[..., None], 0, 255).astype(np.uint8)


def _times(colour: tuple[float, ...], factor: float) -> tuple[float, ...]:
    return tuple(min(255.0, channel * factor) for channel in colour)


def _draw_background(pen: _Pen, look: Look, rng: np.random.Generator) -> None:
    ramp = np.linspace(150, 105, pen.side)[:, None, None] * rng.uniform(0.9, 1.1, 3)
    pen.canvas[:] = np.clip(np.broadcast_to(ramp, pen.canvas.shape), 0, 255)
    shirt = tuple(float(value) for value in rng.uniform(40, 150, 3))
    cx, cy, w, h = look.centre_x, look.centre_y, look.face_width, look.face_height
    pen.ellipse((cx, cy - 0.07), (w * 1.17, h * 1.08), look.hair)
    pen.ellipse((cx, 1.14), (0.47, 0.24), shirt)
    neck = np.array([(cx - 0.13, cy + 0.2), (cx + 0.13, cy + 0.2), (cx + 0.15, 1.0), (cx - 0.15, 1.0)])
    pen.polygon(neck, _times(look.skin, 0.78))


def _draw_head(pen: _Pen, look: Look) -> None:
    cx, cy, w, h = look.centre_x, look.centre_y, look.face_width, look.face_height
    for side in (-1, 1):
        pen.ellipse((cx + side * w * 1.0, look.eye_y + 0.06), (0.03, 0.065), _times(look.skin, 0.85))
    angle = np.linspace(0, 2 * np.pi, 121)
    # a jaw narrower than the brow: the lower half of the ellipse is drawn in
    narrowing = 1.0 - 0.16 * np.clip(np.sin(angle), 0, 1) ** 2
    outline = np.stack([cx + w * np.cos(angle) * narrowing, cy + h * np.sin(angle)], 1)
    pen.polygon(outline, look.skin)
    pen.shade((cx, cy - 0.2), (w * 0.7, 0.1), 0.07)
    left, right = look.eyes_x
    for x in (left, right):
        pen.shade((x, look.eye_y), (0.06, 0.04), -0.16)
        pen.shade((x, look.eye_y + 0.14), (0.055, 0.05), 0.06)
    for side in (-1, 1):
        pen.shade((cx + side * w, cy + 0.05), (0.075, 0.3), -0.22)
    pen.shade((cx, look.mouth_y + 0.055), (0.06, 0.02), -0.14)
    pen.shade((cx, cy + h), (0.2, 0.035), -0.2)


def _draw_eye(pen: _Pen, look: Look, side: int) -> None:
    x, y, half = look.eyes_x[0 if side < 0 else 1], look.eye_y, look.eye_width
    tall = half * look.eye_openness
    t = np.linspace(-1, 1, 25)
    lid = np.stack([x + half * t, y - tall * (1 - t**2)], 1)
    bottom = np.stack([x + half * t[::-1], y + 0.72 * tall * (1 - t[::-1] ** 2)], 1)
    almond = np.concatenate([lid, bottom])
    before = pen.canvas.copy()
    pen.polygon(almond, (225, 228, 232))
    radius = tall * 1.02
    pen.ellipse((x, y - 0.002), (radius, radius), look.iris)
    pen.ellipse((x, y - 0.002), (radius * 0.5, radius * 0.5), (12, 12, 14))
    pen.ellipse((x - 0.3 * radius, y - 0.35 * radius), (radius * 0.2, radius * 0.2), (250, 250, 250))
    # the iris is under the lids: keep what was drawn inside the almond only
    mask = np.zeros(pen.canvas.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.rint(almond * pen.side).astype(np.int32)], 255)
    pen.canvas = np.where(mask[..., None] > 0, pen.canvas, before)
    pen.line(lid, _times(look.skin, 0.25), 0.0085)
    pen.line(bottom, _times(look.skin, 0.62), 0.004)
    fold = np.stack([x + half * t, y - 0.017 - tall * (1 - t**2)], 1)
    pen.line(fold, _times(look.skin, 0.70), 0.004)


def _draw_brow(pen: _Pen, look: Look, side: int, rng: np.random.Generator) -> None:
    x = look.eyes_x[0 if side < 0 else 1]
    t = np.linspace(-1, 1, 40)
    # t = -1 is the inner end, at the nose; the arch is highest in the outer third
    along = x + side * (0.006 + 0.072 * t)
    arch = look.brow_y - look.brow_slope * t + 0.011 * (t - 0.25) ** 2 - 0.004
    colour = _times(look.hair, 0.8)
    half = look.brow_thickness * np.clip(1.12 - 0.55 * (t + 1) / 2, 0.2, 1.2) * np.sqrt(np.clip(1.03 - t**6, 0, 1))
    pen.polygon(
        np.concatenate([np.stack([along, arch - half], 1), np.stack([along, arch + half], 1)[::-1]]),
        tuple(0.72 * hair + 0.28 * skin for hair, skin in zip(colour, look.skin, strict=True)),
    )
    for index in rng.integers(0, len(t), 46):
        root = np.array([along[index], arch[index] + rng.uniform(-0.9, 0.9) * half[index]])
        tip = root + np.array([side * rng.uniform(0.006, 0.014), -rng.uniform(0.002, 0.009)])
        pen.line(np.stack([root, tip]), _times(look.hair, float(rng.uniform(0.5, 1.3))), 0.0028)


def _draw_nose(pen: _Pen, look: Look) -> None:
    cx, tip = look.centre_x, look.eye_y + look.nose_length
    pen.shade((cx, (look.eye_y + tip) / 2), (0.016, look.nose_length / 2.6), 0.14)
    for side in (-1, 1):
        pen.shade((cx + side * 0.036, look.eye_y + 0.6 * look.nose_length), (0.014, 0.06), -0.13)
        wing = np.array([(0.050, -0.022), (0.058, -0.004), (0.052, 0.014), (0.036, 0.018)])
        pen.line(np.array([cx, tip]) + wing * np.array([side, 1]), _times(look.skin, 0.66), 0.006)
        pen.ellipse((cx + side * 0.023, tip + 0.017), (0.013, 0.0075), _times(look.skin, 0.36))
    pen.shade((cx, tip - 0.006), (0.018, 0.015), 0.13)
    pen.shade((cx, tip + 0.032), (0.045, 0.011), -0.16)


def _draw_mouth(pen: _Pen, look: Look) -> None:
    cx, y, half, lip = look.centre_x, look.mouth_y, look.mouth_width, look.lip_thickness
    t = np.linspace(-1, 1, 41)
    x = cx + half * t
    between = y + 0.006 * np.cos(3 * np.pi * t) * (1 - t**2)
    bow = (
        lip * (1 - t**2) * (0.86 - 0.26 * np.exp(-((t / 0.14) ** 2)) + 0.2 * np.exp(-(((np.abs(t) - 0.25) / 0.2) ** 2)))
    )
    under = 1.25 * lip * (1 - t**2) ** 0.8
    # lips are redder and darker than the skin: less blue and green, as much red
    red = (look.skin[0] * 0.62, look.skin[1] * 0.58, look.skin[2] * 0.86)
    pen.polygon(np.concatenate([np.stack([x, between - bow], 1), np.stack([x, between], 1)[::-1]]), _times(red, 0.9))
    pen.polygon(np.concatenate([np.stack([x, between], 1), np.stack([x, between + under], 1)[::-1]]), red)
    pen.shade((cx, y + 0.6 * lip), (0.035, 0.008), 0.13)
    pen.line(np.stack([x, between], 1), _times(look.skin, 0.28), 0.0065)
    for side in (-1, 1):
        pen.shade((cx + side * half, y), (0.013, 0.011), -0.32)
        crease = np.array([(0.058, -0.085), (0.082, -0.06), (half + 0.016, -0.028), (half + 0.022, -0.008)])
        pen.line(np.array([cx, y]) + crease * np.array([side, 1]), _times(look.skin, 0.84), 0.005)


def _draw_fringe(pen: _Pen, look: Look) -> None:
    cx, cy, w, h = look.centre_x, look.centre_y, look.face_width, look.face_height
    t = np.linspace(-1, 1, 41)
    top = np.stack([cx + w * 1.12 * t, cy - 0.07 - h * 1.08 * np.sqrt(np.clip(1 - (t * 0.96) ** 2, 0, 1))], 1)
    hairline = np.stack([cx + w * 1.12 * t, cy - h * (look.hairline + 0.22 * (1 - t**2) - 0.25 * t**8)], 1)
    pen.polygon(np.concatenate([top, hairline[::-1]]), look.hair)


def _texture(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """Draw (S, S) float32 of mean 0: skin at three grains, so that the flow has something to hold on to."""
    total = np.zeros((side, side), np.float32)
    for sigma, strength in ((1.6, 0.036), (3.5, 0.026), (8.0, 0.012)):
        noise = cv2.GaussianBlur(rng.standard_normal((side, side), dtype=np.float32), (0, 0), sigma)
        total += strength * noise / float(noise.std())
    return total
