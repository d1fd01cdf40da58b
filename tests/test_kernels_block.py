"""The fused attention block computes what the composed one does, and both what float64 says, with all gradients.

Interpreted on the CPU, on a GPU under the marker gpu. What the compiler of a GPU says: test_kernels_compile.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.utils.checkpoint import checkpoint

from kernels import local_attention_block
from kernels.attention_block.interface import composed_reason, fused_limit
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
    (4, 4, 3, 3, 85, 1, 256, BF16),  # the level that the kernel is made for; the second tile holds one block
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


def skip_what_no_gpu_runs(case, device):
    if device == "cuda" and case[-1] == F32:
        pytest.skip("the fused kernel takes float32 in the interpreter alone")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_all_gradients_are_those_of_float64(triton_device, case, fused):
    if fused:
        skip_what_no_gpu_runs(case, triton_device)
    assert_right(case, triton_device, backend="triton", fused=fused)


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": False}, {"backend": "sdpa"}], ids=str)
def test_gradients_of_gain_and_bias_keep_their_digits_over_many_tokens(triton_device, options):
    assert_right((4, 4, 8, 1, 5, 2, 16, BF16), triton_device, **{"backend": "triton"} | options)


SMALL = (2, 2, 2, 2, 5, 2, 16, F32)
ON_GPU = (2, 2, 2, 2, 5, 2, 16, F16)  # the fused kernel takes no float32 there


def small(device):
    return make_tensors(ON_GPU if device == "cuda" else SMALL, device)


def close(name, actual, expected):
    assert_close(name, actual, expected, 1e-5 if actual.dtype == F32 else 2e-2)


def block(arguments, **options):
    options = {"backend": "triton", "fused": True} | options
    return lambda *tensors: local_attention_block(*tensors, **arguments, **options)


def test_strided_tensors_give_what_dense_ones_give(triton_device):
    tensors, grad_out, arguments = small(triton_device)
    strided = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    expected = run(tensors, grad_out, arguments, backend="triton", fused=True)
    actual = run(strided, grad_out.repeat_interleave(2, -1)[..., ::2], arguments, backend="triton", fused=True)
    assert torch.equal(actual[0], expected[0])
    for name, strided_gradient, gradient in zip(NAMES[1:], actual[1:], expected[1:], strict=True):
        close(name, strided_gradient, gradient)  # torch's matrix products add in an order of their own


def test_results_repeat_bit_by_bit(triton_device):
    tensors, grad_out, arguments = small(triton_device)
    first, second = (run(tensors, grad_out, arguments, backend="triton", fused=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_large_mean_costs_the_norm_no_digits(triton_device):
    if triton_device == "cuda":
        pytest.skip("16 bits cannot hold such an x")
    tensors, grad_out, arguments = small(triton_device)
    tensors[0] = torch.randn_like(tensors[0]) + 300.0
    out = run(tensors, grad_out, arguments, backend="triton", fused=True)[0] - tensors[0]
    assert_close("attention", out, truth(tensors, grad_out, arguments)[0] - tensors[0].double(), 1e-4)


def test_scale_and_eps_reach_the_kernel(triton_device):
    tensors, _, arguments = small(triton_device)
    options = {"scale": 1.5, "eps": 0.3}
    close(
        "output",
        block(arguments, **options)(*tensors),
        block(arguments, **options, backend="reference", fused=None)(*tensors),
    )


def test_the_operators_pass_opcheck(triton_device):
    from kernels.attention_block.autograd import attention_block_backward, attention_block_forward

    tensors, grad_out, _ = small(triton_device)
    settings = (2, 2, 1e-5, 0.4)
    torch.library.opcheck(attention_block_forward, (*tensors, *settings))
    torch.library.opcheck(attention_block_backward, (grad_out, *tensors[:5], *settings))


def test_a_compiled_function_has_no_graph_break_and_the_same_gradients(triton_device):
    tensors, grad_out, arguments = small(triton_device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    compiled = torch.compile(block(arguments), fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*leaves), leaves, grad_out) for f in (compiled, block(arguments))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_choice_between_fused_and_composed_compiles_too(triton_device):
    tensors, _, arguments = small(triton_device)
    compiled = torch.compile(block(arguments, fused=None), fullgraph=True, backend="aot_eager")
    close("output", compiled(*tensors), block(arguments)(*tensors))


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
        actual, expected = (transform(f)(x, tensors[3]) for f in (loss(), loss(backend="reference", fused=None)))
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


def test_under_autocast_the_fused_kernel_keeps_its_dtype_in_both_directions(triton_device):
    tensors, grad_out, arguments = small(triton_device)
    expected = run(tensors, grad_out, arguments, backend="triton", fused=True)
    with torch.autocast(triton_device, BF16):
        actual = run(tensors, grad_out, arguments, backend="triton", fused=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("needed", [[0], [3], [1, 5]])
def test_frozen_tensors_get_no_gradient_and_the_others_the_same(triton_device, needed):
    tensors, grad_out, arguments = small(triton_device)
    expected = run(tensors, grad_out, arguments, backend="triton", fused=True)[1:]
    wanted = [tensors[i].requires_grad_() for i in needed]
    actual = torch.autograd.grad(block(arguments)(*tensors), wanted, grad_out)
    assert all(torch.equal(a, expected[i]) for a, i in zip(actual, needed, strict=True))


def test_one_token_per_block_takes_the_short_cut(triton_device):
    tensors, grad_out, arguments = make_tensors((1, 1, 3, 2, 5, 1, 16, F32), triton_device)
    results = run(tensors, grad_out, arguments, backend="triton")
    for name, actual, exact in zip(NAMES, results, truth(tensors, grad_out, arguments), strict=True):
        assert_close(name, actual, exact, 1e-5)
    assert not results[4][:20].any()  # queries and keys: their gradient is exactly zero


def test_padded_heads_are_used_where_the_map_outweighs_the_weights(triton_device, monkeypatch):
    from kernels.attention_block import host

    padded = []
    monkeypatch.setattr(host, "pad_heads", lambda *arguments: padded.append(arguments) or arguments[:2])
    tensors, _, arguments = make_tensors((4, 4, 1, 1, 5, 1, 8, F32), triton_device)
    many = [tensors[0].repeat(4, 1, 1, 1), *tensors[1:]]
    for some in (tensors, many):
        block(arguments, fused=False)(*some)
    assert len(padded) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 4}, "2 to 64 tokens, got 1"),
        ({"block": (9, 9)}, "2 to 64 tokens, got 81"),
        ({"channels": 257}, "at most 256 channels, got 257"),
        ({"head_dim": 97}, "head_dim must be at most 96, got 97"),
        ({"heads": 4, "head_dim": 85}, "at most 288 channels, got 384"),
        ({"backend": "sdpa"}, "backend 'triton', got 'sdpa'"),
        ({"dropout_p": 0.5}, "backend 'triton', got 'sdpa'"),
    ],
)
def test_fused_is_refused_with_rule_and_value_where_it_cannot_be(triton_device, changes, message):
    shape = {"block": (2, 2), "side": 2, "heads": 2, "head_dim": 5, "channels": 16, **changes}
    if changes.get("side"):
        shape["block"] = (1, 1)
    case = (*shape["block"], shape["side"], shape["heads"], shape["head_dim"], 1, shape["channels"], F16)
    tensors, _, arguments = make_tensors(case, triton_device)
    options = {name: value for name, value in changes.items() if name in ("backend", "dropout_p")}
    with pytest.raises(ValueError, match=message):
        block(arguments, **options)(*tensors)


class Card:
    """As much of a tensor on a GPU as the choice looks at."""

    def __init__(self, *shape, dtype=BF16):
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, torch.device("cuda")

    def element_size(self):
        return self.dtype.itemsize


@pytest.mark.parametrize(
    ("x", "side", "major", "trains", "expected"),
    [
        (Card(256, 16, 16, 256), 4, 9, False, None),
        (Card(256, 16, 16, 256), 4, 9, True, "backward would compute"),
        (Card(256, 16, 16, 256), 4, 8, False, "9.x or 10.x, got 8.x"),
        (Card(256, 16, 16, 256), 4, 12, False, "9.x or 10.x, got 12.x"),
        (Card(256, 16, 16, 256, dtype=F32), 4, 9, False, "bfloat16 or float16, got torch.float32"),
        (Card(256, 12, 12, 256), 4, 9, False, "blocks of 9 tokens"),
        (Card(256, 16, 16, 250), 4, 9, False, "250 channels are no multiple of 8"),
        (Card(16, 16, 16, 256), 4, 9, False, "fewer tiles"),
        (Card(256, 16, 16, 256), 4, 10, False, "no measurement"),
    ],
)
def test_the_table_fuses_where_a_measurement_and_the_shape_speak_for_it(monkeypatch, x, side, major, trains, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"major": major}))
    monkeypatch.setattr("kernels.attention_block.interface._MEASURED_AHEAD", {9})
    shape = {"num_heads": 3, "head_dim": 85, "blocks_per_side": side}
    reason = fused_limit(x, **shape) or composed_reason(x, **shape, trains=trains)
    assert (reason is None) if expected is None else (expected in reason)
