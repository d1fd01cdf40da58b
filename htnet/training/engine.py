"""Engines that run the optimizer steps of a fold: DeepSpeed, or plain PyTorch behind the same interface.

Both keep fp32 masters: in fp32 they are the weights, in bf16 the optimizer holds them beside the bf16 weights
(``MasterAdam``), in fp16 they are the weights and the pass runs under autocast with a gradient scaler. With the
same optimizer, the two engines compute the same numbers on one device, and DeepSpeed's cost per step can be read off
directly (docs/benchmarks). Weight decay reaches weight matrices only. Nothing is compiled at run time and no port is
opened: the process group of a fold lives on an in-memory store.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htnet.config import EngineConfig, TrainConfig
from htnet.errors import InputError
from htnet.training.master_adam import MasterAdam

_AUTOCAST_DTYPES = {"fp16": torch.float16}


class Engine(Protocol):
    """One model, its optimizer and its precision on one device."""

    model: nn.Module
    device: torch.device

    def train_step(self, images: Tensor, labels: Tensor, learning_rate: float) -> Tensor:
        """One optimizer step on (B, 3, S, S) float32 and (B,) int64; returns the loss, a detached scalar."""
        ...

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 -> (B, num_classes) float32, without gradient and dropout."""
        ...

    def state(self) -> dict[str, Any]:
        """Weights and optimizer state as tensors and plain values, enough to go on bit for bit."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def learning_rate(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then constant or cosine to zero."""
    warmup = round(train.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - warmup) / max(1, train.epochs * steps_per_epoch - warmup)
    return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Balanced weights, samples / (classes * samples of the class); (num_classes,) float32, 0 for an absent class."""
    counts = torch.bincount(labels, minlength=num_classes).float()
    return torch.where(counts > 0, labels.numel() / (num_classes * counts.clamp(min=1)), torch.zeros(()))


def resolve_device(engine: EngineConfig, gpus_per_fold: float) -> torch.device:
    """The device of a fold; :class:`InputError` when a GPU is asked for and there is none."""
    if engine.device == "cpu" or (engine.device == "auto" and gpus_per_fold == 0):
        if engine.precision == "fp16":
            raise InputError(
                "engine.precision: fp16 needs a GPU (resources.gpus_per_fold > 0); use bf16 or fp32 on a CPU"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            f"engine.device={engine.device}, resources.gpus_per_fold={gpus_per_fold:g}: no CUDA device is visible; "
            "set engine.device=cpu and resources.gpus_per_fold=0 to run on the CPU"
        )
    return torch.device("cuda", torch.cuda.current_device())


def create_engine(
    model: nn.Module,
    train: TrainConfig,
    engine: EngineConfig,
    *,
    device: torch.device,
    weights: Tensor | None = None,
) -> Engine:
    """Build the engine that the configuration names; ``weights`` are the loss's class weights, (num_classes,)."""
    kind = DeepSpeedEngine if engine.name == "deepspeed" else TorchEngine
    return kind(model.to(device), train, engine.precision, device=device, weights=weights)


