"""YuNet through OpenCV, with a model file that the user names (the OpenCV model zoo has it)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.faces.detector import CHOICE, Detector, Face, Sighting, choose_face
from htnet.errors import InputError
from htnet.files import checksum

SCORE, OVERLAP, CANDIDATES = 0.7, 0.3, 5000
SIDES = (640, 320)
"""Longer side in pixels to which a larger picture is reduced. YuNet is trained on faces of 10 to 300 pixels; a face
that fills the picture is found at the second try."""


class YuNet:
    """``cv2.FaceDetectorYN``; finds a face and its landmarks in one pass."""

    def __init__(self, model: Path) -> None:
        """Load the model; :class:`InputError` where the file is missing or no YuNet model."""
        if not model.is_file():
            raise InputError(f"prepare.detector_model: {model}: no such file; YuNet needs its model file (.onnx)")
        try:
            self._net: Any = cv2.FaceDetectorYN.create(str(model), "", (SIDES[0],) * 2, SCORE, OVERLAP, CANDIDATES)
            self._faces(np.zeros((64, 64, 3), np.uint8))
        except cv2.error as error:
            raise InputError(f"prepare.detector_model: {model}: not a YuNet model: {error.err}") from None
        self._sha256 = checksum(model)

    def describe(self) -> dict[str, object]:
        """Return what decides its answers."""
        settings = {"score": SCORE, "overlap": OVERLAP, "sides": list(SIDES)}
        return {"name": "yunet", "weights_sha256": self._sha256, "choice": CHOICE, **settings}

    def __call__(self, picture: NDArray[np.uint8]) -> Sighting | None:
        """Return a face, None where there is none."""
        whole = picture.shape[1::-1]
        for scale in dict.fromkeys(min(1.0, side / max(whole)) for side in SIDES):
            size = [max(1, round(length * scale)) for length in whole]
            small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
            found = choose_face(self._faces(np.asarray(small, np.uint8)), small.shape)
            if found is not None:
                by = [length / reduced for length, reduced in zip(whole, size, strict=True)]
                # a coordinate is that of a pixel's centre
                points = tuple(((x + 0.5) * by[0] - 0.5, (y + 0.5) * by[1] - 0.5) for x, y in found.points)
                return replace(found, points=points)
        return None

    def _faces(self, picture: NDArray[np.uint8]) -> list[Face]:
        """Return every face, in pixels of the picture."""
        self._net.setInputSize((picture.shape[1], picture.shape[0]))
        rows = self._net.detect(picture)[1]
        found = [] if rows is None else [[float(value) for value in row] for row in rows]
        # box, then the eye on the picture's left, the other, nose, mouth corners, score
        return [Face(box=tuple(row[:4]), points=tuple(zip(row[4:14:2], row[5:14:2], strict=True))) for row in found]  # type: ignore[arg-type] # four values


def load_yunet(model: Path | None) -> Detector:
    """Return the detector of a model file."""
    if model is None:
        raise InputError("prepare.detector=yunet: prepare.detector_model must name the model file (.onnx)")
    return YuNet(model)
