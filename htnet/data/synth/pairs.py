"""Pairs of synthetic face crops with their true flow: what optical flow is measured against."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.faces.landmarks import face_crop
from htnet.data.synth.clips import plan_clips, render_frame, true_flow
from htnet.data.synth.generate import COMPOSITE
from htnet.data.synth.motion import Field

Pictures = NDArray[np.uint8]


def synth_pairs(count: int, side: int, seed: int = 0) -> tuple[Pictures, Pictures, Field]:
    """Draw onset and apex crops of ``count`` clips with the flow between them.

    Faces are drawn such that the face crop has about ``side`` pixels before it is resized to it, with sensor noise.

    Returns:
        onsets and apexes (count, side, side) uint8 grey, flow (count, side, side, 2) float32 in pixels of the crop.
    """
    pairs = [pair for _, pair in zip(range(count), _pairs(count, side, seed), strict=False)]
    onsets, apexes, flows = (np.stack(part) for part in zip(*pairs, strict=True))
    return onsets, apexes, flows


def _pairs(count: int, side: int, seed: int) -> Iterator[tuple[Pictures, Pictures, Field]]:
    image_size = max(64, round(side * 1.35))
    subjects = -(-count // (6 * len(COMPOSITE)))
    for dataset in COMPOSITE:
        for clip in plan_clips(dataset, subjects=subjects, clips=6, seed=seed, image_size=image_size):
            crop = face_crop(clip.landmarks, (image_size, image_size))
            gray = [
                cv2.cvtColor(crop.cut(render_frame(clip, frame)), cv2.COLOR_BGR2GRAY)
                for frame in (clip.onset, clip.apex)
            ]
            flow = crop.cut(true_flow(clip, clip.apex)) * np.float32(side / crop.side)
            how = cv2.INTER_AREA if crop.side > side else cv2.INTER_CUBIC
            resized = [cv2.resize(picture, (side, side), interpolation=how) for picture in (*gray, flow)]
            yield tuple(np.asarray(picture) for picture in resized)  # type: ignore[misc] # three of them
