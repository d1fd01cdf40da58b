"""Training step of one process, run by DeepSpeed with this project's optimizer; the only file that imports DeepSpeed.

Nothing is compiled at run time. A world of one opens no port: its process group uses an in-memory store.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from htnet.config import TrainConfig
from htnet.config.training import Precision
from htnet.training.loss import cross_entropy
from htnet.training.optimizers import build_optimizer, set_learning_rate
from htnet.training.precision import AUTOCAST_DTYPES, narrow_weights, predict_logits
from htnet.training.state_file import load_state, save_state
from htnet.training.world import ALONE, World

__all__ = ["DeepSpeedEngine", "deepspeed_config", "import_deepspeed", "leave_group"]

_alone = 0
"""Number of this process's engines in the process group of one; the last of them takes it down."""


class DeepSpeedEngine:
    """Engine (:class:`~htnet.training.engine.Engine`) around ``deepspeed.initialize``."""

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        precision: Precision,
        *,
        device: torch.device,
        weights: Tensor | None,
    ) -> None:
        deepspeed = import_deepspeed(device, ALONE)
        self.device = device
        self._train = train
        self._dtype = AUTOCAST_DTYPES.get(precision)
        self._weights = None if weights is None else weights.to(device)
        self._optimizer = build_optimizer(model, train, precision)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=deepspeed_config(train, precision, ALONE),
            dist_init_required=False,
        )
        # a group of one has nothing to reduce, but DeepSpeed would copy every gradient twice
        self._engine.enable_backward_allreduce = False
        narrow_weights(self._optimizer)  # after DeepSpeed's check: it takes bf16 weights only with its own wrapper
        self.model = self._engine.module

    def train_step(self, images: Tensor, labels: Tensor, learning_rate: float) -> Tensor:
        self._engine.train()
        set_learning_rate(self._optimizer, learning_rate)
        loss = cross_entropy(self._engine(images), labels, self._weights, self._train.label_smoothing)
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach()

    def logits(self, images: Tensor) -> Tensor:
        return predict_logits(self.model, images, self.device, self._dtype)

    def save(self, folder: Path) -> Callable[[], None]:
        return save_state(folder, self.model, self._optimizer, self._scaler)

    def load(self, folder: Path) -> None:
        load_state(folder, self.model, self._optimizer, self._scaler)

    def close(self) -> None:
        self._engine.destroy()
        leave_group(ALONE)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        scaler: torch.amp.GradScaler | None = getattr(self._engine, "torch_autocast_z0_gradscaler", None)
        return scaler


def deepspeed_config(train: TrainConfig, precision: Precision, world: World, *, zero: int = 0) -> dict[str, Any]:
    """Return DeepSpeed's configuration: unchanged gradients, this project's optimizer, no measuring."""
    masters_clip = precision == "bf16" and not zero  # MasterAdam clips in fp32
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": -(-train.batch_size // world.ranks),
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": zero},
        "gradient_clipping": 0.0 if masters_clip else train.clip_norm,
        "steps_per_print": 2**31 - 1,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
    }
    if zero:
        config["zero_allow_untested_optimizer"] = True  # it says so of every optimizer that it has not made itself
        # small parts stay whole otherwise, beside their parts, and a state that is loaded would have to reach both
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if precision == "bf16":
            config["bf16"] = {"enabled": True}
    if precision in AUTOCAST_DTYPES:
        config["torch_autocast"] = {"enabled": True, "dtype": str(AUTOCAST_DTYPES[precision]).removeprefix("torch.")}
    return config


def import_deepspeed(device: torch.device, world: World) -> Any:
    """Import DeepSpeed and join the process group: no launcher, no compilation."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # a process sees only its own GPU, so that its local rank is always 0
    os.environ.update(RANK=str(world.rank), LOCAL_RANK="0", WORLD_SIZE=str(world.ranks))
    import deepspeed
    import deepspeed.ops

    # a communication extension that DeepSpeed would compile at start-up (over a minute) for several
    # processes on one CPU machine. The table is replaced unread, because looking
    # at it makes DeepSpeed probe every extension with the C compiler
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    _join_group("nccl" if device.type == "cuda" else "gloo", world)
    return deepspeed


def _join_group(backend: str, world: World) -> None:
    import deepspeed

    global _alone
    if world.ranks == 1:
        if not dist.is_initialized():
            # exported at run time only, which the type checker cannot see
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        _alone += 1
    elif not dist.is_initialized() or dist.get_world_size() != world.ranks:
        raise ValueError(f"a world of {world.ranks} ranks needs torch's process group of as many, joined before")
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def leave_group(world: World) -> None:
    """Take down the process group of one with its last engine; at exit NCCL would warn or delay it."""
    import deepspeed

    global _alone
    if world.ranks == 1:
        _alone -= 1
        if _alone == 0:
            deepspeed.comm.destroy_process_group()
