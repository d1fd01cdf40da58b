"""``htnet prepare``: raw dataset folders to a store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from htnet.config import Config, PrepareConfig, SourceConfig
from htnet.config_io import changed_keys, to_plain
from htnet.data.adapters import build_adapter
from htnet.data.prepared import Adapter, PreparedSample
from htnet.data.store import Store, open_store, remove_leftovers, write_store
from htnet.data.types import Emotion
from htnet.errors import InputError


def prepare(config: Config, out: Path, console: Console) -> Store:
    """Make the store that ``config.prepare`` describes, or keep the one that was made so already."""
    adapters = _adapters(config.prepare)
    recipe = _recipe(config.prepare, adapters)
    store = _made_before(out, recipe)
    remove_leftovers(out)
    if store is not None:
        _say(console, _up_to_date(store))
        return store
    store = write_store(out, _all_samples(adapters), recipe)
    _print_counts(store, adapters, console)
    return store


def plan(config: Config, out: Path) -> list[str]:
    """What :func:`prepare` would do, a line per source and one for the store; no picture is decoded."""
    adapters = _adapters(config.prepare)
    recipe = _recipe(config.prepare, adapters)
    store = _made_before(out, recipe)
    sources = [
        f"{source.adapter}: {source.root}: {json.dumps(facts)}"
        for source, facts in zip(config.prepare.sources, recipe["sources"], strict=True)
    ]
    return [*sources, f"would write {out}" if store is None else _up_to_date(store)]


def _recipe(prepare: PrepareConfig, adapters: list[Adapter]) -> dict[str, Any]:
    settings = {key: value for key, value in to_plain(prepare).items() if key != "sources"}
    return {"sources": [_plain(adapter.describe()) for adapter in adapters], "prepare": settings}


def _made_before(out: Path, recipe: dict[str, Any]) -> Store | None:
    """The store at ``out``, None where there is nothing; InputError when it is something else."""
    if not out.exists():
        return None
    store = open_store(out)
    changed = changed_keys(store.recipe, recipe)
    if changed:
        raise InputError(
            f"{out}: holds a store made from other input or settings ({', '.join(changed)} differ); "
            "remove it or choose another --out"
        )
    return store


def _up_to_date(store: Store) -> str:
    return f"{store.path} is up to date: {len(store.rows)} samples"


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
    table = Table(title=Text(str(store.path)))
    for column in ("dataset", "subjects", "samples", *(emotion.name.lower() for emotion in Emotion)):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    datasets = list(dict.fromkeys(sample.id.dataset for sample in store.samples))
    for name in (*datasets, "all"):
        chosen = [sample for sample in store.samples if name in (sample.id.dataset, "all")]
        classes = Counter(sample.label for sample in chosen)
        subjects = len({sample.subject for sample in chosen})
        table.add_row(Text(name), str(subjects), str(len(chosen)), *(str(classes[label]) for label in Emotion))
    console.print(table)
    for adapter in adapters:
        for clip, reason in getattr(adapter, "skipped", ()):
            _say(console, f"left out: {clip}: {reason}")


def _say(console: Console, line: str) -> None:
    """A line as it is: names of folders and clips are no markup, and are not broken to fit the terminal."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
