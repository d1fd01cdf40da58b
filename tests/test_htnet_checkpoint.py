"""Checkpoints of the public implementation are read and written without loss, and wrong ones are named."""

from __future__ import annotations

import pytest
import torch
from test_htnet_model import CASES, golden_config, load_golden

from htnet import HTNet, HTNetConfig
from htnet.checkpoint import from_upstream, to_upstream
from htnet.errors import InputError

TINY = HTNetConfig(image_size=16, patch_size=2, dim=10, heads=3, levels=2, depths=(1, 2))


@pytest.fixture
def upstream_state():
    torch.manual_seed(0)
    return to_upstream(HTNet(TINY).state_dict())


@pytest.mark.parametrize("case", CASES)
def test_an_upstream_checkpoint_survives_the_way_here_and_back_exactly(case):
    golden = load_golden(case)
    state = {k.removeprefix("state/"): torch.from_numpy(v) for k, v in golden.items() if k.startswith("state/")}
    ours = from_upstream(state)
    HTNet(golden_config(golden)).load_state_dict(ours)
    back = to_upstream(ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("order", ["ours", "upstream"])
def test_our_weights_survive_the_way_there_and_back_exactly(order):
    ours = HTNet(TINY).state_dict()
    back = from_upstream(to_upstream(ours, channel_order=order), channel_order=order)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def test_a_checkpoint_trained_on_strain_v_u_works_on_u_v_strain(upstream_state):
    as_fed_upstream, on_our_mosaics = HTNet(TINY), HTNet(TINY)
    as_fed_upstream.load_state_dict(from_upstream(upstream_state))
    on_our_mosaics.load_state_dict(from_upstream(upstream_state, channel_order="upstream"))
    mosaics = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(on_our_mosaics(mosaics), as_fed_upstream(mosaics.flip(1)))
    assert not torch.allclose(on_our_mosaics(mosaics), as_fed_upstream(mosaics))


@pytest.mark.parametrize(
    "key",
    [
        "to_patch_embedding.1.weight",
        "layers.0.0.pos_emb",
        "layers.1.0.layers.0.0.fn.to_out.0.weight",
        "layers.0.1.0.weight",
        "mlp_head.2.weight",
    ],
)
def test_a_missing_key_is_named(upstream_state, key):
    del upstream_state[key]
    with pytest.raises(InputError, match=rf"^{key}: missing"):
        from_upstream(upstream_state)


@pytest.mark.parametrize("key", ["optimizer", "layers.0.0.extra", "layers.1.1.0.weight"])
def test_an_unknown_key_is_named(upstream_state, key):
    upstream_state[key] = torch.zeros(1)
    with pytest.raises(InputError, match=rf"^{key}: unknown key"):
        from_upstream(upstream_state)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("layers.0.0.layers.0.0.fn.to_qkv.weight", (28, 10, 1, 1)),
        ("layers.0.1.0.weight", (20, 10, 1, 1)),
        ("mlp_head.0.g", (20,)),
        ("to_patch_embedding.1.bias", (11,)),
        ("to_patch_embedding.1.weight", (10,)),
    ],
)
def test_a_wrong_shape_is_named(upstream_state, key, shape):
    upstream_state[key] = torch.zeros(shape)
    with pytest.raises(InputError, match=rf"^{key}: .*shape"):
        from_upstream(upstream_state)


def test_something_else_than_a_checkpoint_is_refused():
    with pytest.raises(InputError, match="to_patch_embedding"):
        from_upstream({})
    with pytest.raises(InputError, match=r"patch_embed\.weight: missing"):
        to_upstream({"fc.weight": torch.zeros(2, 2)})


def test_an_unknown_channel_order_is_refused(upstream_state):
    with pytest.raises(ValueError, match="channel_order must be ours or upstream, got 'rgb'"):
        from_upstream(upstream_state, channel_order="rgb")
