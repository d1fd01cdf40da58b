"""The task of every adapter: read a dataset's annotations and say of each clip what it is, or why it is left out.

An adapter decodes no picture. What it yields is small and can be sent to another process; landmarks, flow and the
sample are made of it there (:mod:`htnet.data.extraction`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from htnet.data.datasets.labels import DatasetSchemes, LabelScheme, OutOfScheme
from htnet.data.datasets.tables import Row, first_name, read_rows
from htnet.data.entries import Clip, Entry, LeftOut
from htnet.data.folders import is_empty, same_name, spelled
from htnet.data.frames import VIDEO_SUFFIXES, inside
from htnet.data.samples import SampleId
from htnet.errors import InputError
from htnet.files import checksum

LANDMARKS_FILE = "landmarks.csv"
"""Landmark table of a dataset folder."""

# Rules by which an annotation is read otherwise than it stands (notes of a clip that stays) ...
APEX_NOT_CODED = "apex_not_coded"
"""The apex is blank or no number (CASME II writes "/"), or there is no column for it: it is found."""
APEX_AT_ONSET = "apex_at_onset"
"""The apex is the onset, so nothing would have moved (55 rows of CAS(ME)^3 part A): it is found."""
APEX_OUTSIDE = "apex_outside_interval"
"""The apex lies before the onset or after the offset (SAMM 028_4_1, 032_3_1): it is found in the interval."""
APEX_EQUALS_ONSET = "apex_equals_onset"
"""The apex's picture shows the same face as the onset's, a frame that was recorded twice: it is found."""
OFFSET_UNUSABLE = "offset_before_onset"
"""The offset is not after the onset, but the apex is: the offset is left open."""
# ... and rules by which a clip is left out, beside those of :mod:`htnet.data.datasets.labels`.
NEGATIVE_DURATION = "negative_duration"
"""Neither the apex nor the offset is after the onset."""
MISSING_FRAMES = "missing_frames"
"""The folder or video of the clip is not there, or empty; a failure."""
MACRO = "macro_expression"
"""The row is no micro-expression."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Onset, apex and offset as far as they can be used, and what of the annotation cannot, by rule and in words."""

    onset: int | None = None
    apex: int | None = None
    offset: int | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class Columns(NamedTuple):
    """Columns of an annotation table by what they hold, as :func:`htnet.data.datasets.tables.read_rows` takes them.

    An empty one is not in the table. The header is the row that has the subject's column.
    """

    subject: str
    clip: str
    onset: str = ""
    apex: str = ""
    offset: str = ""
    emotion: str = ""

    @property
    def names(self) -> Columns:
        """The columns by the names under which a row knows them."""
        return Columns._make(map(first_name, self))


def _find_annotation(root: Path, names: Sequence[str], chosen: Path | None) -> Path:
    """Find the annotation file: ``chosen`` (relative to ``root``) if given, else the first of ``names`` in ``root``."""
    if not root.is_dir():
        raise InputError(f"{root}: no such dataset folder")
    if chosen is not None:
        if not (root / chosen).is_file():
            raise InputError(f"{root / chosen}: no such annotation file")
        return root / chosen
    for name in names:
        if (root / name).is_file():
            return root / name
    raise InputError(f"{root}: the annotation workbook is missing, expected {' or '.join(names)}")


