"""Which emotion is which class: the label schemes of the field, and mappings of a user's own.

A scheme knows every word that a dataset's annotation uses. A word that it does not know is an error, not a guess: a
misspelled class would otherwise vanish from the data.

``megc2019_3class``
    Negative, positive, surprise, as the Facial Micro-Expressions Grand Challenge 2019 has them (See et al., FG 2019):
    442 clips of 68 subjects in CASME II, SAMM and SMIC. Its official list leaves CASME II's sadness and fear out
    against its own rule, and two clips of CASME II that the rule would take. Other datasets follow the rule.
``5class``, ``7class``
    The finer classes that papers on single datasets use. Datasets whose classes differ cannot be merged under them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from htnet.config_io import parse_yaml
from htnet.data.types import SampleId
from htnet.errors import InputError

__all__ = ["SCHEMES", "LabelScheme", "check_official_list", "load_scheme", "read_official_list"]

Words = Mapping[str, str | None]
"""Emotion word in small letters -> class name; None: the scheme leaves the word out."""


@dataclass(frozen=True, kw_only=True)
class LabelScheme:
    """Classes and what belongs to them.

    ``classes``: names, the index is the label. ``words``: by dataset. ``left_out``: clips that the scheme's official
    list leaves out although their emotion has a class, with the reason.
    """

    name: str
    classes: tuple[str, ...]
    words: Mapping[str, Words]
    left_out: Mapping[SampleId, str] = field(default_factory=dict)

    def label(self, sample: SampleId, emotion: str, place: str) -> int | str:
        """The label of a clip, or the reason why the scheme leaves it out.

        Raises:
            InputError: the scheme has no words for the dataset, or does not know this one; names ``place``.
        """
        if sample in self.left_out:
            return self.left_out[sample]
        words = self.words.get(sample.dataset) or self.words.get("*")
        if words is None:
            raise InputError(f"{place}: label scheme {self.name} says nothing about dataset {sample.dataset}")
        word = emotion.strip().lower()
        if word not in words:
            raise InputError(f"{place}: must be one of {', '.join(words)}, got {emotion!r} (label scheme {self.name})")
        chosen = words[word]
        return f"emotion {emotion} is in none of the classes" if chosen is None else self.classes.index(chosen)


def _same(*words: str) -> dict[str, str | None]:
    return {word: word for word in words}


_THREE = ("negative", "positive", "surprise")
_NEGATIVE = ("anger", "contempt", "disgust", "fear", "sadness", "sad", "repression")


def _rule(*words: str, out: Sequence[str] = ()) -> dict[str, str | None]:
    """MEGC2019's rule: six emotions are negative, happiness positive, surprise itself, the rest left out."""
    known = {**dict.fromkeys(_NEGATIVE, "negative"), "happiness": "positive", "happy": "positive"}
    known |= {name: name for name in _THREE}
    return {word: None if word in out else known.get(word) for word in words}


_CASME2 = ("happiness", "disgust", "repression", "surprise", "sadness", "fear", "others")
_SAMM = ("anger", "contempt", "disgust", "fear", "sadness", "happiness", "surprise", "other")
_CASME = ("tense", "disgust", "repression", "surprise", "happiness", "fear", "sadness", "contempt")
_CASME3 = ("disgust", "surprise", "others", "fear", "anger", "sad", "happy")
_MMEW = ("happiness", "surprise", "anger", "disgust", "fear", "sadness", "others")
_FOUR_D = ("positive", "negative", "surprise", "repression", "others")
_FIVE_CASME2 = ("happiness", "disgust", "repression", "surprise", "others")
_FIVE_SAMM = ("anger", "contempt", "happiness", "surprise", "other")

