"""Which emotion is which class: the label schemes of the field, and mappings of a user's own.

A scheme knows every word that a dataset's annotation uses. A word that it does not know is an error, not a guess: a
misspelled class would otherwise vanish from the data.

``megc2019_3class``
    Negative, positive, surprise, as the Facial Micro-Expressions Grand Challenge 2019 has them (See et al., FG 2019):
    442 clips of 68 subjects in CASME II, SAMM and SMIC. Which clips these are only the challenge's list says
    (``prepare.official_list``): it leaves CASME II's sadness and fear out against its own rule, as the words here do,
    and clips that no rule about words finds. Other datasets follow the rule.
``5class``, ``7class``
    The finer classes that papers on single datasets use. Datasets whose classes differ cannot be merged under them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from htnet.config.load import parse_yaml
from htnet.data.datasets.tables import first_name, open_table, read_plain
from htnet.data.samples import SampleId
from htnet.errors import InputError

__all__ = [
    "COMPOSITE_SCHEME",
    "COMPOSITE_SIZES",
    "SCHEMES",
    "Label",
    "LabelScheme",
    "OfficialList",
    "OutOfScheme",
    "load_scheme",
]

OUTSIDE_SCHEME = "label_scheme"
"""Rule: the label scheme has no class for the emotion."""
OFF_THE_LIST = "official_list"
"""Rule: the official list does not name the clip; or names it, and no source has it."""
LISTED_LABEL = "official_label"
"""Rule: the clip has the official list's class, where its emotion has another or none. The clip stays."""
_LIST_COLUMNS = ("dataset|database|db", "subject|sub", "clip|filename|filename_o", "label|class|gt")
COMPOSITE_SCHEME = "megc2019_3class"
COMPOSITE_SIZES = {"casme2": 145, "samm": 133, "smic": 164}
"""Clips of the MEGC2019 composite by dataset."""

Words = Mapping[str, str | None]
"""Emotion word in small letters -> class name; None: the scheme leaves the word out."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """The class of a clip by number; ``notes`` and ``remarks`` as in :class:`htnet.data.datasets.base.Clip`."""

    number: int
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OutOfScheme:
    """A clip without a label, the rule by which it has none, and the reason in words."""

    rule: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class OfficialClip:
    """A clip of a list: identity as the list writes it, label, and the row that it stands in."""

    id: SampleId
    label: int
    row: int


@dataclass(frozen=True, kw_only=True)
class OfficialList:
    """The clips of a composite, such as MEGC2019's 442, which decide what belongs to it.

    Subjects are compared without leading zeros and names in any case, as the challenge's list lost the one and mixes
    the other.
    """

    path: Path
    clips: Mapping[SampleId, OfficialClip]
    """By identity in the form that is compared."""

    @classmethod
    def read(cls, path: Path) -> OfficialList:
        """Read a list of dataset, subject, clip, label; header or none.

        Raises:
            InputError: a list that cannot be read, or that has a clip twice; names file, row and value.
        """
        clips: dict[SampleId, OfficialClip] = {}
        for number, sample, label in read_clip_rows(path):
            key = _key(sample)
            if key in clips:
                raise InputError(f"{path}, row {number}: clip {sample} stands in row {clips[key].row} already")
            clips[key] = OfficialClip(id=sample, label=label, row=number)
        return cls(path=path, clips=clips)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Datasets of the list in small letters; it decides nothing about others."""
        return tuple(dict.fromkeys(key.dataset for key in self.clips))

    def covers(self, dataset: str) -> bool:
        """Tell if the list has clips of a dataset."""
        return dataset.lower() in self.datasets

    def find(self, sample: SampleId) -> OfficialClip | None:
        """Give the list's row of a clip."""
        return self.clips.get(_key(sample))

    def without(self, datasets: Collection[str]) -> list[str]:
        """List the datasets of the list that are none of these."""
        there = {name.lower() for name in datasets}
        return [name for name in self.datasets if name not in there]

    def missing(self, samples: Iterable[SampleId]) -> list[OfficialClip]:
        """List the clips of these samples' datasets that are not among the samples."""
        found = {_key(sample) for sample in samples}
        datasets = {key.dataset for key in found}
        return [clip for key, clip in self.clips.items() if key.dataset in datasets and key not in found]


