"""The public implementation's way of computing HTNet, restated: the baseline of the end-to-end benchmark.

Feature maps are (B, C, H, W); linear maps are 1x1 convolutions; the layer norm over channels is written out; blocks are
moved to the batch axis around the layers of a level and back; attention is computed in full even where a block holds
one token. Module names give the state-dict keys of upstream's checkpoints, so :func:`htnet.checkpoint.to_upstream`
supplies its weights. Not for training: :class:`htnet.HTNet` computes the same function, faster.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from htnet.config import HTNetConfig

__all__ = ["UpstreamHTNet"]


class _Norm(nn.Module):
    """Layer norm over the channels of a (B, C, H, W) map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, unbiased=False, keepdim=True)
        out: Tensor = (x - mean) / (variance + 1e-5).sqrt() * self.g + self.b
        return out


class _Attention(nn.Module):
    """Full softmax attention over all positions of the map it is given, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale, inner = heads, (dim // heads) ** -0.5, dim // heads * heads
        self.dropout = nn.Dropout(dropout)
        self.to_qkv = nn.Conv2d(dim, 3 * inner, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(inner, dim, 1), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = rearrange(self.to_qkv(x), "b (p a d) h w -> p b a (h w) d", p=3, a=self.heads)
        scores = torch.einsum("b a i d, b a j d -> b a i j", query, key) * self.scale
        attended = torch.einsum("b a i j, b a j d -> b a i d", self.dropout(scores.softmax(dim=-1)), value)
        out: Tensor = self.to_out(rearrange(attended, "b a (h w) d -> b (a d) h w", h=x.shape[2]))
        return out


def _mlp(dim: int, ratio: int, dropout: float) -> nn.ModuleDict:
    net = (nn.Conv2d(dim, dim * ratio, 1), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(dim * ratio, dim, 1))
    return nn.ModuleDict({"net": nn.Sequential(*net, nn.Dropout(dropout))})


class _Transformer(nn.Module):
    """The layers of one level, on blocks that lie on the batch axis."""

    def __init__(self, config: HTNetConfig, level: int) -> None:
        super().__init__()
        dim, heads, rate = config.dim * 2**level, config.heads * 2**level, config.dropout
        self.pos_emb = nn.Parameter(torch.randn(config.tokens_per_block))
        self.layers = nn.ModuleList()
        for _ in range(config.depths[level]):
            parts = (_Attention(dim, heads, rate), _mlp(dim, config.mlp_ratio, rate))
            self.layers.append(nn.ModuleList(nn.ModuleDict({"norm": _Norm(dim), "fn": part}) for part in parts))

    def forward(self, x: Tensor) -> Tensor:
        x = x + rearrange(self.pos_emb, "(h w) -> () () h w", h=x.shape[2])
        layer: Any
        for layer in self.layers:
            attention, mlp = layer
            x = attention["fn"](attention["norm"](x)) + x
            x = mlp["fn"]["net"](mlp["norm"](x)) + x
        return x


class UpstreamHTNet(nn.Module):
    """(B, in_channels, S, S) -> (B, num_classes), the same function as :class:`htnet.HTNet`."""

    def __init__(self, config: HTNetConfig) -> None:
        super().__init__()
        self.config = config
        embedding = nn.Conv2d(config.in_channels * config.patch_size**2, config.dim, 1)
        self.to_patch_embedding = nn.Sequential(nn.Identity(), embedding)
        self.layers, dim = nn.ModuleList(), config.dim
        for level in range(config.levels):
            last = level == config.levels - 1
            down = () if last else (nn.Conv2d(dim, 2 * dim, 3, padding=1), _Norm(2 * dim), nn.MaxPool2d(3, 2, 1))
            self.layers.append(nn.ModuleList([_Transformer(config, level), nn.Sequential(*down)]))
            dim *= 1 if last else 2
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.mlp_head = nn.Sequential(_Norm(dim), pool, nn.Linear(dim, config.num_classes))

    def forward(self, x: Tensor) -> Tensor:
        side = self.config.patch_size
        x = self.to_patch_embedding(rearrange(x, "b c (h p1) (w p2) -> b (p1 p2 c) h w", p1=side, p2=side))
        level: Any
        for blocks, level in zip(self.config.blocks_per_side, self.layers, strict=True):
            transformer, aggregate = level
            x = rearrange(x, "b c (gh h) (gw w) -> (b gh gw) c h w", gh=blocks, gw=blocks)
            x = rearrange(transformer(x), "(b gh gw) c h w -> b c (gh h) (gw w)", gh=blocks, gw=blocks)
            x = aggregate(x)
        out: Tensor = self.mlp_head(x)
        return out
