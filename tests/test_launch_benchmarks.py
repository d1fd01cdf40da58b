"""The end-to-end benchmark compares networks that compute the same, and says so when they do not."""

from __future__ import annotations

import csv

import pytest
import torch
from test_htnet_model import CASES, golden_config, load_golden, relative_error

from htnet import HTNet, HTNetConfig
from launch.benchmarks.end_to_end import (
    BASELINE,
    PROVIDERS,
    append_csv,
    check_providers,
    environment,
    make_batches,
    measure,
    table,
)
from launch.benchmarks.upstream import UpstreamHTNet

TINY = HTNetConfig(image_size=8, patch_size=2, dim=12, heads=3, depths=(1, 1, 1))


@pytest.fixture
def providers():
    torch.manual_seed(0)
    state = HTNet(TINY).state_dict()
    names = (BASELINE, "htnet, plain loop, fp32", "htnet, plain loop, bf16")
    return {name: PROVIDERS[name](TINY, state) for name in names}


@pytest.mark.parametrize("case", CASES)
def test_the_restatement_of_upstream_computes_the_golden_logits(case):
    golden = load_golden(case)
    model = UpstreamHTNet(golden_config(golden))
    model.load_state_dict({k.removeprefix("state/"): torch.from_numpy(v) for k, v in golden.items() if "state/" in k})
    assert relative_error(model(torch.from_numpy(golden["input"])), torch.from_numpy(golden["logits"])) < 1e-5


def test_checked_providers_are_timed_in_turn_and_reported(providers, tmp_path):
    batches = make_batches(TINY, (8, 6))
    check_providers(providers, batches)
    measurements = measure(providers, batches, rounds=2)
    assert [len(m.seconds) for m in measurements] == [2, 2, 2]
    assert measurements[0].ratio == 1.0
    out = tmp_path / "new" / "results.csv"
    for _ in range(2):
        append_csv(out, measurements, batches, environment())
    rows = list(csv.DictReader(out.open()))
    assert [row["provider"] for row in rows] == [*providers, *providers]
    assert rows[0]["batches"] == "8+6"
    assert table(measurements, environment()).row_count == 3


def test_a_provider_that_computes_something_else_is_not_timed(providers):
    provider = providers["htnet, plain loop, fp32"]
    with torch.no_grad():
        provider.model.head.bias += 1
        provider.model.head.bias[0] -= 3
    with pytest.raises(RuntimeError, match="htnet, plain loop, fp32: logits before is off by"):
        check_providers(providers, make_batches(TINY, (8, 6)))
