"""Label schemes, and the official list that may have the last word.

A scheme knows every word that a dataset's annotation uses. A word that it does not know is an error, not a guess: a
misspelled class would otherwise vanish from the data. The words are each dataset's own (its file in this folder);
:mod:`htnet.data.datasets.schemes` combines them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from htnet.data.datasets.tables import first_name, open_table, read_plain
from htnet.data.samples import SampleId
from htnet.errors import InputError

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
DatasetScheme = tuple[tuple[str, ...], Words]
"""Classes and words of one dataset under a scheme."""
DatasetSchemes = Mapping[str, DatasetScheme]
"""The label schemes that a dataset has, by name."""
THREE_CLASSES = ("negative", "positive", "surprise")


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


_NEGATIVE = ("anger", "contempt", "disgust", "fear", "sadness", "sad", "repression")


def by_rule(*words: str, out: Sequence[str] = ()) -> DatasetScheme:
    """Sort a dataset's words by MEGC2019's rule; those of ``out``, and those that the rule does not know, are left out.

    Six emotions are negative, happiness is positive, surprise itself.
    """
    known = {**dict.fromkeys(_NEGATIVE, "negative"), "happiness": "positive", "happy": "positive"}
    known |= {name: name for name in THREE_CLASSES}
    return THREE_CLASSES, {word: None if word in out else known.get(word) for word in words}


def own_classes(*words: str, out: Sequence[str] = ()) -> DatasetScheme:
    """Make every word a class of its own, in their order, but for those of ``out``, which are left out."""
    return tuple(word for word in words if word not in out), {word: None if word in out else word for word in words}


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
