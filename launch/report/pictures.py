"""Pictures of predicted clips: both frames, the flow between them as colours, the regions, the probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from htnet.config.data import CropRule
from htnet.data.regions import region_starts
from htnet.data.store.frames import PARTS, frame_member
from htnet.data.store.writer import PreparedSample

__all__ = ["PANELS", "REGION_COLOURS", "draw_prediction", "draw_wheel", "flow_colours"]

REGION_COLOURS: Final = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd")
"""Colours of the mosaic's regions, row by row."""
_SIDE, _GAP = 208, 6
PANELS: Final = (3 * _SIDE + 2 * _GAP, _SIDE)
"""Width and height in pixels of the part above: onset, apex, flow."""
_LINE, _MARGIN = 22, 12
_BAR: Final = 150
_INK, _SOFT, _ACCENT, _RULE = "#1b1f24", "#59636e", "#004c7f", "#d5dae0"

Picture = NDArray[np.float32]


def flow_colours(flow: Picture, largest: float) -> Picture:
    """Colour (H, W, 2) flow as (H, W, 3) RGB in 0..1: hue by direction, white at rest, full colour from ``largest``."""
    hue = np.degrees(np.arctan2(-flow[..., 1], flow[..., 0])) % 360.0  # y points down
    colour = np.clip(np.hypot(flow[..., 0], flow[..., 1]) / max(largest, 1e-12), 0.0, 1.0)
    return np.asarray(
        cv2.cvtColor(np.stack([hue, colour, np.ones_like(hue)], axis=-1).astype(np.float32), cv2.COLOR_HSV2RGB)
    )


def draw_wheel(side: int) -> Image.Image:
    """Draw the colours of directions, (side, side) RGBA."""
    grid = np.linspace(-1.0, 1.0, side, dtype=np.float32)
    flow = np.stack(np.meshgrid(grid, grid), axis=-1)
    inside = np.hypot(flow[..., 0], flow[..., 1]) <= 1.0
    pixels = np.concatenate([flow_colours(flow, 0.95), inside[..., None].astype(np.float32)], axis=-1)
    return Image.fromarray((255 * pixels).astype(np.uint8), "RGBA")


def draw_prediction(
    sample: PreparedSample,
    probabilities: Mapping[str, float],
    regions: Mapping[str, float],
    *,
    crop: CropRule,
) -> Image.Image:
    """Draw a clip and its answer; above :data:`PANELS`, below them probabilities and contributions.

    Args:
        sample: with the crops of onset and apex (``prepare.keep_frames``).
        probabilities: by class.
        regions: contributions by region, in the order of the mosaic.
        crop: the rule by which the regions are cut.
    """
    lines = max(len(probabilities), len(regions)) + 1
    picture = Image.new("RGB", (PANELS[0], PANELS[1] + 2 * _MARGIN + lines * _LINE), "white")
    frames = dict(sample.frames)
    facts = sample.sample
    for place, (name, number) in enumerate(zip(PARTS, (facts.onset, facts.apex), strict=True)):
        corner = place * (_SIDE + _GAP)
        picture.paste(_frame(frames[frame_member(name)]), (corner, 0))
        _caption(picture, corner, f"{name}, frame {number}")
    _paste_flow(picture, 2 * (_SIDE + _GAP), sample, crop)
    _list_probabilities(picture, probabilities)
    _list_regions(picture, regions)
    picture.paste(wheel := draw_wheel(64), (PANELS[0] - 64 - _MARGIN, PANELS[1] + 2 * _MARGIN), wheel)
    return picture


def _frame(encoded: bytes) -> Image.Image:
    pixels = np.asarray(cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB))
    shrinks = min(pixels.shape[:2]) > _SIDE
    scaled = cv2.resize(pixels, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return Image.fromarray(np.asarray(scaled, np.uint8))


def _paste_flow(picture: Image.Image, left: int, sample: PreparedSample, crop: CropRule) -> None:
    """Show the flow, and the regions over flow and apex."""
    flow = sample.flow_image[..., :2].astype(np.float32)
    largest = float(np.percentile(np.linalg.norm(flow, axis=-1), 99))
    coloured = (255 * flow_colours(flow, largest)).astype(np.uint8)
    picture.paste(Image.fromarray(coloured).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, 0))
    _caption(picture, left, f"flow, up to {largest:.2g} px")
    size = sample.sample.flow_size
    scale, side = _SIDE / size, size // 4 * 2
    pen = ImageDraw.Draw(picture)
    for (row, column), colour in zip(region_starts(sample.sample.landmarks, size, crop), REGION_COLOURS, strict=True):
        box = [round(float(edge) * scale) for edge in (column, row, column + side, row + side)]
        for shift in (left - _SIDE - _GAP, left):
            corners = (shift + box[0], box[1], shift + box[2] - 1, box[3] - 1)
            pen.rectangle(corners, outline=colour, width=2)


def _caption(picture: Image.Image, left: int, text: str) -> None:
    pen = ImageDraw.Draw(picture)
    width = round(pen.textlength(text, font=_font(13)))
    pen.rectangle((left, _SIDE - 19, left + width + 9, _SIDE), fill="#ffffff")
    pen.text((left + 4, _SIDE - 18), text, fill=_INK, font=_font(13))


def _list_probabilities(picture: Image.Image, probabilities: Mapping[str, float]) -> None:
    pen, best = ImageDraw.Draw(picture), max(probabilities.values())
    rows = [(name, value, f"{value:.2f}") for name, value in probabilities.items()]
    colours = [_ACCENT if value == best else "#9aa5b1" for _, value, _ in rows]
    _list(pen, _MARGIN, "probability", rows, colours, largest=1.0)


def _list_regions(picture: Image.Image, regions: Mapping[str, float]) -> None:
    pen = ImageDraw.Draw(picture)
    rows = [(name.replace("_", " "), value, f"{value:+.2f}") for name, value in regions.items()]
    largest = max(*(abs(value) for _, value, _ in rows), 1e-9)
    _list(pen, PANELS[0] // 2, "contribution (logit)", rows, REGION_COLOURS, largest=largest)


def _list(
    pen: ImageDraw.ImageDraw,
    left: int,
    title: str,
    rows: Sequence[tuple[str, float, str]],
    colours: Sequence[str],
    *,
    largest: float,
) -> None:
    """List names, bars and figures below the panels; a negative value has a hollow bar."""
    top = PANELS[1] + _MARGIN
    pen.text((left, top), title, fill=_SOFT, font=_font(13))
    names = max(round(pen.textlength(name, font=_font(14))) for name, _, _ in rows) + 8
    width = min(_BAR, PANELS[0] // 2 - names - 150) if left > _MARGIN else min(_BAR, PANELS[0] // 2 - names - 80)
    for place, ((name, value, figure), colour) in enumerate(zip(rows, colours, strict=True), start=1):
        y = top + place * _LINE
        pen.text((left, y), name, fill=_INK, font=_font(14))
        start = left + names
        pen.rectangle((start, y + 4, start + width, y + 14), fill=None, outline=_RULE)
        end = start + max(1, round(width * abs(value) / largest))
        pen.rectangle((start, y + 4, end, y + 14), fill=colour if value >= 0 else None, outline=colour)
        pen.text((start + width + 6, y), figure, fill=_INK, font=_font(14))


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
