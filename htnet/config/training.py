"""The optimisation and the engine that runs it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from htnet.config.section import Above0, Count, Device, NotNegative, Positive, section

EngineName = Literal["deepspeed", "torch", "graphs"]
Precision = Literal["fp32", "bf16", "fp16"]
_BelowOne = Annotated[float, Field(ge=0, lt=1)]


@section
class TrainConfig:
    """The optimisation of one model."""

    epochs: Positive = 40
    """Passes over the training samples."""
    batch_size: Positive = 64
    """Samples of one optimizer step; the last step of an epoch takes what is left."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """adam: L2 decay in the gradient (the paper: none); adamw: decoupled decay."""
    learning_rate: Above0 = 1e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 0.0
    """Decay of all trained weight matrices; biases, norms, position embeddings and idle Q and K are left out."""
    betas: tuple[_BelowOne, _BelowOne] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: Above0 = 1e-8
    """Adam's denominator floor."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine ends at zero."""
    warmup_epochs: NotNegative = 0.0
    """Linear warm-up from zero, in epochs."""
    clip_norm: NotNegative = 0.0
    """Largest norm of the gradient over all weights; 0: no clipping."""
    label_smoothing: _BelowOne = 0.0
    """Share of the target spread over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weight of a class is samples / (classes * samples of the class), from the training samples."""
    init: str = ""
    """Model folder whose weights a training begins with; its subjects cannot be tested on. Empty: seeded weights."""
    ema: _BelowOne = 0.0
    """Share of the average of the weights that each step keeps (``htnet train``); 0: no average is kept."""
    patience: Count = 0
    """Epochs without a better UF1 on validation after which ``htnet train`` ends, with the best epoch; 0: never."""

    def __post_init__(self) -> None:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs must not exceed epochs, got {self.warmup_epochs:g} and {self.epochs}")


@section
class EngineConfig:
    """The engine that runs the optimizer steps."""

    name: EngineName = "deepspeed"
    """deepspeed; torch: plain PyTorch; graphs: an epoch as one CUDA graph, several folds in one process."""
    precision: Precision = "fp32"
    """bf16 keeps fp32 master weights; fp16 needs a GPU."""
    device: Device = "auto"
    """auto takes the GPU that the fold was given, else the CPU."""
    threads: Positive = 1
    """CPU threads of a fold. Part of the numerics on a CPU, so part of a run's identity."""

    def __post_init__(self) -> None:
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision=fp16 needs a GPU, got device=cpu; use bf16 or fp32")
        if self.precision == "fp16" and self.name == "graphs":
            raise ValueError("name=graphs takes no precision=fp16, whose scaler asks the host; use bf16 or fp32")
