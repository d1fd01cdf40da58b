"""Face detectors, by the name that ``prepare.detector`` takes.

Another one is a callable (:class:`Detector`) and a line in :data:`DETECTORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from htnet.config.prepare import DetectorName
from htnet.data.faces.detector import Detector
from htnet.data.faces.mtcnn import load_mtcnn
from htnet.data.faces.yunet import load_yunet

DETECTORS: dict[DetectorName, Callable[[Path | None], Detector]] = {"mtcnn": load_mtcnn, "yunet": load_yunet}
"""Loads a detector; the path is that of ``prepare.detector_model``."""


@cache
def build_detector(name: DetectorName, model: Path | None = None) -> Detector:
    """Return the detector of a name; loaded once in a process, however many subjects it works on.

    Raises:
        InputError: its package or model file is missing, or is no such thing.
    """
    return DETECTORS[name](model)
