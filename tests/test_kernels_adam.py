"""The one-pass optimizer against torch's Adam and AdamW."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

SIZES = (5000, 1024, 7, 3000)  # several blocks, exactly one, less than one
DECAYS = (0.1, 0.1, 0.0, 0.0)
STEPS = 6


def references(parameters, *, decoupled, rate):
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    return kind(groups, lr=rate, betas=(0.9, 0.999), eps=1e-8, foreach=False)


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_the_kernel_follows_torch(narrow, decoupled, triton_device):
    """Within a few roundings: the kernel may contract products and sums, and divides on a card to two units."""
    from kernels.adam import AdamBuffers, adam_launch, rate_table

    generator = torch.Generator().manual_seed(0)
    device = torch.device(triton_device)
    start = [torch.randn(size, generator=generator) for size in SIZES]
    buffers = AdamBuffers.of(SIZES, DECAYS, narrow=narrow, device=device)
    masters = buffers.views(buffers.masters, start)
    for master, value in zip(masters, start, strict=True):
        master.copy_(value)
    theirs = [nn.Parameter(value.clone().to(device)) for value in start]
    optimizer = references(theirs, decoupled=decoupled, rate=1e-2)
    rates, clip = rate_table([1e-2] * STEPS, (0.9, 0.999), 0).to(device), torch.full((1,), 0.5, device=device)
    for step in range(STEPS):
        gradients = [torch.randn(size, generator=generator).to(device) for size in SIZES]
        if narrow:
            gradients = [gradient.bfloat16() for gradient in gradients]
        addresses = torch.tensor([gradient.data_ptr() for gradient in gradients]).to(device)
        options = {"betas": (0.9, 0.999), "eps": 1e-8, "decoupled": decoupled}
        adam_launch(buffers, addresses, rates[step], clip, **options).run()
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = 0.5 * gradient.float()
        optimizer.step()
    for master, parameter in zip(masters, theirs, strict=True):
        torch.testing.assert_close(master, parameter.detach(), rtol=2e-6, atol=2e-6)
    if narrow:
        for weight, master in zip(buffers.views(buffers.narrow, start), masters, strict=True):
            assert torch.equal(weight, master.bfloat16())
    used = sum(-(-size // 1024) * 1024 for size in SIZES)
    assert len(buffers.masters) == used
    assert buffers.masters.count_nonzero() == sum(SIZES)  # what fills a segment up stays 0


def test_the_whole_buffer_form_gives_what_the_kernel_gives(interpreted_kernels):
    """A CPU takes the same step in operations on whole buffers."""
    from htnet.config import HTNetConfig, TrainConfig
    from htnet.model import HTNet
    from htnet.training.flat_adam import FlatAdam
    from htnet.training.precision import clip_factor
    from kernels.adam import rate_table

    train = TrainConfig(weight_decay=0.1, clip_norm=0.3)
    optimizers = []
    for _ in range(2):
        torch.manual_seed(0)
        optimizers.append(FlatAdam(HTNet(HTNetConfig(dim=8, heads=2, depths=(1, 1, 1))), train, narrow=True))
    whole, kernel = optimizers
    generator = torch.Generator().manual_seed(1)
    for rates in rate_table([1e-2] * 3, train.betas, 0):
        for own, other in zip(whole.parameters, kernel.parameters, strict=True):
            own.grad = torch.randn(own.shape, generator=generator).bfloat16()
            other.grad = own.grad.clone()
        gradients = [parameter.grad for parameter in kernel.parameters]
        kernel._launch(gradients, rates, clip_factor(gradients, 0.3).view(1), None)
        whole.step(rates)
    for name in ("masters", "means", "squares"):
        left, right = getattr(whole.buffers, name), getattr(kernel.buffers, name)
        torch.testing.assert_close(left, right, rtol=2e-6, atol=2e-6)


@given(
    first=st.integers(0, 10_000),
    betas=st.tuples(st.floats(0.0, 0.99), st.floats(0.5, 0.9999)),
    rates=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_corrections_are_those_of_float64(first, betas, rates):
    from kernels.adam import rate_table

    for number, (row, rate) in enumerate(zip(rate_table(rates, betas, first).tolist(), rates, strict=True)):
        step = first + number + 1
        wanted = [rate, rate / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5, step]
        assert row == pytest.approx(wanted, rel=1e-6)
