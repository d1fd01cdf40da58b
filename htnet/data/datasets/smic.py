"""SMIC-HS (Li et al., FG 2013): 100 frames a second, colour, no apex.

``HS/s01/micro/negative/s1_ne_01/reg_image000001.bmp``, or the same below ``SMIC_all_cropped``, and
``SMIC-HS-E_annotation.xlsx``. A folder holds one micro-expression from its onset to its offset. The workbook lists the
longer recordings that these were cut from, with the frame numbers of those recordings, so only its subject, name and
emotion are used; a recording with several micro-expressions has one row, and the further folders follow after the
rows. Remarks under the table name no subject.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.base import (
    APEX_NOT_CODED,
    MISSING_FRAMES,
    Columns,
    DuplicateGuard,
    WorkbookDataset,
)
from htnet.data.datasets.labels import COMPOSITE_SCHEME, THREE_CLASSES, DatasetSchemes, OutOfScheme, by_rule
from htnet.data.datasets.tables import Row
from htnet.data.entries import Clip, LeftOut
from htnet.data.folders import entries_of, is_empty, same_name, spelled
from htnet.data.samples import SampleId
from htnet.errors import InputError

DOUBLE_FOLDER = "double_folder"
"""The clip's frames lie in another folder as well, whose name differs in blanks or zeros; a failure."""
_SUBJECT = re.compile(r"s?0*(\d{1,2})", re.IGNORECASE)
_CLIP = re.compile(r"s0*(\d{1,2})_(.+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Smic(WorkbookDataset):
    """Adapter of a SMIC folder.

    Subjects are ``s01``, clips ``s01_ne_01``, as in the MEGC2019 list, whether the disk says s1 or s01.
    """

    adapter = "smic"
    dataset = "smic"
    schemes: ClassVar[DatasetSchemes] = {COMPOSITE_SCHEME: by_rule(*THREE_CLASSES)}
    workbooks = (
        "SMIC-HS-E_annotation.xlsx",
        "SMIC-HS-E_annotation_2019.xlsx",
        "SMIC-HS-E_annotation_orig.xlsx",
    )
    columns = Columns(subject="Subject", clip="Filename", emotion="Emotion")
    folders = ("HS", "SMIC_all_cropped/HS")
    """Here they hold ``<subject>/micro/<emotion>/<clip>``."""
    fps = 100.0

    def describe(self) -> dict[str, object]:
        """Name what identifies the input; folders of a clip had before count, where there are any."""
        doubles = [out.place for out in self._folders()[1]]
        return {**super().describe(), **({"double_folders": len(doubles)} if doubles else {})}

    def rows(self) -> tuple[Row, ...]:
        """Return the rows that are of a recording; a remark under the table has one cell, whatever its column."""
        return tuple(row for row in super().rows() if sum(bool(row.optional(name)) for name in row.cells) > 1)

    def entries(self) -> Iterator[Clip | LeftOut]:
        """Yield every row in the table's order, then the folders that are further micro-expressions of a recording."""
        folders, doubles = self._folders()
        guard = DuplicateGuard()
        for row in self.rows():
            sample, place = self.sample_of(row), row.place("Filename")
            guard.add(sample, place)
            folder, emotion = folders.pop(sample, None), row.text("Emotion").lower()
            if folder is None:
                reason = (
                    f"no such folder of frames: {self._root / sample.subject / 'micro' / '*' / row.text('Filename')}"
                )
                yield LeftOut(clip=str(sample), rule=MISSING_FRAMES, reason=reason, place=place, failed=True)
                continue
            if emotion != same_name(folder.parent.name):
                raise InputError(f"{row.place('Emotion')}: {emotion}, but the clip lies in {folder}")
            yield self._clip(sample, folder, place)
        for sample, folder in folders.items():
            yield self._clip(sample, folder, str(folder))
        yield from doubles

    def _clip(self, sample: SampleId, folder: Path, place: str) -> Clip | LeftOut:
        emotion = same_name(folder.parent.name)
        label = self.scheme.label(sample, emotion, place)
        if isinstance(label, OutOfScheme):
            return LeftOut(clip=str(sample), rule=label.rule, reason=label.reason, place=place)
        return Clip(
            id=sample, frames=folder, label=label.number, emotion=emotion, place=place, fps=self.fps,
            notes=(*label.notes, APEX_NOT_CODED), remarks=label.remarks,
        )  # fmt: skip

    @property
    def _root(self) -> Path:
        for name in self.folders:
            if (self.root / name).is_dir():
                return self.root / name
        preferred, other = self.folders
        raise InputError(f"{self.root / preferred}: no such folder of frames (nor {other})")

    def sample_of(self, row: Row) -> SampleId:
        """Return ``smic/s01/s01_ne_01``."""
        name, text = row.name("Filename"), row.text("Subject")
        subject, clip = _SUBJECT.fullmatch(text), _CLIP.fullmatch(name)
        if subject is None:
            raise InputError(f"{row.place('Subject')}: must be a number such as 1 or s01, got {text!r}")
        if clip is None or int(clip[1]) != int(subject[1]):
            raise InputError(
                f"{row.place('Filename')}: must be a clip of subject {text} such as s1_ne_01, got {name!r}"
            )
        return _sample(int(subject[1]), clip[2])

    def _folders(self) -> tuple[dict[SampleId, Path], list[LeftOut]]:
        """Find the clips' folders, by subject, then emotion, then name; and folders of a clip had before.

        A folder may be there twice but for a blank or a zero (``s1_ne_01`` and ``s1_ne_01 ``); the first is taken.
        """
        clips: dict[SampleId, Path] = {}
        doubles = []
        for subject_folder in _subfolders(self._root):
            match = _SUBJECT.fullmatch(subject_folder.name.strip())
            if match is None:
                raise InputError(f"{subject_folder}: a subject's folder must be named such as s01")
            emotions = [emotion for micro in spelled(subject_folder / "micro") for emotion in _subfolders(micro)]
            for folder in [clip for emotion in emotions for clip in _subfolders(emotion)]:
                if is_empty(folder):  # a failure of the clip, as if it were not there
                    continue
                sample = _of_folder(folder, int(match[1]))
                if sample in clips:
                    reason = f"clip {sample} lies in {str(clips[sample])!r} already"
                    where = repr(str(folder))
                    doubles.append(
                        LeftOut(clip=str(sample), rule=DOUBLE_FOLDER, reason=reason, place=where, failed=True)
                    )
                clips.setdefault(sample, folder)
        return clips, doubles


def _subfolders(folder: Path) -> list[Path]:
    """List the folders in a folder, sorted by name."""
    return sorted(path for path in entries_of(folder) if path.is_dir())


def _of_folder(folder: Path, subject: int) -> SampleId:
    match = _CLIP.fullmatch(folder.name.strip())
    if match is None or int(match[1]) != subject:
        raise InputError(f"{folder}: must be named as a clip of subject s{subject}, such as s{subject}_ne_01")
    return _sample(subject, match[2])


def _sample(subject: int, rest: str) -> SampleId:
    return SampleId(dataset=Smic.dataset, subject=f"s{subject:02d}", clip=f"s{subject:02d}_{rest.lower()}")
