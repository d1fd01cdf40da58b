"""A folder of OpenFace's output: a CSV per clip with a row per frame and face.

The file of a clip is ``<dataset>/<subject>/<clip>.csv``, or ``<subject>_<clip>.csv`` where all lie in one folder.
Columns used are ``frame``, ``success`` and the 68 points ``x_0, y_0, ... x_67, y_67`` in pixels; blanks around names
are dropped.

OpenFace counts the pictures of a folder from 1 **in the order of their names** (``img100.jpg`` before ``img46.jpg``),
and so are rows read that begin at frame 1; rows that begin at 0 are counted from 0 in the same order. Rows that begin
at another frame are taken to name frames by their own numbers. Of a video, rows are counted likewise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from htnet.data.datasets.tables import Table, open_table
from htnet.data.entries import Clip, Entry, clips_of
from htnet.data.faces.points68 import COLUMNS68, check_scheme, five_of_68
from htnet.data.faces.table import LandmarkTable
from htnet.data.frames import inside, list_frames
from htnet.data.samples import Landmarks, SampleId
from htnet.errors import InputError
from htnet.files import checksum

FRAME, SUCCESS = "frame", "success"
PLACES = "<dataset>/<subject>/<clip>.csv or <subject>_<clip>.csv"
"""Places of a clip's file in the folder."""


def read_openface(folder: Path, entries: Sequence[Entry]) -> LandmarkTable:
    """Read the landmarks of the clips' onset frames; a clip without a file has none.

    Where a frame has several faces, the largest that was found is taken.

    Raises:
        InputError: no clip has a file; a column is missing, no row of the onset frame, a value that cannot be read.
    """
    clips = clips_of(entries)
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
        digest.update(f"{clip.id} {checksum(file)}\n".encode())
        found = _onset_points(file, open_table(file, (FRAME, SUCCESS)), clip)
        if isinstance(found, str):
            not_found[clip.id] = found
        else:
            points[clip.id] = found
    return LandmarkTable(path=folder, points=points, flow_size=None, sha256=digest.hexdigest(), not_found=not_found)


def _file_of(folder: Path, sample: SampleId) -> Path | None:
    nested = inside(folder, sample.dataset, sample.subject, f"{sample.clip}.csv")
    flat = inside(folder, f"{sample.subject}_{sample.clip}.csv")
    return next((path for path in (nested, flat) if path.is_file()), None)


def _onset_points(path: Path, table: Table, clip: Clip) -> Landmarks | str:
    """Return landmarks of the onset frame, or why there are none."""
    check_scheme(path, table.header)
    rows = table.rows((FRAME, SUCCESS, *COLUMNS68))
    if not rows:
        return f"{path}: no row, so no face of clip {clip.id}"
    frames = [row.integer(FRAME) for row in rows]
    onset = _frame_of_onset(path, frames, clip)
    if isinstance(onset, str):
        return onset
    there = [row for row, frame in zip(rows, frames, strict=True) if frame == onset]
    if not there:
        span = f"{min(frames)} to {max(frames)}"
        raise InputError(f"{path}: no row of frame {onset}, the onset of clip {clip.id}; there are frames {span}")
    faces = [five_of_68(row) for row in there if row.mark(SUCCESS)]
    if not faces:
        return f"{there[0].place(SUCCESS)}: 0: no face in frame {onset}, the onset of clip {clip.id}"
    return max(faces, key=lambda face: float(np.ptp(np.asarray(face), axis=0).max()))


def _frame_of_onset(path: Path, frames: Sequence[int], clip: Clip) -> int | str:
    """Find ``frame`` of the onset's row, or say why there can be none: the onset's picture is not there.

    Raises:
        InputError: rows counted from 0 or 1 that are more than the clip's folder has pictures.
    """
    first = min(frames)
    if first < 0:
        raise InputError(f"{path}, column {FRAME}: must not be negative, got {first}")
    if not clip.frames.is_dir():
        onset = 1 if clip.onset is None else clip.onset
        return onset - 1 if first == 0 else onset
    try:
        pictures = list_frames(clip.frames)
    except InputError as error:
        return str(error)
    onset = next(iter(pictures)) if clip.onset is None else clip.onset
    if onset not in pictures:
        return f"{clip.frames}: frame {onset}, the onset of clip {clip.id}, is missing"
    if first > 1:
        return onset
    last = max(frames) - first + 1
    if last > len(pictures):
        raise InputError(f"{path}: {last} frames, but {clip.frames} has {len(pictures)} pictures: not made of these")
    return sorted(picture.name for picture in pictures.values()).index(pictures[onset].name) + first
