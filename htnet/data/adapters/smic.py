"""SMIC-HS (Li et al., FG 2013): 100 frames a second, colour, no apex.

``HS/s01/micro/negative/s1_ne_01/reg_image000001.bmp`` and ``SMIC-HS-E_annotation.xlsx``. A folder holds one
micro-expression from its onset to its offset. The workbook lists the longer recordings these were cut from,
with the frame numbers of those recordings, so only its subject, name and emotion are used; a recording with
several micro-expressions has one row, and the further folders follow after the rows.
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

WORKBOOKS = ("SMIC-HS-E_annotation.xlsx", "SMIC-HS-E_annotation_2019.xlsx")
COLUMNS = ("Subject", "Filename", "Emotion")
FRAMES = "HS"
FPS = 100.0
EMOTIONS: dict[str, Emotion | None] = {
    "negative": Emotion.NEGATIVE,
    "positive": Emotion.POSITIVE,
    "surprise": Emotion.SURPRISE,
}
_SUBJECT = re.compile(r"s?0*(\d{1,2})", re.IGNORECASE)
_CLIP = re.compile(r"s0*(\d{1,2})_(.+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Smic:
    """Adapter of a SMIC folder; ``landmarks`` None: ``landmarks.csv`` in ``root``.

    Subjects are ``s01``, clips ``s01_ne_01``, as in the MEGC2019 list, whether the disk says s1 or s01.
    ``skipped`` holds (clip, reason) of everything that the latest :meth:`samples` left out.
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
        return describe("smic", find_workbook(self.root, WORKBOOKS), self._landmarks, self.flow, SPOTTING)

    def samples(self) -> Iterator[PreparedSample]:
        """Yield the samples in the workbook's order; :class:`InputError` on bad input."""
        rows = read_rows(find_workbook(self.root, WORKBOOKS), COLUMNS)
        table = read_landmarks(self._landmarks)
        yield from prepare_clips(self.root, self._clips(rows), table, self.flow)

    def _clips(self, rows: tuple[Row, ...]) -> Iterator[Clip]:
        self.skipped.clear()
        folders = _clip_folders(self.root / FRAMES)
        guard = DuplicateGuard()
        for row in rows:
            if row.cells["Subject"] is None or row.cells["Filename"] is None:
                self.skipped.append((f"row {row.number}", "names no subject and clip"))
                continue
            sample = self._listed(row)
            guard.add(sample, row.place("Filename"))
            if sample not in folders:
                place = self.root / FRAMES / sample.subject / "micro" / row.text("Emotion") / row.text("Filename")
                raise InputError(f"{place}: no such folder of frames ({row.place('Filename')})")
            clip = folders.pop(sample)
            if three_classes(row.text("Emotion"), EMOTIONS, row.place("Emotion")) != clip.label:
                raise InputError(f"{row.place('Emotion')}: {row.text('Emotion')}, but the clip lies in {clip.folder}")
            yield clip
        yield from folders.values()

    def _listed(self, row: Row) -> SampleId:
        name, text = row.text("Filename"), row.text("Subject")
        inside(self.root, name)
        subject, clip = _SUBJECT.fullmatch(text), _CLIP.fullmatch(name)
        if subject is None:
            raise InputError(f"{row.place('Subject')}: must be a number such as 1 or s01, got {text!r}")
        if clip is None or int(clip[1]) != int(subject[1]):
            raise InputError(
                f"{row.place('Filename')}: must be a clip of subject {text} such as s1_ne_01, got {name!r}"
            )
        return _sample(int(subject[1]), clip[2])


def _sample(subject: int, rest: str) -> SampleId:
    return SampleId(dataset="smic", subject=f"s{subject:02d}", clip=f"s{subject:02d}_{rest.lower()}")


def _clip_folders(root: Path) -> dict[SampleId, Clip]:
    """Every clip folder by the clip's name, by subject, then emotion, then name."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder of frames")
    clips: dict[SampleId, Clip] = {}
    for subject_folder in sorted(path for path in root.iterdir() if path.is_dir()):
        match = _SUBJECT.fullmatch(subject_folder.name)
        if match is None:
            raise InputError(f"{subject_folder}: a subject's folder must be named such as s01")
        check_subject_folder(subject_folder / "micro", f"s{int(match[1]):02d}")
        for clip in _subject_clips(subject_folder / "micro", int(match[1])):
            if clip.id in clips:
                raise InputError(f"{clip.folder}: clip {clip.id} lies in {clips[clip.id].folder} already")
            clips[clip.id] = clip
    return clips


def _subject_clips(folder: Path, subject: int) -> Iterator[Clip]:
    for emotion_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        label = three_classes(emotion_folder.name, EMOTIONS, str(emotion_folder))
        assert label is not None  # every word of EMOTIONS has a class here
        for clip_folder in sorted(path for path in emotion_folder.iterdir() if path.is_dir()):
            match = _CLIP.fullmatch(clip_folder.name)
            if match is None or int(match[1]) != subject:
                raise InputError(
                    f"{clip_folder}: must be named as a clip of subject s{subject}, such as s{subject}_ne_01"
                )
            sample = _sample(subject, match[2])
            yield Clip(id=sample, folder=clip_folder, label=label, emotion=emotion_folder.name.lower(), fps=FPS)
