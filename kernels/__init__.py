"""Local attention in Triton (needs torch, einops), loops compiled for the CPU (numpy, Numba), facts of the machine.

Imports nothing else of this project, and nothing at all until a name is used. A program that reads the machine's facts
or compiles a loop therefore needs no torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__all__ = ["local_attention", "local_attention_block"]


class _Kernels(ModuleType):
    """This package, with functions named like its parts: Python binds the sub-package ``local_attention`` here."""

    @property
    def local_attention(self) -> Any:
        from kernels.local_attention import local_attention

        return local_attention

    @local_attention.setter
    def local_attention(self, package: ModuleType) -> None:
        pass  # Python binds the sub-package here; the function must stay

    @property
    def local_attention_block(self) -> Any:
        from kernels.attention_block import local_attention_block

        return local_attention_block


sys.modules[__name__].__class__ = _Kernels