SCHEMES: Mapping[str, Mapping[str, tuple[tuple[str, ...], Words]]] = {
    "megc2019_3class": {
        "casme2": (_THREE, _rule(*_CASME2, out=("sadness", "fear"))),
        "samm": (_THREE, _rule(*_SAMM)),
        "smic": (_THREE, _rule(*_THREE)),
        "casme": (_THREE, _rule(*_CASME)),
        "casme3": (_THREE, _rule(*_CASME3)),
        "casme3c": (_THREE, _rule(*_THREE, "others")),
        "mmew": (_THREE, _rule(*_MMEW)),
        "4dme": (_THREE, _rule(*_FOUR_D)),
        "*": (_THREE, _rule(*dict.fromkeys((*_CASME2, *_SAMM, *_CASME, *_CASME3, *_THREE)))),
    },
    "5class": {
        "casme2": (_FIVE_CASME2, {**dict.fromkeys(_CASME2, None), **_same(*_FIVE_CASME2)}),
        "samm": (_FIVE_SAMM, {**dict.fromkeys(_SAMM, None), **_same(*_FIVE_SAMM)}),
        "4dme": (_FOUR_D, _same(*_FOUR_D)),
    },
    "7class": {
        "casme2": (_CASME2, _same(*_CASME2)),
        "casme3": (_CASME3, _same(*_CASME3)),
        "mmew": (_MMEW, _same(*_MMEW)),
    },
}
"""Built-in schemes: by name and dataset, the classes and the words; ``*`` stands for any other dataset."""

_ABSENT = "the official list of MEGC2019 leaves this clip out"
_LEFT_OUT = {
    SampleId(dataset="casme2", subject=subject, clip=clip): _ABSENT
    for subject, clip in (("sub04", "EP12_01f"), ("sub24", "EP02_07"))
}


def load_scheme(name: str, datasets: Iterable[str]) -> LabelScheme:
    """A built-in scheme for these datasets, or a mapping from a YAML file.

    A file holds ``classes``, a list of names, and ``words``, a mapping from dataset (``*``: any other) to a mapping
    from emotion word to class name or null.

    Raises:
        InputError: no such scheme or file, a dataset without this scheme, datasets whose classes differ, a file that is
            not such a mapping; names the file and the key.
    """
    if name not in SCHEMES:
        return _read_scheme(Path(name))
    known = SCHEMES[name]
    chosen: dict[str, tuple[tuple[str, ...], Words]] = {}
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
        classes=next(iter(kinds), _THREE),
        words={dataset: words for dataset, (_, words) in chosen.items()},
        left_out=_LEFT_OUT if name == "megc2019_3class" else {},
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
    return {word.strip().lower(): name for word, name in given.items()}


def read_official_list(path: Path) -> tuple[tuple[int, SampleId, int], ...]:
    """Rows of a list such as the MEGC2019 composite's: dataset, subject, clip, label, header or none.

    Returns:
        Row number from 1, the clip as the list writes it, and its label.

    Raises:
        InputError: a list that cannot be read; names file, row and value.
    """
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if row and not (number == 1 and not row[-1].strip().isdecimal()):
                    dataset, subject, clip, label = _list_row(path, number, row)
                    rows.append((number, SampleId(dataset=dataset, subject=subject, clip=clip), int(label)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable list: {error}") from None
    return tuple(rows)


def check_official_list(path: Path, labels: Mapping[SampleId, int]) -> list[str]:
    """Compare samples with a list such as the MEGC2019 composite's: dataset, subject, clip, label, header or none.

    Subjects are compared without leading zeros and clips in any case, as the list has lost the one and mixes the other.

    Returns:
        A line for every clip that is missing, not in the list, or has another label there; empty when they agree.

    Raises:
        InputError: a list that cannot be read; names file, row and value.
    """
    listed = {_key(clip.dataset, clip.subject, clip.clip): label for _, clip, label in read_official_list(path)}
    found = {_key(sample.dataset, sample.subject, sample.clip): label for sample, label in labels.items()}
    lines = [f"{sample}: is in the list, but not in the sources" for sample in listed if sample not in found]
    lines += [f"{sample}: is not in the list" for sample in found if sample not in listed]
    return lines + [
        f"{sample}: has label {found[sample]}, in the list {label}"
        for sample, label in listed.items()
        if found.get(sample, label) != label
    ]


def _list_row(path: Path, number: int, row: Sequence[str]) -> list[str]:
    if len(row) < 4 or not row[3].strip().isdecimal():
        raise InputError(f"{path}, row {number}: must be dataset, subject, clip, label, got {','.join(row)!r}")
    return [cell.strip() for cell in row[:4]]


def _key(dataset: str, subject: str, clip: str) -> SampleId:
    return SampleId(dataset=dataset.lower(), subject=subject.lower().lstrip("0"), clip=clip.lower())