class DuplicateGuard:
    """Refuses a clip that an annotation names twice."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def add(self, sample: SampleId, place: str) -> None:
        """Take note of a clip and where it stands; :class:`InputError` if it stood elsewhere before, in any case."""
        name = same_name(str(sample))
        if name in self._seen:
            raise InputError(f"{place}: clip {sample} is there already, {self._seen[name]}")
        self._seen[name] = place


@dataclass(frozen=True, kw_only=True)
class WorkbookDataset:
    """A dataset with one annotation table, a row per clip. A subclass names its parts and what else a row means.

    ``annotations``: the table, relative to ``root``; None: by its usual names.
    """

    root: Path
    scheme: LabelScheme
    annotations: Path | None = None

    adapter: ClassVar[str]
    dataset: ClassVar[str]
    """Name of the dataset in its samples; ``*``: each row names its own."""
    schemes: ClassVar[DatasetSchemes]
    workbooks: ClassVar[tuple[str, ...]]
    """Names under which the owners ship the table, the preferred one first."""
    columns: ClassVar[Columns]
    more_columns: ClassVar[tuple[str, ...]] = ()
    folders: ClassVar[tuple[str, ...]] = ()
    """Folders below the root that hold ``<subject>/<clip>``, the preferred one first; "" is the root itself."""
    landmarks_file: ClassVar[str] = LANDMARKS_FILE
    """Name of the landmark table in the root, where none is chosen."""
    flow_size: ClassVar[None] = None
    """Side of the flow pictures that a dataset comes with: none, it has frames."""
    fps: ClassVar[float | None] = None

    @property
    def other_workbooks(self) -> list[str]:
        """Further annotation tables in the root, which are not read where none is chosen."""
        there = [name for name in self.workbooks if (self.root / name).is_file()]
        return there[1:] if self.annotations is None else []

    @property
    def workbook(self) -> Path:
        """The annotation table; :class:`InputError` where there is none."""
        return _find_annotation(self.root, self.workbooks, self.annotations)

    def describe(self) -> dict[str, object]:
        """Name what identifies the input, for ``store.json``."""
        path = self.workbook
        return {"adapter": self.adapter, "annotation": path.name, "annotation_sha256": checksum(path)}

    def entries(self) -> Iterator[Entry | LeftOut]:
        """Yield every annotated clip once, in the table's order.

        Raises:
            InputError: an annotation that cannot be read; names file, sheet, row, column, value, rule.
        """
        guard = DuplicateGuard()
        for row in self.rows():
            sample = self.sample_of(row)
            guard.add(sample, row.place(self.columns.names.clip))
            yield self.entry(row, sample)

    def rows(self) -> tuple[Row, ...]:
        """Read the rows of the annotation table."""
        return read_rows(self.workbook, self.wanted_columns)

    @property
    def wanted_columns(self) -> tuple[str, ...]:
        """The columns that a table must have, or may have."""
        return (*filter(None, self.columns), *self.more_columns)

    def entry(self, row: Row, sample: SampleId) -> Clip | LeftOut:
        """Turn a row into a clip, or into the reason why there is none."""
        emotion, place = self.emotion_of(row)
        label = self.scheme.label(sample, emotion, place)
        where = row.place(self.columns.names.clip)
        if isinstance(label, OutOfScheme):
            return LeftOut(clip=str(sample), rule=label.rule, reason=label.reason, place=where)
        interval = self.interval_of(row)
        if isinstance(interval, str):
            return LeftOut(clip=str(sample), rule=NEGATIVE_DURATION, reason=interval, place=where)
        frames = first_there(self.frames_of(row, sample))
        if isinstance(frames, str):
            return LeftOut(clip=str(sample), rule=MISSING_FRAMES, reason=frames, place=where, failed=True)
        return Clip(
            id=sample, frames=frames, label=label.number, emotion=emotion, place=where, fps=self.fps_of(row),
            notes=(*label.notes, *interval.notes), remarks=(*label.remarks, *interval.remarks),
            onset=interval.onset, apex=interval.apex, offset=interval.offset,
        )  # fmt: skip

    def sample_of(self, row: Row) -> SampleId:
        """Return the identity of the row's clip."""
        raise NotImplementedError

    def emotion_of(self, row: Row) -> tuple[str, str]:
        """Return the row's emotion, and where it stands."""
        column = self.columns.names.emotion
        return row.text(column), row.place(column)

    def interval_of(self, row: Row) -> Interval | str:
        """Return the row's interval, or why it has none."""
        _, _, onset, apex, offset, _ = self.columns.names
        first, last = row.integer(onset), row.integer(offset)
        peak = row.whole(apex) if apex else None
        if last <= first:
            if peak is None or peak <= first:
                return f"neither apex nor offset is after the onset: onset {first}, apex {peak}, offset {last}"
            remark = f"{OFFSET_UNUSABLE}: offset {last} is not after onset {first} ({row.place(offset)})"
            return Interval(onset=first, apex=peak, notes=(OFFSET_UNUSABLE,), remarks=(remark,))
        if peak is not None and first < peak <= last:
            return Interval(onset=first, apex=peak, offset=last)
        rule = APEX_NOT_CODED if peak is None else APEX_AT_ONSET if peak == first else APEX_OUTSIDE
        text = row.optional(apex) if apex else ""
        remark = f"{rule}: apex {text!r}, onset {first}, offset {last} ({row.place(apex)})"
        return Interval(onset=first, offset=last, notes=(rule,), remarks=(remark,) if text else ())

    def fps_of(self, row: Row) -> float | None:
        """Return the frames a second, of the dataset or of the row."""
        return self.fps

    def frames_of(self, row: Row, sample: SampleId) -> Iterable[Path]:
        """Name the places of the clip's frames, the preferred one first; folders or videos, in any case of letters."""
        for folder in self.folders:
            yield inside(self.root / folder, sample.subject, sample.clip)


def first_there(candidates: Iterable[Path]) -> Path | str:
    """Find the first candidate that exists and is not empty, as the disk spells it, or say why there is none."""
    tried = []
    for path in candidates:
        there = spelled(path)
        full = [found for found in there if not (found.is_dir() and is_empty(found)) and is_place_of_frames(found)]
        if len(full) > 1:
            names = ", ".join(repr(str(found)) for found in full)
            return f"several folders of frames, whose names differ in blanks or case: {names}"
        if full:
            return full[0]
        tried.append(f"{path} (empty)" if any(found.is_dir() for found in there) else str(path))
    return f"no such folder of frames: {' or '.join(tried)}"


def is_place_of_frames(path: Path) -> bool:
    """Tell by its kind and name that a path is a folder or a video."""
    return path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES
