"""A folder of OpenFace's output: a CSV per clip with a row per frame and face.

The file of a clip is ``<dataset>/<subject>/<clip>.csv``, or ``<subject>_<clip>.csv`` where all lie in one folder.
Columns used are ``frame``, ``success`` and the 68 points ``x_0, y_0, ... x_67, y_67`` in pixels; blanks around names
are dropped.

OpenFace counts the pictures of a folder from 1 **in the order of their names** (``img100.jpg`` before ``img46.jpg``),
and so are rows read that begin at frame 1. Rows that begin at another frame are taken to name frames by their own
numbers. Of a video, a frame is its number in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from htnet.data.adapters.base import Clip, FlowPicture
from htnet.data.frames import inside, list_frames
from htnet.data.landmarks.points68 import COLUMNS68, five_of_68
from htnet.data.landmarks.table import CsvRow, LandmarkTable, read_text, require_columns, row_of
from htnet.data.types import Landmarks, SampleId
from htnet.errors import InputError

FRAME, SUCCESS = "frame", "success"
PLACES = "<dataset>/<subject>/<clip>.csv or <subject>_<clip>.csv"
"""Where a clip's file lies in the folder."""


def read_openface(folder: Path, entries: Sequence[Clip | FlowPicture]) -> LandmarkTable:
    """Landmarks of the clips' onset frames; a clip without a file has none.

    Where a frame has several faces, the largest that was found is taken.

    Raises:
        InputError: no clip has a file; a column is missing, no row of the onset frame, a value that cannot be read.
    """
    clips = [entry for entry in entries if isinstance(entry, Clip)]
    files = {clip.id: file for clip in clips if (file := _file_of(folder, clip.id)) is not None}
    if clips and not files:
        raise InputError(f"{folder}: holds no OpenFace file of a clip, such as of {clips[0].id}: {PLACES}")
    points: dict[SampleId, Landmarks] = {}
    not_found: dict[SampleId, str] = {}
    digest = hashlib.sha256()
    for clip in clips:
        file = files.get(clip.id)
        if file is None:
            not_found[clip.id] = f"{folder}: no OpenFace file of clip {clip.id}: {PLACES}"
            continue
        text = read_text(file)
        digest.update(f"{clip.id} {hashlib.sha256(text.encode()).hexdigest()}\n".encode())
        found = _onset_points(file, text.splitlines(), clip)
        if isinstance(found, str):
            not_found[clip.id] = found
        else:
            points[clip.id] = found
    return LandmarkTable(path=folder, points=points, flow_size=None, sha256=digest.hexdigest(), not_found=not_found)


def _file_of(folder: Path, sample: SampleId) -> Path | None:
    nested = inside(folder, sample.dataset, sample.subject, f"{sample.clip}.csv")
    flat = inside(folder, f"{sample.subject}_{sample.clip}.csv")
    return next((path for path in (nested, flat) if path.is_file()), None)


def _onset_points(path: Path, lines: Sequence[str], clip: Clip) -> Landmarks | str:
    """Landmarks of the onset frame, or why there are none."""
    header = [name.strip() for name in (lines[0] if lines else "").split(",")]
    require_columns(path, header, (FRAME, SUCCESS, *COLUMNS68))
    frames = _frames(path, lines, header.index(FRAME))
    if not frames:
        return f"{path}: no row, so no face of clip {clip.id}"
    onset = _frame_of_onset(path, frames, clip)
    if isinstance(onset, str):
        return onset
    rows = [
        row_of(path, number, header, lines[number - 1].split(",")) for number, frame in frames.items() if frame == onset
    ]
    if not rows:
        span = f"{min(frames.values())} to {max(frames.values())}"
        raise InputError(f"{path}: no row of frame {onset}, the onset of clip {clip.id}; there are frames {span}")
    faces = [five_of_68(row) for row in rows if _is_found(row)]
    if not faces:
        return (
            f"{path}, row {rows[0].number}, column {SUCCESS}: 0: no face in frame {onset}, the onset of clip {clip.id}"
        )
    return max(faces, key=lambda face: float(np.ptp(np.asarray(face), axis=0).max()))


def _frames(path: Path, lines: Sequence[str], column: int) -> dict[int, int]:
    """The frame of each row. A row has up to 714 cells and all but one row are passed over: no other cell is read."""
    frames = {}
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            text = "".join(line.split(",", column + 1)[column : column + 1]).strip()
            if not text.isdecimal():
                raise InputError(f"{path}, row {number}, column {FRAME}: must be the number of a frame, got {text!r}")
            frames[number] = int(text)
    return frames


def _frame_of_onset(path: Path, frames: Mapping[int, int], clip: Clip) -> int | str:
    """What ``frame`` is in the row of the onset, or why there can be none: the onset's picture is not there.

    Raises:
        InputError: more frames than the clip's folder has pictures.
    """
    if not clip.frames.is_dir():
        return 1 if clip.onset is None else clip.onset
    try:
        pictures = list_frames(clip.frames)
    except InputError as error:
        return str(error)
    onset = next(iter(pictures)) if clip.onset is None else clip.onset
    if onset not in pictures:
        return f"{clip.frames}: frame {onset}, the onset of clip {clip.id}, is missing"
    if min(frames.values()) != 1:
        return onset
    last = max(frames.values())
    if last > len(pictures):
        raise InputError(f"{path}: {last} frames, but {clip.frames} has {len(pictures)} pictures: not made of these")
    return sorted(picture.name for picture in pictures.values()).index(pictures[onset].name) + 1


def _is_found(row: CsvRow) -> bool:
    text = row.cells[SUCCESS].strip()
    if text not in ("0", "1"):
        raise InputError(f"{row.place(SUCCESS)}: must be 0 or 1, got {text!r}")
    return text == "1"
