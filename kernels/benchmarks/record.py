"""One measurement: a row of a CSV file with everything that a reader needs to place it.

A file holds one benchmark. Its columns are the fields of the benchmark's cases, ``MEASURED``, the benchmark's further
figures and ``MACHINE``; a :class:`Layout` names the first and the third.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch

from kernels.machine import card_facts, commit, cpu_facts, cpu_name, emulates_bf16, package_version

__all__ = [
    "MACHINE",
    "MEASURED",
    "Layout",
    "Record",
    "Status",
    "append_records",
    "check_columns",
    "figures_of",
    "read_records",
    "this_machine",
]

Status = Literal["ok", "skipped", "refused", "failed"]
"""ok: measured. skipped: not run here, or not in time. refused: failed the accuracy gate. failed: raised."""

MEASURED: Final = ("provider", "unit", "median", "low", "high", "spread", "n", "status", "reason")
MACHINE: Final = (
    *("date", "commit", "device", "processor", "card", "driver", "cores", "threads", "native_bf16", "load", "system"),
    *("python", "cuda", "torch", "triton", "deepspeed", "dali", "opencv", "numpy", "numba"),
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A provider on a case. Fields that do not apply are empty in the file and None here."""

    case: Mapping[str, Any]
    """Fields of the benchmark's own."""
    provider: str
    unit: str = ""
    median: float | None = None
    low: float | None = None
    high: float | None = None
    spread: str = ""
    """Kind of ``low`` and ``high``: ``quartiles``, and in older rows ``20 % .. 80 %`` or ``min .. max``."""
    n: int = 0
    """Samples."""
    status: Status = "ok"
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Further ones of the benchmark's own."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """Of ``MACHINE``."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The file of a benchmark."""

    file: str
    case: tuple[str, ...]
    figures: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.case, *MEASURED, *self.figures, *MACHINE)


def figures_of(samples: Sequence[float]) -> dict[str, Any]:
    """Return median, quartiles and n of the samples, as a :class:`Record` takes them."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    spread = {"low": low, "high": high, "spread": "quartiles"}
    return {"median": statistics.median(samples), **spread, "n": len(samples)}


def check_columns(path: Path, layout: Layout) -> None:
    """Raise ValueError where the file holds other columns: an old result is never changed."""
    if path.exists() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        if header != list(layout.columns):
            raise ValueError(f"{path}: holds other columns than this program writes; choose another place")


def append_records(path: Path, layout: Layout, records: Iterable[Record]) -> None:
    """Append to a CSV file, with a header where it is new; each row is on disk before the next is asked for.

    Raises:
        ValueError: the file has other columns (nothing is written then), or a record has a field without a column.
    """
    check_columns(path, layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=layout.columns)
        if not path.stat().st_size:
            writer.writeheader()
            file.flush()
        for record in records:
            measured = {name: getattr(record, name) for name in MEASURED}
            row = {**record.case, **measured, **record.figures, **record.machine}
            writer.writerow({name: _text(value) for name, value in row.items()})
            file.flush()


def read_records(path: Path) -> list[Record]:
    """Return the rows of a file that :func:`append_records` wrote; the header tells the case from further figures."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or ())
        first, last = names.index(MEASURED[0]), names.index(MEASURED[-1]) + 1
        parts = {"case": names[:first], "figures": names[last : -len(MACHINE)]}
        return [
            Record(
                **{key: _value(line[key]) for key in ("median", "low", "high")},
                **{key: line[key] for key in ("provider", "unit", "spread", "status", "reason")},
                n=int(line["n"]),
                machine={name: line[name] for name in MACHINE},
                **{part: {name: _value(line[name]) for name in held} for part, held in parts.items()},
            )
            for line in reader
        ]


def this_machine(device: torch.device) -> dict[str, Any]:
    """Return the fields of ``MACHINE``, as far as the machine says; the card's are of ``device``."""
    card, cpu = card_facts(device), cpu_facts()
    packages = {name: package_version(name) for name in ("triton", "deepspeed", "numpy", "numba")}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "device": device.type,
        "processor": f"{cpu_name()} (family {cpu.get('cpu family', '?')}, model {cpu.get('model', '?')})",
        "card": card.get("name"),
        "driver": card.get("driver"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native_bf16": not emulates_bf16(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": card.get("cuda"),
        "torch": torch.__version__,
        **packages,
        "dali": package_version("nvidia-dali-cuda130") or package_version("nvidia-dali-cuda120"),
        "opencv": package_version("opencv-python-headless") or package_version("opencv-contrib-python-headless"),
    }


def _text(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def _value(text: str) -> Any:
    """Return a field as a number or truth value where it is written as one, None where it is empty."""
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
