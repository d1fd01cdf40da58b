"""Training step of several processes, by DeepSpeed with ZeRO 0 to 3; it works for one process as well.

The loss of a step is the mean over the whole batch, whatever part of it each rank holds, so that the number of ranks
changes rounding alone. A saved state has every tensor whole, under its parameter's name. It is therefore good for any
number of ranks and any ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from htnet.config import ScaleConfig, TrainConfig
from htnet.config.training import Precision
from htnet.training.deepspeed_engine import deepspeed_config, import_deepspeed, leave_group
from htnet.training.loss import cross_entropy
from htnet.training.master_adam import MasterAdam
from htnet.training.optimizers import build_optimizer, set_learning_rate
from htnet.training.precision import AUTOCAST_DTYPES, narrow_weights, predict_logits
from htnet.training.state_file import copied_to_cpu, read_tensors
from htnet.training.world import World

__all__ = ["ParallelEngine"]

_NAME = "engine.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ParallelEngine:
    """Engine (:class:`~htnet.training.engine.Engine`) of a training by several processes.

    Every method but :meth:`close` is called by all ranks, in the same order. With several ranks the caller has already
    joined torch's process group.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        scale: ScaleConfig,
        precision: Precision,
        *,
        device: torch.device,
        weights: Tensor | None,
        world: World,
    ) -> None:
        self._deepspeed = import_deepspeed(device, world)
        self.device, self._world, self._train, self._scale = device, world, train, scale
        self._dtype = AUTOCAST_DTYPES.get(precision)
        self._input = torch.bfloat16 if precision == "bf16" and scale.zero else torch.float32
        self._weights = None if weights is None else weights.to(device)
        if scale.checkpoint_activations:
            model.set_grad_checkpointing()  # type: ignore[operator] # every model of this project has it
        self._untrained = {name: copied_to_cpu(p) for name, p in model.named_parameters() if not p.requires_grad}
        # under ZeRO, DeepSpeed keeps the fp32 masters of the ranks' parts itself
        self._own = build_optimizer(model, train, "fp32" if scale.zero else precision)
        self._engine, *_ = self._deepspeed.initialize(
            model=model,
            optimizer=self._own,
            config=deepspeed_config(train, precision, world, zero=scale.zero),
            dist_init_required=False,
        )
        self._engine.enable_backward_allreduce = world.ranks > 1 or scale.zero > 0
        narrow_weights(self._own)
        self.model = self._engine.module
        self._named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._steps = 0
        self._make_state()
        self._average = [shard.detach().clone() for shard in self._masters()] if train.ema else []

    def train_step(self, images: Tensor, labels: Tensor, learning_rate: float) -> Tensor:
        """Take one optimizer step on this rank's part of the batch; returns the loss of the whole batch.

        The part may be empty. It is passed through the network ``scale.micro_batch`` samples at a time.
        """
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        set_learning_rate(self._own, learning_rate)
        whole = self._summed(self._weight_of(labels))
        passes = self._passes(len(labels))
        loss = torch.zeros((), device=self.device)
        for index, (part, marks) in enumerate(_parts(images, labels, passes)):
            self._engine.set_gradient_accumulation_boundary(index == passes - 1)
            loss += self._backward(part, marks, self._weight_of(marks) / whole)
            self._engine.step()
        self._steps += 1
        self._follow()
        return self._summed(loss)

    def logits(self, images: Tensor) -> Tensor:
        return predict_logits(self.model, images.to(self._input), self.device, self._dtype)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that the training is for, fp32 on the CPU: their average where ``train.ema`` asks for it.

        On the first rank they are all there, by the network's names of parameters; other ranks get none.
        """
        with self._averaged() if self._train.ema else _nothing():
            whole = self._whole(None)
        return {**self._untrained, **whole} if self._world.rank == 0 else {}

    def save(self, folder: Path) -> Callable[[], None]:
        state: dict[str, Any] = {"steps": self._steps, "weights": self._whole(None)}
        for moment in _MOMENTS:
            state[moment] = self._whole(moment)
        if self._train.ema:
            with self._averaged():
                state["average"] = self._whole(None)
        if self._scaler is not None:
            state["scaler"] = self._scaler.state_dict()
        return lambda: torch.save(state, folder / _NAME)

    def load(self, folder: Path) -> None:
        state = read_tensors(folder / _NAME)
        self._steps = state["steps"]
        if self._train.ema:
            self._fill(state["average"], None)
            self._average = [shard.detach().clone() for shard in self._masters()]
        self._fill(state["weights"], None)
        for moment in _MOMENTS:
            self._fill(state[moment], moment)
        for entry in self._own_state():
            entry["step"].fill_(self._steps)
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        self._engine.destroy()
        leave_group(self._world)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        scaler: torch.amp.GradScaler | None = getattr(self._engine, "torch_autocast_z0_gradscaler", None)
        return scaler

    def _summed(self, value: Tensor) -> Tensor:
        """Return the sum of the ranks' values."""
        if self._world.ranks > 1:
            dist.all_reduce(value)
        return value

    def _passes(self, samples: int) -> int:
        """Return the number of passes of this step, the same on all ranks; ``samples`` is this rank's."""
        if not self._scale.micro_batch:
            return 1
        most = torch.tensor(samples, device=self.device)
        if self._world.ranks > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return -(-int(most) // self._scale.micro_batch)

    def _weight_of(self, labels: Tensor) -> Tensor:
        """Return the weight of samples in the mean over the batch: their number, or the sum of their class weights."""
        if self._weights is None or labels.ndim == 2:  # shares of mixed labels are averaged over the samples
            return torch.tensor(float(len(labels)), device=self.device)
        return self._weights[labels].sum()

    def _backward(self, images: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        """Add the gradient of a part of the batch, of weight ``share`` in the whole; returns its part of the loss."""
        if not len(images):  # all ranks pass the network equally often: its parts are gathered on the way
            images, labels = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1, *labels.shape[1:])
        logits = self._engine(images.to(self._input))
        loss = cross_entropy(logits, labels, self._weights, self._train.label_smoothing) * share
        # DeepSpeed takes the mean over the ranks
        self._engine.backward(loss * self._world.ranks)
        return loss.detach()

    def _follow(self) -> None:
        """Move the average of the weights: ``ema`` of it stays, less in the first steps."""
        if self._average:
            stays = min(self._train.ema, (1 + self._steps) / (10 + self._steps))
            torch._foreach_lerp_(self._average, [shard.detach() for shard in self._masters()], 1 - stays)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Hold the averages where the masters are."""
        masters = [shard.detach() for shard in self._masters()]
        kept = [shard.clone() for shard in masters]
        torch._foreach_copy_(masters, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(masters, kept)

    def _masters(self) -> list[Tensor]:
        """Return this rank's parts of the fp32 weights: with ZeRO flat, without whole."""
        optimizer = self._engine.optimizer
        if self._scale.zero == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if self._scale.zero:
            return list(optimizer.single_partition_of_fp32_groups)
        if isinstance(self._own, MasterAdam):
            return [self._own.state[parameter]["master"] for _, parameter in self._named]
        return [parameter for _, parameter in self._named]

    def _make_state(self) -> None:
        """Give Adam its moments before the first step, so that a state can be loaded into them."""
        if isinstance(self._own, MasterAdam):
            return
        for shard in self._masters():
            zeros = {moment: torch.zeros_like(shard) for moment in _MOMENTS}
            self._inner.state[shard] = {"step": torch.zeros((), device=self.device), **zeros}
        if self._scale.zero in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """Adam itself, which under ZeRO works on the parts."""
        inner: torch.optim.Optimizer = self._engine.optimizer.optimizer if self._scale.zero else self._own
        return inner

    def _own_state(self) -> list[dict[str, Any]]:
        return list(self._inner.state.values())

    def _whole(self, moment: str | None) -> dict[str, Tensor]:
        """Gather the fp32 weights, or a moment of them, on the first rank's CPU; by name."""
        whole = {}
        for name, parameter in self._named:
            value = self._gathered(parameter, moment)
            if self._world.rank == 0:
                whole[name] = copied_to_cpu(value)
        return whole

    def _gathered(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        if self._scale.zero:
            tools = self._deepspeed.utils
            if moment is None:
                gathered: Tensor = tools.safe_get_full_fp32_param(parameter)
            else:
                gathered = tools.safe_get_full_optimizer_state(parameter, moment)
            return gathered
        state = self._own.state[parameter]
        if moment is None:
            return state.get("master", parameter)  # type: ignore[no-any-return] # a state holds anything
        return state[moment]  # type: ignore[no-any-return]

    @torch.no_grad()
    def _fill(self, whole: Mapping[str, Tensor], moment: str | None) -> None:
        """Put whole tensors, by name, into this rank's parts of the weights or of a moment."""
        for name, parameter in self._named:
            value = whole[name].to(self.device)
            if self._scale.zero == 3:
                self._fill_part(parameter, value, moment)
            elif self._scale.zero:
                parameter.set_full_hp_param(value, moment)
            else:
                self._gathered(parameter, moment).copy_(value)
            if moment is None and self._scale.zero < 3:
                parameter.copy_(value)

    def _fill_part(self, parameter: Any, value: Tensor, moment: str | None) -> None:
        """Fill the part of a parameter that this rank holds under ZeRO 3; the last ranks' parts are filled up."""
        part = self._deepspeed.utils.safe_get_local_fp32_param(parameter)
        flat = torch.zeros(part.numel() * self._world.ranks, device=self.device)
        flat[: value.numel()] = value.flatten()
        own = flat[part.numel() * self._world.rank :][: part.numel()]
        if moment is None:
            self._deepspeed.utils.safe_set_local_fp32_param(parameter, own)
            parameter.ds_tensor.data.copy_(own)
        else:
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, own, moment)


def _parts(images: Tensor, labels: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.tensor_split(count), labels.tensor_split(count), strict=True)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
