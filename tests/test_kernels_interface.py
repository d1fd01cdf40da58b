"""The public operations: all backends compute the same, and wrong arguments are refused with rule and value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_reference import naive_local_attention

from kernels import local_attention, local_attention_block

BUILT = ("reference", "sdpa", "auto")


def block_arguments(channels=8, heads=2, head_dim=3, dtype=torch.float32):
    inner = heads * head_dim
    shapes = {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "qkv_weight": (3 * inner, channels),
        "out_weight": (channels, inner),
        "out_bias": (channels,),
    }
    return {name: torch.randn(*shape, dtype=dtype) for name, shape in shapes.items()}


cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 3),
        "head_dim": st.integers(1, 9),
        "blocks": st.integers(1, 3),
        "rows": st.integers(1, 3),
        "columns": st.integers(1, 3),
        "scale": st.sampled_from([None, 0.5]),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=25, deadline=None)
@given(case=cases)
def test_all_backends_compute_attention_inside_each_block(case):
    torch.manual_seed(case["seed"])
    height, width = case["blocks"] * case["rows"], case["blocks"] * case["columns"]
    qkv = torch.randn(case["batch"], height, width, 3 * case["heads"] * case["head_dim"])
    expected = naive_local_attention(qkv, case["heads"], case["blocks"], case["scale"])
    for backend in BUILT:
        actual = local_attention(
            qkv, num_heads=case["heads"], blocks_per_side=case["blocks"], scale=case["scale"], backend=backend
        )
        assert actual.is_contiguous()
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(case=cases)
def test_both_backends_have_the_same_block_output_and_gradients(case):
    torch.manual_seed(case["seed"])
    height, width = case["blocks"] * case["rows"], case["blocks"] * case["columns"]
    x = torch.randn(case["batch"], height, width, 8, dtype=torch.float64)
    weights = block_arguments(8, case["heads"], case["head_dim"], torch.float64)
    settings_ = {"num_heads": case["heads"], "blocks_per_side": case["blocks"], "scale": case["scale"]}
    results = []
    for backend in ("reference", "sdpa"):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in {"x": x, **weights}.items()}
        out = local_attention_block(**leaves, **settings_, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BUILT)
def test_one_token_per_block_gives_exactly_the_values(backend):
    """With one token per block, the output is exactly the values."""
    qkv = torch.randn(2, 3, 3, 24)
    out = local_attention(qkv, num_heads=2, blocks_per_side=3, backend=backend)
    assert torch.equal(out, qkv[..., 16:])


@pytest.mark.parametrize("backend", BUILT)
def test_heads_wider_than_128_channels_are_served(backend):
    qkv = torch.randn(1, 2, 2, 3 * 130)
    out = local_attention(qkv, num_heads=1, blocks_per_side=1, backend=backend)
    torch.testing.assert_close(out.double(), naive_local_attention(qkv, 1, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("blocks", [2, 4])
def test_dropout_of_attention_weights_keeps_the_mean(backend, blocks):
    torch.manual_seed(0)
    qkv = torch.randn(1, 4, 4, 12).expand(4000, 4, 4, 12)
    arguments = {"num_heads": 2, "blocks_per_side": blocks, "backend": backend}
    dropped = local_attention(qkv, **arguments, dropout_p=0.25)
    exact = local_attention(qkv[:1], **arguments)
    assert not torch.equal(dropped[:1], exact)
    torch.testing.assert_close(dropped.mean(0), exact[0], rtol=0, atol=0.08)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": torch.zeros(4, 4, 12)}, ValueError, "4 dimensions"),
        ({"qkv": torch.zeros(1, 4, 4, 12, dtype=torch.int32)}, TypeError, "floating point, got torch.int32"),
        ({"qkv": [1.0]}, TypeError, "tensor, got list"),
        ({"qkv": torch.zeros(0, 4, 4, 12)}, ValueError, "at least one token"),
        ({"qkv": torch.zeros(1, 0, 4, 12)}, ValueError, "at least one token"),
        ({"qkv": torch.zeros(1, 4, 5, 12)}, ValueError, "4 x 5 with blocks_per_side=2"),
        ({"qkv": torch.zeros(1, 4, 4, 14)}, ValueError, "got 14 channels with num_heads=2"),
        ({"qkv": torch.zeros(1, 4, 4, 0)}, ValueError, "got 0 channels"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got float"),
        ({"blocks_per_side": -1}, ValueError, "blocks_per_side must be at least 1, got -1"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"scale": torch.tensor(0.5)}, TypeError, "scale must be a number, got Tensor"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got str"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"backend": "cudnn"}, ValueError, "one of auto, reference, sdpa, triton, got 'cudnn'"),
    ],
)
def test_wrong_arguments_of_attention_are_refused(changes, error, message):
    """Wrong arguments of attention are refused with the rule and the value."""
    arguments = {"qkv": torch.zeros(1, 4, 4, 12), "num_heads": 2, "blocks_per_side": 2, **changes}
    qkv = arguments.pop("qkv")
    with pytest.raises(error, match=message):
        local_attention(qkv, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"norm_bias": torch.zeros(8, dtype=torch.float64)}, TypeError, "norm_bias torch.float64"),
        ({"out_weight": torch.zeros(8, 6, device="meta")}, ValueError, "out_weight on meta"),
        ({"out_bias": None}, TypeError, "out_bias must be a tensor, got NoneType"),
        ({"qkv_weight": torch.zeros(18, 9)}, ValueError, r"qkv_weight must have shape \(18, 8\), got \(18, 9\)"),
        ({"qkv_weight": torch.zeros(16, 8)}, ValueError, "got 16 rows with num_heads=2"),
        ({"out_weight": torch.zeros(6, 8)}, ValueError, r"out_weight must have shape \(8, 6\)"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
        ({"x": torch.zeros(1, 4, 4)}, ValueError, "x must have 4 dimensions"),
    ],
)
def test_wrong_arguments_of_the_block_are_refused(changes, error, message):
    """Wrong arguments of the block are refused with the rule and the value."""
    arguments = {"x": torch.zeros(1, 4, 4, 8), **block_arguments(), "num_heads": 2, "blocks_per_side": 2, **changes}
    with pytest.raises(error, match=message):
        local_attention_block(**arguments)
