"""The prepared store, read: its manifest, the samples' members, and the clips that were left out of it.

Format::

    STORE/store.json          format version, recipe, digest, size of every shard
    STORE/manifest.parquet    htnet.data.store.manifest
    STORE/left_out.csv        clips that are no samples: htnet.data.store.writer.LEFT_OUT_COLUMNS
    STORE/shards/<dataset>/<subject>.tar    WebDataset-style members <clip>.flow.npy, <clip>.json, ...

Format 2 is format 1 with frames beside onset and apex (:mod:`htnet.data.store.frames`); a store without any is written
as format 1, which earlier versions read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from htnet.data.samples import Emotion, Sample
from htnet.data.store.manifest import ManifestRow, manifest_digest, read_manifest
from htnet.errors import InputError

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Store:
    """An opened store; ``rows`` are in the manifest's order."""

    path: Path
    rows: tuple[ManifestRow, ...]
    digest: str
    recipe: dict[str, Any]

    @property
    def address(self) -> str | tuple[str, ...]:
        """Absolute path, as ``data.store`` may name it; of several stores read as one, all paths."""
        return str(self.path.resolve())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels; of stores that do not say, the three of the MEGC2019 composite."""
        return tuple(self.recipe.get("classes", (emotion.name.lower() for emotion in Emotion)))

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(row.sample for row in self.rows)

    def is_published_picture(self, row: int) -> bool:
        """Tell if a sample's channels were stretched to 0..255 by the dataset's authors, so that u and v are no pixels.

        Of sources that say so, only what comes without frames, and so without an onset, is such a picture.
        """
        sources = self.recipe.get("sources")
        flows = [one.get("flow") for one in sources if isinstance(one, dict)] if isinstance(sources, list) else []
        return self.samples[row].onset is None and any(isinstance(one, dict) and "scaling" in one for one in flows)

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
    """Decode the array in a ``flow.npy`` member; pickled arrays are refused."""
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


def read_left_out(store: Store) -> tuple[dict[str, str], ...]:
    """Rows of a store's ``left_out.csv``; none where the store has no such file, as those of before had not."""
    path = store.path / "left_out.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return tuple(csv.DictReader(file))
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
