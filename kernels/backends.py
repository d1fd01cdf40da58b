"""The names of the ways to compute local attention; a configuration reads them without torch."""

from __future__ import annotations

from typing import Final, Literal, get_args

__all__ = ["BACKENDS", "Backend"]

Backend = Literal["auto", "reference", "sdpa", "triton"]
BACKENDS: Final[tuple[Backend, ...]] = get_args(Backend)
