"""The shapes that are measured, and the least that any program must do for them.

Two operations, as the package has them: ``core`` is :func:`kernels.local_attention` on packed qkv, ``block`` is
:func:`kernels.local_attention_block`, the attention half of a transformer layer. A count here is a floor:

- bytes: every input read once, every output written once. What a program keeps between forward and backward, and what
  it reads twice, is its own affair and not counted.
- FLOPs: a multiplication and an addition are two. Only products are counted; softmax and layer norm are not.

With one token per block the softmax over one key is 1: the core is a copy of V, and the block needs no queries or keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

from kernels.benchmarks.cards import Card

__all__ = ["CONFIGURATIONS", "DIRECTIONS", "OPERATIONS", "SHAPE", "Case", "Direction", "Operation", "select_cases"]

Operation = Literal["core", "block"]
Direction = Literal["forward", "backward", "both"]
OPERATIONS: Final = get_args(Operation)
DIRECTIONS: Final = get_args(Direction)
ELEMENT_SIZE: Final = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Local attention on a feature map of ``batch`` x ``height`` x ``width`` tokens."""

    name: str
    """Configuration and level, or tokens per block and head_dim of a shape of its own: ``16x85``."""
    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    blocks_per_side: int
    dim: int
    """Channels of the block operation; the core does not see them."""
    dtype: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.dtype not in ELEMENT_SIZE:
            raise ValueError(f"dtype must be one of {', '.join(ELEMENT_SIZE)}, got {self.dtype!r}")

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.batch * self.height * self.width

    @property
    def tokens_per_block(self) -> int:
        return self.height * self.width // self.blocks_per_side**2

    @property
    def blocks(self) -> int:
        """Blocks of the whole batch."""
        return self.batch * self.blocks_per_side**2

    @property
    def inner(self) -> int:
        """Channels of q, of k and of v: A*D."""
        return self.heads * self.head_dim

    def bytes_moved(self, operation: Operation, direction: Direction) -> int:
        """Least traffic in bytes."""
        if direction == "both":
            return self.bytes_moved(operation, "forward") + self.bytes_moved(operation, "backward")
        if operation == "core":
            return self.tokens * self.inner * ELEMENT_SIZE[self.dtype] * self._core_maps(direction)
        gradients = 4 * self.dim * self.inner + 3 * self.dim
        weights = gradients if self.tokens_per_block > 1 else gradients - 2 * self.dim * self.inner
        if direction == "forward":
            elements = 2 * self.tokens * self.dim + weights  # x in, result out
        else:
            elements = 3 * self.tokens * self.dim + weights + gradients  # x, gradient of the result in, that of x out
        return elements * ELEMENT_SIZE[self.dtype]

    def _core_maps(self, direction: Direction) -> int:
        """Maps of A*D channels that the core moves."""
        if self.tokens_per_block == 1:
            return 2 if direction == "forward" else 4  # v in, out; the gradient in, that of qkv (two thirds zeros) out
        return 4 if direction == "forward" else 7  # qkv in, out; the gradient and qkv in, that of qkv out

    def flops(self, operation: Operation, direction: Direction) -> int:
        """Arithmetic of the products.

        Core, per block and head: forward 2 products of N x N x D (scores; weights times values); backward 5 (the
        scores again, because to keep them would cost traffic; the gradients of weights, values, queries and keys).
        Block: also the projections to 3*A*D channels and back, forward once and backward twice (input and weight).
        """
        if direction == "both":
            return self.flops(operation, "forward") + self.flops(operation, "backward")
        one_token = self.tokens_per_block == 1
        product = 2 * self.tokens * self.tokens_per_block * self.inner  # of N x N x D, over all blocks and heads
        core = 0 if one_token else product * (2 if direction == "forward" else 5)
        if operation == "core":
            return core
        projections = 2 * self.tokens * self.dim * self.inner * (2 if one_token else 4)
        return core + projections * (1 if direction == "forward" else 2)

    def floor(self, operation: Operation, direction: Direction, *, bandwidth: float, rate: float) -> tuple[float, str]:
        """Seconds that no program beats at ``bandwidth`` bytes and ``rate`` FLOP a second, and what sets them."""
        traffic = self.bytes_moved(operation, direction) / bandwidth
        arithmetic = self.flops(operation, direction) / rate
        return max(traffic, arithmetic), "traffic" if traffic >= arithmetic else "arithmetic"

    def floor_on(self, card: Card, operation: Operation, direction: Direction) -> tuple[float, str]:
        """Return the same by a card's data sheet."""
        return self.floor(operation, direction, bandwidth=card.bandwidth, rate=card.rate(self.dtype))


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Sizes of a network that decide the shapes of its attention; level 0 is the finest."""

    image_size: int
    patch_size: int = 7
    dim: int = 256
    heads: int = 3
    levels: int = 3

    def case(self, name: str, level: int, *, batch: int, dtype: str) -> Case:
        """Return the attention of one level: width and heads double from level to level, the side of the map halves."""
        side = self.image_size // self.patch_size // 2**level
        dim, heads = self.dim * 2**level, self.heads * 2**level
        return Case(
            name=f"{name}/{level}",
            batch=batch,
            height=side,
            width=side,
            heads=heads,
            head_dim=dim // heads,
            blocks_per_side=2 ** (self.levels - 1 - level),
            dim=dim,
            dtype=dtype,
        )


CONFIGURATIONS: Final = {
    "paper": Configuration(image_size=28),
    "fine": Configuration(image_size=112),
    "hd": Configuration(image_size=224),
}
"""The paper's network, and the same on finer maps, where a block holds 16 and 64 tokens instead of one."""

