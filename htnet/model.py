"""HTNet: a nested transformer over a mosaic of four facial regions, with attention local to each block.

"HTNet for micro-expression recognition", Wang, Zhang, Zhang, Wang and Zhang, Neurocomputing 602, 2024,
https://arxiv.org/abs/2307.14637. The network is NesT ("Nested Hierarchical Transformer: Towards Accurate,
Data-Efficient and Interpretable Visual Understanding", Zhang et al., AAAI 2022, https://arxiv.org/abs/2105.12723)
applied to optical flow. Tokens attend to each other inside a block only. From level to level four blocks merge into one
while channels and heads double, until the last level is one block.

It is the same function as the public implementation, computed differently. Tokens stay channels-last, (B, H, W, C), so
1x1 convolutions are linear layers and the layer norms need no transposition. :mod:`htnet.checkpoint` reads and writes
checkpoints of the public implementation.

Shapes: B samples, S side of the mosaic, P side of a patch, H x W feature map of a level, C its channels, N tokens per
block, A heads, D head_dim. ``head_dim = dim // heads`` is rounded down, so A*D may be smaller than C (255 of 256 in the
paper's configuration).

In the paper's configuration N is 1: a token attends to itself alone, its attention weight is exactly 1, and queries and
keys influence nothing. They are then neither computed nor trained, and their weights stay in the state dict
(:class:`ValueProjection`). Values and output projection remain. Together they are one linear map, and are computed as
one where that is cheaper.
"""

from __future__ import annotations

import math
import os
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from htnet.aggregation import BlockAggregation
from htnet.config import HTNetConfig
from kernels.attention_block import pad_heads
from kernels.backends import BACKENDS
from kernels.local_attention import drop_heads, local_attention

__all__ = ["ATTENTION_ENV_VAR", "HTNet", "attention_backend"]

ATTENTION_ENV_VAR: Final = "HTNET_ATTENTION"


def attention_backend(configured: str) -> str:
    """Return the backend to use: the environment variable HTNET_ATTENTION if it is set, else the configured one.

    Raises:
        ValueError: the variable names no backend.
    """
    chosen = os.environ.get(ATTENTION_ENV_VAR) or configured
    if chosen not in BACKENDS:
        raise ValueError(f"{ATTENTION_ENV_VAR} must be one of {', '.join(BACKENDS)}, got {chosen!r}")
    return chosen


