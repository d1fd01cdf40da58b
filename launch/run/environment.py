"""Environments: the machine of a driver, the machine of a fold, and the facts of it that decide a fold's last bits."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic accepts typing's own only from Python 3.12 on

from htnet.config import Config, EngineConfig
from htnet.config.data import Stores
from htnet.files import read_json
from kernels.machine import card_facts, checkout, cpu_facts, cpu_name, package_version, package_versions

if TYPE_CHECKING:
    import torch

_CPU_MODEL = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
_INSTRUCTIONS = ("avx", "amx", "fma", "asimd", "sve", "bf16")


@with_config(ConfigDict(extra="allow", strict=True))
class StoreRecipe(TypedDict, total=False):
    """Entries of a store's recipe that a report turns into sentences."""

    classes: list[str]


@with_config(ConfigDict(extra="allow", strict=True))
class RunEnvironment(TypedDict, total=False):
    """Content of ``environment.json``: the first driver's, and under ``resumed`` that of each later one.

    The report only lists further keys.
    """

    config_hash: str
    store_digest: str
    store_recipe: StoreRecipe
    store: Stores
    command: str
    commit: str
    modified: bool
    versions: dict[str, str]
    resumed: list[dict[str, Any]]


@cache
def _adapter() -> TypeAdapter[RunEnvironment]:
    return TypeAdapter(RunEnvironment)


def read_environment(path: Path) -> RunEnvironment:
    """Read ``environment.json``; errors as of :func:`htnet.files.read_json`."""
    return read_json(path, _adapter(), "environment of a run")


def driver_environment() -> dict[str, Any]:
    """Return the facts that a driver's work is judged and repeated by; ``commit`` only for a checkout."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
        **checkout(),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def fold_environment(config: Config, device: torch.device, first: Mapping[str, str]) -> dict[str, Any]:
    """Return the machine and the settings that computed a fold, for its record.

    ``first`` holds the deciding facts of the run's first fold; ``mixed_devices`` names those in which this one differs.
    """

    here = deciding_facts(config.engine, device)
    mixed = differences(first, here)
    card = card_facts(device)
    packages = ("torch", "deepspeed", "ray")
    versions = {name: found for name in packages if (found := package_version(name)) is not None}
    return {
        "host": platform.node(),
        "device": device.type,
        "device_name": card.get("name") or cpu_name(),
        **{key: value for key, value in dataclasses.asdict(config.engine).items() if key != "device"},
        "versions": versions | {"dali": here["dali"]},
        "decides": here,
        **({"card": card} if card else {}),
        **({"mixed_devices": mixed} if mixed else {}),
    }


@cache
def deciding_facts(engine: EngineConfig, device: torch.device) -> dict[str, str]:
    """Return the facts of this machine that decide the last bits of a fold: device and versions, by name."""
    import torch

    from dali_pipelines import DALI_VERSION

    facts = {"device": device.type, "dali": str(DALI_VERSION)}
    if device.type == "cuda":
        card = card_facts(device)
        facts |= {key: card.get(key, "") for key in ("name", "capability", "cuda", "cudnn")}
        facts["triton"] = package_version("triton") or ""
    else:
        facts["processor"] = processor_kind(cpu_facts())
    facts |= {"torch": torch.__version__, "numpy": package_version("numpy") or ""}
    if engine.name == "deepspeed":
        facts["deepspeed"] = package_version("deepspeed") or ""
    return facts


def processor_kind(facts: Mapping[str, str]) -> str:
    """Return the kind of a processor from :func:`kernels.machine.cpu_facts`: maker, family, model, vector instructions.

    By these the libraries under torch choose their loops, and with them the order of additions. Clock and number of
    cores are left out, because they change no order (threads are part of a run's identity). Machines of one generation
    are therefore of one kind, under any product name.
    """
    flags = f"{facts.get('flags', '')} {facts.get('Features', '')}".split()
    model = [facts[key] for key in _CPU_MODEL if key in facts]
    return " ".join(
        [*(model or [platform.machine()]), *sorted(flag for flag in flags if flag.startswith(_INSTRUCTIONS))]
    )


def differences(first: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Name the facts in which a machine differs from that of the run's first fold, with both values."""
    return [
        f"{key} {here.get(key) or 'none'} instead of {first.get(key) or 'none'}"
        for key in sorted(first.keys() | here.keys())
        if first.get(key) != here.get(key)
    ]
