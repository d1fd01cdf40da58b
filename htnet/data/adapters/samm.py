"""SAMM (Davison et al., IEEE TAC 2018): 200 frames a second, grey, apex annotated.

``006/006_1_2/006_05562.jpg`` and ``SAMM_Micro_FACS_Codes_v2.xlsx``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from htnet.data.adapters.clips import (
    LANDMARKS_FILE,
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

WORKBOOKS = ("SAMM_Micro_FACS_Codes_v2.xlsx",)
COLUMNS = ("Subject", "Filename", "Onset Frame", "Apex Frame", "Offset Frame", "Estimated Emotion")
FPS = 200.0
EMOTIONS: dict[str, Emotion | None] = {
    "anger": Emotion.NEGATIVE,
    "contempt": Emotion.NEGATIVE,
    "disgust": Emotion.NEGATIVE,
    "fear": Emotion.NEGATIVE,
    "sadness": Emotion.NEGATIVE,
    "happiness": Emotion.POSITIVE,
    "surprise": Emotion.SURPRISE,
    "other": None,
}


@dataclass(frozen=True, kw_only=True)
class Samm:
    """Adapter of a SAMM folder; ``landmarks`` None: ``landmarks.csv`` in ``root``.

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
        return describe("samm", find_workbook(self.root, WORKBOOKS), self._landmarks, self.flow, "annotated")

    def samples(self) -> Iterator[PreparedSample]:
        """Yield the samples in the workbook's order; :class:`InputError` on bad input."""
        rows = read_rows(find_workbook(self.root, WORKBOOKS), COLUMNS)
        table = read_landmarks(self._landmarks)
        yield from prepare_clips(self.root, self._clips(rows), table, self.flow)

    def _clips(self, rows: tuple[Row, ...]) -> Iterator[Clip]:
        self.skipped.clear()
        guard = DuplicateGuard()
        for row in rows:
            sample = SampleId(dataset="samm", subject=_subject(row), clip=row.text("Filename"))
            guard.add(sample, row.place("Filename"))
            emotion = row.text("Estimated Emotion")
            label = three_classes(emotion, EMOTIONS, row.place("Estimated Emotion"))
            onset, apex, offset = (row.integer(f"{name} Frame") for name in ("Onset", "Apex", "Offset"))
            if label is None:
                self.skipped.append((str(sample), f"emotion {emotion} is in none of the three classes"))
            elif not onset < apex <= offset:
                reason = f"frames must rise onset < apex <= offset, got {onset}, {apex}, {offset}"
                self.skipped.append((str(sample), reason))
            else:
                folder = inside(self.root, sample.subject, sample.clip)
                check_subject_folder(folder.parent, sample.subject)
                frames = {"onset": onset, "apex": apex, "offset": offset}
                yield Clip(id=sample, folder=folder, label=label, emotion=emotion, fps=FPS, **frames)


def _subject(row: Row) -> str:
    text = row.text("Subject")
    # a spreadsheet that takes 006 for a number shows 6; the folders have three digits
    if not (text.isascii() and text.isdigit() and int(text) < 1000):
        raise InputError(f"{row.place('Subject')}: must be a number of up to three digits, got {text!r}")
    return f"{int(text):03d}"
