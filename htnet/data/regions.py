"""Facial regions: where they are cut from a flow image and how four of them make the mosaic.

Two rules, chosen by ``data.crop`` (ADR 1):

``upstream``
    The public code's: a landmark's x picks rows and its y picks columns. Reproduces its inputs bit for bit.
``anatomical``
    x picks columns and y rows, so that the eye regions are at the eyes.

Both clamp the landmark such that the region lies inside the picture. A region's side is half the
flow image's, as in the paper (14 of 28 pixels).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from htnet.config.data import CropRule
from htnet.data.samples import LANDMARK_NAMES, Landmarks

MOSAIC_REGIONS = tuple(LANDMARK_NAMES.index(name) for name in ("left_eye", "right_eye", "left_lip", "right_lip"))
"""Landmark indices of the mosaic's regions, row by row: eyes above, lips below; the nose is left out."""


def region_starts(
    landmarks: Landmarks | NDArray[np.float64],
    flow_size: int | NDArray[np.int64],
    rule: CropRule,
    half: int | NDArray[np.int64] | None = None,
) -> NDArray[np.int32]:
    """First row and column of the four mosaic regions, (4, 2) int32; of many samples at once (B, 4, 2).

    Landmarks, (5, 2) or (B, 5, 2), are in pixels of a square flow image of side ``flow_size`` (one for all or (B,));
    they are clamped such that a region of side ``2 * half`` (None: half of the image's) lies inside, and truncated to
    whole pixels, as upstream does at 28 px.
    """
    size = np.asarray(flow_size)[..., None, None]
    margin = size // 4 if half is None else np.asarray(half)[..., None, None]
    points = np.asarray(landmarks, dtype=np.float64)[..., list(MOSAIC_REGIONS), :]
    centres = np.clip(points, margin, size - margin).astype(np.int32)
    rows_columns = centres if rule == "upstream" else centres[..., ::-1]
    return np.ascontiguousarray(rows_columns - margin, dtype=np.int32)


def mosaic(flow_image: NDArray[np.generic], landmarks: Landmarks, rule: CropRule) -> NDArray[np.generic]:
    """Cut the four regions of an (F, F, C) flow image and join them to (2 * (F // 4 * 2), same, C).

    The plain numpy statement of what the input pipeline does.
    """
    size = flow_image.shape[0]
    side = size // 4 * 2
    parts = [
        flow_image[row : row + side, column : column + side] for row, column in region_starts(landmarks, size, rule)
    ]
    return np.concatenate([np.concatenate(parts[:2], axis=1), np.concatenate(parts[2:], axis=1)], axis=0)


def scale_minmax(flow_image: NDArray[np.generic]) -> NDArray[np.float32]:
    """Stretch each channel of an (F, F, C) flow image to 0..255, float32; a constant channel becomes 0.

    The paper's data is scaled so, which makes a flow image free of its amplitude.
    """
    image = flow_image.astype(np.float32)
    low = image.min(axis=(0, 1))
    span = image.max(axis=(0, 1)) - low
    return np.where(span > 0, (image - low) * (255.0 / np.where(span > 0, span, 1.0)), 0.0).astype(np.float32)
