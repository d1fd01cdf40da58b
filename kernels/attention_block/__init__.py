"""The attention block: layer norm, projections, local attention, bias and residual, composed or in one kernel."""

from kernels.attention_block.interface import local_attention_block

__all__ = ["local_attention_block"]
