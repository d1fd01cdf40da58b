"""Where CASME II, SAMM and SMIC-HS keep frames and annotations, for the synthetic generator.

File names, columns and folder layouts follow what the datasets' owners ship; each layout writes its
annotation traps where they cost nothing (subjects as numbers that lost their zeros, SAMM's header in
row 14, SMIC's ``s1`` beside ``s01``). The landmarks of the onset frames go into ``landmarks.csv``.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from openpyxl import Workbook

from htnet.data.landmarks import SOURCE_COLUMNS
from htnet.data.types import Emotion, Landmarks


@dataclass(frozen=True, kw_only=True)
class ClipFiles:
    """What a layout needs to know of a clip; ``render`` draws a frame by its number, (S, S, 3) uint8."""

    subject: str
    clip: str
    label: int
    emotion: str
    first: int
    onset: int
    apex: int
    offset: int
    last: int
    landmarks: Landmarks
    render: Callable[[int], NDArray[np.uint8]]


class Layout(Protocol):
    """One dataset's way of naming and writing things.

    ``length``: least and most frames from onset to apex, and from apex to offset. ``margin``: frames before
    the onset and after the offset. ``emotions``: the dataset's words for each of the three classes.
    """

    dataset: str
    length: tuple[int, int]
    margin: int
    emotions: ClassVar[dict[int, tuple[str, ...]]]

    def subject_name(self, index: int) -> str: ...

    def clip_name(self, subject: int, index: int, label: int, number: int) -> str:
        """Name of a subject's clip ``index``, which is its ``number``-th (from 1) of the label."""
        ...

    def first_frame(self, rng: np.random.Generator) -> int: ...

    def write(self, root: Path, clips: Sequence[ClipFiles]) -> None:
        """Write frames, annotation and landmarks under ``root``, which is made."""
        ...


class Casme2Layout:
    """CASME2_RAW_selected/sub01/EP02_01f/img46.jpg and CASME2-coding-20140508.xlsx."""

    dataset = "casme2"
    length: tuple[int, int] = (5, 8)
    margin = 2
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("disgust", "repression"),
        Emotion.POSITIVE: ("happiness",),
        Emotion.SURPRISE: ("surprise",),
    }

    def subject_name(self, index: int) -> str:
        return f"sub{index + 1:02d}"

    def clip_name(self, subject: int, index: int, label: int, number: int) -> str:
        return f"EP{index + 1:02d}_{subject % 9 + 1:02d}f"

    def first_frame(self, rng: np.random.Generator) -> int:
        return int(rng.integers(30, 120))

    def write(self, root: Path, clips: Sequence[ClipFiles]) -> None:
        header = ["Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None]
        rows: list[list[object]] = [[*header, "Action Units", "Estimated Emotion"]]
        for clip in clips:
            folder = root / "CASME2_RAW_selected" / clip.subject / clip.clip
            _write_frames(folder, clip, "img{}.jpg")
            frames = [clip.onset, clip.apex, clip.offset]
            rows.append([int(clip.subject[3:]), clip.clip, None, *frames, None, _units(clip.label), clip.emotion])
        _write_workbook(root / "CASME2-coding-20140508.xlsx", rows)
        _write_landmarks(root, self.dataset, clips)


class SammLayout:
    """006/006_1_2/006_05562.jpg, grey, and SAMM_Micro_FACS_Codes_v2.xlsx with its header in row 14."""

    dataset = "samm"
    length: tuple[int, int] = (5, 8)
    margin = 2
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("Anger", "Contempt", "Disgust", "Fear", "Sadness"),
        Emotion.POSITIVE: ("Happiness",),
        Emotion.SURPRISE: ("Surprise",),
    }

    def subject_name(self, index: int) -> str:
        return f"{index + 6:03d}"

    def clip_name(self, subject: int, index: int, label: int, number: int) -> str:
        return f"{self.subject_name(subject)}_{index // 3 + 1}_{index % 3 + 1}"

    def first_frame(self, rng: np.random.Generator) -> int:
        return int(rng.integers(900, 8000))

    def write(self, root: Path, clips: Sequence[ClipFiles]) -> None:
        header = ["Subject", "Filename", "Inducement Code", "Onset Frame", "Apex Frame", "Offset Frame", "Duration"]
        header += ["Micro", "Action Units", "Estimated Emotion", "Objective Classes", "Notes"]
        rows: list[list[object]] = [["Synthetic data in the layout of SAMM"]]
        rows.extend([None] for _ in range(12))
        rows.append([*header])
        for clip in clips:
            _write_frames(root / clip.subject / clip.clip, clip, clip.subject + "_{:05d}.jpg", grey=True)
            induced = int(clip.clip.split("_")[1])
            frames = [clip.onset, clip.apex, clip.offset, clip.offset - clip.onset + 1]
            units = _units(clip.label)
            rows.append(
                [int(clip.subject), clip.clip, induced, *frames, "Micro - 1/2", units, clip.emotion, None, None]
            )
        _write_workbook(root / "SAMM_Micro_FACS_Codes_v2.xlsx", rows)
        _write_landmarks(root, self.dataset, clips)


