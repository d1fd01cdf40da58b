"""Kernels of local attention; imports torch, triton and einops, and nothing else of this project."""

from kernels.attention_block import local_attention_block
from kernels.local_attention import local_attention

__all__ = ["local_attention", "local_attention_block"]
