"""One training over several processes (``htnet train``)."""

from __future__ import annotations

from typing import Literal

from htnet.config.section import Above0, Count, NotNegative, Positive, section


@section
class ScaleConfig:
    """One training over several processes (``htnet train``). Nothing here changes a result, but for rounding."""

    workers: Positive = 1
    """Processes that share every step's batch; train.batch_size stays the size over all of them."""
    cpus_per_worker: Above0 = 1.0
    """CPUs that Ray reserves for a worker; at least engine.threads is sensible."""
    gpus_per_worker: NotNegative = 0.0
    """GPUs that Ray reserves for a worker: 0 or 1."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what is split over the workers. 1: optimizer states; 2: gradients, too; 3: weights, too."""
    micro_batch: Count = 0
    """Samples that a worker passes through the network at once; gradients of a step add up. 0: all."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    keep_snapshots: Positive = 2
    """Newest snapshots that stay; a training goes on from the newest whole one."""
    look_steps: Positive = 10
    """Steps between two looks: a line of metrics, a stop, a snapshot if one is due (resources.checkpoint_minutes)."""

    def __post_init__(self) -> None:
        if self.gpus_per_worker not in (0.0, 1.0):
            raise ValueError(f"gpus_per_worker must be 0 or 1, got {self.gpus_per_worker:g}")


@section
class LoggingConfig:
    """Places beside ``metrics.jsonl`` that a training's figures go to."""

    tensorboard: bool = False
    """Write them into MODEL/training/tensorboard, for TensorBoard (the viewer: extra tensorboard)."""
    mlflow: str = ""
    """Address of MLflow's tracking, a server or sqlite:///FILE (extra: mlflow); empty: none."""
