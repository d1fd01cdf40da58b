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

from kernels.benchmarks.race import OVER
from kernels.machine import card_facts, commit, cpu_facts, cpu_name, emulates_bf16, package_version

__all__ = ["MACHINE", "MEASURED", "Layout", "Record", "Status", "append_records", "read_records", "this_machine"]

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
    provider: str
    unit: str
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
    machine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The file of a benchmark: its columns beside those of all, and the unit of its samples."""

    file: str
    unit: str
    case: tuple[str, ...]
    figures: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.case, *MEASURED, *self.figures, *MACHINE)

    def record(
        self,
        machine: Mapping[str, Any],
        case: Mapping[str, Any],
        provider: str,
        samples: Sequence[float] = (),
        *,
        status: Status = "ok",
        reason: str = "",
        **figures: Any,
    ) -> Record:
        """Return median and quartiles of the samples; what should have some and has none was not begun in time."""
        if status == "ok" and not samples:
            status, reason = "skipped", OVER
        found: dict[str, Any] = {"case": case, "provider": provider, "status": status, "reason": reason}
        if samples:
            low, middle, high = (
                statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
            )
            found |= {"median": middle, "low": low, "high": high, "spread": "quartiles", "n": len(samples)}
        return Record(unit=self.unit, figures=dict.fromkeys(self.figures) | figures, machine=machine, **found)

    def check_columns(self, path: Path) -> None:
        """Raise ValueError where the file holds other columns: an old result is never changed."""
        if path.exists() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file))
            if header != list(self.columns):
                raise ValueError(f"{path}: holds other columns than this program writes; choose another place")


def append_records(path: Path, layout: Layout, records: Iterable[Record]) -> None:
    """Append to a CSV file, with a header where it is new; each row is on disk before the next is asked for.

    Raises:
        ValueError: the file has other columns (nothing is written then), or a record has a field without a column.
    """
    layout.check_columns(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=layout.columns)
        if not path.stat().st_size:
            writer.writeheader()
            file.flush()
        for record in records:
            measured = {name: getattr(record, name) for name in MEASURED}
            row = {**record.case, **measured, **record.figures, **record.machine}
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )
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
                **{name: _value(line[name]) for name in ("median", "low", "high", "n")},
                **{name: line[name] for name in ("provider", "unit", "spread", "status", "reason")},
                machine={name: line[name] for name in MACHINE},
                **{part: {name: _value(line[name]) for name in held} for part, held in parts.items()},
            )
            for line in reader
        ]


def this_machine(device: torch.device) -> dict[str, Any]:
    """Return the fields of ``MACHINE``, as far as the machine says; the card's are of ``device``."""
    card, cpu = card_facts(device), cpu_facts()
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
        **{name: package_version(name) for name in ("triton", "deepspeed", "numpy", "numba")},
        "dali": package_version("nvidia-dali-cuda130") or package_version("nvidia-dali-cuda120"),
        "opencv": package_version("opencv-python-headless") or package_version("opencv-contrib-python-headless"),
    }


def _value(text: str) -> Any:
    """Return a field as a number or truth value where it is written as one, None where it is empty."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"": None, "True": True, "False": False}.get(text, text)
