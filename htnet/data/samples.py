"""The nouns of the data: emotion, sample, fold.

Landmark order everywhere: left eye, right eye, nose tip, left mouth corner, right mouth corner;
*left* is the left of the picture. A landmark is (x, y), x to the right and y down, in pixels of the
picture it belongs to.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from enum import IntEnum

from htnet.errors import InputError

COMPOSITE = "composite"
"""All datasets together, in scores and reports; no dataset has this name."""
_CONTROL = {"Cc", "Zl", "Zp"}
"""Unicode's categories of control characters, line and paragraph separators."""
UNLABELLED = -1
"""Label of a clip that nobody has labelled; no store takes it."""
LANDMARK_NAMES = ("left_eye", "right_eye", "nose", "left_lip", "right_lip")

Landmarks = tuple[tuple[float, float], ...]
"""Five (x, y) points in the order of :data:`LANDMARK_NAMES`."""


class Emotion(IntEnum):
    """The three classes of the MEGC2019 composite; the value is the label."""

    NEGATIVE = 0
    POSITIVE = 1
    SURPRISE = 2


def check_dataset_name(name: str, place: str) -> None:
    """Refuse a name under which a dataset's scores would be another's: they are filed by it, people by name/subject.

    Raises:
        InputError: names ``place``.
    """
    if name == COMPOSITE:
        raise InputError(f"{place}: no dataset may be named {name!r}: scores of all datasets together are")
    if "/" in name:
        raise InputError(f"{place}: the name of a dataset must not hold a slash, got {name!r}")


@dataclass(frozen=True, kw_only=True)
class SampleId:
    """The names that tell a clip from all others.

    Raises:
        InputError: a name holds a line break or another control character, with which it would be several lines of a
            log, or other cells of a table; a dataset has a name that none may have.
    """

    dataset: str
    subject: str
    clip: str

    def __post_init__(self) -> None:
        check_dataset_name(self.dataset, str(self))
        for kind, name in (("dataset", self.dataset), ("subject", self.subject), ("clip", self.clip)):
            if any(unicodedata.category(letter) in _CONTROL for letter in name):
                raise InputError(f"{name!r}: the name of a {kind} must not hold a control character or line break")

    def __str__(self) -> str:
        return f"{self.dataset}/{self.subject}/{self.clip}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One clip of the store.

    ``landmarks`` are in pixels of the flow image, whose side is ``flow_size``. ``onset``, ``apex`` and
    ``offset`` are frame numbers of the source, None where the dataset does not give them.
    """

    id: SampleId
    label: int
    landmarks: Landmarks
    flow_size: int
    onset: int | None = None
    apex: int | None = None
    offset: int | None = None
    fps: float | None = None
    emotion: str | None = None

    @property
    def subject(self) -> str:
        """Subject keyed by its dataset, ``casme2/sub17``."""
        return f"{self.id.dataset}/{self.id.subject}"


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One LOSO run: everything of one subject is held out for the test."""

    subject: str
    train: tuple[int, ...]
    """Rows of the manifest that are trained on, in the manifest's order."""
    test: tuple[int, ...]
    """Rows of the manifest that belong to the held-out subject."""

    @property
    def name(self) -> str:
        """File name stem of the fold's record, ``casme2__sub17``."""
        return fold_stem(self.subject)


def fold_stem(subject: str) -> str:
    """Turn a subject keyed by its dataset into a file name stem; no two share one, ordinary names stay as they are.

    The first ``__`` ends the dataset: one that holds it, or ends in ``_``, has its ``_`` quoted.
    """
    dataset, _, name = (_quoted(part, "%/") for part in subject.partition("/"))
    return f"{_quoted(dataset, '_') if '__' in f'{dataset}_' else dataset}__{name}"


def _quoted(text: str, marks: str) -> str:
    return "".join(f"%{ord(letter):02X}" if letter in marks else letter for letter in text)
