"""The identity of a run: every setting counts, but for those marked :data:`~htnet.config.section.NOT_IDENTITY`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, get_type_hints

from htnet.config.load import to_plain
from htnet.config.run import Config
from htnet.config.section import NOT_IDENTITY, takes_gpu


def config_hash(config: Config, store_digest: str) -> str:
    """Return the identity of a run: a hash of the settings that count and of the store's content."""
    identity = _identity(config) | {"store": store_digest}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def identity_changes(old: Config, new: Config) -> list[str]:
    """Return the key paths that give two configurations different identities."""
    names = {"engine.device": "resources.gpus_per_fold"} if old.engine.device == new.engine.device else {}
    return [names.get(key, key) for key in changed_keys(_identity(old), _identity(new))]


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return the key paths whose values differ between two plain configurations."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [path for key in keys for path in changed_keys(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [prefix.rstrip(".")]


def _identity(config: Config) -> dict[str, Any]:
    identity = _counted(config)
    # a fold on a GPU rounds otherwise than one on a CPU; "auto" takes the GPU that a fold is given
    on_gpu = takes_gpu(config.engine.device, config.resources.gpus_per_fold)
    identity["engine"]["device"] = "cuda" if on_gpu else "cpu"
    return identity


def _counted(section: Any) -> dict[str, Any]:
    """Return a section's keys as plain data, without the marked ones."""
    hints = get_type_hints(type(section), include_extras=True)
    counted = {}
    for field in dataclasses.fields(section):
        if NOT_IDENTITY not in getattr(hints[field.name], "__metadata__", ()):
            value = getattr(section, field.name)
            counted[field.name] = _counted(value) if dataclasses.is_dataclass(value) else to_plain(value)
    return counted
