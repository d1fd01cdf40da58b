"""The prepared store: one tar per subject, a manifest with byte ranges, a record of how it was made.

A store appears whole or not at all: it is written into ``.<name>.partial`` beside its final place, a subject at a time,
synced, and renamed; ``.<name>.lock`` keeps a second writer out. A writer that follows a killed one goes on with the
subjects that are whole. Two stores made from the same input are byte-identical. In the making::

    .STORE.partial/parts/recipe.txt                  what is being made, and with what
    .STORE.partial/parts/<dataset>/<subject>.json    a part record: this subject is done
    .STORE.partial/store/                            becomes STORE

The format is described in :mod:`htnet.data.store.reader`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from htnet.data.samples import UNLABELLED, Sample
from htnet.data.store.manifest import (
    MEMBERS,
    ByteRange,
    ManifestRow,
    file_stem,
    from_record,
    manifest_digest,
    read_manifest,
    to_record,
    write_manifest,
)
from htnet.data.store.reader import FORMAT_VERSION, Store, open_store
from htnet.errors import InputError
from htnet.files import csv_text, locked, move_folder, write_whole

LEFT_OUT_COLUMNS = ("clip", "rule", "reason", "place", "failed")
"""``clip`` is dataset/subject/clip; ``failed`` is true where something is wrong with the files."""


@dataclass(frozen=True, kw_only=True)
class PreparedSample:
    """A sample and its flow image.

    ``flow_image`` is (F, F, 3) float16, channels (flow_u, flow_v, strain). ``frames`` are the encoded onset and apex
    pictures where they are kept, and those beside them, by member name (:mod:`htnet.data.store.frames`). ``sources``
    says what it was made from: checksums of the frames, and how the landmarks were found; ``notes`` are the rules by
    which the clip was read otherwise than its annotation stands, or its apex was found. Both go into the sample's json
    member.
    """

    sample: Sample
    flow_image: NDArray[np.float16]
    frames: tuple[tuple[str, bytes], ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Staging:
    """A store in the making, ``.<name>.partial`` beside its final place.

    A subject is written whole by :func:`write_part`, in any process and order; what is written stays over an
    interruption, and :meth:`done` tells the next run. :meth:`finish` makes the store of it.
    """

    path: Path
    """Place of the finished store."""
    folder: Path
    recipe: Mapping[str, Any]
    replaced_partial: bool = False
    """True if an unfinished store of another kind was removed."""
    unlocked: str | None = None
    """Reason for which nothing keeps a second writer out; None where the lock is held."""

    def done(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Part records by (dataset, subject), sorted: rows, left_out, seconds, notes.

        A record that cannot be read, or whose shard is not as it says, counts as none: the subject is made again.
        """
        parts = (self._part(path) for path in (self.folder / "parts").glob("*/*.json"))
        return dict(sorted(((part["dataset"], part["subject"]), part) for part in parts if part is not None))

    def _part(self, path: Path) -> dict[str, Any] | None:
        try:
            part: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if part["shard"] is not None:
                name, size = part["shard"]
                if (self.folder / "store" / name).stat().st_size != size:
                    return None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return part

    def discard(self) -> None:
        """Remove everything; nothing is left behind."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, left_out: Sequence[Mapping[str, object]] = ()) -> Store:
        """Write the manifest, ``left_out.csv`` (:data:`LEFT_OUT_COLUMNS`) and the record, and rename.

        Raises:
            InputError: there is no sample.
        """
        rows = [from_record(record, self.path) for part in self.done().values() for record in part["rows"]]
        if not rows:
            raise InputError(f"{self.path}: the sources hold no sample; a store needs at least one")
        whole = self.folder / "store"
        write_manifest(whole / "manifest.parquet", rows)
        rows_left_out = ([_cell(item[name]) for name in LEFT_OUT_COLUMNS] for item in left_out)
        (whole / "left_out.csv").write_text(csv_text([LEFT_OUT_COLUMNS, *rows_left_out]), encoding="utf-8", newline="")
        _write_record(whole, rows, self.recipe)
        move_folder(whole, self.path)
        self.discard()
        return open_store(self.path)


def _cell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def staging(path: Path, recipe: Mapping[str, Any], made_with: Mapping[str, Any] | None = None) -> Iterator[Staging]:
    """Open the unfinished store at ``path``; parts that an interrupted run of the same kind wrote are kept.

    Args:
        recipe: what decides the content; goes into the store.
        made_with: what may change its last bits (versions, device). Parts made with something else are made again, but
            a store that is there is not another store for it.

    Raises:
        InputError: ``path`` is taken or cannot be written to, or another process writes there.
    """
    partial, lock = _beside(path)
    text = json.dumps({"recipe": dict(recipe), "made_with": dict(made_with or {})}, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, _busy(lock)) as unlocked:
            if os.path.lexists(path):
                raise InputError(f"{path}: is there already; remove it or choose another --out")
            mark = partial / "parts" / "recipe.txt"
            going_on = _same_text(mark, text)
            replaced = not going_on and mark.exists()
            if not going_on:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "parts").mkdir(parents=True)
                (partial / "store").mkdir()
                write_whole(mark, text)
            yield Staging(path=path, folder=partial, recipe=recipe, replaced_partial=replaced, unlocked=unlocked)
    except OSError as error:  # no right to write, a full disk, a name that the file system cannot hold
        raise InputError(f"{path}: the store cannot be written: {error}") from None


def _same_text(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def write_part(
    folder: Path,
    dataset: str,
    subject: str,
    items: Sequence[PreparedSample],
    left_out: Sequence[Mapping[str, Any]] = (),
    seconds: Mapping[str, float] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a subject's shard and its part record into the folder of a :class:`Staging`; each whole or not at all.

    ``left_out``, ``seconds`` and ``notes`` go into the part record as they are.

    Raises:
        InputError: a clip without a label or given twice, a flow image that is not finite or of another shape.
    """
    seen: set[str] = set()
    for item in items:
        if item.sample.label == UNLABELLED:
            raise InputError(f"{item.sample.id}: the clip has no label, which a store needs")
        if item.sample.id.clip in seen:
            raise InputError(f"{item.sample.id}: duplicate clip: it is listed twice")
        seen.add(item.sample.id.clip)
        _check_image(item)
    name = f"shards/{file_stem(dataset)}/{file_stem(subject)}.tar"
    rows = _write_shard(folder, name, items) if items else []
    part = {
        "dataset": dataset,
        "subject": subject,
        "shard": [name, (folder / "store" / name).stat().st_size] if items else None,
        "rows": [to_record(row) for row in rows],
        "left_out": list(left_out),
        "seconds": dict(seconds or {}),
        "notes": dict(notes or {}),
    }
    target = folder / "parts" / file_stem(dataset) / f"{file_stem(subject)}.json"
    target.parent.mkdir(exist_ok=True)
    write_whole(target, json.dumps(part))


