"""The work of ``htnet prepare``: the sources' clips by subject, and the recipe that identifies them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from htnet.config import PrepareConfig, SourceConfig
from htnet.config.section import takes_gpu
from htnet.data.datasets import DATASETS, Adapter, build_adapter
from htnet.data.datasets.labels import (
    COMPOSITE_SCHEME,
    COMPOSITE_SIZES,
    OFF_THE_LIST,
    LabelScheme,
    OfficialList,
)
from htnet.data.datasets.schemes import load_scheme
from htnet.data.entries import Entry, GivenLandmarks, LeftOut
from htnet.data.extraction import EXTRACTION_VERSION, recipe_of
from htnet.data.faces.landmarks import LandmarkTable, read_landmarks
from htnet.data.folders import entries_of
from htnet.data.samples import SampleId
from htnet.data.store.manifest import file_stem
from htnet.errors import InputError
from htnet.rules import check_task_device

OFFICIAL_LISTS = ("combined_3class_gt.csv", "gt.csv")
"""Names of the MEGC2019 challenge's list in a dataset folder."""
_LONGEST_NAME = 180
"""Of dataset and subject in a file's name, which has 255 letters at most, those of a temporary file among them."""
_FOLDERS_KEPT = 256
"""Listings in memory: clips of one recording, which an annotation has side by side, share a folder."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Content of the sources, before any picture is decoded."""

    scheme: LabelScheme
    subjects: dict[tuple[str, str], list[Entry]]
    left_out: tuple[LeftOut, ...]
    recipe: dict[str, Any]
    remarks: tuple[str, ...] = ()
    """A line for each table of a source that is not read."""

    @property
    def entries(self) -> list[Entry]:
        """Clips that are to become samples, by subject."""
        return [entry for entries in self.subjects.values() for entry in entries]

    def landmarks(self) -> dict[str, Counter[str]]:
        """Count the clips of each dataset by the table of their landmarks; ``not given`` where they are in none."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in self.entries:
            face = entry.face
            counts[entry.id.dataset][
                f"table {face.table.name}" if isinstance(face, GivenLandmarks) else "not given"
            ] += 1
        return counts


def make_plan(prepare: PrepareConfig, *, only_list: bool = False) -> Plan:
    """Read every annotation; :class:`InputError` for what is wrong with one, or for sources that do not fit together.

    ``only_list``: nothing is to be made of it, and a source whose configuration names no landmark table may lack one.
    """
    if not prepare.sources:
        raise InputError("prepare.sources: at least one source is needed, got none")
    check_task_device(prepare)
    scheme = load_scheme(
        prepare.label_scheme,
        [name for source in prepare.sources for name in DATASETS[source.adapter]],
        find_official_list(prepare),
    )
    subjects: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    places: dict[SampleId, str] = {}
    left_out: list[LeftOut] = []
    facts = []
    sizes: dict[int, str] = {}
    remarks: list[str] = []
    listed = lru_cache(_FOLDERS_KEPT)(_listed)
    for source in prepare.sources:
        adapter = build_adapter(source, scheme)
        remarks += [
            f"{source.root}: {name} is not read; prepare.sources.N.annotations may name it"
            for name in adapter.other_workbooks
        ]
        described = adapter.describe()
        taken: list[Entry] = []
        for entry in adapter.entries():
            if isinstance(entry, LeftOut):
                left_out.append(entry)
                continue
            if entry.id in places:
                raise InputError(f"{entry.place}: clip {entry.id} is in two sources: also {places[entry.id]}")
            places[entry.id] = entry.place
            _check_names(entry)
            taken.append(entry)
        if taken:
            _check_size(prepare, source, adapter.flow_size, sizes)
        table = _landmarks(prepare, source, adapter, taken, only_list=only_list)
        for entry in taken:
            check_landmarks(table, entry)
            subjects[entry.id.dataset, entry.id.subject].append(replace(entry, face=table.face_of(entry.id)))
        facts.append({**described, "landmarks_sha256": table.sha256, "clips_sha256": _identity(taken, listed)})
    if scheme.official is not None:
        left_out += _missing(scheme.official, [*places, *map(identity_of, left_out)])
    recipe = {"sources": facts, "label_scheme": scheme.name, "classes": list(scheme.classes), **recipe_of(prepare)}
    if any(entry.has_frames for entries in subjects.values() for entry in entries):
        recipe["extraction_version"] = EXTRACTION_VERSION
    if scheme.official is not None:  # only then: older stores stay up to date
        recipe["official_list_sha256"] = hashlib.sha256(scheme.official.path.read_bytes()).hexdigest()
    return Plan(
        scheme=scheme,
        subjects=dict(sorted(subjects.items())),
        left_out=tuple(left_out),
        recipe=json.loads(json.dumps(recipe, default=str)),
        remarks=tuple(remarks),
    )


def _check_names(entry: Entry) -> None:
    """Refuse names that no file can have: a subject's shard and a fold's record are named by them."""
    length = len(file_stem(entry.id.dataset)) + len(file_stem(entry.id.subject))
    if length > _LONGEST_NAME:
        raise InputError(
            f"{entry.place}: dataset and subject must have at most {_LONGEST_NAME} letters as parts of a file's name, "
            f"where letters beyond ASCII count several times, got {length}: {entry.id.subject[:40]}..."
        )


def find_official_list(prepare: PrepareConfig) -> Path | None:
    """Name the list that decides what belongs to the composite: the configuration's, else one in a source's folder.

    Raises:
        InputError: several folders hold one.
    """
    if prepare.official_list is not None:
        return Path(prepare.official_list)
    if prepare.label_scheme != COMPOSITE_SCHEME:
        return None
    roots = dict.fromkeys(Path(source.root) for source in prepare.sources)
    found = [root / name for root in roots for name in OFFICIAL_LISTS if (root / name).is_file()]
    if len(found) > 1:
        raise InputError(f"prepare.official_list: name one of {' and '.join(map(str, found))}")
    for path in found:
        try:
            OfficialList.read(path)
        except InputError as error:
            raise InputError(
                f"{error}; it is taken for the official list because it lies in a source's folder, another may be "
                "named by prepare.official_list"
            ) from None
    return found[0] if found else None


def _missing(official: OfficialList, annotated: Collection[SampleId]) -> list[LeftOut]:
    """Clips of the list that no source has, though one has others of their dataset.

    Raises:
        InputError: the list has none of the sources' datasets.
    """
    datasets = dict.fromkeys(sample.dataset for sample in annotated)
    if datasets and not any(map(official.covers, datasets)):
        raise InputError(
            f"{official.path}: the official list must have a dataset of the sources, {', '.join(datasets)}, got "
            f"{', '.join(dict.fromkeys(clip.id.dataset for clip in official.clips.values())) or 'no clip'}"
        )
    return [
        LeftOut(
            clip=str(clip.id), rule=OFF_THE_LIST, reason="is on the list, but in no source", failed=True,
            place=f"{official.path}, row {clip.row}",
        )
        for clip in official.missing(annotated)
    ]  # fmt: skip


def composite_lines(scheme: LabelScheme, samples: Collection[SampleId], left_out: Sequence[LeftOut]) -> list[str]:
    """Say how samples stand to the official list, and to the size of the MEGC2019 composite."""
    lines = []
    official = scheme.official
    if official is not None:
        there = set(samples)
        gone = [item.clip for item in left_out if official.find(sample := identity_of(item)) and sample not in there]
        seen = {sample.dataset for sample in [*there, *map(identity_of, left_out)]}
        over, absent = ", ".join(filter(official.covers, sorted(seen))), ", ".join(official.without(seen))
        lines.append(f"official list: {official.path} decides over {over}{absent and f'; no source has its {absent}'}")
        lines.append(f"official list: left out of it: {', '.join(gone)}" if gone else "official list: agrees")
    counts = Counter(sample.dataset for sample in samples)
    other = [
        f"{name} {counts[name]} of {size}" for name, size in COMPOSITE_SIZES.items() if counts[name] not in (0, size)
    ]
    if scheme.name == COMPOSITE_SCHEME and other:
        hint = "" if official else "; only its list says which clips belong to it: prepare.official_list"
        lines.append(f"not the composite of MEGC2019: {', '.join(other)}{hint}")
    return lines


def identity_of(item: LeftOut) -> SampleId:
    """Identity of the clip that is left out."""
    dataset, subject, clip = item.clip.split("/", 2)
    return SampleId(dataset=dataset, subject=subject, clip=clip)


def _check_size(prepare: PrepareConfig, source: SourceConfig, published: int | None, sizes: dict[int, str]) -> None:
    """Refuse sources whose flow images differ in size; ``sizes`` says which source has which, and grows."""
    size = prepare.flow_size if published is None else published
    how = "are made with prepare.flow_size" if published is None else "come with"
    sizes.setdefault(size, f"those of {source.root} ({source.adapter}) {how} {size}")
    if len(sizes) > 1:
        raise InputError(f"prepare.sources: flow images of one store have one size: {', '.join(sizes.values())}")


def check_landmarks(table: LandmarkTable, entry: Entry) -> None:
    """Refuse landmarks of another kind than the entry needs: of the frame, or of the flow picture."""
    if not entry.has_frames and table.flow_size is None:
        raise InputError(
            f"{table.path}: landmarks in pixels of a frame, but {entry.place} comes without frames: columns such "
            "as left_eye_x_upstream28, in pixels of the flow picture, are needed"
        )
    if entry.has_frames and table.flow_size is not None:
        raise InputError(f"{table.path}: landmarks must be in pixels of the onset frame, these are of a flow image")


def _identity(entries: Sequence[Entry], listed: Callable[[Path], bytes]) -> str:
    """Digest what tells that clips are read otherwise, or frames were added or exchanged: names, sizes.

    To read all frames would be the work itself.
    """
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(entry.identity(listed))
    return digest.hexdigest()


def _listed(frames: Path) -> bytes:
    """Names and sizes of a folder's frames, or of a video."""
    files = sorted(entries_of(frames)) if frames.is_dir() else [frames]
    return repr([(file.name, _size(file)) for file in files]).encode()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a link to nowhere: the clip's own task says so, if the frame is one that it needs
        return -1


def _landmarks(
    prepare: PrepareConfig, source: SourceConfig, adapter: Adapter, taken: Sequence[Entry], *, only_list: bool
) -> LandmarkTable:
    """Read the source's table; empty where there is none and a detector finds the faces, or nobody looks for them."""
    path = Path(source.root) / adapter.landmarks_file
    if source.landmarks is not None:
        path = Path(source.landmarks)
    elif not path.exists() and (only_list or (prepare.detector != "none" and adapter.flow_size is None)):
        return LandmarkTable(path=path, points={}, flow_size=adapter.flow_size)
    return read_landmarks(path, taken)


def flow_device(prepare: PrepareConfig) -> str:
    """Name the device on which flow is computed, ``cpu`` or ``cuda``."""
    return "cuda" if takes_gpu(prepare.device, prepare.gpus_per_task) else "cpu"
