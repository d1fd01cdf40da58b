"""The Triton kernels compute local attention and its gradient, and are good citizens of torch.

Interpreted on the CPU, on a GPU under the marker gpu. The interpreter checks no shape of a product: what the compiler
of a GPU says of every tile is in test_kernels_compile.py.
"""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import func, nn
from torch.utils.checkpoint import checkpoint

from kernels import local_attention, local_attention_block
from kernels.testing import TOLERANCES, assert_close, attention_truth, poisoned_outputs

# an attribute of that name is the function
interface = importlib.import_module("kernels.local_attention.interface")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# block height, block width, blocks per side, heads, head_dim, batch, dtype: every N, D, A and dtype of the issue, in
# pairs rather than in all combinations; few programs each, for the interpreter needs milliseconds for one
CASES = [
    (1, 1, 3, 3, 16, 1, F32),  # the kernel itself, without the short cut
    (1, 2, 2, 1, 85, 3, F32),  # 12 blocks of 2: the second tile half empty
    (2, 1, 2, 3, 1, 1, BF16),
    (1, 3, 2, 1, 80, 1, BF16),  # 5 blocks in 16 slots
    (3, 1, 1, 12, 16, 1, F16),
    (2, 2, 2, 3, 85, 1, F32),
    (2, 2, 3, 1, 85, 1, BF16),
    (4, 1, 1, 3, 128, 3, F32),
    (3, 3, 1, 12, 80, 1, F32),
    (3, 3, 2, 1, 85, 1, BF16),
    (4, 4, 2, 1, 85, 1, BF16),
    (4, 4, 1, 3, 96, 1, F32),
    (2, 8, 1, 12, 64, 1, F16),
    (5, 5, 1, 3, 85, 1, F32),
    (5, 5, 2, 1, 1, 1, F16),
    (7, 7, 1, 1, 85, 3, BF16),
    (7, 7, 1, 3, 96, 1, F32),
    (8, 8, 1, 1, 128, 1, BF16),
    (4, 16, 1, 3, 85, 1, F32),
    (10, 10, 1, 1, 85, 1, F32),
    (5, 20, 1, 1, 1, 1, F32),
    (10, 10, 1, 1, 80, 3, BF16),
    (14, 14, 1, 1, 85, 1, BF16),
    (14, 14, 1, 1, 128, 1, F32),
    (16, 16, 1, 1, 64, 1, F16),
    (8, 32, 1, 1, 16, 1, BF16),
    (6, 6, 1, 1, 85, 1, F32),
    pytest.param((32, 32, 1, 3, 85, 1, BF16), marks=pytest.mark.gpu),
    pytest.param((4, 4, 4, 12, 85, 64, BF16), marks=pytest.mark.gpu),
]


def make_input(case, device, *, spread=1.0):
    """Packed qkv and a random upstream gradient, rounded to the case's dtype."""
    block_h, block_w, side, heads, head_dim, batch, dtype = case
    generator = torch.Generator().manual_seed(hash(case[:6]) % 2**31)
    shape = (batch, block_h * side, block_w * side)
    qkv = torch.randn(*shape, 3 * heads * head_dim, generator=generator) * spread
    grad_out = torch.randn(*shape, heads * head_dim, generator=generator)
    return qkv.to(device, dtype), grad_out.to(device, dtype), {"num_heads": heads, "blocks_per_side": side}


def run_operators(qkv, grad_out, *, num_heads, blocks_per_side, scale=None):
    """Output and gradient from the operators, past the interface and its short cut."""
    from kernels.local_attention.autograd import triton_attention

    qkv = qkv.detach().requires_grad_()
    with poisoned_outputs():
        out = triton_attention(qkv, num_heads=num_heads, blocks_per_side=blocks_per_side, scale=scale)
        return out.detach(), *torch.autograd.grad(out, qkv, grad_out)