class PatchEmbedding(nn.Linear):
    """Linear map of squares of ``patch_size`` pixels to tokens: (B, in_channels, S, S) -> (B, S/P, S/P, dim).

    Its inputs are ordered (row, column, channel), the channel running fastest, as in upstream.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__(patch_size**2 * in_channels, dim)
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        patches = rearrange(x, "b c (h p1) (w p2) -> b h w (p1 p2 c)", p1=self.patch_size, p2=self.patch_size)
        return super().forward(patches.to(self.weight.dtype))


class ValueProjection(nn.Module):
    """Packed projection reduced to the values, for blocks of one token: (..., C) -> (..., A*D).

    ``value`` (A*D, C) is trained. ``query_key`` (2*A*D, C) is frozen. Upstream's queries and keys get gradient zero
    here; leaving them out saves a step the filling of that gradient and the optimizer's pass over them. Weight decay,
    which would shrink upstream's, does not reach them, so they keep their initial or loaded values.

    The state dict holds one ``weight`` (3*A*D, C), queries, keys, values, as a linear layer's does. Unlike a linear
    layer's it is a copy, in the dtype of ``value``. Parameters start as those of that linear layer.
    """

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        whole = nn.Linear(dim, 3 * inner_dim, bias=False).weight.detach()
        self.query_key = nn.Parameter(whole[: 2 * inner_dim].clone(), requires_grad=False)
        self.value = nn.Parameter(whole[2 * inner_dim :].clone())
        self.register_state_dict_post_hook(_pack)  # type: ignore[no-untyped-call] # torch's
        self.register_load_state_dict_pre_hook(_unpack)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.value)


def _pack(module: ValueProjection, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    query_key, value = (state.pop(prefix + name) for name in ("query_key", "value"))
    state[prefix + "weight"] = torch.cat((query_key.to(value.dtype), value))  # an optimizer may have narrowed one


def _unpack(module: ValueProjection, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    whole = state.pop(prefix + "weight", None)
    if whole is not None:
        rows = len(module.query_key)
        state[prefix + "query_key"], state[prefix + "value"] = whole[:rows], whole[rows:]


class LocalAttention(nn.Module):
    """Multi-head attention inside each block, with its projections; (B, H, W, C) -> (B, H, W, C).

    ``qkv.weight`` in the state dict is (3*A*D, C), rows in the order queries, keys, values. On a GPU in 16 bits, heads
    are padded with zeros to a multiple of 8 channels (85: 88): matrix products and kernels are several times slower on
    rows that do not begin at multiples of 16 bytes.
    """

    def __init__(
        self, dim: int, heads: int, blocks_per_side: int, tokens_per_block: int, dropout: float, backend: str
    ) -> None:
        super().__init__()
        inner_dim = dim // heads * heads
        self.heads = heads
        self.blocks_per_side = blocks_per_side
        self.tokens_per_block = tokens_per_block
        self.dropout = dropout
        self.backend = backend
        self.widened = False
        self.qkv = (
            ValueProjection(dim, inner_dim) if tokens_per_block == 1 else nn.Linear(dim, 3 * inner_dim, bias=False)
        )
        self.out = nn.Linear(inner_dim, dim)

    def forward(self, x: Tensor, *, bias: bool = True) -> Tensor:
        """Compute the forward pass; without ``bias`` the output projection's is left to the caller."""
        padded = x.is_cuda and _element_size(self.out.weight) == 2 and not self.widened
        return self.attend(x, padded=padded, bias=bias)

    def attend(self, x: Tensor, *, padded: bool, bias: bool = True) -> Tensor:
        """Compute the forward pass of ``x``, heads unchanged or ``padded``: the same function, rounded differently."""
        dropout_p = self.dropout if self.training else 0.0
        out_bias = self.out.bias if bias else None
        if isinstance(self.qkv, ValueProjection):
            return self._attend_itself(x, self.qkv.value, out_bias, dropout_p, padded=padded)
        qkv_weight, out_weight = self.qkv.weight, self.out.weight
        scale = (self.out.in_features // self.heads) ** -0.5  # of the true D
        if padded:
            qkv_weight, out_weight = pad_heads(qkv_weight, out_weight, self.heads)
        attended = local_attention(
            F.linear(x, qkv_weight),
            num_heads=self.heads,
            blocks_per_side=self.blocks_per_side,
            scale=scale,
            dropout_p=dropout_p,
            backend=self.backend,
        )
        return F.dropout(F.linear(attended, out_weight, out_bias), dropout_p)

    def widen(self) -> None:
        """Keep the weights with padded heads, so that no step pads them; the state dict stays as it is.

        The padding is 0 and stays so: its gradient is exactly 0. Parameters become new ones.
        """
        if self.widened:
            return
        self.widened = True
        one_token = isinstance(self.qkv, ValueProjection)
        own = self.qkv.value if isinstance(self.qkv, ValueProjection) else self.qkv.weight
        weights = pad_heads(own.detach(), self.out.weight.detach(), 1 if one_token else self.heads)
        wide, self.out.weight = (nn.Parameter(weight.contiguous()) for weight in weights)
        if isinstance(self.qkv, ValueProjection):
            self.qkv.value = wide
        else:
            self.qkv.weight = wide
        self.register_state_dict_post_hook(_strip_padding)  # type: ignore[no-untyped-call] # torch's
        self.register_load_state_dict_pre_hook(_add_padding)  # type: ignore[no-untyped-call]

    def _attend_itself(
        self, x: Tensor, value: Tensor, out_bias: Tensor | None, dropout_p: float, *, padded: bool
    ) -> Tensor:
        """Compute the forward pass for blocks of one token; ``value`` is (A*D, C)."""
        out_weight = self.out.weight
        if padded:  # all heads are padded as one if none is dropped (1,020: 1,024)
            value, out_weight = pad_heads(value, out_weight, self.heads if dropout_p else 1)
        # one key: its attention weight is exactly 1, so the values are the result
        many = torch.compiler.is_exporting() or x.numel() > x.shape[-1] ** 2  # exported, it is a constant
        if not dropout_p and many:
            # values and output are one linear map; if there are more tokens than channels (C), its (C, C) matrix costs
            # less than the intermediate (tokens, A*D)
            return F.linear(x, out_weight @ value, out_bias)
        attended = F.linear(x, value)
        if dropout_p:
            attended = drop_heads(attended, self.heads, dropout_p)
        return F.dropout(F.linear(attended, out_weight, out_bias), dropout_p)

    def extra_repr(self) -> str:
        """Return the settings that the submodules do not show."""
        return (
            f"heads={self.heads}, blocks_per_side={self.blocks_per_side}, tokens_per_block={self.tokens_per_block}, "
            f"backend={self.backend}"
        )


def _strip_padding(module: LocalAttention, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Take the padding of :meth:`LocalAttention.widen` out of a state dict."""
    inner, heads = module.out.in_features, module.heads
    qkv, out = state[prefix + "qkv.weight"], state[prefix + "out.weight"]
    if isinstance(module.qkv, ValueProjection):
        state[prefix + "qkv.weight"], state[prefix + "out.weight"] = qkv[: 3 * inner], out[:, :inner].contiguous()
        return
    head_dim = inner // heads
    state[prefix + "qkv.weight"] = qkv.unflatten(0, (3 * heads, -1))[:, :head_dim].flatten(0, 1)
    state[prefix + "out.weight"] = out.unflatten(1, (heads, -1))[..., :head_dim].flatten(1)


def _add_padding(module: LocalAttention, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pad the weights of a state dict as :meth:`LocalAttention.widen` does."""
    names = (prefix + "qkv.weight", prefix + "out.weight")
    if not all(name in state for name in names):
        return
    qkv, out = (state[name] for name in names)
    if isinstance(module.qkv, ValueProjection):
        missing = module.out.weight.shape[1] - out.shape[1]
        qkv, out = F.pad(qkv, (0, 0, 0, missing)), F.pad(out, (0, missing))
    else:
        qkv, out = pad_heads(qkv, out, module.heads)
    state |= dict(zip(names, (qkv, out), strict=True))


def _element_size(weight: Tensor) -> int:
    """Return the bytes per element in which products with ``weight`` are computed, with or without autocast."""
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return dtype.itemsize


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them; (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        hidden = F.dropout(F.gelu(self.hidden(x)), dropout_p)
        return F.dropout(self.out(hidden), dropout_p)


class TransformerLayer(nn.Module):
    """Attention and MLP, each after a layer norm and added to its input; (B, H, W, C) -> (B, H, W, C).

    It is not called a block: here a block is a group of tokens that attend to each other.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        blocks_per_side: int,
        tokens_per_block: int,
        mlp_ratio: int,
        dropout: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = LocalAttention(dim, heads, blocks_per_side, tokens_per_block, dropout, backend)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim * mlp_ratio, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class NestedLevel(nn.Module):
    """Transformer layers at one resolution, then the aggregation to the next (none after the last level).

    ``pos_emb`` is (N,): one number per position in a block, added to all channels of the token there. With
    ``position="channel"`` it is (N, C), a number for each channel. The layer norms of a level remove a number that all
    channels share. (N,) therefore acts through the aggregation's convolution alone, and in the last level not at all.
    """

    def __init__(self, config: HTNetConfig, level: int, backend: str) -> None:
        super().__init__()
        dim, heads = config.dim * 2**level, config.heads * 2**level
        self.blocks_per_side = config.blocks_per_side[level]
        self.grad_checkpointing = False
        self.fused = False
        if config.position == "scalar":
            self.pos_emb = nn.Parameter(torch.randn(config.tokens_per_block))
        else:
            self.pos_emb = nn.Parameter(0.02 * torch.randn(config.tokens_per_block, dim))  # as NesT's tables start
        self.layers = nn.ModuleList(
            TransformerLayer(
                dim, heads, self.blocks_per_side, config.tokens_per_block, config.mlp_ratio, config.dropout, backend
            )
            for _ in range(config.depths[level])
        )
        last = level == config.levels - 1
        self.aggregation: nn.Module = nn.Identity() if last else BlockAggregation(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(len(self.pos_emb))
        # the same table in every block: (H, W, 1) or (H, W, C)
        x = x + self.pos_emb.view(side, side, -1).repeat(self.blocks_per_side, self.blocks_per_side, 1)
        if self.fused:
            x = self._run_fused(x)
        else:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False) if self.grad_checkpointing and self.training else layer(x)
        out: Tensor = self.aggregation(x)
        return out

    def _run_fused(self, x: Tensor) -> Tensor:
        """Run the layers with one kernel between two matrix products; the same function, rounded differently."""
        from kernels.pointwise import gelu, residual, residual_norm  # imports Triton

        layers = cast("list[TransformerLayer]", list(self.layers))
        normed = layers[0].attention_norm(x)
        for layer, following in zip(layers, (*layers[1:], None), strict=True):
            attention, mlp, norm = layer.attention, layer.mlp, layer.mlp_norm
            mixed = attention(normed, bias=False)
            x, normed = residual_norm(x, mixed, attention.out.bias, norm.weight, norm.bias, norm.eps)
            hidden = gelu(F.linear(normed, mlp.hidden.weight), mlp.hidden.bias)
            mixed = F.linear(hidden, mlp.out.weight)
            if following is None:
                x = residual(x, mixed, mlp.out.bias)
                break
            norm = following.attention_norm
            x, normed = residual_norm(x, mixed, mlp.out.bias, norm.weight, norm.bias, norm.eps)
        return x


class HTNet(nn.Module):
    """The network: mosaics (B, in_channels, S, S) to logits (B, num_classes).

    Weights are initialised as upstream's: torch's defaults for linear layers and convolutions, standard normal for
    position tables (a fiftieth of that for tables with a number for each channel). Input of another floating dtype than
    the weights is cast to it.

    Args:
        config: the architecture; it refuses sizes that do not divide.

    Raises:
        ValueError: the environment variable HTNET_ATTENTION names no backend.
    """

    def __init__(self, config: HTNetConfig) -> None:
        super().__init__()
        backend = attention_backend(config.attention_backend)
        last_dim = config.dim * 2 ** (config.levels - 1)
        self.config = config
        self.patch_embed = PatchEmbedding(config.patch_size, config.in_channels, config.dim)
        self.levels = nn.ModuleList(NestedLevel(config, level, backend) for level in range(config.levels))
        self.head_norm = nn.LayerNorm(last_dim)
        self.head = nn.Linear(last_dim, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of mosaics (B, in_channels, S, S).

        Raises:
            ValueError: ``x`` has another shape.
            TypeError: ``x`` is not floating point.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the tokens of the last level, (B, side, side, dim*2^(levels-1)), side = S/P/2^(levels-1).

        Errors as of :meth:`forward`.
        """
        expected = (self.config.in_channels, self.config.image_size, self.config.image_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"input must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        if not torch.is_floating_point(x):
            raise TypeError(f"input must be floating point, got {x.dtype}")
        x = self.patch_embed(x)
        for level in self.levels:
            x = level(x)
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        """Return logits (B, num_classes) of the tokens that :meth:`forward_features` returns."""
        logits: Tensor = self.head(self.head_norm(features).mean(dim=(1, 2)))
        return logits

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that weight decay must leave alone: biases, norms, position tables."""
        named = self.named_parameters()
        return {name for name, parameter in named if parameter.dim() < 2 or name.endswith("pos_emb")}

    def fuse(self, *, padded: bool) -> None:
        """Compute the layers by :mod:`kernels.pointwise`; ``padded``: on weights that are padded once and for all.

        Padding makes new parameters: fuse before an optimizer is built. The state dict stays as it is.

        Raises:
            ValueError: the network has dropout.
        """
        if self.config.dropout:
            raise ValueError(f"fused layers have no dropout, got {self.config.dropout:g}")
        for level in self.levels:
            assert isinstance(level, NestedLevel)
            level.fused = True
            if isinstance(level.aggregation, BlockAggregation):
                level.aggregation.fused = True
            for layer in level.layers:
                assert isinstance(layer, TransformerLayer)
                if padded:
                    layer.attention.widen()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each transformer layer in the backward pass instead of keeping its activations."""
        for level in self.levels:
            assert isinstance(level, NestedLevel)
            level.grad_checkpointing = enable

    def extra_repr(self) -> str:
        """Return the configuration."""
        return str(self.config)