@dataclass(frozen=True, kw_only=True)
class LabelScheme:
    """Classes and what belongs to them.

    ``classes``: names, the index is the label. ``words``: by dataset. ``official``: which clips of the datasets that it
    covers are taken, and their labels.
    """

    name: str
    classes: tuple[str, ...]
    words: Mapping[str, Words]
    official: OfficialList | None = None

    def label(self, sample: SampleId, emotion: str, place: str) -> Label | OutOfScheme:
        """Find the label of a clip, or the reason why it has none.

        Raises:
            InputError: the scheme has no words for the dataset, or does not know this one; names ``place``.
        """
        return self.decide(sample, self._by_word(sample, emotion, place), emotion, place)

    def decide(self, sample: SampleId, found: Label | OutOfScheme, emotion: str, place: str) -> Label | OutOfScheme:
        """Give the official list the last word over ``found``, what the annotation says of the clip.

        Raises:
            InputError: a label of other classes than the scheme's; names the list and its row.
        """
        if self.official is None or not self.official.covers(sample.dataset):
            return found
        listed = self.official.find(sample)
        if listed is None:
            absent = OutOfScheme(rule=OFF_THE_LIST, reason=f"{self.official.path} does not list the clip")
            return absent if isinstance(found, Label) else found
        if isinstance(found, Label) and found.number == listed.label:
            return found
        if self.name != COMPOSITE_SCHEME and isinstance(found, Label):
            raise InputError(
                f"{self.official.path}, row {listed.row}: must have the class of {self.name}, "
                f"{self.classes[found.number]} ({found.number}), got {listed.label}"
            )
        remark = (
            f"{LISTED_LABEL}: {self.classes[listed.label]} by {self.official.path}, row {listed.row}, where the "
            f"emotion is {emotion!r} ({place})"
        )
        return Label(number=listed.label, notes=(LISTED_LABEL,), remarks=(remark,))

    def _by_word(self, sample: SampleId, emotion: str, place: str) -> Label | OutOfScheme:
        words = self.words.get(sample.dataset) or self.words.get("*")
        if words is None:
            raise InputError(f"{place}: label scheme {self.name} says nothing about dataset {sample.dataset}")
        word = emotion.strip().lower()
        if word not in words:
            raise InputError(f"{place}: must be one of {', '.join(words)}, got {emotion!r} (label scheme {self.name})")
        chosen = words[word]
        if chosen is None:
            return OutOfScheme(rule=OUTSIDE_SCHEME, reason=f"emotion {emotion} is in none of the classes")
        return Label(number=self.classes.index(chosen))


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
_CASME = ("tense", "disgust", "repression", "surprise", "happiness", "sadness", "contempt", "fear")
_CASME3 = ("disgust", "surprise", "others", "fear", "anger", "sad", "happy")
_MMEW = ("happiness", "surprise", "anger", "disgust", "fear", "sadness", "others")
_FOUR_D = ("positive", "negative", "surprise", "repression", "others")
_FIVE_CASME2 = ("happiness", "disgust", "repression", "surprise", "others")
_FIVE_SAMM = ("anger", "contempt", "happiness", "surprise", "other")

SCHEMES: Mapping[str, Mapping[str, tuple[tuple[str, ...], Words]]] = {
    COMPOSITE_SCHEME: {
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


def read_clip_rows(path: Path) -> list[tuple[int, SampleId, int]]:
    """Read the rows of a list of clips by its header; of a list without one dataset, subject, clip, label in turn.

    Returns:
        Row number from 1, the clip as the list writes it, and its label.

    Raises:
        InputError: a list that cannot be read, or holds no clip; names file, row and value.
    """
    table = open_table(path, _LIST_COLUMNS)
    headed = table.top is not None
    names = [first_name(column) for column in _LIST_COLUMNS]
    rows = []
    for row in table.rows(_LIST_COLUMNS) if headed else read_plain(path, names):
        dataset, subject, clip = (row.text(name) for name in names[:3])
        if (label := row.integer("label")) < 0:
            raise InputError(f"{row.place('label')}: must not be negative, got {label}")
        rows.append((row.number, SampleId(dataset=dataset, subject=subject, clip=clip), label))
    if not rows:
        raise InputError(f"{path}: must hold at least one clip, got none")
    return rows


def _key(sample: SampleId) -> SampleId:
    names = (sample.dataset.lower(), sample.subject.lower().lstrip("0"), sample.clip.lower())
    return SampleId(**dict(zip(("dataset", "subject", "clip"), names, strict=True)))