def assert_right(qkv, grad_out, arguments):
    out, grad_qkv = run_operators(qkv, grad_out, **arguments)
    true_out, true_grad = attention_truth(qkv, grad_out, **arguments)
    tolerance = TOLERANCES[qkv.dtype]
    assert out.dtype == grad_qkv.dtype == qkv.dtype
    assert_close("output", out, true_out, tolerance.forward)
    assert_close("gradient", grad_qkv, true_grad, tolerance.backward)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradient_are_those_of_float64(triton_device, case):
    assert_right(*make_input(case, triton_device))


shapes = st.tuples(
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 128),
    st.integers(1, 2),
    st.sampled_from([F32, BF16, F16]),
).filter(lambda case: case[0] * case[1] * case[2] ** 2 * case[3] * case[5] <= 300)


@settings(max_examples=15, deadline=None)
@given(case=shapes, scale=st.sampled_from([None, 0.7, -0.3, 0.0]))
def test_any_shape_and_scale_is_computed_right(interpreted_kernels, case, scale):
    qkv, grad_out, arguments = make_input(case, "cpu")
    if scale is None or abs(scale) * case[4] ** 0.5 <= 1.5:  # sharper weights amplify the rounding of the scores
        assert_right(qkv, grad_out, arguments | {"scale": scale})


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in slots that are not stored
@pytest.mark.parametrize("block", [(4, 4), (10, 10)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_extreme_scores_neither_overflow_nor_give_nan(triton_device, block, dtype):
    qkv, grad_out, arguments = make_input((*block, 1, 1, 20, 1, dtype), triton_device, spread=300.0)
    qkv[:, 0, :, :20] = -3e4  # queries whose scores are all far below zero
    qkv[..., 20:40] = qkv[..., 20:40].abs()
    out, grad_qkv = run_operators(qkv, grad_out, **arguments)
    true_out, _ = attention_truth(qkv, grad_out, **arguments)
    assert grad_qkv.isfinite().all()
    # scores of 1e5 in float32 are exact to 1e-2 only, so that near ties move weight: not the tolerance of moderate ones
    assert_close("output", out, true_out, 0.05)


def strided_views(case, device):
    """The same values in other places of memory, as (qkv, grad_out) pairs; all have a dense last dimension."""
    qkv, grad_out, _ = make_input(case, device)

    def inside(x):
        big = torch.full((x.shape[0], 2 * x.shape[1], x.shape[2] + 3, x.shape[3] + 5), torch.nan).to(x)
        view = big[:, 1::2, 2:-1, 3:-2]
        view.copy_(x)
        return view

    def channels_first(x):
        return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)

    return qkv, grad_out, [(inside(qkv), grad_out), (channels_first(qkv), inside(grad_out))]


@pytest.mark.parametrize(
    "case", [(2, 2, 2, 1, 16, 2, BF16), (3, 3, 1, 2, 85, 2, F32), (6, 6, 1, 1, 16, 2, F32)], ids=str
)
def test_strided_input_is_read_where_it_lies(triton_device, case):
    from kernels.local_attention import host

    arguments = make_input(case, "cpu")[2]
    qkv, grad_out, views = strided_views(case, triton_device)
    expected = run_operators(qkv, grad_out, **arguments)
    for strided_qkv, strided_grad in views:
        assert host.last_dim_dense(strided_qkv) is strided_qkv
        # rows that are aligned otherwise are loaded otherwise, and on a card added in another order
        for actual, plain in zip(run_operators(strided_qkv, strided_grad, **arguments), expected, strict=True):
            assert_close("strided", actual, plain, TOLERANCES[qkv.dtype].forward)
    sparse = qkv.transpose(2, 3).contiguous().transpose(2, 3)  # last dimension not dense: copied
    assert torch.equal(run_operators(sparse, grad_out.new_ones(()).expand_as(grad_out), **arguments)[0], expected[0])


def test_offsets_beyond_32_bits_reach_their_tokens(triton_device):
    # two samples 2^31 elements apart: only their pages of the storage are ever touched
    case = (2, 2, 1, 1, 16, 2, F16)
    qkv, grad_out, arguments = make_input(case, triton_device)
    far = torch.empty(2**31 + qkv[0].numel(), dtype=F16, device=triton_device)
    far = far.as_strided(qkv.shape, (2**31, *qkv.stride()[1:]))
    far.copy_(qkv)
    expected = run_operators(qkv, grad_out, **arguments)
    for actual, plain in zip(run_operators(far, grad_out, **arguments), expected, strict=True):
        assert torch.equal(actual, plain)


@pytest.mark.parametrize("case", [(3, 3, 1, 2, 85, 2, BF16), (10, 10, 1, 1, 16, 1, BF16)], ids=str)
def test_results_repeat_bit_by_bit(triton_device, case):
    qkv, grad_out, arguments = make_input(case, triton_device)
    first, second = (run_operators(qkv, grad_out, **arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def attention(backend="triton", side=2, **changes):
    return lambda qkv: local_attention(qkv, num_heads=2, blocks_per_side=side, backend=backend, **changes)


# 4 tokens a block with side 2; 36 with side 1, more than a packed tile holds in float32
SMALL, LARGE = (2, 4, 4, 30), (1, 6, 6, 30)


@pytest.mark.parametrize(("shape", "side"), [(SMALL, 2), (LARGE, 1)])
def test_the_operators_pass_opcheck(triton_device, shape, side):
    from kernels.local_attention.autograd import local_attention_backward, local_attention_forward

    qkv = torch.randn(shape, device=triton_device)
    settings_ = (2, side, 0.3)
    torch.library.opcheck(local_attention_forward, (qkv, *settings_))
    out, log_sums = local_attention_forward(qkv, *settings_)
    saved = (out, log_sums) if side == 1 else (None, None)
    torch.library.opcheck(local_attention_backward, (torch.randn_like(out), qkv, *saved, *settings_))


def test_a_compiled_function_has_no_graph_break(triton_device):
    """A compiled function has no graph break and the same gradient."""
    qkv = torch.randn(SMALL, device=triton_device, requires_grad=True)
    compiled = torch.compile(attention(), fullgraph=True, backend="aot_eager")
    grad_out = torch.randn_like(qkv[..., :10])
    assert torch.equal(compiled(qkv), attention()(qkv))
    gradients = [torch.autograd.grad(run(qkv), qkv, grad_out)[0] for run in (compiled, attention())]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("shape", "side", "dim"), [(SMALL, 2, 4), (LARGE, 1, 0)])
def test_function_transforms_agree_with_the_reference(triton_device, shape, side, dim):
    stack = torch.randn((3, *shape), device=triton_device)
    mapped = stack.movedim(0, dim)

    def total(backend):
        return lambda qkv: attention(backend, side)(qkv).square().sum()

    def compare(transform, argument):
        actual, expected = (transform(run)(argument) for run in (total("triton"), total("reference")))
        assert_close("transformed", actual, expected, 1e-5)

    compare(func.grad, stack[0])
    compare(lambda f: func.vmap(f, in_dims=dim), mapped)
    compare(lambda f: func.vmap(func.grad(f), in_dims=dim), mapped)
    # one map for all upstream gradients: only one argument of the backward is mapped
    out, pull = func.vjp(attention("triton", side), stack[0])
    many = torch.randn((3, *out.shape), device=triton_device)
    expected = torch.stack([pull(one)[0] for one in many])
    assert_close("mapped pull-back", func.vmap(pull)(many)[0], expected, 1e-5)


def test_second_derivatives_are_refused(triton_device):
    qkv = torch.randn(SMALL, device=triton_device, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention()(qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        gradient.sum().backward()


class Twice(nn.Module):
    """Attention used twice with one projection, as a layer that shares weights does."""

    def __init__(self, backend):
        super().__init__()
        self.qkv, self.out, self.attention = nn.Linear(10, 30), nn.Linear(10, 10), attention(backend)

    def forward(self, x):
        for _ in range(2):
            x = x + self.out(self.attention(self.qkv(x)))
        return x


def loss_and_gradients(model, x, *, use_checkpoint=False):
    out = checkpoint(model, x, use_reentrant=False) if use_checkpoint else model(x)
    loss = out.float().square().mean()
    return loss, *torch.autograd.grad(loss, list(model.parameters()))


def test_autocast_keeps_the_narrow_dtype_and_its_gradient(triton_device):
    """Attention that is used twice under autocast keeps the narrow dtype and its gradient."""
    torch.manual_seed(0)
    ours, plain = Twice("triton").to(triton_device), Twice("reference").to(triton_device)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 4, 10, device=triton_device)
    with torch.autocast(triton_device, BF16):
        assert ours.attention(ours.qkv(x)).dtype == BF16
        assert ours.attention(torch.randn(SMALL, device=triton_device)).dtype == F32  # not narrowed behind one's back
        results = [loss_and_gradients(model, x) for model in (ours, plain)]
    for actual, expected in zip(*results, strict=True):
        assert_close("under autocast", actual, expected, 2e-2)  # both round at every step, in different places


def test_activation_checkpointing_changes_nothing(triton_device):
    model, x = Twice("triton").to(triton_device), torch.randn(2, 4, 4, 10, device=triton_device)
    for actual, expected in zip(
        loss_and_gradients(model, x, use_checkpoint=True), loss_and_gradients(model, x), strict=True
    ):
        assert torch.equal(actual, expected)


def test_the_block_with_triton_inside_is_that_of_the_reference(triton_device):
    torch.manual_seed(0)
    x, qkv_weight, out_weight = torch.randn(2, 4, 4, 8), torch.randn(18, 8), torch.randn(8, 6)
    tensors = [x, torch.rand(8), torch.rand(8), qkv_weight, out_weight, torch.rand(8)]
    leaves = [tensor.to(triton_device).requires_grad_() for tensor in tensors]
    results = []
    for backend in ("triton", "reference"):
        out = local_attention_block(*leaves, num_heads=2, blocks_per_side=2, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        assert_close("block", actual, expected, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(1, 2, 2, 12, dtype=torch.float64)}, "float32, bfloat16 or float16, got torch.float64"),
        ({"qkv": torch.zeros(1, 2, 2, 6 * 129)}, "head_dim must be at most 128, got 129"),
        ({"qkv": torch.zeros(1, 33, 33, 6)}, "at most 1024 tokens, got 1089"),
        ({"qkv": torch.zeros(1, 2, 2, 12, device="meta")}, "must be on a CUDA or ROCm device, got meta"),
    ],
)
def test_triton_refuses_input_that_its_kernels_do_not_take(changes, message):
    """Input that the kernels do not take is refused where they are asked for."""
    arguments = {"num_heads": 2, "blocks_per_side": 1, **changes}
    with pytest.raises(ValueError, match=message):
        local_attention(arguments.pop("qkv"), **arguments, backend="triton")


def test_the_cpu_is_refused_unless_the_kernels_are_interpreted(monkeypatch):
    monkeypatch.setattr(interface, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"got cpu \(for Triton's interpreter on the CPU, set TRITON_INTERPRET=1"):
        attention()(torch.zeros(SMALL))


def test_dropout_goes_to_sdpa_and_says_so_once(triton_device, caplog, monkeypatch):
    monkeypatch.setattr(interface, "_logged", set())
    caplog.set_level(logging.INFO, "kernels.local_attention.interface")
    qkv = torch.randn(SMALL, device=triton_device)
    for _ in range(2):
        torch.manual_seed(0)
        dropped = attention(dropout_p=0.5)(qkv)
    torch.manual_seed(0)
    assert torch.equal(dropped, attention("sdpa", dropout_p=0.5)(qkv))
    assert [record.getMessage() for record in caplog.records] == [
        "local attention runs on 'sdpa' instead of 'triton': the kernels have no dropout of attention weights, "
        "got dropout_p=0.5"
    ]
