"""A list of clips, such as the MEGC2019 composite's, that synthetic datasets are built to."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from htnet.data.labels import read_clip_rows
from htnet.data.synth_layouts import LAYOUTS
from htnet.data.types import Emotion
from htnet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ListedClip:
    """A clip of a list: identity as an adapter should give it, and its class."""

    subject: str
    clip: str
    label: int


@dataclass(frozen=True, kw_only=True)
class ClipList:
    """A list by layout, in its order. ``sha256``: of the file."""

    clips: Mapping[str, Sequence[ListedClip]]
    sha256: str


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
    if not clips:
        raise InputError(f"{path}: must hold at least one clip, got none")
    return ClipList(clips=dict(clips), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
