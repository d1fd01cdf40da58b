"""Writing pictures, videos, workbooks and landmark tables so that the same content gives the same bytes."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from openpyxl import Workbook

from htnet.data.datasets.base import LANDMARKS_FILE
from htnet.data.faces.landmarks import SOURCE_COLUMNS
from htnet.data.synth.layouts.base import ClipFiles
from htnet.errors import InputError

Rows = Sequence[Sequence[object]]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "text": lambda data: b"not a picture\n",
}
"""Ways to damage a file."""


def write_frames(folder: Path, clip: ClipFiles, name: str, *, grey: bool = False) -> None:
    """Write a clip's frames, ``name`` as of :class:`Layout`; nothing where the clip has none."""
    if clip.numbers:
        folder.mkdir(parents=True, exist_ok=True)
    for number in clip.numbers:
        path = folder / name.format(number=number, subject=clip.subject, clip=clip.clip)
        write_frame(path, clip, number, grey=grey)


def write_frame(path: Path, clip: ClipFiles, number: int, *, grey: bool = False) -> None:
    """Write one frame, damaged where the clip says so."""
    picture = clip.render(number)
    if grey and picture.ndim == 3:
        picture = np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), np.uint8)
    data = encode(picture, path.suffix)
    if clip.damage is not None and clip.damage.frame == number:
        data = DAMAGES[clip.damage.how](data)
    path.write_bytes(data)


def encode(picture: NDArray[np.uint8], suffix: str) -> bytes:
    """Return a picture's file by its suffix; JPEG at quality 95."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix == ".jpg" else []
    encoded, data = cv2.imencode(suffix, picture, options)
    assert encoded, suffix  # encoding to memory has no input that could be wrong
    return bytes(data.tobytes())


def write_video(path: Path, clip: ClipFiles, fps: int) -> None:
    """Write a clip as a video: .avi as motion JPEG of nearly no loss, .mp4 as MPEG-4."""
    import av  # a store is made of pictures far more often

    if not clip.numbers:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, pixels, options = {
        ".avi": ("mjpeg", "yuvj420p", {"qmin": "1", "qmax": "1"}),
        ".mp4": ("mpeg4", "yuv420p", {"qmin": "2", "qmax": "2"}),
    }[path.suffix]
    # bitexact: no version of the writer, no time of writing
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as file:
        stream: Any = file.add_stream(codec, rate=fps, options={**options, "flags": "+bitexact", "threads": "1"})
        side = clip.render(clip.numbers[0]).shape[0]
        stream.width, stream.height, stream.pix_fmt = side, side, pixels
        for number in clip.numbers:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(clip.render(number)), format="bgr24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    if clip.damage is not None:
        # half a video may still hold the frame that matters
        how = "empty" if clip.damage.how == "truncated" else clip.damage.how
        path.write_bytes(DAMAGES[how](b""))


def write_table(path: Path, rows: Rows, *, sheet: str = "Sheet1", more_sheets: Sequence[str] = ()) -> None:
    """Write a workbook (.xlsx, .xls) or a CSV, by the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writers = {".xlsx": _write_xlsx, ".xls": _write_xls}
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    else:
        writers[path.suffix](path, rows, sheet, more_sheets)


def _write_xlsx(path: Path, rows: Rows, sheet: str, more_sheets: Sequence[str]) -> None:
    workbook = Workbook()
    page = workbook.active
    assert page is not None
    page.title = sheet
    for row in rows:
        page.append(list(row))
    for name in more_sheets:
        workbook.create_sheet(name)
    partial = io.BytesIO()
    workbook.save(partial)
    # a workbook holds the time of writing, in every member and in one property: the same seed, the same bytes
    with zipfile.ZipFile(partial) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            data = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", b"2020-01-01T00:00:00Z", source.read(member))
            target.writestr(zipfile.ZipInfo(member.filename, (2020, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)


def _write_xls(path: Path, rows: Rows, sheet: str, more_sheets: Sequence[str]) -> None:
    try:
        import xlwt  # for development only: nobody needs to write the format any more
    except ImportError:
        raise InputError(f"{path}: writing .xls needs the package xlwt: pip install xlwt") from None
    workbook = xlwt.Workbook()
    page = workbook.add_sheet(sheet)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if value is not None:
                page.write(y, x, value)
    for name in more_sheets:
        workbook.add_sheet(name)
    workbook.save(str(path))


def write_landmarks(root: Path, clips: Sequence[ClipFiles]) -> None:
    """Write ``landmarks.csv``: five points of every onset frame there is, in its pixels."""
    rows: list[list[object]] = [["dataset", "subject", "clip", *SOURCE_COLUMNS]]
    for clip in clips:
        if clip.numbers:
            values = [f"{value:.3f}" for point in clip.landmarks for value in point]
            rows.append([clip.dataset, clip.subject, clip.clip, *values])
    write_table(root / LANDMARKS_FILE, rows)
