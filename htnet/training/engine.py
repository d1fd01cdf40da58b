"""Engines: one model, its optimizer and its precision on one device, behind one interface.

Engines keep fp32 masters: in fp32 they are the weights, in bf16 the optimizer holds them beside the bf16 weights
(:class:`~htnet.training.master_adam.MasterAdam`), in fp16 they are the weights and the pass runs under autocast with a
gradient scaler. With the same optimizer, the engines compute the same numbers on one device, and DeepSpeed's cost per
step can be read off directly (docs/benchmarks). Weight decay reaches weight matrices only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from htnet.config import EngineConfig, TrainConfig
from htnet.config.section import takes_gpu
from htnet.rules import check_gpu, check_precision
from htnet.training.deepspeed_engine import DeepSpeedEngine
from htnet.training.graph_engine import GraphEngine
from htnet.training.torch_engine import TorchEngine

__all__ = ["Engine", "create_engine", "resolve_device", "set_determinism"]


class Engine(Protocol):
    """One model, its optimizer and its precision on one device."""

    model: nn.Module
    device: torch.device

    def train_step(self, images: Tensor, labels: Tensor, learning_rate: float) -> Tensor:
        """Take one optimizer step on (B, 3, S, S) float32 and (B,) int64; returns the loss, a detached scalar.

        ``labels`` may be shares, (B, num_classes) float32. Dropout draws from torch's default generator of the device.
        """
        ...

    def logits(self, images: Tensor) -> Tensor:
        """Return (B, num_classes) float32 of (B, 3, S, S) float32, without gradient and dropout."""
        ...

    def save(self, folder: Path) -> Callable[[], None]:
        """Copy the state, enough to go on bit for bit; the function that is returned writes it into ``folder``.

        The function may be called from another thread while training goes on.
        """
        ...

    def load(self, folder: Path) -> None:
        """Go on from a state that an engine of the same configuration saved; of which name does not matter."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it is not used afterwards."""
        ...


def resolve_device(engine: EngineConfig, gpus_per_fold: float) -> torch.device:
    """Return the device of a training.

    Raises:
        InputError: a GPU is asked for and there is none, or the precision needs one.
    """
    check_precision(engine, gpus_per_fold)
    if not takes_gpu(engine.device, gpus_per_fold):
        return torch.device("cpu")
    asked = f"engine.device={engine.device}, resources.gpus_per_fold={gpus_per_fold:g}"
    instead = "engine.device=cpu and resources.gpus_per_fold=0"
    check_gpu(asked, visible=torch.cuda.is_available(), instead=instead)
    return torch.device("cuda", torch.cuda.current_device())


def create_engine(
    model: nn.Module,
    train: TrainConfig,
    engine: EngineConfig,
    *,
    device: torch.device,
    weights: Tensor | None = None,
) -> Engine:
    """Build the engine of one process that the configuration names.

    Args:
        model: moved to ``device``; its weights are changed in place.
        train: optimizer and loss.
        engine: name and precision.
        device: of this process.
        weights: the loss's class weights, (num_classes,).
    """
    set_determinism(device)
    model = model.to(device)
    if engine.name == "graphs":
        return GraphEngine(model, train, engine.precision, device=device, weights=weights)
    if engine.name == "deepspeed":
        return DeepSpeedEngine(model, train, engine.precision, device=device, weights=weights)
    return TorchEngine(model, train, engine.precision, device=device, weights=weights)


def set_determinism(device: torch.device) -> None:
    """Set the process's switches by which equal steps give equal bits, and fp32 convolutions take no TF32.

    On a GPU an operation without a deterministic form raises a RuntimeError; on a CPU, where all operations of the
    network have one, it warns.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cuda")
    # a debugging aid that costs a pass over every new buffer; the name is set on a module-like class
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = False
