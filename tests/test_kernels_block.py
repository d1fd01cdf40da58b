"""The attention block computes what float64 says, with all gradients, and bears torch's transformations.

Its core is interpreted on the CPU, and compiled on a GPU under the marker gpu.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import func
from torch.utils.checkpoint import checkpoint

from kernels import local_attention_block
from kernels.reference import local_attention_block_reference
from kernels.testing import BLOCK_TOLERANCES, assert_close, poisoned_outputs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("output", "x", "norm_weight", "norm_bias", "qkv_weight", "out_weight", "out_bias")
DEVICE_ONLY = pytest.mark.gpu

# block height, block width, blocks per side, heads, head_dim, batch, channels, dtype; few blocks, for the interpreter
CASES = [
    (1, 2, 2, 3, 5, 1, 16, F32),  # 2 tokens a block, a map that is not square
    (2, 2, 5, 1, 17, 1, 24, F32),  # 25 blocks in tiles of 16: the second half empty
    (2, 2, 2, 3, 21, 3, 50, BF16),  # channels that are no power of two and no multiple of 8
    (3, 3, 2, 2, 33, 3, 64, F32),  # 12 blocks in tiles of 7
    (3, 3, 2, 1, 85, 1, 85, BF16),
    (4, 4, 1, 3, 85, 1, 256, F32),
    (4, 4, 3, 3, 85, 1, 256, BF16),  # the finest level of 112 pixels
    (4, 4, 1, 1, 5, 4, 8, BF16),  # a map that outweighs the weights: padded heads
    (2, 8, 1, 2, 64, 3, 128, F16),
    (7, 7, 1, 2, 43, 1, 96, F32),
    (7, 7, 1, 3, 64, 1, 192, BF16),
    (8, 8, 1, 1, 96, 1, 200, BF16),
    pytest.param((4, 4, 4, 3, 85, 256, 256, BF16), marks=DEVICE_ONLY),
    pytest.param((8, 8, 4, 3, 85, 16, 256, F16), marks=DEVICE_ONLY),
]


def make_tensors(case, device="cpu"):
    """x, the five weights and an upstream gradient, rounded to the case's dtype; scores and residual of usual size."""
    block_h, block_w, side, heads, head_dim, batch, channels, dtype = case
    generator = torch.Generator().manual_seed(hash(case[:7]) % 2**31)

    def normal(*shape, size=1.0, mean=0.0):
        return (torch.randn(*shape, generator=generator) * size + mean).to(device, dtype)

    inner, shape = heads * head_dim, (batch, block_h * side, block_w * side, channels)
    weights = [normal(channels, size=0.2, mean=1.0), normal(channels, size=0.2)]
    weights += [normal(3 * inner, channels, size=channels**-0.5), normal(channels, inner, size=inner**-0.5)]
    tensors = [normal(*shape, mean=0.5), *weights, normal(channels, size=0.2)]
    return tensors, normal(*shape), {"num_heads": heads, "blocks_per_side": side}


def run(tensors, grad_out, arguments, **options):
    """Output and all six gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with poisoned_outputs():
        out = local_attention_block(*leaves, **arguments, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def truth(tensors, grad_out, arguments):
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out = local_attention_block_reference(*leaves, **arguments)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.double())


def assert_right(case, device, **options):
    tensors, grad_out, arguments = make_tensors(case, device)
    results = run(tensors, grad_out, arguments, **options)
    tolerance = BLOCK_TOLERANCES[case[-1]]
    for name, actual, exact in zip(NAMES, results, truth(tensors, grad_out, arguments), strict=True):
        assert actual.dtype == case[-1]
        assert_close(name, actual, exact, tolerance.forward if name == "output" else tolerance.backward)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_all_gradients_are_those_of_float64(triton_device, case):
    assert_right(case, triton_device, backend="triton")


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_gradients_of_gain_and_bias_keep_their_digits(triton_device, backend):
    """Over many tokens, where torch's layer norm on a CPU adds them up in 16 bits."""
    assert_right((4, 4, 8, 1, 5, 2, 16, BF16), triton_device, backend=backend)


def small(device):
    return make_tensors((2, 2, 2, 2, 5, 2, 16, F32), device)


def close(name, actual, expected):
    assert_close(name, actual, expected, 1e-5 if actual.dtype == F32 else 2e-2)


def block(arguments, **options):
    options = {"backend": "triton"} | options
    return lambda *tensors: local_attention_block(*tensors, **arguments, **options)


