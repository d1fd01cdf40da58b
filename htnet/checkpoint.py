"""Weights of HTNet's public implementation, converted to this project's network and back without loss.

Both networks compute the same function; their weights differ in name, in the trailing ``(1, 1)`` of 1x1 convolutions,
in the ``(1, C, 1, 1)`` of layer norms, and in the axis order of the 3x3 convolutions, (C', C, 3, 3) there and (C', 3,
3, C) here.

Upstream reads its flow images with OpenCV and so feeds the channels in the order strain, v, u; a mosaic here has (u, v,
strain). A checkpoint trained by upstream's script therefore works on mosaics of this project only after a change of the
patch embedding: pass ``channel_order="upstream"``. With ``"ours"``, the default, the weights are taken unchanged, which
is right if both networks are fed the same tensor.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from htnet.errors import InputError

__all__ = ["ChannelOrder", "from_upstream", "to_upstream"]

ChannelOrder = Literal["ours", "upstream"]

_CHANNELS: Final = 3
_WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""Keys of the state dict in files that hold an epoch or an optimizer beside it."""
_PREFIXES: Final = ("module.", "_orig_mod.")
"""Prefixes that ``DataParallel`` and ``torch.compile`` put before every key."""
_LAYER_KEYS: Final = (  # upstream's name in a transformer layer, ours, kind of weight
    ("0.norm.g", "attention_norm.weight", "norm"),
    ("0.norm.b", "attention_norm.bias", "norm"),
    ("0.fn.to_qkv.weight", "attention.qkv.weight", "linear"),
    ("0.fn.to_out.0.weight", "attention.out.weight", "linear"),
    ("0.fn.to_out.0.bias", "attention.out.bias", "plain"),
    ("1.norm.g", "mlp_norm.weight", "norm"),
    ("1.norm.b", "mlp_norm.bias", "norm"),
    ("1.fn.net.0.weight", "mlp.hidden.weight", "linear"),
    ("1.fn.net.0.bias", "mlp.hidden.bias", "plain"),
    ("1.fn.net.3.weight", "mlp.out.weight", "linear"),
    ("1.fn.net.3.bias", "mlp.out.bias", "plain"),
)
_AGGREGATION_KEYS: Final = (
    ("0.weight", "weight", "conv"),
    ("0.bias", "bias", "plain"),
    ("1.g", "norm.weight", "norm"),
    ("1.b", "norm.bias", "norm"),
)


@dataclass(frozen=True)
class _Entry:
    """Names of a weight there and here, its shape here, and the difference of its shape there."""

    upstream: str
    ours: str
    kind: str
    shape: tuple[int, ...]

    @property
    def upstream_shape(self) -> tuple[int, ...]:
        match self.kind:
            case "linear":
                return (*self.shape, 1, 1)
            case "norm":
                return (1, *self.shape, 1, 1)
            case "conv":
                out_dim, height, width, dim = self.shape
                return (out_dim, dim, height, width)
            case _:
                return self.shape

    def to_ours(self, weight: Tensor) -> Tensor:
        if self.kind == "conv":
            return weight.permute(0, 2, 3, 1).contiguous()
        return weight.reshape(self.shape)

    def to_upstream(self, weight: Tensor) -> Tensor:
        if self.kind == "conv":
            return weight.permute(0, 3, 1, 2).contiguous()
        return weight.reshape(self.upstream_shape)


def from_upstream(
    state_dict: str | os.PathLike[str] | Mapping[str, Any], *, channel_order: ChannelOrder = "ours"
) -> dict[str, Tensor]:
    """Convert an upstream checkpoint to a state dict of :class:`htnet.HTNet` in float32, on the same devices.

    The state dict may be inside a dict that also holds an epoch or an optimizer, and all its keys may begin with
    ``module.``, as ``DataParallel`` makes them. Weights of 16 or 64 bits become float32, from which training can go on.
    The position tables are those of ``model.position=scalar``.

    Args:
        state_dict: a file written by ``torch.save``, or its content as ``torch.load`` returns it. From a file, tensors
            and plain values are read and no code is run; the weights are on the CPU.
        channel_order: ``upstream`` if the checkpoint was trained on (strain, v, u) and will see (u, v, strain).

    Raises:
        InputError: the file is no such checkpoint, or a key is missing, unknown, or its weight has the wrong shape or
            kind; the message names the file, the key and the rule.
        ValueError: ``channel_order`` is neither of the two.
    """
    if isinstance(state_dict, str | os.PathLike):
        path = Path(state_dict)
        content = _read(path)
        try:
            return from_upstream(content, channel_order=channel_order)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    weights = _weights(_unwrapped(state_dict))
    entries = list(_entries(weights, upstream=True))
    _check(weights, {entry.upstream: entry.upstream_shape for entry in entries}, "an upstream HTNet checkpoint")
    ours = {entry.ours: entry.to_ours(weights[entry.upstream]) for entry in entries}
    ours["patch_embed.weight"] = _reorder(ours["patch_embed.weight"], channel_order)
    return ours


