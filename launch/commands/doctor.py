"""Command ``htnet doctor``: facts of this machine, and a check of every part on it."""

from __future__ import annotations

import os
import platform
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from htnet.errors import EXIT_DONE, EXIT_PARTIAL
from kernels.machine import card_facts, cpu_name, emulates_bf16, package_versions
from launch.cluster import ray_cluster, usable_cpus


def doctor(console: Console) -> int:
    """Print the facts and run a small check of every part; exit code 1 when a check fails."""
    facts = Table(title="this machine", show_header=False)
    for name, value in machine_facts().items():
        facts.add_row(name, Text(value))
    console.print(facts)
    checks = Table(title="parts")
    checks.add_column("part")
    checks.add_column("result")
    good = True
    for name, check in (
        ("torch", _torch),
        ("triton", _triton),
        ("DALI", _dali),
        ("Numba", _numba),
        ("DeepSpeed", _deepspeed),
        ("Ray", _ray),
    ):
        try:
            result = Text(check())
        except Exception as error:  # each part may be broken in its own way, and the command is there to tell
            # plain text: [/dev/shm] in it is no markup
            result, good = Text(f"fails: {type(error).__name__}: {error}", style="red"), False
        checks.add_row(name, result)
    console.print(checks)
    return EXIT_DONE if good else EXIT_PARTIAL


def machine_facts() -> dict[str, str]:
    """Return processor, its bf16 support, Python and package versions."""
    return {
        "processor": f"{cpu_name()}, {os.cpu_count()} CPUs, {usable_cpus()} of them usable here",
        "bf16 on the CPU": "emulated: engine.precision=fp32 is faster" if emulates_bf16() else "by the processor",
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "packages": ", ".join(f"{name} {found}" for name, found in package_versions().items()),
    }


def _torch() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"{torch.__version__}, no GPU: folds run on the CPU"
    cards = (card_facts(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    return "; ".join(
        (str(torch.__version__), *(", ".join(f"{name} {fact}" for name, fact in card.items()) for card in cards))
    )


def _triton() -> str:
    import triton

    return str(triton.__version__)


def _dali() -> str:
    import torch

    from dali_pipelines import DALI_VERSION, self_test

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self_test(device)
    return f"{DALI_VERSION}, a pipeline ran on the {device.type}"


def _numba() -> str:
    import numba
    import torch

    from htnet.data.flow.tvl1 import tvl1

    pictures = torch.zeros(1, 16, 16)
    tvl1(pictures, pictures)
    return f"{numba.__version__}, TV-L1 ran on the CPU"


def _deepspeed() -> str:
    import torch

    from htnet.config import EngineConfig, HTNetConfig, TrainConfig
    from htnet.model import HTNet
    from htnet.training.engine import create_engine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = HTNet(HTNetConfig(dim=8, heads=1, depths=(1, 1, 1)))
    engine = create_engine(model, TrainConfig(), EngineConfig(), device=device)
    loss = engine.train_step(
        torch.zeros(2, 3, 28, 28, device=device), torch.zeros(2, dtype=torch.int64, device=device), 1e-3
    )
    engine.close()
    return f"one step on the {device.type}, loss {loss.item():.3f}"


def _ray() -> str:
    with ray_cluster(None) as ray:
        resources = ray.cluster_resources()
    return f"{ray.__version__}, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