def test_strided_tensors_give_what_dense_ones_give(triton_device):
    tensors, grad_out, arguments = small(triton_device)
    strided = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    expected = run(tensors, grad_out, arguments, backend="triton")
    actual = run(strided, grad_out.repeat_interleave(2, -1)[..., ::2], arguments, backend="triton")
    for name, from_strided, from_dense in zip(NAMES, actual, expected, strict=True):
        close(name, from_strided, from_dense)  # torch's matrix products add in an order of their own


def test_results_repeat_bit_by_bit(triton_device):
    tensors, grad_out, arguments = small(triton_device)
    first, second = (run(tensors, grad_out, arguments, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_large_mean_costs_the_norm_no_digits(triton_device):
    tensors, grad_out, arguments = small(triton_device)
    tensors[0] = torch.randn_like(tensors[0]) + 300.0
    out = run(tensors, grad_out, arguments, backend="triton")[0] - tensors[0]
    assert_close("attention", out, truth(tensors, grad_out, arguments)[0] - tensors[0].double(), 1e-4)


def test_scale_and_eps_are_used(triton_device):
    tensors, _, arguments = small(triton_device)
    options = {"scale": 1.5, "eps": 0.3}
    close(
        "output",
        block(arguments, **options)(*tensors),
        block(arguments, **options, backend="reference")(*tensors),
    )


def test_it_compiles_without_a_graph_break(triton_device):
    tensors, grad_out, arguments = small(triton_device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    compiled = torch.compile(block(arguments), fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*leaves), leaves, grad_out) for f in (compiled, block(arguments))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap by torch's fallback
def test_function_transforms_agree_with_the_reference(triton_device):
    tensors, grad_out, arguments = small(triton_device)
    stack = torch.stack([tensors[0], tensors[0].flip(0), -tensors[0]])

    def loss(**options):
        return lambda x, weight: (block(arguments, **options)(x, *tensors[1:3], weight, *tensors[4:]) * grad_out).sum()

    for transform, x in (
        (lambda f: func.grad(f, argnums=(0, 1)), tensors[0]),
        (lambda f: func.vmap(f, in_dims=(0, None)), stack),
        (lambda f: func.vmap(func.grad(f, argnums=(0, 1)), in_dims=(0, None)), stack),
    ):
        actual, expected = (transform(f)(x, tensors[3]) for f in (loss(), loss(backend="reference")))
        for name, a, b in zip(
            ("x", "qkv_weight"), *map(torch.utils._pytree.tree_leaves, (actual, expected)), strict=False
        ):
            close(name, a, b)


def test_second_derivatives_are_refused(triton_device):
    tensors, _, arguments = small(triton_device)
    x = tensors[0].requires_grad_()
    (gradient,) = torch.autograd.grad(block(arguments)(*tensors).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        gradient.sum().backward()


def test_activation_checkpointing_changes_nothing(triton_device):
    tensors, grad_out, arguments = small(triton_device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    kept = torch.autograd.grad(checkpoint(block(arguments), *leaves, use_reentrant=False), leaves, grad_out)
    plain = torch.autograd.grad(block(arguments)(*leaves), leaves, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


@pytest.mark.parametrize("needed", [[0], [3], [1, 5]])
def test_frozen_tensors_change_no_other_gradient(triton_device, needed):
    tensors, grad_out, arguments = small(triton_device)
    expected = run(tensors, grad_out, arguments, backend="triton")[1:]
    wanted = [tensors[i].requires_grad_() for i in needed]
    actual = torch.autograd.grad(block(arguments)(*tensors), wanted, grad_out)
    assert all(torch.equal(a, expected[i]) for a, i in zip(actual, needed, strict=True))


def test_one_token_per_block_takes_the_short_cut(triton_device):
    tensors, grad_out, arguments = make_tensors((1, 1, 3, 2, 5, 1, 16, F32), triton_device)
    results = run(tensors, grad_out, arguments, backend="triton")
    for name, actual, exact in zip(NAMES, results, truth(tensors, grad_out, arguments), strict=True):
        assert_close(name, actual, exact, 1e-5)
    assert not results[4][:20].any()  # queries and keys: their gradient is exactly zero


def test_heads_are_padded_where_the_map_outweighs_the_weights(triton_device, monkeypatch):
    module = importlib.import_module("kernels.attention_block")
    padded = []
    monkeypatch.setattr(module, "pad_heads", lambda *arguments: padded.append(arguments) or arguments[:2])
    tensors, _, arguments = make_tensors((4, 4, 1, 1, 5, 1, 8, F32), triton_device)
    for some in (tensors, [tensors[0].repeat(4, 1, 1, 1), *tensors[1:]]):
        block(arguments)(*some)
    assert len(padded) == 1
