"""State of an engine that runs in one process, as a file: weights, optimizer and gradient scaler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copied_to_cpu", "load_state", "read_tensors", "save_state"]

_NAME = "engine.pt"


def save_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> Callable[[], None]:
    """Copy the state to the CPU; return the function that writes the copy into ``folder``, from any thread."""
    state = copied_to_cpu(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": {} if scaler is None else scaler.state_dict(),
        }
    )
    return lambda: torch.save(state, folder / _NAME)


def load_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> None:
    """Load the state in ``folder`` into the three objects, which have the configuration that wrote it."""
    state = read_tensors(folder / _NAME)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])


def read_tensors(path: Path) -> Any:
    """Read the tensors and plain values of a file by ``torch.save`` onto the CPU; no code in the file is run."""
    return torch.load(path, map_location="cpu", weights_only=True)


def copied_to_cpu(value: Any) -> Any:
    """Copy the tensors in mappings and lists to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied_to_cpu(item) for key, item in value.items()}
    return [copied_to_cpu(item) for item in value] if isinstance(value, list) else value
