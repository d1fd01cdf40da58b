"""Reading, checking and overriding configurations.

An error names the file, the path of the key, the value and the rule.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from htnet.config.plain import FLOAT, to_plain
from htnet.config.run import Config
from htnet.errors import InputError

_BOOL = re.compile(r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")


class _Loader(yaml.SafeLoader):
    """Loader for which every key is a text given once, and a number is what everyone reads as the same number.

    Whole numbers are decimal and without leading zeros, no number has underscores or colons, 5e-5 is one: as in YAML
    1.2. What else has digits, dates too, is a text, which a key that wants a number refuses.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
                continue
            key = self.construct_object(key_node, deep=True)
            problem = None
            if not isinstance(key, str):
                quoted = f": write it as '{key_node.value}'" if isinstance(key_node, yaml.ScalarNode) else ""
                problem = f"is not a text{quoted}"
            elif key in seen:
                problem = "is given twice"
            if problem is not None:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} {problem}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_KEPT = ("null", "str", "seq", "map", "merge")
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _KEPT
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in _KEPT]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _reads(name: str, pattern: re.Pattern[str], convert: Callable[[str], object]) -> None:
    """Make :class:`_Loader` read what the pattern matches as ``name``, and refuse the rest of what claims to be one."""
    tag = f"tag:yaml.org,2002:{name}"

    def construct(loader: _Loader, node: yaml.ScalarNode) -> object:
        text = loader.construct_scalar(node)
        if not pattern.fullmatch(text):
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} is no plain {name}", node.start_mark)
        return convert(text)

    _Loader.add_constructor(tag, construct)
    _Loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern.pattern})$"), None)


_reads("bool", _BOOL, lambda text: text.lower() in ("yes", "true", "on"))
_reads("int", _INT, int)
_reads("float", FLOAT, lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``a.b=value`` overrides (values are YAML; list items by number).

    The file has to be valid without the overrides, so that an error is attributed to the one it comes from.
    Raises :class:`InputError` for a missing or malformed file, an unknown key, a wrong type or a value
    that breaks a rule.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    config = validate_config(parse_yaml(text, str(path)), str(path))
    if not overrides:
        return config
    raw = to_plain(config)
    for override in overrides:
        _apply_override(raw, override)
    return validate_config(raw, " ".join(f"--set {override}" for override in overrides))


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """Parse a YAML mapping safely; an empty file is an empty mapping."""
    raw = _parse_value(text, origin)
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"{origin}: the file must hold a mapping of sections, got {type(raw).__name__}")
    return raw


def _parse_value(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 # _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of 5,000 digits
        what = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise InputError(f"{origin}: not valid YAML: {what}") from None


def validate_config(raw: dict[str, Any], origin: str) -> Config:
    """Build the configuration from plain data; ``origin`` names where it came from in errors."""
    try:
        # through JSON, because strict mode takes a JSON list for a tuple but not a Python list
        text = json.dumps(raw)
    except (ValueError, RecursionError):  # an anchor inside itself
        raise InputError(f"{origin}: a value holds itself") from None
    try:
        return TypeAdapter(Config).validate_json(text)
    except ValidationError as error:
        raise InputError("\n".join(f"{origin}: {_explain(item)}" for item in error.errors())) from None


_RULES = {
    "dataclass_type": "must be a section of keys",
    "tuple_type": "must be a list",
    "too_long": "too many items in the list",
    "greater_than_equal": "must be at least {ge:.10g}",
    "greater_than": "must be greater than {gt:.10g}",
    "less_than_equal": "must be at most {le:.10g}",
    "less_than": "must be less than {lt:.10g}",
}
"""In the words of a YAML file, where pydantic speaks of Python."""
_MOVED = {"score.validation_subjects": "data.validation_subjects"}
"""Keys of earlier versions and their place now."""


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    rule = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "unexpected_keyword_argument":
        if key in _MOVED:
            return f"{key}: moved: write {_MOVED[key]}"
        known = ", ".join(_known_keys(item["loc"][:-1]))
        return f"{key}: unknown key; known here: {known}"
    if item["type"] == "value_error":
        return f"{key}: {rule}" if key else rule
    if item["type"] == "missing":
        return f"{key}: must be given"
    rule = _RULES.get(item["type"], rule.replace("Input should be", "must be")).format(**item.get("ctx", {}))
    return f"{key}: {rule}, got {item['input']!r}"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    kind: Any = Config
    for part in location:
        kind = get_args(kind)[0] if isinstance(part, int) else get_type_hints(kind)[part]
    return [field.name for field in dataclasses.fields(kind)]


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value of a whole plain configuration in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected key.path=value")
    value = _parse_value(text, f"--set {override}")
    parts = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parts):
        where = ".".join(parts[: depth + 1])
        index: Any = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise InputError(f"--set {override}: {where}: expected the number of an item, the list has {len(node)}")
            index = int(part)
        elif not isinstance(node, dict):
            raise InputError(f"--set {override}: {where}: the part before it is a value, not a section")
        elif part not in node:
            raise InputError(f"--set {override}: {where}: unknown key; known here: {', '.join(node)}")
        if depth == len(parts) - 1:
            node[index] = value
        else:
            node = node[index]
