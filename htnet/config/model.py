"""The network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from htnet.config.section import Positive, section
from kernels.backends import Backend


@section
class HTNetConfig:
    """The network. Defaults are the paper's (Wang et al., 2024): 139,582,982 parameters."""

    image_size: Positive = 28
    """Side of the mosaic in pixels."""
    patch_size: Positive = 7
    """Side of the square of pixels embedded as one token."""
    dim: Positive = 256
    """Channels of level 0; doubles from level to level."""
    heads: Positive = 3
    """Attention heads of level 0; doubles from level to level. head_dim is dim // heads."""
    levels: Positive = 3
    """Resolution stages; level 0 is the finest and has 2^(levels-1) blocks per side."""
    depths: tuple[Positive, ...] = (2, 2, 10)
    """Transformer layers of each level, finest first."""
    mlp_ratio: Positive = 4
    """Hidden channels of a layer's MLP as a multiple of its channels."""
    in_channels: Positive = 3
    """Channels of the mosaic: flow_u, flow_v, strain."""
    num_classes: Positive = 3
    """Emotions to tell apart."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout after the attention's softmax and projections and in the MLP; the paper has none."""
    position: Literal["scalar", "channel"] = "scalar"
    """Position table: scalar is upstream's, one number for all channels of a token; channel has a number for each."""
    attention_backend: Backend = "auto"
    """Way in which local attention is computed; the environment variable HTNET_ATTENTION overrides it."""

    def __post_init__(self) -> None:
        if len(self.depths) != self.levels:
            raise ValueError(
                f"depths must hold one number of layers per level: levels={self.levels}, depths={self.depths}"
            )
        if self.heads > self.dim:
            raise ValueError(f"heads must not exceed dim, got heads={self.heads}, dim={self.dim}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )
        tokens, blocks = self.image_size // self.patch_size, 2 ** (self.levels - 1)
        if tokens % blocks:
            raise ValueError(
                f"image_size / patch_size must be a multiple of 2^(levels-1) blocks per side, got {self.image_size} / "
                f"{self.patch_size} = {tokens} tokens per side and {blocks} blocks per side"
            )

    @property
    def blocks_per_side(self) -> tuple[int, ...]:
        """Blocks per side of each level, finest first; the last level is one block."""
        return tuple(2**level for level in reversed(range(self.levels)))

    @property
    def tokens_per_block(self) -> int:
        """Tokens that attend to each other; the same at every level."""
        side: int = self.image_size // self.patch_size // 2 ** (self.levels - 1)
        return side * side
