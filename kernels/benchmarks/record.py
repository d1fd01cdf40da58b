"""Measurement on paper: one row with everything that a reader needs to place it, appended to a CSV file."""

from __future__ import annotations

import csv
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final, Literal

import torch

from kernels.machine import card_facts, commit, cpu_name, package_version

__all__ = [
    "COLUMNS",
    "Row",
    "Status",
    "Where",
    "append_lines",
    "append_rows",
    "check_columns",
    "read_rows",
    "this_machine",
]

Status = Literal["ok", "skipped", "refused", "failed"]
"""Timed; does not run for this case; wrong, so not timed; broke."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Machine and versions."""

    date: str
    commit: str
    device: str
    """``cuda`` or ``cpu``."""
    card: str
    """The GPU's name, or the processor's."""
    driver: str
    torch: str
    triton: str
    cuda: str
    python: str


@dataclass(frozen=True, kw_only=True)
class Row(Where):
    """One provider on one case in one mode. Fields that do not apply are empty in the file and None here."""

    case: str
    operation: str
    provider: str
    mode: str
    """``forward``, ``backward`` or ``both``."""
    graph: bool
    """Whether it ran inside a CUDA graph."""
    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    blocks_per_side: int
    tokens_per_block: int
    dim: int
    dtype: str
    status: Status
    reason: str = ""
    n: int = 0
    """Samples."""
    runs: int = 0
    """Runs that a sample is the mean of."""
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    bytes: int = 0
    """Least traffic of the case; see ``cases``."""
    flops: int = 0
    gb_s: float | None = None
    copy_gb_s: float | None = None
    """What a large copy moved just before this case."""
    copy_percent: float | None = None
    tflop_s: float | None = None
    matrix_tflop_s: float | None = None
    """What a large matrix product of this dtype did just before this case."""
    matrix_percent: float | None = None
    peak_mib: float | None = None
    error_forward: float | None = None
    """Relative root mean square of the difference from float64; the gradient's is the worst of all inputs."""
    error_backward: float | None = None


COLUMNS: Final = tuple(field.name for field in fields(Row))


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """ValueError where the file holds other columns: an old result is never changed."""
    if path.exists() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        if header != list(columns):
            raise ValueError(f"{path}: holds other columns than this program writes; choose another place")


def append_lines(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, object]]) -> None:
    """Append to a CSV file, with a header where it is new; each line is on disk before the next is asked for.

    Raises:
        ValueError: the file has other columns. Nothing is written then.
    """
    check_columns(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        if not path.stat().st_size:
            writer.writeheader()
            file.flush()
        for line in lines:
            writer.writerow(line)
            file.flush()


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """:func:`append_lines` of rows."""
    append_lines(path, COLUMNS, ({key: _rounded(value) for key, value in asdict(row).items()} for row in rows))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that :func:`append_rows` wrote."""
    kinds = {field.name: str(field.type) for field in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{key: _parse(kinds[key], text) for key, text in line.items()}) for line in csv.DictReader(file)]


def this_machine(device: torch.device) -> Where:
    """Describe where a measurement is made, as far as the machine says."""
    card, threads = card_facts(device), torch.get_num_threads()
    return Where(
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        commit=commit(),
        device=device.type,
        card=card.get("name") or f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}",
        driver=card.get("driver", ""),
        torch=torch.__version__,
        triton=package_version("triton") or "absent",
        cuda=card.get("cuda", ""),
        python=platform.python_version(),
    )


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def _parse(kind: str, text: str) -> object:
    if kind.startswith("float"):
        return float(text) if text else None
    if kind == "bool":
        return text == "True"
    return int(text) if kind == "int" else text
