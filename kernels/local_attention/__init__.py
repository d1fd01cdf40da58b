"""Local attention, softmax attention inside each block of a feature map: one interface, several backends."""

from kernels.local_attention.interface import drop_heads, local_attention

__all__ = ["drop_heads", "local_attention"]
