"""The composite as the HTNet authors publish it: 28-pixel flow pictures and a label list, no frames.

Layout: ``combined_3_class2_for_optical_flow.csv`` and ``datasets/STSNet_whole_norm_u_v_os/``, where a
picture is ``<sub>_<filename_o> .png`` (the published names end in a space; without it is taken too).
OpenCV reads a picture's channels as (strain, v, u); each is TV-L1 flow scaled to 0..255.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htnet.data.datasets.labels import Label, LabelScheme, OutOfScheme
from htnet.data.datasets.tables import read_rows
from htnet.data.entries import FlowPicture, LeftOut
from htnet.data.faces.five_points import UPSTREAM_SIZE
from htnet.data.samples import Emotion, SampleId, check_dataset_name
from htnet.errors import InputError

LABELS = "combined_3_class2_for_optical_flow.csv"
PICTURES = Path("datasets") / "STSNet_whole_norm_u_v_os"
LANDMARKS = "landmarks_5pt.csv"
COLUMNS = ("dataset", "sub", "filename_o", "label")


@dataclass(frozen=True, kw_only=True)
class HTNetRelease:
    """Adapter of the published composite. Its labels are those of the scheme megc2019_3class, and no other."""

    root: Path
    scheme: LabelScheme
    annotations: Path | None = None

    adapter: ClassVar[str] = "htnet_release"
    datasets: ClassVar[tuple[str, ...]] = ("casme2", "samm", "smic")
    landmarks_file: ClassVar[str] = LANDMARKS
    flow_size: ClassVar[int] = UPSTREAM_SIZE

    @property
    def other_workbooks(self) -> list[str]:
        """A release has one list of labels."""
        return []

    @property
    def labels(self) -> Path:
        """The label list."""
        return self.root / (self.annotations or LABELS)

    def describe(self) -> dict[str, object]:
        """Name what identifies the input: checksums of labels and pictures, and how the flow was made."""
        pictures = hashlib.sha256()
        for path in self._pictures().values():
            pictures.update(_read(path))
        return {
            "adapter": self.adapter,
            "annotation": self.labels.name,
            "annotation_sha256": hashlib.sha256(_read(self.labels)).hexdigest(),
            "pictures_sha256": pictures.hexdigest(),
            "flow": {"method": "TV-L1 by the dataset's authors", "scaling": "min-max per channel to 0..255"},
        }

    def entries(self) -> Iterator[FlowPicture | LeftOut]:
        """Yield every row of the label list, in its order; InputError names file and row of what cannot be used."""
        names = tuple(emotion.name.lower() for emotion in Emotion)
        if self.scheme.classes != names:
            raise InputError(
                f"{self.labels}: the release knows {', '.join(names)} only, label scheme {self.scheme.name} has "
                f"{', '.join(self.scheme.classes)}"
            )
        pictures = self._pictures()
        for number, sample, label in _read_labels(self.labels):
            place, emotion = f"{self.labels}, row {number}", names[label]
            decided = self.scheme.decide(sample, Label(number=label), emotion, place)
            if isinstance(decided, OutOfScheme):
                yield LeftOut(clip=str(sample), rule=decided.rule, reason=decided.reason, place=place)
                continue
            yield FlowPicture(
                id=sample, picture=pictures[sample], label=decided.number, emotion=emotion, place=place,
                flow_size=self.flow_size, remarks=decided.remarks,
            )  # fmt: skip

    def _pictures(self) -> dict[SampleId, Path]:
        """Return the path of every sample's picture; each has its own."""
        owners: dict[Path, SampleId] = {}
        for number, sample_id, _ in _read_labels(self.labels):
            path = self._picture(sample_id, number)
            if path in owners:
                raise InputError(
                    f"{self.labels}, row {number}: {sample_id} has the flow file of {owners[path]}: {path.name}"
                )
            owners[path] = sample_id
        return {sample_id: path for path, sample_id in owners.items()}

    def _picture(self, sample: SampleId, row: int) -> Path:
        stem = f"{sample.subject}_{sample.clip}"
        for name in (f"{stem} .png", f"{stem}.png"):
            path = self.root / PICTURES / name
            if path.is_file():
                return path
        raise InputError(
            f"{self.root / PICTURES / f'{stem} .png'}: missing flow file of {sample} ({LABELS}, row {row})"
        )


def _read_labels(path: Path) -> Iterator[tuple[int, SampleId, int]]:
    """Yield row number, identity and label of every row, each clip once."""
    _read(path)  # of a folder that is no release it says what one holds
    seen: dict[SampleId, int] = {}
    for row in read_rows(path, COLUMNS):
        for name in ("dataset", "sub", "filename_o"):
            row.text(name)
        check_dataset_name(row.text("dataset"), row.place("dataset"))
        sample = SampleId(dataset=row.text("dataset"), subject=row.name("sub"), clip=row.name("filename_o"))
        label = row.whole("label")
        if label not in (0, 1, 2):
            raise InputError(
                f"{row.place('label')}: must be 0 (negative), 1 (positive) or 2 (surprise), "
                f"got {row.optional('label')!r}"
            )
        if sample in seen:
            raise InputError(f"{path}, row {row.number}: duplicate clip {sample}: row {seen[sample]} holds it already")
        seen[sample] = row.number
        yield row.number, sample, label


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        what = f"; an htnet_release folder holds {LABELS}, {LANDMARKS} and {PICTURES}"
        raise InputError(f"{path}: no such file{what}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
