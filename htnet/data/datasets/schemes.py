"""The built-in label schemes, combined from the words of the datasets, and mappings of a user's own.

``megc2019_3class``
    Negative, positive, surprise, as the Facial Micro-Expressions Grand Challenge 2019 has them (See et al., FG 2019):
    442 clips of 68 subjects in CASME II, SAMM and SMIC. Which clips these are only the challenge's list says
    (``prepare.official_list``): it leaves CASME II's sadness and fear out against its own rule, as the words here do,
    and clips that no rule about words finds. Other datasets follow the rule.
``5class``, ``7class``
    The finer classes that papers on single datasets use. Datasets whose classes differ cannot be merged under them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from htnet.config.load import parse_yaml
from htnet.data.datasets import WORKBOOKS
from htnet.data.datasets.labels import THREE_CLASSES, DatasetScheme, LabelScheme, OfficialList, Words
from htnet.errors import InputError


def _combined() -> Mapping[str, Mapping[str, DatasetScheme]]:
    schemes: dict[str, dict[str, DatasetScheme]] = defaultdict(dict)
    for kind in WORKBOOKS.values():
        for name, scheme in kind.schemes.items():
            schemes[name][kind.dataset] = scheme
    return dict(schemes)


SCHEMES = _combined()
"""Built-in schemes: by name and dataset, the classes and the words; ``*`` stands for any other dataset."""


def load_scheme(name: str, datasets: Iterable[str], official: Path | None = None) -> LabelScheme:
    """Give a built-in scheme for these datasets, or a mapping from a YAML file, with the ``official`` list if named.

    A file holds ``classes``, a list of names, and ``words``, a mapping from dataset (``*``: any other) to a mapping
    from emotion word to class name or null.

    Raises:
        InputError: no such scheme or file, a dataset without this scheme, datasets whose classes differ, a file that is
            not such a mapping; names the file and the key.
    """
    scheme = _built_in(name, datasets) if name in SCHEMES else _read_scheme(Path(name))
    if official is None:
        return scheme
    listed = OfficialList.read(official)
    for clip in listed.clips.values():
        if clip.label >= len(scheme.classes):
            raise InputError(
                f"{official}, row {clip.row}: label must be in 0..{len(scheme.classes) - 1}, the classes of {name}, "
                f"got {clip.label}"
            )
    return replace(scheme, official=listed)


def _built_in(name: str, datasets: Iterable[str]) -> LabelScheme:
    known = SCHEMES[name]
    chosen: dict[str, DatasetScheme] = {}
    for dataset in dict.fromkeys(datasets):
        if dataset not in known and "*" not in known:
            raise InputError(
                f"prepare.label_scheme: {name} is not defined for {dataset}, only for {', '.join(known)}; "
                "a YAML file may define it"
            )
        chosen[dataset] = known.get(dataset) or known["*"]
    kinds = {classes for classes, _ in chosen.values()}
    if len(kinds) > 1:
        (first, (one, _)), (second, (other, _)) = next(
            (a, b) for a in chosen.items() for b in chosen.items() if a[1][0] != b[1][0]
        )
        raise InputError(
            f"prepare.label_scheme: under {name}, {first} has the classes {', '.join(one)} and {second} "
            f"{', '.join(other)}: they cannot be merged"
        )
    return LabelScheme(
        name=name,
        classes=next(iter(kinds), THREE_CLASSES),
        words={dataset: words for dataset, (_, words) in chosen.items()},
    )


def _read_scheme(path: Path) -> LabelScheme:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"prepare.label_scheme: must be one of {', '.join(SCHEMES)} or a YAML file, got {str(path)!r}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    plain = parse_yaml(text, str(path))
    if set(plain) != {"classes", "words"}:
        raise InputError(f"{path}: must be a mapping with the keys classes and words")
    classes = plain["classes"]
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(item, str) for item in classes):
        raise InputError(f"{path}: classes must be a list of two or more names, got {classes!r}")
    if len(set(classes)) != len(classes):
        raise InputError(f"{path}: classes must differ, got {', '.join(classes)}")
    if not isinstance(plain["words"], dict):
        raise InputError(f"{path}: words must be a mapping from dataset to words")
    words = {dataset: _read_words(path, dataset, given, classes) for dataset, given in plain["words"].items()}
    return LabelScheme(name=path.name, classes=tuple(classes), words=words)


def _read_words(path: Path, dataset: str, given: object, classes: Sequence[str]) -> Words:
    if not isinstance(given, dict):
        raise InputError(f"{path}: words.{dataset} must be a mapping from emotion to class")
    for word, name in given.items():
        if name is not None and name not in classes:
            raise InputError(
                f"{path}: words.{dataset}.{word} must be one of {', '.join(classes)} or null, got {name!r}"
            )
    words = {word.strip().lower(): name for word, name in given.items()}
    if len(words) < len(given):
        raise InputError(f"{path}: words.{dataset} has a word twice, in other capitals or blanks: {', '.join(given)}")
    return words
