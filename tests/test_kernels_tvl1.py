"""The compiled loops of TV-L1 against the plane by plane way, which is what a GPU runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_htnet_flow import texture

from htnet.data.flow.tvl1 import TVL1, _flow_of_chunk, _refined, _refined_by_loops, tvl1


def both(onsets: torch.Tensor, apexes: torch.Tensor, parameters: TVL1) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            _flow_of_chunk(onsets.float(), apexes.float(), parameters, way) for way in (_refined_by_loops, _refined)
        ]


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(2, 70),
    width=st.integers(2, 70),
    shift=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    seed=st.integers(0, 100),
    median=st.sampled_from([1, 3, 5]),
    iterations=st.integers(1, 100),
)
def test_for_one_linearisation_loops_give_the_flow_of_the_planes(height, width, shift, seed, median, iterations):
    """One, because each is a convex problem; without filtering, several may follow a rounding anywhere."""
    onset, apex = (
        torch.from_numpy(picture[None, :height, :width]).float()
        for picture in (texture(70, seed), texture(70, seed, shift))
    )
    start = torch.from_numpy(np.random.default_rng(seed).uniform(-3, 3, (1, 2, height, width)).astype(np.float32))
    parameters = TVL1(iterations=iterations, warps=1, median=median, tolerance=1e-9)
    loops, planes = (way(onset, apex, start.clone(), parameters) for way in (_refined_by_loops, _refined))
    torch.testing.assert_close(loops, planes, atol=5e-3, rtol=0)
    assert (loops - planes).abs().mean() < 1e-4


def test_both_ways_stop_by_the_same_rule():
    onsets = torch.from_numpy(np.stack([texture(48, seed) for seed in range(4)]))
    apexes = torch.from_numpy(np.stack([texture(48, seed, shift=(0.3 * seed, -0.5)) for seed in range(4)]))
    for tolerance in (0.3, 0.05, 0.01):  # each stops the scheme at another step
        loops, planes = both(onsets, apexes, TVL1(tolerance=tolerance, iterations=200))
        torch.testing.assert_close(loops, planes, atol=2e-3, rtol=0)


def test_a_pair_does_not_depend_on_the_rest_of_the_batch():
    """Computed plane by plane, a pair does not depend on what else is in the batch."""
    onsets = torch.from_numpy(np.stack([texture(50, seed) for seed in range(6)])).float()
    apexes = torch.from_numpy(np.stack([texture(50, seed, shift=(0.4 * seed - 1, 0.2)) for seed in range(6)])).float()
    together = _flow_of_chunk(onsets, apexes, TVL1(), _refined)
    for index in range(6):
        one = slice(index, index + 1)
        assert torch.equal(_flow_of_chunk(onsets[one], apexes[one], TVL1(), _refined)[0], together[index])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_that_is_no_picture_gives_a_flow_that_shows_it(value):
    onset, apex = (torch.from_numpy(texture(40)).float()[None] for _ in range(2))
    apex[0, 20, 20] = value
    assert not tvl1(onset, apex).isfinite().all()