def to_upstream(state_dict: Mapping[str, Tensor], *, channel_order: ChannelOrder = "ours") -> dict[str, Tensor]:
    """Return the exact inverse of :func:`from_upstream` on a state dict; same errors.

    ``channel_order="upstream"`` writes a checkpoint that upstream's script can use on (strain, v, u) images. Position
    tables with a number for each channel are refused.
    """
    for key, weight in state_dict.items():
        if key.endswith(".pos_emb") and weight.dim() > 1:
            raise InputError(
                f"{key}: is of model.position=channel, {tuple(weight.shape)}; upstream has one number for each position"
            )
    entries = list(_entries(state_dict, upstream=False))
    _check(state_dict, {entry.ours: entry.shape for entry in entries}, "an HTNet state dict")
    reordered = {**state_dict, "patch_embed.weight": _reorder(state_dict["patch_embed.weight"], channel_order)}
    return {entry.upstream: entry.to_upstream(reordered[entry.ours]) for entry in entries}


def _read(path: Path) -> Any:
    """Read the tensors and plain values of a file written by ``torch.save``.

    Raises:
        InputError: the file is of another kind, is damaged, or holds objects that only running code restores.
    """
    try:
        with path.open("rb") as file:
            start = file.read(10)
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a checkpoint: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats; a file that cannot be read is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"{path}: {_unreadable(start, str(error))}") from None


def _unreadable(start: bytes, said: str) -> str:
    """Name the rule that a file breaks, from its first bytes and torch's error message."""
    if found := re.search(r"GLOBAL (\S+)", said):
        like = "" if found[1].startswith("numpy") else ", as a whole pickled model does"
        return f"holds {found[1]}, which only running code restores{like}: save model.state_dict() and nothing else"
    if "TorchScript" in said:
        return "a TorchScript archive: save the state_dict() of the model that it was made of"
    if start[8:9] == b"{":
        return "a file of safetensors: give what safetensors.torch.load_file returns of it"
    if start[:2] == b"PK" or start[:4] == b"\x80\x02\x8a\x0a":  # a zip archive; the number of torch's older format
        return "a damaged checkpoint: it ends too early, or is another kind of archive"
    return f"not a file that torch.save wrote: it begins with {start!r}"


def _unwrapped(checkpoint: object) -> Mapping[str, Any]:
    """Find the state dict in a training script's checkpoint, and remove the prefix of a wrapper around the model."""
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"must be a state dict, or a dict that holds one, got {type(checkpoint).__name__}")
    if odd := [key for key in checkpoint if not isinstance(key, str)]:
        raise InputError(f"{odd[0]!r}: a key of a state dict must be a text")
    inner = [name for name in _WRAPPERS if isinstance(checkpoint.get(name), Mapping)]
    if len(inner) > 1:
        raise InputError(f"holds more than one state dict, {' and '.join(inner)}: give the one that is wanted")
    if inner:
        return _unwrapped(checkpoint[inner[0]])
    if checkpoint and not any(isinstance(value, Tensor) for value in checkpoint.values()):
        names = f"{', '.join(_WRAPPERS[:-1])} or {_WRAPPERS[-1]}"
        raise InputError(f"holds no weights, and no dict of them under {names}, but {', '.join(list(checkpoint)[:8])}")
    for prefix in _PREFIXES:
        marked = [key for key in checkpoint if key.startswith(prefix)]
        if marked and len(marked) == len(checkpoint):
            return _unwrapped({key.removeprefix(prefix): value for key, value in checkpoint.items()})
        if marked:
            raise InputError(
                f"{marked[0]}: all keys must begin with {prefix} or none, got {len(marked)} of {len(checkpoint)}"
            )
    return checkpoint


