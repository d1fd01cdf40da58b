"""The public implementation's way of computing HTNet, restated: the baseline of the end-to-end benchmark.

Feature maps are (B, C, H, W); linear maps are 1x1 convolutions; the layer norm over channels is written out; blocks are
moved to the batch axis around the layers of a level and back; attention is computed in full even where a block holds
one token. Module names give the state-dict keys of upstream's checkpoints, so :func:`htnet.checkpoint.to_upstream`
supplies its weights. Not for training: :class:`htnet.HTNet` computes the same function, faster.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from htnet.config import HTNetConfig

__all__ = ["UpstreamHTNet"]


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a (B, C, H, W) map."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)
        variance = x.var(dim=1, unbiased=False, keepdim=True)
        out: Tensor = (x - mean) / (variance + self.eps).sqrt() * self.g + self.b
        return out


class PreNorm(nn.Module):
    """A function of the normed input."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fn(self.norm(x))
        return out


class Attention(nn.Module):
    """Full softmax attention over all positions of the map it is given, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        head_dim = dim // heads
        self.heads = heads
        self.scale = head_dim**-0.5
        self.dropout = nn.Dropout(dropout)
        self.to_qkv = nn.Conv2d(dim, 3 * heads * head_dim, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * head_dim, dim, 1), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        query, key, value = (
            rearrange(part, "b (a d) h w -> b a (h w) d", a=self.heads) for part in self.to_qkv(x).chunk(3, dim=1)
        )
        scores = torch.einsum("b a i d, b a j d -> b a i j", query, key) * self.scale
        attended = torch.einsum("b a i j, b a j d -> b a i d", self.dropout(scores.softmax(dim=-1)), value)
        out: Tensor = self.to_out(rearrange(attended, "b a (h w) d -> b (a d) h w", h=height))
        return out


class FeedForward(nn.Module):
    """The MLP as 1x1 convolutions."""

    def __init__(self, dim: int, ratio: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, dim * ratio, 1),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Conv2d(dim * ratio, dim, 1),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Transformer(nn.Module):
    """The layers of one level, on blocks that lie on the batch axis."""

    def __init__(self, config: HTNetConfig, level: int) -> None:
        super().__init__()
        dim, heads = config.dim * 2**level, config.heads * 2**level
        self.pos_emb = nn.Parameter(torch.randn(config.tokens_per_block))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, Attention(dim, heads, config.dropout)),
                    PreNorm(dim, FeedForward(dim, config.mlp_ratio, config.dropout)),
                ]
            )
            for _ in range(config.depths[level])
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + rearrange(self.pos_emb, "(h w) -> () () h w", h=x.shape[2])
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, feed_forward = layer
            x = attention(x) + x
            x = feed_forward(x) + x
        return x


class UpstreamHTNet(nn.Module):
    """(B, in_channels, S, S) -> (B, num_classes), the same function as :class:`htnet.HTNet`."""

    def __init__(self, config: HTNetConfig) -> None:
        super().__init__()
        self.config = config
        self.to_patch_embedding = nn.Sequential(
            nn.Identity(), nn.Conv2d(config.in_channels * config.patch_size**2, config.dim, 1)
        )
        self.layers = nn.ModuleList()
        for level in range(config.levels):
            dim = config.dim * 2**level
            aggregate = (
                nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, padding=1), ChannelNorm(2 * dim), nn.MaxPool2d(3, 2, 1))
                if level < config.levels - 1
                else nn.Identity()
            )
            self.layers.append(nn.ModuleList([Transformer(config, level), aggregate]))
        last_dim = config.dim * 2 ** (config.levels - 1)
        self.mlp_head = nn.Sequential(
            ChannelNorm(last_dim), _MeanOverPositions(), nn.Linear(last_dim, config.num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        side = self.config.patch_size
        x = self.to_patch_embedding(rearrange(x, "b c (h p1) (w p2) -> b (p1 p2 c) h w", p1=side, p2=side))
        for blocks, level in zip(self.config.blocks_per_side, self.layers, strict=True):
            assert isinstance(level, nn.ModuleList)
            transformer, aggregate = level
            x = rearrange(x, "b c (gh h) (gw w) -> (b gh gw) c h w", gh=blocks, gw=blocks)
            x = rearrange(transformer(x), "(b gh gw) c h w -> b c (gh h) (gw w)", gh=blocks, gw=blocks)
            x = aggregate(x)
        out: Tensor = self.mlp_head(x)
        return out


class _MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))