SHAPE: Final = ("tokens", "heads", "head_dim", "blocks_per_side", "dim")
"""Names of what describes a case of its own."""


def select_cases(names: Sequence[str] | None, shape: Mapping[str, Any], *, batch: int, dtype: str) -> list[Case]:
    """Return cases by name (``fine``: its levels; ``fine/0``: one of them; None: all), or one of its own, ``16x85``.

    ``shape`` may hold ``SHAPE``: ``tokens`` of a block (``"16"``, or ``"2x8"`` if it is not square), and numbers.

    Raises:
        ValueError: an unknown name or value; the message lists those that are known.
    """
    if shape:
        if names is not None:
            raise ValueError(f"{', '.join(shape)} describe a case of their own; leave out the names of cases")
        return [_custom(batch=batch, dtype=dtype, **shape)]
    known = {
        f"{name}/{level}": (name, level) for name in CONFIGURATIONS for level in range(CONFIGURATIONS[name].levels)
    }
    chosen: dict[str, Case] = {}
    for wanted in names or CONFIGURATIONS:
        found = {key: place for key, place in known.items() if wanted in (key, place[0])}
        if not found:
            raise ValueError(
                f"unknown case {wanted!r}; known: {', '.join(CONFIGURATIONS)}, and their levels as paper/0"
            )
        for key, (name, level) in found.items():
            chosen[key] = CONFIGURATIONS[name].case(name, level, batch=batch, dtype=dtype)
    return list(chosen.values())


def _custom(
    *,
    batch: int,
    dtype: str,
    tokens: str = "16",
    heads: int = 3,
    head_dim: int = 85,
    blocks_per_side: int = 4,
    dim: int | None = None,
) -> Case:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", tokens)
    if found is None:
        raise ValueError(f"tokens must be a whole number, or rows x columns as 2x8, got {tokens!r}")
    rows = int(found[1]) if found[2] else math.isqrt(int(found[1]))
    columns = int(found[2] or rows)
    if not found[2] and rows * columns != int(tokens):
        raise ValueError(f"tokens must be a square number, or rows x columns as 2x8, got {tokens}")
    return Case(
        name=f"{rows * columns}x{head_dim}",
        batch=batch,
        height=rows * blocks_per_side,
        width=columns * blocks_per_side,
        heads=heads,
        head_dim=head_dim,
        blocks_per_side=blocks_per_side,
        # heads need not divide the width: dim 256 with 3 heads of 85 leaves one channel
        dim=dim or math.ceil(heads * head_dim / 16) * 16,
        dtype=dtype,
    )
