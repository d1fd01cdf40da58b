"""Checkpoints of the public implementation are read and written without loss, and wrong ones are named."""

from __future__ import annotations

import argparse
import pickle

import numpy as np
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
def test_upstream_checkpoints_convert_there_and_back_exactly(case):
    """An upstream checkpoint survives the way here and back exactly."""
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


# --- files

WRAPPED = {
    "plain": lambda state: state,
    "parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}},
    "model": lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "best": 0.5},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": torch.zeros(())},
    "net": lambda state: {"net": {"state_dict": state}, "args": {"lr": 5e-5}},
}


@pytest.fixture(scope="module")
def golden():
    return load_golden("seq4")


@pytest.fixture(scope="module")
def golden_state(golden):
    return {k.removeprefix("state/"): torch.from_numpy(v) for k, v in golden.items() if k.startswith("state/")}


def logits_of(golden, state):
    model = HTNet(golden_config(golden))
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.from_numpy(golden["input"])).numpy()


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("how", WRAPPED)
def test_a_file_of_upstream_gives_upstreams_logits(golden, golden_state, tmp_path, how, old_format):
    path, stored = tmp_path / "HTNet.pth", WRAPPED[how](golden_state)
    torch.save(stored, path, _use_new_zipfile_serialization=not old_format)
    for given in (path, str(path), stored):
        ours = from_upstream(given)
        assert to_upstream(ours).keys() == golden_state.keys()
        np.testing.assert_allclose(logits_of(golden, ours), golden["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 1e-1), (torch.float64, 1e-4)])
def test_weights_of_another_precision_become_float32(golden, golden_state, tmp_path, dtype, tolerance):
    path = tmp_path / "HTNet.pth"
    torch.save({"model": {key: value.to(dtype) for key, value in golden_state.items()}}, path)
    ours = from_upstream(path)
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert all(torch.equal(value, golden_state[key].to(dtype).float()) for key, value in to_upstream(ours).items())
    scale = np.abs(golden["logits"]).max()
    np.testing.assert_allclose(logits_of(golden, ours), golden["logits"], atol=tolerance * scale)


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        from_upstream(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


class RunsCode:
    """Content of a hostile file: reading it by pickle would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("old_format", [False, True])
def test_what_only_code_restores_is_named_and_not_run(upstream_state, tmp_path, old_format):
    for held, name in (
        (HTNet(TINY), "htnet.model.HTNet, which only running code restores, as a whole pickled model does"),
        ({"model": HTNet(TINY)}, "htnet.model.HTNet, which"),
        ({"model": upstream_state, "args": argparse.Namespace(lr=1)}, "argparse.Namespace, which"),
        ({"model": upstream_state, "acc": np.float64(0.5)}, r"numpy._core.multiarray.scalar, which only running code"),
        ({"model": upstream_state, "x": RunsCode(tmp_path / "made")}, "posix.mkdir, which only running code restores"),
    ):
        torch.save(held, tmp_path / "x.pth", _use_new_zipfile_serialization=not old_format)
        message = refusal(tmp_path / "x.pth")
        assert message.startswith(f"holds {name}")
        assert message.endswith(": save model.state_dict() and nothing else")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_that_ends_too_early_is_called_damaged(upstream_state, tmp_path, old_format, share):
    path = tmp_path / "x.pth"
    torch.save(upstream_state, path, _use_new_zipfile_serialization=not old_format)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert refusal(path).startswith("a damaged checkpoint: it ends too early")


def test_a_file_of_another_kind_is_refused_in_words(upstream_state, tmp_path):
    path = tmp_path / "x.pth"
    assert refusal(path) == "cannot be read as a checkpoint: No such file or directory"
    assert refusal(tmp_path) == "cannot be read as a checkpoint: Is a directory"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for content, rule in (
        (b"", "not a file that torch.save wrote: it begins with b''"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "not a file that torch.save wrote: it begins with b'version ht'",
        ),
        (b"<!DOCTYPE html>", "not a file that torch.save wrote: it begins with b'<!DOCTYPE '"),
        (pickle.dumps({"a": 1}), "not a file that torch.save wrote"),
        (b"PK\x03\x04 and so on", "a damaged checkpoint: it ends too early, or is another kind of archive"),
        (len(header).to_bytes(8, "little") + header + bytes(4), "a file of safetensors: give what safetensors.torch."),
    ):
        path.write_bytes(content)
        assert refusal(path).startswith(rule)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert refusal(path).startswith("a TorchScript archive: save the state_dict()")


def test_what_holds_no_state_dict_of_upstream_is_refused(upstream_state, tmp_path):
    some = dict(upstream_state)
    some["module.mlp_head.0.g"] = some.pop("mlp_head.0.g")
    count = len(some)
    for held, rule in (
        ([1], "must be a state dict, or a dict that holds one, got list"),
        (torch.zeros(2), "must be a state dict, or a dict that holds one, got Tensor"),
        ({1: torch.zeros(2)}, "1: a key of a state dict must be a text"),
        ({"epoch": 1, "weights_of_mine": upstream_state}, "holds no weights, and no dict of them under state_dict, "),
        (
            {"model": upstream_state, "net": upstream_state},
            "holds more than one state dict, model and net: give the one",
        ),
        (some, f"module.mlp_head.0.g: all keys must begin with module. or none, got 1 of {count}"),
        ({**upstream_state, "epoch": 3}, "epoch: must be a tensor, got int"),
        (
            {**upstream_state, "mlp_head.0.g": torch.ones(1, 20, 1, 1, dtype=torch.int64)},
            "mlp_head.0.g: must be a tensor of floating point numbers, got torch.int64",
        ),
        ({"model": {"fc.weight": torch.zeros(2)}}, "to_patch_embedding.1.weight: missing"),
    ):
        torch.save(held, tmp_path / "x.pth")
        assert refusal(tmp_path / "x.pth").startswith(rule)
        with pytest.raises(InputError) as caught:
            from_upstream(held)
        assert str(caught.value).startswith(rule)
