"""Which emotion is which class: the label schemes of the field, and mappings of a user's own.

A scheme knows every word that a dataset's annotation uses. A word that it does not know is an error, not a guess: a
misspelled class would otherwise vanish from the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from htnet.data.types import SampleId
from htnet.errors import InputError

__all__ = ["LabelScheme"]

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
        if sample.dataset not in self.words:
            raise InputError(f"{place}: label scheme {self.name} says nothing about dataset {sample.dataset}")
        words = self.words[sample.dataset]
        word = emotion.strip().lower()
        if word not in words:
            raise InputError(f"{place}: must be one of {', '.join(words)}, got {emotion!r} (label scheme {self.name})")
        chosen = words[word]
        return f"emotion {emotion} is in none of the classes" if chosen is None else self.classes.index(chosen)
