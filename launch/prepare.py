"""``htnet prepare``: raw dataset folders to a store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from htnet.config import Config, PrepareConfig, SourceConfig
from htnet.config_io import to_plain
from htnet.data.adapters import build_adapter
from htnet.data.prepared import Adapter, PreparedSample
from htnet.data.store import Store, open_store, write_store
from htnet.data.types import Emotion
from htnet.errors import InputError


def prepare(config: Config, out: Path, console: Console) -> Store:
    """Make the store that ``config.prepare`` describes, or keep the one that was made so already."""
    adapters = _adapters(config.prepare)
    recipe: dict[str, Any] = {"sources": [_plain(adapter.describe()) for adapter in adapters]}
    recipe["prepare"] = {key: value for key, value in to_plain(config.prepare).items() if key != "sources"}
    if out.exists():
        store = open_store(out)
        if store.recipe != recipe:
            raise InputError(
                f"{out}: a store made from other input or settings is there; remove it or choose another --out"
            )
        console.print(f"{out} is up to date: {len(store.rows)} samples")
        return store
    store = write_store(out, _all_samples(adapters), recipe)
    _print_counts(store, adapters, console)
    return store


def check_sources(config: Config) -> list[str]:
    """A line per source, after the checks that need no picture to be read."""
    return [
        f"{source.adapter}: {source.root}: {json.dumps(_plain(adapter.describe()))}"
        for source, adapter in zip(config.prepare.sources, _adapters(config.prepare), strict=True)
    ]


def _adapters(prepare: PrepareConfig) -> list[Adapter]:
    if not prepare.sources:
        raise InputError("prepare.sources: at least one source is needed, got none")
    return [_adapter(source, prepare) for source in prepare.sources]


def _adapter(source: SourceConfig, prepare: PrepareConfig) -> Adapter:
    root = Path(source.root)
    if not root.is_dir():
        raise InputError(f"prepare.sources: {root}: no such folder (adapter {source.adapter})")
    return build_adapter(source, prepare)


def _all_samples(adapters: list[Adapter]) -> Iterator[PreparedSample]:
    for adapter in adapters:
        yield from adapter.samples()


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that recipes compare equal after a round trip."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _print_counts(store: Store, adapters: list[Adapter], console: Console) -> None:
    table = Table(title=f"{store.path}")
    for column in ("dataset", "subjects", "samples", *(emotion.name.lower() for emotion in Emotion)):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    datasets = list(dict.fromkeys(sample.id.dataset for sample in store.samples))
    for name in (*datasets, "all"):
        chosen = [sample for sample in store.samples if name in (sample.id.dataset, "all")]
        classes = Counter(sample.label for sample in chosen)
        subjects = len({sample.subject for sample in chosen})
        table.add_row(name, str(subjects), str(len(chosen)), *(str(classes[label]) for label in Emotion))
    console.print(table)
    for adapter in adapters:
        for clip, reason in getattr(adapter, "skipped", ()):
            console.print(f"left out: {clip}: {reason}", highlight=False)
