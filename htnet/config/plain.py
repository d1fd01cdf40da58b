"""A configuration as plain data: printed as YAML, compared, and hashed as the identity of a run.

Every setting counts for the identity, but for those marked :data:`~htnet.config.section.NOT_IDENTITY`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from htnet.config.run import Config
from htnet.config.section import NOT_IDENTITY, takes_gpu
from htnet.errors import InputError

FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
"""Texts that a configuration reads as a number with a fraction."""
_NUMBER_ELSEWHERE = re.compile(r"[-+]?[0-9][0-9_:.]*(?:[eE][-+]?[0-9]+)?|[-+]?0[box][0-9a-fA-F_]+")
"""Texts that some version of YAML reads as a number: YAML 1.1 takes 010 and 1:30 for 8 and 90."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what a reader of any version of YAML would take for a number."""


for _numbers in (FLOAT, _NUMBER_ELSEWHERE):
    _Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_numbers.pattern})$"), None)


def to_plain(value: Any) -> Any:
    """Return dataclasses and tuples as dicts and lists, ready for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def dump_config(config: Config) -> str:
    """Return the whole configuration as YAML, defaults included; reading it gives an equal configuration."""
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


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
    if config.train.init:  # of initial weights their content counts, not their place
        identity["train"]["init"] = _weights_digest(Path(config.train.init) / "model.json")
    return identity


def _weights_digest(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"train.init={path.parent}: no model folder: {path} cannot be read ({error!r})") from None


def _counted(section: Any) -> dict[str, Any]:
    """Return a section's keys as plain data, without the marked ones."""
    hints = get_type_hints(type(section), include_extras=True)
    counted = {}
    for field in dataclasses.fields(section):
        if NOT_IDENTITY not in getattr(hints[field.name], "__metadata__", ()):
            value = getattr(section, field.name)
            counted[field.name] = _counted(value) if dataclasses.is_dataclass(value) else to_plain(value)
    return counted
