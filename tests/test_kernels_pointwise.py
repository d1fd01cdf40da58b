"""The kernels between the matrix products of a layer against float64, and the network that is built of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from kernels.testing import relative_rms

BF16, F32 = torch.bfloat16, torch.float32
# three times the largest error measured: rounding the result
TOLERANCES = {F32: 6e-7, BF16: 8e-3}
SHAPES = [(5, 24), (70, 256), (300, 96), (1, 1000), (257, 20)]


def compare(ours, true, inputs):
    """Outputs and gradients of a function, each against float64."""
    own = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    pairs = []
    outs, wanted = ours(*own), true(*exact)
    outs, wanted = (x if isinstance(x, tuple) else (x,) for x in (outs, wanted))
    upstream = [torch.randn_like(out) for out in outs]
    torch.autograd.backward(outs, upstream)
    torch.autograd.backward(wanted, [x.double() for x in upstream])
    pairs = [*zip(outs, wanted, strict=True), *((x.grad, y.grad) for x, y in zip(own, exact, strict=True))]
    for found, truth in pairs:
        assert found.dtype == inputs[0].dtype
        assert relative_rms(found.detach(), truth.detach()) < TOLERANCES[found.dtype]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_kernel_is_that_of_float64(shape, dtype, triton_device):
    from kernels import pointwise

    torch.manual_seed(0)
    columns = shape[-1]
    x, delta = (torch.randn(shape, device=triton_device).to(dtype) for _ in range(2))
    bias, gain, shift = (torch.randn(columns, device=triton_device).to(dtype) for _ in range(3))

    def norm(x, delta, bias, gain, shift):
        total = x + delta + bias
        return total, F.layer_norm(total, (columns,), gain, shift)

    compare(pointwise.residual_norm, norm, (x, delta, bias, gain, shift))
    compare(pointwise.residual, lambda x, delta, bias: x + delta + bias, (x, delta, bias))
    compare(pointwise.gelu, lambda x, bias: F.gelu(x + bias), (x, bias))


@pytest.mark.parametrize("sides", [(4, 4), (2, 2), (7, 5), (1, 3)], ids=str)
def test_the_pooling_is_that_of_torch(sides, triton_device):
    from kernels.pointwise import max_pool

    torch.manual_seed(0)
    values = torch.randn(3, *sides, 40, device=triton_device)
    own, other = (values.clone().requires_grad_() for _ in range(2))
    pooled = max_pool(own)
    expected = F.max_pool2d(other.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
    assert torch.equal(pooled, expected)
    upstream = torch.randn_like(pooled)
    upstream[0, 0, 0, 0] = torch.inf  # it reaches its own pixel and no other
    with torch.no_grad():
        upstream.nan_to_num_(posinf=1e30)
    pooled.backward(upstream)
    with torch.random.fork_rng():
        torch.use_deterministic_algorithms(False)
        expected.backward(upstream)
    torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize(
    "shape",
    [
        {"dim": 20, "heads": 3, "depths": (2, 1, 2)},
        {"dim": 20, "heads": 3, "depths": (1, 2, 1), "image_size": 56, "attention_backend": "reference"},
    ],
    ids=["one-token", "four-tokens"],
)
def test_a_fused_network_is_the_same_function(shape, triton_device, monkeypatch):
    """With padded weights too; padding gets no gradient, and no state dict shows it."""
    from htnet.config import HTNetConfig
    from htnet.model import HTNet

    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = HTNet(HTNetConfig(**shape)).to(triton_device)
    fused = copy.deepcopy(plain)
    fused.fuse(padded=True)
    state, other = plain.state_dict(), fused.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    loaded = HTNet(plain.config).to(triton_device)
    loaded.fuse(padded=True)
    loaded.load_state_dict(state)

    side = plain.config.image_size
    x = torch.randn(3, 3, side, side, device=triton_device)
    outs = [network(x) for network in (plain, fused, loaded)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(outs[1], outs[2])
    for out in outs[:2]:
        out.square().sum().backward()
    for (name, left), right in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if left.requires_grad and left.shape == right.shape and name != f"levels.{plain.config.levels - 1}.pos_emb":
            assert relative_rms(right.grad, left.grad) < 1e-4, name
        elif left.requires_grad and left.shape != right.shape:
            assert (right.grad == 0).sum() >= right.numel() - left.numel()


def test_a_network_with_dropout_is_not_fused():
    from htnet.config import HTNetConfig
    from htnet.model import HTNet

    with pytest.raises(ValueError, match=r"fused layers have no dropout, got 0\.1"):
        HTNet(HTNetConfig(dim=8, heads=2, depths=(1, 1, 1), dropout=0.1)).fuse(padded=False)
