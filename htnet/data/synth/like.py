"""Clips that synthetic datasets are built to: those of a list, such as the MEGC2019 composite's, or of an annotation.

What the annotation table of a dataset's owners says is asked of the dataset's adapter, so that frames lie where it
looks for them. What is wrong with a row is for the adapter to say when it reads the copy: such a row gets frames too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from htnet.data.datasets import WORKBOOKS
from htnet.data.datasets.base import Interval, WorkbookDataset
from htnet.data.datasets.labels import COMPOSITE_SCHEME, read_clip_rows
from htnet.data.datasets.schemes import load_scheme
from htnet.data.datasets.tables import Row
from htnet.data.samples import Emotion
from htnet.data.synth.layouts import LAYOUTS
from htnet.errors import InputError
from htnet.files import checksum

TABLES = tuple(name for name in WORKBOOKS if name not in ("smic", "csv"))
"""Adapters whose annotation tables say where a clip's frames lie, and which they are (SMIC's does not)."""
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ListedFrames:
    """Frames that an annotation wants: ``folder`` is below the dataset's, ``numbers`` rise; the rest is the motion."""

    folder: Path
    numbers: tuple[int, ...]
    onset: int
    apex: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class ListedClip:
    """A clip of a list: identity as an adapter should give it, and its class. ``frames`` only of an annotation."""

    subject: str
    clip: str
    label: int
    frames: ListedFrames | None = None


@dataclass(frozen=True, kw_only=True)
class ClipList:
    """A list by layout, in its order. ``sha256``: of the file. ``table``: the file where it is an annotation."""

    clips: Mapping[str, Sequence[ListedClip]]
    sha256: str
    table: Path | None = None


def read_like(path: Path, datasets: Sequence[str] | None) -> ClipList:
    """Read a list of clips, or the annotation table of a dataset's owners.

    Args:
        path: a list as text, or a table as workbook or text. The owners' name of a table tells its dataset.
        datasets: the one of :data:`TABLES` that it is of where the name tells nothing.

    Raises:
        InputError: a file that cannot be read or is of no such dataset; names file, row, value and rule.
    """
    is_workbook = path.suffix.lower() in (".xlsx", ".xlsm", ".xls")
    named = list(datasets or [name for name in TABLES if path.name in WORKBOOKS[name].workbooks])
    if len(named) != 1 or named[0] not in TABLES:
        if not is_workbook:
            return read_clip_list(path)
        raise InputError(
            f"{path}: its dataset must follow from the name, as of {WORKBOOKS[TABLES[0]].workbooks[0]}, or datasets "
            f"must be one of {', '.join(TABLES)}, got {', '.join(named) or 'none'}"
        )
    [name] = named
    scheme = load_scheme(COMPOSITE_SCHEME, [WORKBOOKS[name].dataset])
    adapter = WORKBOOKS[name](root=path.parent, annotations=Path(path.name), scheme=scheme)
    try:
        rows = adapter.rows()
    except InputError as error:
        if is_workbook:
            raise
        try:
            return read_clip_list(path)
        except InputError as other:
            raise InputError(f"{path}: neither an annotation of {name} ({error}) nor a list ({other})") from None
    return _whole(path, {name: [_annotated(adapter, *item) for item in enumerate(rows)]}, table=path)


def _annotated(adapter: WorkbookDataset, index: int, row: Row) -> ListedClip:
    sample, scheme = adapter.sample_of(row), adapter.scheme
    emotion = _if_readable(partial(adapter.emotion_of, row))
    name = None if emotion is None else scheme.words[sample.dataset].get(emotion[0].strip().lower())
    folder = next(iter(adapter.frames_of(row, sample))).relative_to(adapter.root)
    return ListedClip(
        subject=sample.subject,
        clip=sample.clip,
        label=index % len(Emotion) if name is None else scheme.classes.index(name),
        frames=_annotated_frames(adapter, row, folder),
    )


def _annotated_frames(adapter: WorkbookDataset, row: Row, folder: Path) -> ListedFrames:
    """Choose every number that stands there, and a few in between: enough for a flow, and to find an apex by."""
    columns = [name for name in row.cells if name.lower().startswith(("onset", "apex", "offset"))]
    cells = [_if_readable(partial(row.whole, name)) for name in columns]
    stated = [number for number in cells if number is not None]
    interval = _if_readable(partial(adapter.interval_of, row))
    if not isinstance(interval, Interval):
        interval = Interval()
    onset = (stated or [1])[0] if interval.onset is None else interval.onset
    end = onset + 4 if interval.offset is None else interval.offset
    apex = max(onset + 1, (onset + end) // 2) if interval.apex is None else interval.apex
    offset = 2 * apex - onset if interval.offset is None else interval.offset
    numbers = {*stated, onset, (onset + apex) // 2, apex, (apex + offset) // 2, offset}
    return ListedFrames(
        folder=folder,
        numbers=tuple(sorted(number for number in numbers if number >= 0)),
        onset=onset,
        apex=apex,
        offset=max(offset, apex + 1),  # an apex on the offset is still the peak
    )


def _if_readable(read: Callable[[], _T]) -> _T | None:
    try:
        return read()
    except InputError:
        return None


def _whole(path: Path, clips: Mapping[str, Sequence[ListedClip]], table: Path | None = None) -> ClipList:
    if not any(clips.values()):
        raise InputError(f"{path}: must hold at least one clip, got none")
    return ClipList(clips=clips, sha256=checksum(path), table=table)


def read_clip_list(path: Path) -> ClipList:
    """Read a list: dataset, subject, clip, label in each row, header or none.

    Subjects that lost their zeros get them back.

    Raises:
        InputError: a list that cannot be read, a dataset that no list names, a name that is not the dataset's, a label
            that is no class, a clip that stands twice, no clip at all; names file, row, value and rule.
    """
    known = [name for name, layout in LAYOUTS.items() if layout.in_lists]
    clips: dict[str, list[ListedClip]] = defaultdict(list)
    seen: dict[tuple[str, str, str], int] = {}
    for number, sample, label in read_clip_rows(path):
        if sample.dataset not in known:
            raise InputError(f"{path}, row {number}: dataset must be one of {', '.join(known)}, got {sample.dataset!r}")
        if label >= len(Emotion):
            raise InputError(f"{path}, row {number}: label must be in 0..{len(Emotion) - 1}, got {label}")
        try:
            subject, clip = LAYOUTS[sample.dataset].listed_name(sample.subject, sample.clip)
        except ValueError as error:
            raise InputError(f"{path}, row {number}: {error}") from None
        first = seen.setdefault((sample.dataset, subject, clip), number)
        if first != number:
            raise InputError(f"{path}, row {number}: clip {sample} stands in row {first} already")
        clips[sample.dataset].append(ListedClip(subject=subject, clip=clip, label=label))
    return _whole(path, dict(clips))