def _weights(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in float32."""
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{key}: must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise InputError(f"{key}: must be a tensor of floating point numbers, got {value.dtype}")
    return {key: value.to(torch.float32) for key, value in state_dict.items()}


def _reorder(weight: Tensor, channel_order: ChannelOrder) -> Tensor:
    """Reverse the channels among the inputs of the patch embedding, (dim, P*P*3), whose channel runs fastest."""
    if channel_order == "ours":
        return weight
    if channel_order != "upstream":
        raise ValueError(f"channel_order must be ours or upstream, got {channel_order!r}")
    if weight.shape[1] % _CHANNELS:
        raise InputError(f"channel_order=upstream needs {_CHANNELS} channels, got {weight.shape[1]} inputs per patch")
    return weight.view(weight.shape[0], -1, _CHANNELS).flip(-1).reshape(weight.shape)


def _check(state_dict: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    for key in state_dict:
        if key not in expected:
            raise InputError(f"{key}: unknown key for {what}")
    for key, shape in expected.items():
        if key not in state_dict:
            raise InputError(f"{key}: missing from {what}")
        if tuple(state_dict[key].shape) != shape:
            raise InputError(f"{key}: {what} has shape {shape} here, got {tuple(state_dict[key].shape)}")


def _entries(state_dict: Mapping[str, Tensor], *, upstream: bool) -> Iterator[_Entry]:
    """Yield every weight of a network that has the sizes found in ``state_dict``."""
    side = 0 if upstream else 1

    def size(names: tuple[str, str], axis: int) -> int:
        key = names[side]
        if key not in state_dict:
            raise InputError(f"{key}: missing from the state dict")
        if state_dict[key].dim() <= axis:
            raise InputError(f"{key}: expected more than {axis} axes, got shape {tuple(state_dict[key].shape)}")
        return int(state_dict[key].shape[axis])

    embedding = ("to_patch_embedding.1.weight", "patch_embed.weight")
    head = ("mlp_head.2.weight", "head.weight")
    dim, levels = size(embedding, 0), _count(state_dict, ("layers.", "levels.")[side])
    yield _Entry(*embedding, "linear", (dim, size(embedding, 1)))
    yield _Entry("to_patch_embedding.1.bias", "patch_embed.bias", "plain", (dim,))
    for level in range(levels):
        theirs, ours, width = f"layers.{level}", f"levels.{level}", dim * 2**level
        position = (f"{theirs}.0.pos_emb", f"{ours}.pos_emb")
        yield _Entry(*position, "plain", (size(position, 0),))
        for layer in range(_count(state_dict, (f"{theirs}.0.layers.", f"{ours}.layers.")[side])):
            prefixes = (f"{theirs}.0.layers.{layer}.", f"{ours}.layers.{layer}.")
            inner = size((prefixes[0] + "0.fn.to_out.0.weight", prefixes[1] + "attention.out.weight"), 1)
            hidden = size((prefixes[0] + "1.fn.net.0.weight", prefixes[1] + "mlp.hidden.weight"), 0)
            yield from _layer(prefixes, width, inner, hidden)
        if level < levels - 1:
            shapes = ((2 * width, 3, 3, width), (2 * width,), (2 * width,), (2 * width,))
            for (name, our_name, kind), shape in zip(_AGGREGATION_KEYS, shapes, strict=True):
                yield _Entry(f"{theirs}.1.{name}", f"{ours}.aggregation.{our_name}", kind, shape)
    width = dim * 2 ** (levels - 1)
    yield _Entry("mlp_head.0.g", "head_norm.weight", "norm", (width,))
    yield _Entry("mlp_head.0.b", "head_norm.bias", "norm", (width,))
    yield _Entry(*head, "plain", (size(head, 0), width))
    yield _Entry("mlp_head.2.bias", "head.bias", "plain", (size(head, 0),))


def _layer(prefixes: tuple[str, str], dim: int, inner: int, hidden: int) -> Iterator[_Entry]:
    attention = ((dim,), (dim,), (3 * inner, dim), (dim, inner), (dim,))
    mlp = ((dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,))
    for (theirs, ours, kind), shape in zip(_LAYER_KEYS, (*attention, *mlp), strict=True):
        yield _Entry(prefixes[0] + theirs, prefixes[1] + ours, kind, shape)


def _count(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Count the numbered children under ``prefix``: the largest number plus one, at least one."""
    numbers = [key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)]
    return max((int(number) for number in numbers if number.isdecimal()), default=0) + 1
