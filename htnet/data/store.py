"""The prepared store: one tar per subject, a manifest with byte ranges, a record of how it was made.

A store appears whole or not at all: it is written to ``.<name>.partial`` beside its final place,
synced, and renamed; ``.<name>.lock`` keeps a second writer out. What a killed writer leaves of the two
is removed by the next one. Two stores made from the same input are byte-identical. Format::

    STORE/store.json          format version, recipe, digest, size of every shard
    STORE/manifest.parquet    htnet.data.manifest
    STORE/shards/<dataset>/<subject>.tar    WebDataset-style members <clip>.flow.npy, <clip>.json, ...
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from htnet.data.manifest import (
    MEMBERS,
    ByteRange,
    ManifestRow,
    file_stem,
    manifest_digest,
    read_manifest,
    write_manifest,
)
from htnet.data.prepared import PreparedSample
from htnet.data.types import Sample
from htnet.errors import InputError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Store:
    """An opened store; ``rows`` are in the manifest's order."""

    path: Path
    rows: tuple[ManifestRow, ...]
    digest: str
    recipe: dict[str, Any]

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(row.sample for row in self.rows)

    def read_member(self, row: int, member: str) -> bytes:
        """Bytes of a sample's member, checked against the manifest; InputError names a damaged one."""
        entry = self.rows[row]
        if member not in entry.members:
            raise InputError(f"{self.path}: sample {entry.sample.id} has no {member}")
        where = entry.members[member]
        try:
            with (self.path / entry.shard).open("rb") as shard:
                shard.seek(where.start)
                data = shard.read(where.bytes)
        except OSError as error:
            raise InputError(f"{self.path / entry.shard}: cannot be read: {error.strerror}") from None
        if len(data) != where.bytes or hashlib.sha256(data).hexdigest() != where.sha256:
            raise InputError(
                f"{self.path / entry.shard}: {member} of {entry.sample.id} is damaged: its checksum differs"
            )
        return data

    def read_flow(self, row: int) -> NDArray[np.float16]:
        """Flow image of a sample, (F, F, 3) float16, channels (flow_u, flow_v, strain)."""
        return decode_flow(self.read_member(row, "flow.npy"))


def decode_flow(data: bytes) -> NDArray[np.float16]:
    """The array in a ``flow.npy`` member; pickled arrays are refused."""
    image: NDArray[np.float16] = np.load(io.BytesIO(data), allow_pickle=False)
    return image


def open_store(path: Path) -> Store:
    """Open a store and check its version, manifest and the sizes of its shards; InputError names what is wrong."""
    if path.is_file():
        raise InputError(f"{path}: is a file; a store is a folder that htnet prepare writes")
    if not path.is_dir():
        raise InputError(f"{path}: no such store; make it with htnet prepare")
    record = _read_record(path / "store.json")
    rows = read_manifest(path / "manifest.parquet")
    digest = manifest_digest(rows)
    if digest != record.get("digest"):
        raise InputError(
            f"{path / 'manifest.parquet'}: does not belong to this store: its digest differs from store.json's"
        )
    for name in dict.fromkeys(row.shard for row in rows):
        if name not in record["shards"]:
            raise InputError(f"{path / 'store.json'}: does not list the shard {name}, which the manifest names")
    for name, size in record["shards"].items():
        shard = path / name
        if not shard.is_file():
            raise InputError(f"{shard}: shard is missing")
        if shard.stat().st_size != size:
            raise InputError(f"{shard}: truncated or changed shard: {shard.stat().st_size} bytes, expected {size}")
    return Store(path=path, rows=rows, digest=digest, recipe=record["recipe"])


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format"]
    except FileNotFoundError:
        raise InputError(f"{path}: not found; this folder is not a store") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a store record: {error!r}") from None
    if not isinstance(version, int) or version < 1:
        raise InputError(f"{path}: not a store record: format must be a whole number from 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path}: store format {version} is newer than this htnet reads ({FORMAT_VERSION}); update htnet"
        )
    if not isinstance(record.get("shards"), dict) or not isinstance(record.get("recipe"), dict):
        raise InputError(f"{path}: not a store record: 'shards' and 'recipe' must be mappings")
    return dict(record)