def build_optimizer(model: nn.Module, train: TrainConfig, precision: str) -> torch.optim.Optimizer:
    """Fused Adam or AdamW, for bf16 on masters; decay for weight matrices, none for biases, norms, position tables."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for _, p in named], "weight_decay": 0.0}]
    if train.weight_decay > 0:
        exempt = set(model.no_weight_decay())  # type: ignore[operator] # every model of ours names them
        groups = [
            {"params": [p for name, p in named if name not in exempt], "weight_decay": train.weight_decay},
            {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
        ]
    if precision == "bf16":
        return MasterAdam(
            groups,
            lr=train.learning_rate,
            betas=train.betas,
            eps=train.eps,
            decoupled=train.optimizer == "adamw",
            clip_norm=train.clip_norm,
        )
    kind = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=True)


class TorchEngine:
    """The step in plain PyTorch."""

    def __init__(
        self, model: nn.Module, train: TrainConfig, precision: str, *, device: torch.device, weights: Tensor | None
    ) -> None:
        self.model = model
        self.device = device
        self._train = train
        self._dtype = _AUTOCAST_DTYPES.get(precision)
        self._weights = None if weights is None else weights.to(device)
        self._optimizer = build_optimizer(model, train, precision)
        self._clip_norm = 0.0 if precision == "bf16" else train.clip_norm  # MasterAdam clips in fp32
        narrow_weights(self._optimizer)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def train_step(self, images: Tensor, labels: Tensor, learning_rate: float) -> Tensor:
        self.model.train()
        set_learning_rate(self._optimizer, learning_rate)
        with autocast(self.device, self._dtype):
            logits = self.model(images)
        loss = cross_entropy(logits, labels, self._weights, self._train.label_smoothing)
        self._scaler.scale(loss).backward()
        if self._clip_norm > 0:
            self._scaler.unscale_(self._optimizer)
            clip_gradients(self.model.parameters(), self._clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def logits(self, images: Tensor) -> Tensor:
        return predict_logits(self.model, images, self.device, self._dtype)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        return


class DeepSpeedEngine:
    """The same step run by ``deepspeed.initialize`` with our optimizer, ZeRO stage 0."""

    def __init__(
        self, model: nn.Module, train: TrainConfig, precision: str, *, device: torch.device, weights: Tensor | None
    ) -> None:
        deepspeed = _import_deepspeed(device)
        self.device = device
        self._train = train
        self._dtype = _AUTOCAST_DTYPES.get(precision)
        self._weights = None if weights is None else weights.to(device)
        self._optimizer = build_optimizer(model, train, precision)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=deepspeed_config(train, precision),
            dist_init_required=False,
        )
        # in a group of one there is nothing to reduce, but DeepSpeed would copy every gradient twice for it
        self._engine.enable_backward_allreduce = False
        narrow_weights(self._optimizer)  # after DeepSpeed has looked: it takes bf16 weights with its own wrapper only
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

    def state(self) -> dict[str, Any]:
        scaler = getattr(self._engine, "torch_autocast_z0_gradscaler", None)
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": {} if scaler is None else scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        scaler = getattr(self._engine, "torch_autocast_z0_gradscaler", None)
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        self._engine.destroy()


def deepspeed_config(train: TrainConfig, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration of one fold: one process, gradients as they are, our optimizer."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0 if precision == "bf16" else train.clip_norm,  # MasterAdam clips in fp32
        "steps_per_print": 2**31 - 1,
    }
    if precision in _AUTOCAST_DTYPES:
        config["torch_autocast"] = {"enabled": True, "dtype": str(_AUTOCAST_DTYPES[precision]).removeprefix("torch.")}
    return config


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed and join a process group of one: no launcher, no port, no compilation."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # one process a fold; Ray shows it only its own GPU, so the local rank is 0 as well
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist

    # a communication extension that DeepSpeed would compile at start-up (over a minute) for several
    # processes on one CPU machine; a fold is one process. The table is replaced unread, because looking
    # at it makes DeepSpeed probe every extension with the C compiler
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # exported at run time only, which the type checker cannot see
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Mean cross entropy in fp32; (B, num_classes), (B,) -> scalar."""
    return F.cross_entropy(logits.float(), labels, weight=weights, label_smoothing=smoothing)


@torch.no_grad()
def predict_logits(model: nn.Module, images: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """Logits in evaluation mode, (B, num_classes) float32."""
    model.eval()
    with autocast(device, dtype):
        logits: Tensor = model(images.to(device))
    return logits.float()


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> None:
    """Scale the gradients to a norm of at most ``clip_norm`` over all of them, rounded as DeepSpeed does."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).square().sum().sqrt()
    torch._foreach_mul_(gradients, (torch.full_like(norm, clip_norm) / (norm + 1e-6)).clamp(max=1.0))


def narrow_weights(optimizer: torch.optim.Optimizer) -> None:
    """Round the weights to bf16 where the optimizer holds masters."""
    if isinstance(optimizer, MasterAdam):
        optimizer.narrow(torch.bfloat16)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
