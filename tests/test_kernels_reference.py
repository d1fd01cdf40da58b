"""The reference is local attention: compared with a loop over blocks, heads and queries in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.reference import local_attention_block_reference, local_attention_reference


def naive_local_attention(qkv, num_heads, blocks_per_side, scale=None):
    """Block by block, head by head, query by query, in float64."""
    batch, height, width, channels = qkv.shape
    inner = channels // 3
    head_dim, rows, columns = inner // num_heads, height // blocks_per_side, width // blocks_per_side
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, height, width, inner, dtype=torch.float64)
    for sample in range(batch):
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                block = qkv[sample, top : top + rows, left : left + columns].double().reshape(-1, channels)
                for head in range(num_heads):
                    query, key, value = (block[:, part * inner + head * head_dim :][:, :head_dim] for part in range(3))
                    for token, row in enumerate(query):
                        weights = torch.softmax((key * row).sum(-1) * scale, 0)
                        out[sample, top + token // columns, left + token % columns][
                            head * head_dim : (head + 1) * head_dim
                        ] = (weights[:, None] * value).sum(0)
    return out


@pytest.mark.parametrize(
    ("shape", "heads", "blocks"),
    [((2, 4, 4, 18), 3, 2), ((1, 4, 6, 30), 2, 2), ((2, 3, 3, 15), 1, 3), ((1, 2, 4, 12), 4, 1)],
)
def test_reference_is_attention_inside_each_block(shape, heads, blocks):
    torch.manual_seed(0)
    qkv = torch.randn(*shape, dtype=torch.float64)
    for scale in (None, 0.3):
        actual = local_attention_reference(qkv, num_heads=heads, blocks_per_side=blocks, scale=scale)
        torch.testing.assert_close(actual, naive_local_attention(qkv, heads, blocks, scale), rtol=1e-12, atol=1e-13)


def test_the_reference_computes_in_float32():
    """The reference computes in float32 and returns the input's dtype."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 4, 4, 24).bfloat16()
    actual = local_attention_reference(qkv, num_heads=2, blocks_per_side=2)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, naive_local_attention(qkv, 2, 2).bfloat16(), rtol=0.01, atol=1e-3)


def test_the_block_reference_is_written_by_its_definition():
    """The reference of the block is norm, projections, attention and residual."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 10, dtype=torch.float64)
    gain, bias = torch.rand(10).double(), torch.rand(10).double()
    qkv_weight, out_weight, out_bias = (
        torch.randn(27, 10).double(),
        torch.randn(10, 9).double(),
        torch.rand(10).double(),
    )
    normed = F.layer_norm(x, (10,), gain, bias, 1e-3)
    attended = naive_local_attention(F.linear(normed, qkv_weight), 3, 2)
    actual = local_attention_block_reference(
        x, gain, bias, qkv_weight, out_weight, out_bias, num_heads=3, blocks_per_side=2, eps=1e-3
    )
    torch.testing.assert_close(actual, x + F.linear(attended, out_weight, out_bias), rtol=1e-11, atol=1e-12)


def test_gradients_of_the_references_are_right():
    torch.manual_seed(0)
    qkv = torch.randn(1, 2, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: local_attention_reference(t, num_heads=2, blocks_per_side=2), (qkv,))
