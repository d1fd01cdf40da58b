"""Balanced and sharded epochs: equal shares, nobody left out, no overlap."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipelines import EpochSampler, balance_groups


def make_sampler(groups, batch_size=16, **changes) -> EpochSampler:
    options = {"rows": tuple(range(len(groups))), "batch_size": batch_size, "seed": 4, "shuffle": True}
    return EpochSampler(**(options | {"groups": tuple(groups)} | changes))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_groups_get_equal_shares_and_rows_equal_turns(sizes, seed):
    """Every group fills the same share of an epoch, and every row of a group comes equally often."""
    groups = [f"g{index}" for index, size in enumerate(sizes) for _ in range(size)]
    sampler = make_sampler(groups, seed=seed)
    seen: Counter[int] = Counter()
    for epoch in range(2 * len(sizes) * max(sizes)):
        rows = sampler.epoch(epoch)
        assert len(rows) == len(groups)
        counts = Counter(groups[row] for row in rows)
        shares = [counts[name] for name in set(groups)]
        assert max(shares) - min(shares) <= 1
        seen.update(rows.tolist())
    for name in set(groups):
        counts = [seen[row] for row, group in enumerate(groups) if group == name]
        assert max(counts) - min(counts) <= 1


def test_a_balanced_order_differs_by_epoch_and_repeats():
    """A balanced order differs between epochs and is the same each time it is made."""
    sampler = make_sampler(["a"] * 20 + ["b"] * 5)
    assert not np.array_equal(sampler.epoch(0), sampler.epoch(1))
    assert np.array_equal(sampler.epoch(1), make_sampler(["a"] * 20 + ["b"] * 5).epoch(1))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 80), batch_size=st.integers(1, 40), ranks=st.integers(1, 4))
def test_ranks_share_a_batch_without_overlap(count, batch_size, ranks):
    if (count - 1) % batch_size + 1 < ranks:
        with pytest.raises(ValueError, match=f"too few for {ranks} ranks"):
            make_sampler([], rows=tuple(range(count)), batch_size=batch_size, ranks=ranks)
        return
    whole = make_sampler([], rows=tuple(range(count)), batch_size=batch_size)
    parts = [
        make_sampler([], rows=tuple(range(count)), batch_size=batch_size, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    for step in range(2 * whole.steps_per_epoch):
        pieces = [part.batch(step).tolist() for part in parts]
        assert sorted(row for piece in pieces for row in piece) == sorted(whole.batch(step).tolist())
        assert all(pieces)
        assert whole.size_of(step) == len(whole.batch(step))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ("a",), "rows": (1, 2)}, "one group per row, got 1 for 2 rows"),
        ({"groups": ("a", "b"), "rows": (1, 2), "shuffle": False}, "balanced groups need shuffle"),
        ({"rank": 2, "ranks": 2}, r"rank must be in 0\.\.1, got 2"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(changes.pop("groups", ()), **({"rows": (1, 2, 3)} | changes))


def test_groups_are_the_classes_or_the_datasets(tiny_store):
    rows = range(len(tiny_store.rows))
    samples = tiny_store.samples
    assert balance_groups(tiny_store, rows, "none") == ()
    assert balance_groups(tiny_store, rows, "class") == tuple(str(sample.label) for sample in samples)
    assert balance_groups(tiny_store, rows, "dataset") == tuple(sample.id.dataset for sample in samples)