def write_store(path: Path, samples: Iterator[PreparedSample], recipe: Mapping[str, Any]) -> Store:
    """Write a store from samples in any order.

    Raises :class:`InputError` for a clip given twice, a flow image that is not finite, no sample at all, a
    ``path`` that is taken or cannot be written to, and while another process writes there; then nothing is
    left behind.

    Held in memory: the samples. The shards are sorted by dataset and subject, samples keep their order.
    """
    collected: dict[tuple[str, str], list[PreparedSample]] = {}
    for item in samples:
        siblings = collected.setdefault((item.sample.id.dataset, item.sample.id.subject), [])
        if any(other.sample.id.clip == item.sample.id.clip for other in siblings):
            raise InputError(f"{item.sample.id}: duplicate clip: it is listed twice")
        _check_image(item)
        siblings.append(item)
    if not collected:
        raise InputError(f"{path}: the sources hold no sample; a store needs at least one")
    with _partial_folder(path) as partial:
        rows: list[ManifestRow] = []
        for (dataset, subject), items in sorted(collected.items()):
            name = f"shards/{file_stem(dataset)}/{file_stem(subject)}.tar"
            rows.extend(_write_shard(partial, name, items))
        write_manifest(partial / "manifest.parquet", rows)
        _write_record(partial, rows, recipe)
    return open_store(path)


def _check_image(item: PreparedSample) -> None:
    """What would end a fold in its fortieth epoch is found here."""
    image, expected = item.flow_image, (item.sample.flow_size, item.sample.flow_size, 3)
    if image.shape != expected or image.dtype != np.float16:
        raise InputError(f"{item.sample.id}: flow image must be {expected} float16, got {image.shape} {image.dtype}")
    if not np.isfinite(image).all():
        raise InputError(f"{item.sample.id}: flow image must be finite, got NaN or infinity")
    if not np.isfinite(item.sample.landmarks).all():
        raise InputError(f"{item.sample.id}: landmarks must be finite, got {item.sample.landmarks}")


def remove_leftovers(path: Path) -> None:
    """Remove what a killed writer of ``path`` left beside it, unless a writer is at work; never raises."""
    partial, lock = _beside(path)
    if partial.exists() or lock.exists():
        with contextlib.suppress(InputError, OSError), _locked(lock):
            shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.parent / f".{path.name}.partial", path.parent / f".{path.name}.lock"


@contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A folder that becomes ``path`` when the block ends; leftovers of a killed run are replaced."""
    partial, lock = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(lock):
            if os.path.lexists(path):
                raise InputError(f"{path}: is there already; remove it or choose another --out")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                yield partial
                _sync_tree(partial)
                partial.rename(path)
                # some network file systems cannot sync a folder
                with contextlib.suppress(OSError):
                    _sync(path.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:  # no right to write, a full disk, a name that the file system cannot hold
        raise InputError(f"{path}: the store cannot be written: {error}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes out; the file is removed at the end, a kill frees the lock and leaves the file."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the holder before us removes the file when it ends: a lock on the removed one guards nothing
            held = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise InputError(f"{path}: another htnet prepare is writing this store; wait for it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _write_shard(root: Path, name: str, items: Sequence[PreparedSample]) -> list[ManifestRow]:
    target = root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    checksums: dict[str, str] = {}
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for item in items:
            for member, data in _members(item):
                info = tarfile.TarInfo(f"{file_stem(item.sample.id.clip)}.{member}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                checksums[info.name] = hashlib.sha256(data).hexdigest()
    with tarfile.open(target, "r:") as tar:
        ranges = {
            info.name: ByteRange(start=info.offset_data, bytes=info.size, sha256=checksums[info.name]) for info in tar
        }
    return [
        ManifestRow(
            sample=item.sample,
            shard=name,
            members={m: ranges[key] for m in MEMBERS if (key := f"{file_stem(item.sample.id.clip)}.{m}") in ranges},
        )
        for item in items
    ]


def _members(item: PreparedSample) -> Iterator[tuple[str, bytes]]:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(item.flow_image), allow_pickle=False)
    yield "flow.npy", buffer.getvalue()
    yield from item.frames
    facts = {"dataset": item.sample.id.dataset, "subject": item.sample.id.subject, "clip": item.sample.id.clip}
    yield "json", json.dumps({**facts, "label": item.sample.label}, sort_keys=True).encode()


def _write_record(root: Path, rows: Sequence[ManifestRow], recipe: Mapping[str, Any]) -> None:
    record = {
        "format": FORMAT_VERSION,
        "digest": manifest_digest(read_manifest(root / "manifest.parquet")),
        "samples": len(rows),
        "subjects": len({row.sample.subject for row in rows}),
        "shards": {name: (root / name).stat().st_size for name in sorted({row.shard for row in rows})},
        "recipe": dict(recipe),
    }
    (root / "store.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(Path(folder) / name)
        with contextlib.suppress(OSError):
            _sync(Path(folder))
