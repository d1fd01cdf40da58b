"""CASME II (Yan et al., PLoS ONE 2014): 200 frames a second, colour, apex annotated.

``CASME2_RAW_selected/sub01/EP02_01f/img46.jpg`` and ``CASME2-coding-20140508.xlsx``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from htnet.data.adapters.clips import (
    LANDMARKS_FILE,
    SPOTTING,
    Clip,
    DuplicateGuard,
    FlowOptions,
    check_subject_folder,
    describe,
    prepare_clips,
    three_classes,
)
from htnet.data.adapters.frames import inside
from htnet.data.adapters.workbook import Row, find_workbook, read_rows
from htnet.data.landmarks import read_landmarks
from htnet.data.prepared import PreparedSample
from htnet.data.types import Emotion, SampleId
from htnet.errors import InputError

WORKBOOKS = ("CASME2-coding-20140508.xlsx", "CASME2-coding-20190701.xlsx")
COLUMNS = ("Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Estimated Emotion")
FRAMES = "CASME2_RAW_selected"
FPS = 200.0
# the MEGC2019 list leaves sadness and fear out for this dataset, against its general rule
EMOTIONS: dict[str, Emotion | None] = {
    "happiness": Emotion.POSITIVE,
    "disgust": Emotion.NEGATIVE,
    "repression": Emotion.NEGATIVE,
    "surprise": Emotion.SURPRISE,
    "sadness": None,
    "fear": None,
    "others": None,
}


@dataclass(frozen=True, kw_only=True)
class Casme2:
    """Adapter of a CASME II folder; ``landmarks`` None: ``landmarks.csv`` in ``root``.

    ``skipped`` holds (clip, reason) of every annotated clip that the latest :meth:`samples` left out.
    """

    root: Path
    landmarks: Path | None = None
    flow: FlowOptions
    skipped: list[tuple[str, str]] = field(default_factory=list, init=False, compare=False, repr=False)

    @property
    def _landmarks(self) -> Path:
        return self.landmarks or self.root / LANDMARKS_FILE

    def describe(self) -> dict[str, object]:
        """How the samples are made, for ``store.json``."""
        apex = f"annotated; where it is not: {SPOTTING}"
        return describe("casme2", find_workbook(self.root, WORKBOOKS), self._landmarks, self.flow, apex)

    def samples(self) -> Iterator[PreparedSample]:
        """Yield the samples in the workbook's order; :class:`InputError` on bad input."""
        rows = read_rows(find_workbook(self.root, WORKBOOKS), COLUMNS)
        table = read_landmarks(self._landmarks)
        yield from prepare_clips(self.root, self._clips(rows), table, self.flow)

    def _clips(self, rows: tuple[Row, ...]) -> Iterator[Clip]:
        self.skipped.clear()
        guard = DuplicateGuard()
        if not (self.root / FRAMES).is_dir():
            raise InputError(f"{self.root / FRAMES}: no such folder of frames")
        for row in rows:
            sample = SampleId(dataset="casme2", subject=_subject(row), clip=row.text("Filename"))
            guard.add(sample, row.place("Filename"))
            emotion = row.text("Estimated Emotion")
            label = three_classes(emotion, EMOTIONS, row.place("Estimated Emotion"))
            if label is None:
                self.skipped.append((str(sample), f"emotion {emotion} is in none of the three classes"))
                continue
            clip = self._clip(row, sample, label, emotion)
            if clip is not None:
                yield clip

    def _clip(self, row: Row, sample: SampleId, label: Emotion, emotion: str) -> Clip | None:
        folder = inside(self.root / FRAMES, sample.subject, sample.clip)
        check_subject_folder(folder.parent, sample.subject)
        onset, offset = row.integer("OnsetFrame"), row.integer("OffsetFrame")
        # about 21 rows of the real workbook hold "/" for an apex that was not coded
        apex = None if row.text("ApexFrame") == "/" else row.integer("ApexFrame")
        if not onset < offset or not onset < (offset if apex is None else apex) <= offset:
            reason = f"frames must rise onset < apex <= offset, got {onset}, {apex}, {offset}"
            self.skipped.append((str(sample), reason))
            return None
        return Clip(
            id=sample, folder=folder, label=label, emotion=emotion, fps=FPS, onset=onset, apex=apex, offset=offset
        )


def _subject(row: Row) -> str:
    text = row.text("Subject")
    match = re.fullmatch(r"(?:sub)?0*(\d{1,2})", text, re.IGNORECASE)
    if match is None:
        raise InputError(f"{row.place('Subject')}: must be a number such as 1 or sub01, got {text!r}")
    return f"sub{int(match[1]):02d}"
