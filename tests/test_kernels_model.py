"""The whole network on the Triton backend computes what it computes on the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_htnet_model import CASES, golden_config, load_golden, relative_error, weights

from htnet import HTNet


def logits_and_gradients(golden, backend, device):
    model = HTNet(golden_config(golden, backend))
    model.load_state_dict(weights(golden, "state/"))
    model.to(device)
    logits = model(torch.from_numpy(golden["input"]).to(device))
    F.cross_entropy(logits, torch.from_numpy(golden["labels"]).to(device)).backward()
    return {"logits": logits.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_on_triton_are_the_references(triton_device, monkeypatch, case):
    """The logits and every gradient on Triton are those of the reference."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as where engines are made: TF32 rounds away digits
    golden = load_golden(case)
    expected = logits_and_gradients(golden, "reference", triton_device)
    monkeypatch.setenv("HTNET_ATTENTION", "triton")  # overrides the configured backend
    actual = logits_and_gradients(golden, "sdpa", triton_device)
    # rounding noise around an exact zero, as in test_htnet_model
    last = max(name for name in expected if name.endswith("pos_emb"))
    assert max(actual.pop(last).abs().max(), expected.pop(last).abs().max()) < 5e-7
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert {name: error for name, error in errors.items() if error >= 1e-5} == {}
