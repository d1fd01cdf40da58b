"""The store's table: one row per sample, with the byte ranges of its members in their shard.

Members beyond :data:`MEMBERS` (frames beside onset and apex) are in a column of their own, which only a table of a
store that keeps some has; the others, of before and of now, are without it. Frame numbers of stores of before are of 32
bits; read and digested they are the same.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from htnet.data.samples import LANDMARK_NAMES, Landmarks, Sample, SampleId
from htnet.errors import InputError

MEMBERS = ("flow.npy", "onset.jpg", "apex.jpg")
"""Members that a sample can have, by the name after its key; only the first is always there."""
NEIGHBOURS = "neighbours"
"""Column of the other members."""

_RANGE_FIELDS = [("start", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())]
_RANGE = pa.struct(_RANGE_FIELDS)
_NAMED_RANGES = pa.list_(pa.struct([("name", pa.string()), *_RANGE_FIELDS]))
SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("subject", pa.string()),
        ("clip", pa.string()),
        ("label", pa.int8()),
        ("emotion", pa.string()),
        *((name, pa.int64()) for name in ("onset", "apex", "offset")),  # 32 bits do not hold a time stamp
        ("fps", pa.float32()),
        ("flow_size", pa.int32()),
        ("landmarks", pa.list_(pa.float32(), 2 * len(LANDMARK_NAMES))),
        ("shard", pa.string()),
        *((member, _RANGE) for member in MEMBERS),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """Place of a member's bytes in its shard, and their SHA-256."""

    start: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """A sample and where it is: ``members`` by name, e.g. ``flow.npy``."""

    sample: Sample
    shard: str
    members: dict[str, ByteRange]


def file_stem(name: str) -> str:
    """Turn a subject's or clip's name into a file name stem: no separator, no dot; ordinary names stay."""
    return quote(name, safe="").replace(".", "%2E")


def write_manifest(path: Path, rows: Sequence[ManifestRow]) -> None:
    """Write the rows as Parquet; the same rows give the same bytes."""
    records = [to_record(row) for row in rows]
    wider = any(NEIGHBOURS in record for record in records)
    schema = SCHEMA.append(pa.field(NEIGHBOURS, _NAMED_RANGES)) if wider else SCHEMA
    table = pa.Table.from_pylist(records, schema=schema)
    pq.write_table(table, path, compression="zstd", version="2.6")


def read_manifest(path: Path) -> tuple[ManifestRow, ...]:
    """Read a manifest; raises :class:`InputError` when it is missing, damaged or has other columns or values."""
    try:
        # without threads, Arrow's for input and output too: a program that ends at once, on bad input, would be aborted
        # while they start
        with pq.ParquetFile(io.BytesIO(path.read_bytes()), pre_buffer=False) as file:
            table = file.read(use_threads=False)
    except FileNotFoundError:
        raise InputError(f"{path}: the store has no manifest; make it again with htnet prepare") from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from None
    missing = [name for name in SCHEMA.names if name not in table.schema.names]
    if missing:
        raise InputError(f"{path}: missing column(s) {', '.join(missing)}")
    try:
        return tuple(from_record(record, path) for record in table.to_pylist())
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: holds a row that is no sample: {error}") from None


def manifest_digest(rows: Sequence[ManifestRow]) -> str:
    """Identity of a store's content: every sample's id, label, landmarks and checksums, in order."""
    digest = hashlib.sha256()
    for row in rows:
        record = to_record(row)
        names = (*SCHEMA.names, NEIGHBOURS) if NEIGHBOURS in record else SCHEMA.names
        digest.update(repr([record[name] for name in names]).encode())
    return digest.hexdigest()


def to_record(row: ManifestRow) -> dict[str, Any]:
    """Return a row as plain values, by the names of :data:`SCHEMA`, and :data:`NEIGHBOURS` where there are any."""
    sample = row.sample
    others = [{"name": name, **vars(row.members[name])} for name in sorted(row.members) if name not in MEMBERS]
    members = {name: vars(row.members[name]) if name in row.members else None for name in MEMBERS}
    return {
        "dataset": sample.id.dataset,
        "subject": sample.id.subject,
        "clip": sample.id.clip,
        "label": sample.label,
        "emotion": sample.emotion,
        "onset": sample.onset,
        "apex": sample.apex,
        "offset": sample.offset,
        "fps": sample.fps,
        "flow_size": sample.flow_size,
        "landmarks": [float(value) for point in sample.landmarks for value in point],
        "shard": row.shard,
        **members,
        **({NEIGHBOURS: others} if others else {}),
    }


def from_record(record: dict[str, Any], path: Path) -> ManifestRow:
    """Return the row of plain values; ``path`` is named in the error where a shard leads out of the store."""
    points = record["landmarks"]
    landmarks: Landmarks = tuple(zip(points[0::2], points[1::2], strict=True))
    shard = str(record["shard"])
    if Path(shard).is_absolute() or ".." in Path(shard).parts:
        raise InputError(f"{path}: shard {shard!r} leads out of the store")
    try:
        name = SampleId(dataset=record["dataset"], subject=record["subject"], clip=record["clip"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    sample = Sample(
        id=name,
        landmarks=landmarks,
        **{name: record[name] for name in ("label", "flow_size", "onset", "apex", "offset", "fps", "emotion")},
    )
    members = {name: ByteRange(**record[name]) for name in MEMBERS if record[name] is not None}
    for entry in record.get(NEIGHBOURS) or ():
        members[entry["name"]] = ByteRange(**{name: entry[name] for name in ("start", "bytes", "sha256")})
    return ManifestRow(sample=sample, shard=shard, members=members)
