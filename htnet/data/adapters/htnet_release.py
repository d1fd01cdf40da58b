"""The composite as the HTNet authors publish it: 28-pixel flow pictures and a label list, no frames.

Layout: ``combined_3_class2_for_optical_flow.csv`` and ``datasets/STSNet_whole_norm_u_v_os/``, where a
picture is ``<sub>_<filename_o> .png`` (the published names end in a space; without it is taken too).
OpenCV reads a picture's channels as (strain, v, u); each is TV-L1 flow scaled to 0..255.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from htnet.data.landmarks import read_landmarks
from htnet.data.prepared import PreparedSample
from htnet.data.types import Emotion, Sample, SampleId
from htnet.errors import InputError

LABELS = "combined_3_class2_for_optical_flow.csv"
PICTURES = Path("datasets") / "STSNet_whole_norm_u_v_os"
LANDMARKS = "landmarks_5pt.csv"
_COLUMNS = ("dataset", "sub", "filename_o", "label")


@dataclass(frozen=True, kw_only=True)
class HTNetRelease:
    """Adapter of the published composite; ``landmarks`` defaults to ``landmarks_5pt.csv`` in ``root``."""

    root: Path
    landmarks: Path | None = None

    @property
    def _landmarks_path(self) -> Path:
        return self.landmarks if self.landmarks is not None else self.root / LANDMARKS

    def describe(self) -> dict[str, object]:
        """How the flow was made, and what identifies the input."""
        return {
            "adapter": "htnet_release",
            "labels_sha256": _digest(self.root / LABELS),
            "landmarks_sha256": _digest(self._landmarks_path),
            "flow": {"method": "TV-L1 by the dataset's authors", "scaling": "min-max per channel to 0..255"},
        }

    def samples(self) -> Iterator[PreparedSample]:
        """Every row of the label list, in its order; InputError names file and row of what cannot be used."""
        table = read_landmarks(self._landmarks_path)
        for number, sample_id, label in _read_labels(self.root / LABELS):
            image = read_flow_picture(self._picture(sample_id, number))
            yield PreparedSample(
                sample=Sample(
                    id=sample_id,
                    label=label,
                    emotion=Emotion(label).name.lower(),
                    landmarks=table.of(sample_id),
                    flow_size=image.shape[0],
                ),
                flow_image=image,
            )

    def _picture(self, sample: SampleId, row: int) -> Path:
        stem = f"{sample.subject}_{sample.clip}"
        if "/" in stem or "\\" in stem:
            raise InputError(f"{self.root / LABELS}, row {row}: {stem!r} is not a file name")
        for name in (f"{stem} .png", f"{stem}.png"):
            path = self.root / PICTURES / name
            if path.is_file():
                return path
        raise InputError(
            f"{self.root / PICTURES / f'{stem} .png'}: missing flow file of {sample} ({LABELS}, row {row})"
        )


def read_flow_picture(path: Path) -> NDArray[np.float16]:
    """A published picture as (F, F, 3) float16, channels (flow_u, flow_v, strain); 0..255 is exact in float16."""
    try:
        picture = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # an empty file
        picture = None
    if picture is None:
        raise InputError(f"{path}: unreadable picture: not a PNG, or truncated")
    if picture.shape[0] != picture.shape[1]:
        raise InputError(f"{path}: a flow picture must be square, got {picture.shape[1]} x {picture.shape[0]} pixels")
    return np.ascontiguousarray(picture[..., ::-1]).astype(np.float16)


def _read_labels(path: Path) -> Iterator[tuple[int, SampleId, int]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such label list; an htnet_release folder holds one") from None
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"{path}, row 1: missing column(s) {', '.join(missing)}")
    seen: dict[SampleId, int] = {}
    for number, row in enumerate(reader, start=2):
        values = {name: (row[name] or "").strip() for name in _COLUMNS}
        sample = SampleId(dataset=values["dataset"], subject=values["sub"], clip=values["filename_o"])
        if not all((sample.dataset, sample.subject, sample.clip)):
            raise InputError(f"{path}, row {number}: dataset, sub and filename_o must not be empty, got {sample}")
        if values["label"] not in {"0", "1", "2"}:
            raise InputError(
                f"{path}, row {number}, column label: must be 0 (negative), 1 (positive) or 2 (surprise), "
                f"got {values['label']!r}"
            )
        if sample in seen:
            raise InputError(f"{path}, row {number}: duplicate clip {sample}: row {seen[sample]} holds it already")
        seen[sample] = number
        yield number, sample, int(values["label"])


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
