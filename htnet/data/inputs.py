"""Clips that a user names to predict: folders of frames, videos, pairs of pictures, a table of many, JSON lines.

The keys of a JSON line are the columns of a table: ``frames`` (a folder or video), or ``onset_picture`` and
``apex_picture``; frame numbers ``onset``, ``apex``, ``offset``; ``fps``; ``dataset``, ``subject``, ``clip`` where the
clip has a name. All but the first are optional.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from htnet.data.datasets.tables import Row, read_rows
from htnet.data.entries import Clip, Pair
from htnet.data.faces.landmarks import read_landmarks
from htnet.data.frames import VIDEO_SUFFIXES
from htnet.data.samples import SampleId
from htnet.errors import InputError

__all__ = ["UNNAMED", "NamedClip", "add_landmarks", "read_inputs"]

UNNAMED: Final = "input"
"""Dataset and subject of clips that have none."""
_PICTURES: Final = (".jpg", ".jpeg", ".png", ".bmp")
_TABLES: Final = (".csv", ".tsv", ".txt", ".xlsx", ".xls")
_NUMBERS: Final = ("onset", "apex", "offset")


@dataclass(frozen=True, kw_only=True)
class NamedClip:
    """A clip as the user named it, or the reason for which it is none."""

    name: str
    clip: Clip | None = None
    problem: str | None = None


class _Keys(BaseModel):
    """One clip by the keys of a JSON line or the columns of a table."""

    model_config = ConfigDict(extra="forbid", strict=True)

    frames: str | None = None
    onset_picture: str | None = None
    apex_picture: str | None = None
    onset: int | None = Field(default=None, ge=0)
    apex: int | None = Field(default=None, ge=0)
    offset: int | None = Field(default=None, ge=0)
    fps: float | None = Field(default=None, gt=0)
    dataset: str = UNNAMED
    subject: str = UNNAMED
    clip: str | None = None


def read_inputs(arguments: Sequence[str], lines: Iterable[str] = ()) -> list[NamedClip]:
    """Return the clips of the arguments in their order; ``-`` stands for the JSON ``lines``.

    Raises:
        InputError: a table or a JSON line breaks its form, or a picture has no partner; names the place and the rule.
    """
    clips: list[NamedClip] = []
    waiting: Path | None = None
    for argument in arguments:
        path = Path(argument)
        if waiting is not None:
            clips.append(_pair(waiting, path, len(clips)))
            waiting = None
        elif argument == "-":
            clips += _of_lines(lines, len(clips))
        elif path.suffix.lower() in _PICTURES:
            waiting = path
        elif path.suffix.lower() in _TABLES and path.is_file():
            clips += _of_table(path, len(clips))
        else:
            clips.append(_of_path(path, len(clips)))
    if waiting is not None:
        raise InputError(f"{waiting}: a picture needs another one after it: the onset, then the apex")
    return clips


def _pair(onset: Path, apex: Path, number: int) -> NamedClip:
    if apex.suffix.lower() not in _PICTURES:
        raise InputError(f"{onset}: a picture needs another one after it: the onset, then the apex; got {apex}")
    return _named(_Keys(onset_picture=str(onset), apex_picture=str(apex)), Path(), number, f"{onset} {apex}")


def _of_path(path: Path, number: int) -> NamedClip:
    return _named(_Keys(frames=str(path)), Path(), number, str(path))


def _of_lines(lines: Iterable[str], first: int) -> Iterator[NamedClip]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"standard input, line {number}"
            try:
                content = json.loads(line)
            except ValueError as error:
                raise InputError(f"{place}: not JSON: {error}") from None
            yield _named(_checked(content, place), Path(), first + number - 1, place)


def _of_table(path: Path, first: int) -> Iterator[NamedClip]:
    others = [name for name in _Keys.model_fields if name != "frames"]
    for number, row in enumerate(read_rows(path, ("frames|onset_picture", *(f"{name}?" for name in others)))):
        cells = {name: _cell(row, name) for name in _Keys.model_fields if row.optional(name)}
        if "onset_picture" in cells:
            cells.pop("frames")  # the same column, under the name by which the header was found
        place = row.place("frames")
        yield _named(_checked(cells, place), path.parent, first + number, place)


def _cell(row: Row, name: str) -> object:
    if name in _NUMBERS:
        return row.optional_integer(name)
    return row.decimal(name) if name == "fps" else row.text(name)


def _checked(content: object, place: str) -> _Keys:
    try:
        return _Keys.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "line"
        known = f"; known are {', '.join(_Keys.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise InputError(f"{place}: {key}: {first['msg']}{known}") from None


def _named(keys: _Keys, folder: Path, number: int, place: str) -> NamedClip:
    """Make the clip; one whose files are not there is no clip, and the others go on."""
    pair = keys.onset_picture is not None and keys.apex_picture is not None
    if pair == (keys.frames is not None):
        raise InputError(f"{place}: a clip is either frames, or onset_picture and apex_picture")
    given = [value for name in _NUMBERS if (value := getattr(keys, name)) is not None]
    if pair and given:
        raise InputError(f"{place}: a pair of pictures has no frame numbers")
    if given != sorted(set(given)):
        raise InputError(f"{place}: frame numbers must rise, onset < apex < offset, got {', '.join(map(str, given))}")
    files = [folder / name for name in (keys.frames, keys.onset_picture, keys.apex_picture) if name is not None]
    shown = " ".join(map(str, files))
    for path in files:
        if not path.exists():
            return NamedClip(name=shown, problem=f"{path}: no such file or folder")
    if not pair and files[0].is_file() and files[0].suffix.lower() not in VIDEO_SUFFIXES:
        kinds = f"a folder of frames, a video ({', '.join(VIDEO_SUFFIXES)}) or two pictures"
        return NamedClip(name=shown, problem=f"{files[0]}: not a clip: {kinds}")
    name = SampleId(dataset=keys.dataset, subject=keys.subject, clip=keys.clip or f"{number + 1:04d} {files[0].name}")
    facts: dict[str, Any] = {"id": name, "emotion": "", "place": place, "fps": keys.fps, "frames": files[0]}
    if pair:
        return NamedClip(name=shown, clip=Pair(**facts, apex_picture=files[1]))
    facts |= {name: getattr(keys, name) for name in _NUMBERS}
    return NamedClip(name=shown, clip=Clip(**facts))


def add_landmarks(clips: Sequence[NamedClip], table: Path | None) -> list[NamedClip]:
    """Give the clips the landmarks that a table has of them; a detector finds the others."""
    if table is None:
        return list(clips)
    known = read_landmarks(table, [item.clip for item in clips if item.clip is not None])
    return [
        item if item.clip is None else replace(item, clip=replace(item.clip, face=known.face_of(item.clip.id)))
        for item in clips
    ]