def write_store(path: Path, samples: Iterator[PreparedSample], recipe: Mapping[str, Any]) -> Store:
    """Write a store from samples in any order.

    Raises :class:`InputError` for a clip given twice, a flow image that is not finite, no sample at all, a
    ``path`` that is taken or cannot be written to, and while another process writes there; then nothing is
    left behind.

    Held in memory: the samples. The shards are sorted by dataset and subject, samples keep their order.
    """
    collected: dict[tuple[str, str], list[PreparedSample]] = {}
    for item in samples:
        collected.setdefault((item.sample.id.dataset, item.sample.id.subject), []).append(item)
    with staging(path, recipe) as stage:
        try:
            for (dataset, subject), items in sorted(collected.items()):
                write_part(stage.folder, dataset, subject, items)
            return stage.finish()
        except BaseException:
            stage.discard()
            raise


def _check_image(item: PreparedSample) -> None:
    """Refuse here what would end a fold in its fortieth epoch."""
    image, expected = item.flow_image, (item.sample.flow_size, item.sample.flow_size, 3)
    if image.shape != expected or image.dtype != np.float16:
        raise InputError(f"{item.sample.id}: flow image must be {expected} float16, got {image.shape} {image.dtype}")
    if not np.isfinite(image).all():
        raise InputError(f"{item.sample.id}: flow image must be finite, got NaN or infinity")
    if not np.isfinite(item.sample.landmarks).all():
        raise InputError(f"{item.sample.id}: landmarks must be finite, got {item.sample.landmarks}")


def remove_leftovers(path: Path) -> None:
    """Remove what a killed writer of a finished ``path`` left beside it, unless a writer is at work; never raises.

    Where the file system has no locks nobody can tell, and it stays.
    """
    partial, lock = _beside(path)
    if partial.exists() or lock.exists():
        with contextlib.suppress(InputError, OSError), locked(lock, _busy(lock)) as unlocked:
            if unlocked is None:
                shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.parent / f".{path.name}.partial", path.parent / f".{path.name}.lock"


def _busy(lock: Path) -> str:
    return f"{lock}: another htnet prepare is writing this store; wait for it"


def _write_shard(folder: Path, name: str, items: Sequence[PreparedSample]) -> list[ManifestRow]:
    target = folder / "store" / name
    # not with parents: a task that a refused run left behind must not bring back the folder that was removed
    for folder_of in (target.parent.parent, target.parent):
        folder_of.mkdir(exist_ok=True)
    checksums: dict[str, str] = {}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for item in items:
            for member, data in _members(item):
                info = tarfile.TarInfo(f"{file_stem(item.sample.id.clip)}.{member}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                checksums[info.name] = hashlib.sha256(data).hexdigest()
    buffer.seek(0)
    with tarfile.open(fileobj=buffer, mode="r:") as tar:
        ranges = {
            info.name: ByteRange(start=info.offset_data, bytes=info.size, sha256=checksums[info.name]) for info in tar
        }
    # what a killed writer leaves must not lie among the shards
    write_whole(target, buffer.getvalue(), beside=folder / "parts")
    return [
        ManifestRow(
            sample=item.sample,
            shard=name,
            members={m: ranges[f"{file_stem(item.sample.id.clip)}.{m}"] for m in ("flow.npy", *dict(item.frames))},
        )
        for item in items
    ]


def _members(item: PreparedSample) -> Iterator[tuple[str, bytes]]:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(item.flow_image), allow_pickle=False)
    yield "flow.npy", buffer.getvalue()
    yield from item.frames
    facts = {**vars(item.sample.id), "label": item.sample.label, "notes": list(item.notes), **item.sources}
    yield "json", json.dumps(facts, sort_keys=True).encode()


def _write_record(root: Path, rows: Sequence[ManifestRow], recipe: Mapping[str, Any]) -> None:
    record = {
        "format": FORMAT_VERSION if any(row.members.keys() - set(MEMBERS) for row in rows) else 1,
        "digest": manifest_digest(read_manifest(root / "manifest.parquet")),
        "samples": len(rows),
        "subjects": len({row.sample.subject for row in rows}),
        "shards": {name: (root / name).stat().st_size for name in sorted({row.shard for row in rows})},
        "recipe": dict(recipe),
    }
    (root / "store.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
