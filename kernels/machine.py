"""Facts of the machine and its software: processor, card, driver, package versions, commit. No other file reads them.

Imports nothing of this project, and torch only where a card is asked for.
"""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

__all__ = [
    "PACKAGES",
    "card_facts",
    "checkout",
    "commit",
    "cpu_facts",
    "cpu_name",
    "emulates_bf16",
    "package_version",
    "package_versions",
]

PACKAGES: Final = (
    *("htnet", "torch", "triton", "deepspeed", "ray", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("numpy", "numba", "llvmlite"),
)
"""Distributions whose versions decide the numbers that are computed."""


def cpu_facts() -> dict[str, str]:
    """Return the facts of the last processor in Linux's /proc/cpuinfo, by their names there; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name() -> str:
    """Return the processor's model name, or its type where the system does not know the name."""
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def emulates_bf16() -> bool:
    """Return True where torch emulates bfloat16 because the processor has no AVX512-BF16, no AMX and no bf16 of ARM."""
    facts = cpu_facts()
    flags = {*facts.get("flags", "").split(), *facts.get("Features", "").split()}
    return not flags & {"avx512_bf16", "amx_bf16", "bf16"}


def card_facts(device: torch.device | None = None) -> dict[str, str]:
    """Return name, capability, uuid, driver, cuda, cudnn and nccl of a GPU (the current one by default).

    Empty without a GPU, and for a ``device`` that is not a GPU. Facts that the installation does not tell are left out.
    """
    import torch

    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return {}
    properties = torch.cuda.get_device_properties(device if device is not None else torch.cuda.current_device())
    cudnn = torch.backends.cudnn.version()
    facts = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "uuid": str(getattr(properties, "uuid", "")),
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda or "",
        "cudnn": "" if cudnn is None else str(cudnn),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "",
    }
    return {name: value for name, value in facts.items() if value}


def package_version(package: str) -> str | None:
    """Return the version of an installed distribution, None where it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages among ``PACKAGES``."""
    return {name: found for name in PACKAGES if (found := package_version(name)) is not None}


def checkout() -> dict[str, Any]:
    """Return the project's ``commit`` and if files differ from it (``modified``); empty for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # git would search the folders above
        return {}
    try:
        found, changes = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, timeout=30, check=True).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": found.strip(), "modified": bool(changes)}


def commit() -> str:
    """Return seven digits of the project's commit, with ``-dirty`` where files differ; ``unknown`` if installed."""
    found = checkout()
    return found["commit"][:7] + "-dirty" * found["modified"] if found else "unknown"


def _said_by(*command: str) -> str:
    """Return the first line that a program prints; empty if the program does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip()
