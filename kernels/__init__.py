"""Kernels of local attention in Triton (imports torch and einops), compiled loops for the CPU (numpy and Numba), facts.

Imports nothing else of this project, and nothing at all before a name is asked for: a program that reads the
machine's facts, or compiles a loop, does without torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__all__ = ["local_attention", "local_attention_block"]


class _Kernels(ModuleType):
    """This package, with functions of the names of its parts: Python binds the sub-package ``local_attention`` here."""

    @property
    def local_attention(self) -> Any:
        from kernels.local_attention import local_attention

        return local_attention

    @local_attention.setter
    def local_attention(self, package: ModuleType) -> None:
        pass  # the function stays

    @property
    def local_attention_block(self) -> Any:
        from kernels.attention_block import local_attention_block

        return local_attention_block


sys.modules[__name__].__class__ = _Kernels
