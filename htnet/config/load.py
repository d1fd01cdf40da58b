"""Configuration files: reading, overriding, printing, identity and their generated reference.

An error names the file, the key's path, the value and the rule. What a run's identity depends on is
everything that can change a prediction: all sections but ``prepare`` (the store's own record holds
that), ``resources`` and ``score``'s resampling counts.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from htnet.config import Config
from htnet.errors import InputError

_BOOL = re.compile(r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_NUMBER_ELSEWHERE = re.compile(r"[-+]?[0-9][0-9_:.]*(?:[eE][-+]?[0-9]+)?|[-+]?0[box][0-9a-fA-F_]+")
"""Texts that some version of YAML reads as a number: YAML 1.1 takes 010 and 1:30 for 8 and 90."""


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


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what :class:`_Loader` or a reader of another version of YAML would take for a number."""


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
_reads("float", _FLOAT, lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_NUMBER_ELSEWHERE.pattern})$"), None)


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
}
"""In the words of a YAML file, where pydantic speaks of Python."""


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    rule = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "unexpected_keyword_argument":
        known = ", ".join(_known_keys(item["loc"][:-1]))
        return f"{key}: unknown key; known here: {known}"
    if item["type"] == "value_error":
        return f"{key}: {rule}" if key else rule
    if item["type"] == "missing":
        return f"{key}: must be given"
    rule = _RULES.get(item["type"], rule.replace("Input should be", "must be"))
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


def to_plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists, ready for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, defaults included; reading it gives an equal configuration."""
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def config_hash(config: Config, store_digest: str) -> str:
    """Identity of a run: the settings that can change a prediction, and the content of the store."""
    identity = _identity(config) | {"store": store_digest}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def identity_changes(old: Config, new: Config) -> list[str]:
    """Key paths that give two configurations different identities; empty where only other keys differ."""
    names = {"validation_subjects": "score.validation_subjects"}
    if old.engine.device == new.engine.device:
        names["engine.device"] = "resources.gpus_per_fold"
    return [names.get(key, key) for key in changed_keys(_identity(old), _identity(new))]


def _identity(config: Config) -> dict[str, Any]:
    plain = to_plain(config)
    identity = {name: plain[name] for name in ("seed", "data", "model", "train", "engine")}
    identity["data"] = {
        key: value for key, value in plain["data"].items() if key not in ("store", "subjects", "cache_mb")
    }
    # a fold on a GPU rounds otherwise than one on a CPU; which of them "auto" takes depends on the GPUs it gets
    engine = config.engine
    on_gpu = engine.device == "cuda" or (engine.device == "auto" and config.resources.gpus_per_fold > 0)
    identity["engine"] = plain["engine"] | {"device": "cuda" if on_gpu else "cpu"}
    identity["validation_subjects"] = plain["score"]["validation_subjects"]
    return identity


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Key paths whose values differ between two plain configurations."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [path for key in keys for path in changed_keys(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [prefix.rstrip(".")]


def field_docs(kind: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, by field name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs: dict[str, str] = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docs[field.target.id] = str(ast.literal_eval(text.value))
    return docs


def reference() -> str:
    """Every key with type, default and meaning, as Markdown; the source of ``configs/README.md``."""
    lines = [line for name, kind in _sections(Config, "") for line in _section_lines(name, kind)]
    return "\n".join(lines).rstrip() + "\n"


def _sections(kind: type, prefix: str) -> Iterator[tuple[str, type]]:
    yield prefix, kind
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _sections(hint, f"{prefix}{name}.")
        elif get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
            yield from _sections(get_args(hint)[0], f"{prefix}{name}.N.")


def _section_lines(prefix: str, kind: type) -> Iterator[str]:
    summary = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
    yield f"## `{prefix.rstrip('.')}`" if prefix else "## Top level"
    yield from ("", summary, "", "| key | type | default | meaning |", "|---|---|---|---|")
    docs, hints = field_docs(kind), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            default = "section below"
        elif field.default is dataclasses.MISSING:
            default = "required"
        else:
            default = f"`{json.dumps(to_plain(field.default))}`"
        yield f"| `{prefix}{field.name}` | {_type_name(hints[field.name])} | {default} | {docs[field.name]} |"
    yield ""


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if dataclasses.is_dataclass(hint):
        return "section"
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if inner[-1] is Ellipsis:
            return "list of sections" if dataclasses.is_dataclass(inner[0]) else f"list of {inner[0].__name__}"
        return f"list of {len(inner)} {inner[0].__name__}"
    if isinstance(hint, type):
        return hint.__name__
    return " or ".join("null" if part is type(None) else _type_name(part) for part in get_args(hint))


def _readme() -> str:
    """Content of ``configs/README.md``; a test keeps the file current."""
    return (
        "# Configurations\n\n"
        "Generated by `python -m htnet.config.load > configs/README.md` from the dataclasses of `htnet/config/`.\n\n"
        "| file | what it is |\n|---|---|\n"
        "| `demo.yaml` | synthetic data, what `make demo` runs |\n"
        "| `small.yaml` | a small HTNet on the real composite, made for a laptop |\n"
        "| `composite.yaml` | the same of raw frames: CASME II, SAMM, SMIC and the challenge's list |\n"
        "| `paper.yaml` | upstream's setting to the letter |\n\n"
        "A key is set in the file or with `--set key.path=value` (values are YAML, list items by number: "
        "`--set prepare.sources.0.root=PATH`). Paths are relative to the working directory. "
        "`--print-config` shows the result. Numbers are decimal: `010`, `1:30`, `0x1f`, `1_000` and dates are texts.\n"
        "\n" + reference()
    )


if __name__ == "__main__":
    print(_readme(), end="")
