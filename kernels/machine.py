"""The machine and the software on it: processor, card, driver, package versions, commit. The only reader of its kind.

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
"""Distributions whose versions decide what is computed."""


def cpu_facts() -> dict[str, str]:
    """Return what Linux reports of the last processor in /proc/cpuinfo, by its names; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name() -> str:
    """Return the processor's model name, as far as the system says."""
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def emulates_bf16() -> bool:
    """Return True where torch emulates bfloat16, for want of AVX512-BF16, AMX or ARM's bf16 in the processor."""
    facts = cpu_facts()
    flags = {*facts.get("flags", "").split(), *facts.get("Features", "").split()}
    return not flags & {"avx512_bf16", "amx_bf16", "bf16"}


def card_facts(device: torch.device | None = None) -> dict[str, str]:
    """Return name, capability, uuid, driver, cuda, cudnn and nccl of a GPU (the current one by default).

    Empty without a GPU, as it is for a ``device`` that is none. A fact that the installation does not give is missing.
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
    """Return the versions of those of ``PACKAGES`` that are installed."""
    return {name: found for name in PACKAGES if (found := package_version(name)) is not None}


def checkout() -> dict[str, Any]:
    """Return ``commit`` of the project and if files differ from it (``modified``); empty for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # git itself would find a repository that the environment happens to lie in
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
    """Return the first line that a program prints, empty where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip()