class SmicLayout:
    """HS/s01/micro/negative/s1_ne_01/reg_image000001.bmp and SMIC-HS-E_annotation.xlsx, which has no apex."""

    dataset = "smic"
    length: tuple[int, int] = (4, 6)
    margin = 0
    emotions: ClassVar[dict[int, tuple[str, ...]]] = {
        Emotion.NEGATIVE: ("negative",),
        Emotion.POSITIVE: ("positive",),
        Emotion.SURPRISE: ("surprise",),
    }

    def subject_name(self, index: int) -> str:
        return f"s{index + 1:02d}"

    def clip_name(self, subject: int, index: int, label: int, number: int) -> str:
        return f"{self.subject_name(subject)}_{('ne', 'po', 'sur')[label]}_{number:02d}"

    def first_frame(self, rng: np.random.Generator) -> int:
        return 1

    def write(self, root: Path, clips: Sequence[ClipFiles]) -> None:
        header = ["Subject", "Filename", "OnsetF", "OffsetF", "TotalMF1", "Onset2F", "Offset2F", "TotalMF2", "Onset3F"]
        header += ["Offset3F", "TotalMF3", "Emotion", "FirstF", "LastF", "TotalVL"]
        rows: list[list[object]] = [[*header]]
        for clip in clips:
            number = int(clip.subject[1:])
            name = f"s{number}{clip.clip.removeprefix(clip.subject)}"
            _write_frames(root / "HS" / clip.subject / "micro" / clip.emotion / name, clip, "reg_image{:06d}.bmp")
            length = clip.last - clip.first + 1
            more = [None] * 6
            rows.append(
                [number, name, clip.onset, clip.offset, length, *more, clip.emotion, clip.first, clip.last, length]
            )
        _write_workbook(root / "SMIC-HS-E_annotation.xlsx", rows)
        _write_landmarks(root, self.dataset, clips)


LAYOUTS: dict[str, Layout] = {layout.dataset: layout for layout in (Casme2Layout(), SammLayout(), SmicLayout())}
"""The layouts by dataset, in the order of the MEGC2019 list."""


def _units(label: int) -> str:
    return ("4+15", "6+12", "1+2+5+26")[label]


def _write_frames(folder: Path, clip: ClipFiles, name: str, *, grey: bool = False) -> None:
    folder.mkdir(parents=True)
    for number in range(clip.first, clip.last + 1):
        picture = clip.render(number)
        if grey:
            picture = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        path = folder / name.format(number)
        options = [cv2.IMWRITE_JPEG_QUALITY, 95] if path.suffix == ".jpg" else []
        encoded, data = cv2.imencode(path.suffix, picture, options)
        assert encoded, path  # encoding to memory has no input that could be wrong
        path.write_bytes(data.tobytes())


def _write_workbook(path: Path, rows: Sequence[Sequence[object]]) -> None:
    workbook = Workbook()
    sheet = workbook.active
    assert sheet is not None
    for row in rows:
        sheet.append(list(row))
    partial = io.BytesIO()
    workbook.save(partial)
    # a workbook holds the time of writing, in every member and in one property: the same seed, the same bytes
    with zipfile.ZipFile(partial) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            data = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", b"2020-01-01T00:00:00Z", source.read(member))
            target.writestr(zipfile.ZipInfo(member.filename, (2020, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)


def _write_landmarks(root: Path, dataset: str, clips: Sequence[ClipFiles]) -> None:
    with (root / "landmarks.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["dataset", "subject", "clip", *SOURCE_COLUMNS])
        for clip in clips:
            values = [f"{value:.3f}" for point in clip.landmarks for value in point]
            writer.writerow([dataset, clip.subject, clip.clip, *values])
