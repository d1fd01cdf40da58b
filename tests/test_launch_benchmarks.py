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
    check_equal,
    environment,
    first_epoch,
    make_batches,
    measure,
    table,
)
from launch.benchmarks.upstream import UpstreamHTNet

TINY = HTNetConfig(image_size=8, patch_size=2, dim=12, heads=3, depths=(1, 1, 1))


@pytest.mark.parametrize("case", CASES)
def test_the_restatement_of_upstream_computes_the_golden_logits(case):
    golden = load_golden(case)
    model = UpstreamHTNet(golden_config(golden))
    model.load_state_dict({k.removeprefix("state/"): torch.from_numpy(v) for k, v in golden.items() if "state/" in k})
    assert relative_error(model(torch.from_numpy(golden["input"])), torch.from_numpy(golden["logits"])) < 1e-5


@pytest.mark.slow
def test_checked_providers_are_timed_in_turn_and_reported(tmp_path):
    names = [BASELINE, "torch engine, fp32", "DeepSpeed engine, bf16"]
    measurements = measure(names, TINY, (8, 6), rounds=2, threads=1)
    assert [len(m.seconds) for m in measurements] == [2, 2, 2]
    assert measurements[0].ratio == 1.0
    out = tmp_path / "new" / "results.csv"
    for _ in range(2):
        append_csv(out, measurements, (8, 6), environment())
    rows = list(csv.DictReader(out.open()))
    assert [row["provider"] for row in rows] == [*names, *names]
    assert rows[0]["batches"] == "8+6"
    assert table(measurements, environment()).row_count == 3


def test_every_provider_computes_what_upstream_does_and_another_is_not_timed():
    torch.manual_seed(0)
    state = HTNet(TINY).state_dict()
    batches = make_batches(TINY, (8, 6))
    found = {name: first_epoch(build(TINY, state), batches) for name, build in PROVIDERS.items()}
    for name, values in found.items():
        check_equal(name, values, found[BASELINE])
    wrong = found["torch engine, fp32"] | {"logits before": found[BASELINE]["logits before"] + 1}
    with pytest.raises(RuntimeError, match="torch engine, fp32: logits before is off by"):
        check_equal("torch engine, fp32", wrong, found[BASELINE])
