"""A model folder gives back what was put in, runs no code, and refuses what does not fit together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import small_model

import htnet
from htnet.checkpoint import from_upstream
from htnet.errors import InputError
from htnet.export import FORMATS, export_model
from htnet.model_folder import is_model_folder, load_model, mean_motion, save_model, seen_samples
from launch.cli import main


@pytest.fixture
def folder(tmp_path) -> Path:
    network, config, facts = small_model()
    save_model(tmp_path / "model", network.state_dict(), config, facts)
    return tmp_path / "model"


def test_a_model_is_loaded_as_it_was_saved(folder):
    network, config, facts = small_model()
    model = htnet.load(folder)
    recorded = replace(facts, weights_sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
    assert (model.config, model.facts) == (config, recorded)
    images = torch.randn(3, 3, 28, 28)
    assert torch.equal(model.logits(images), network.eval()(images))
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert sorted(path.name for path in folder.iterdir()) == [
        "card.md",
        "config.yaml",
        "model.json",
        "model.safetensors",
    ]


def test_the_samples_that_weights_have_seen_are_described(tiny_store):
    rows = [row for row, sample in enumerate(tiny_store.samples) if sample.id.dataset != "smic"]
    seen = seen_samples(tiny_store, rows)
    assert seen.stores == (tiny_store.digest,)
    assert seen.subjects == tuple(sorted({tiny_store.samples[row].subject for row in rows}))
    assert sum(seen.samples.values()) == len(rows)
    assert list(seen.samples) == ["negative", "positive", "surprise"]
    still = np.zeros((4, 4, 3), np.float16)
    still[..., 0], still[..., 1] = 3, 4
    assert mean_motion(still) == 5


def test_the_card_names_data_scores_and_limits(folder):
    card = (folder / "card.md").read_text()
    assert "9 clips of 2 people: 4 negative, 3 positive, 2 surprise" in card
    assert "| composite | 0.500 (0.40 to 0.60) | 0.400 (0.30 to 0.50) | 12 |" in card
    assert "not a lie detector" in card


def test_a_model_is_none_until_it_is_whole(folder, monkeypatch):
    network, config, facts = small_model()
    monkeypatch.setattr("htnet.model_folder.write_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(folder, network.state_dict(), config, facts)
    assert not is_model_folder(folder)
    with pytest.raises(InputError, match="its training has not ended"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.json", "{", "cannot be read as the facts of a model"),
        ("model.json", '{"format": 7}', "model format 7; this htnet reads format 1"),
        ("model.json", '{"format": 1}', "is no valid model: classes"),
        ("model.safetensors", "\x80\x02pickle", "no weights can be read"),
        ("config.yaml", "model: {dim: 0}", "model.dim"),
        ("config.yaml", "model: {dim: 12}", "the weights do not fit the configured network: head.weight is"),
        (
            "config.yaml",
            "model: {dim: 6, depths: [1, 1, 1], num_classes: 5}",
            "names 3 classes; model.num_classes is 5",
        ),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(folder, capsys, tmp_path, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_model(folder)
    assert main(["export", str(folder), "--format", "torch", "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_and_foreign_weights_are_named(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["stranger"] = weights.pop("head.bias")
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights))
    with pytest.raises(
        InputError, match=r"head.bias is missing, expected \(3,\); stranger is \(3,\), expected nothing"
    ):
        load_model(folder)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("change", [{}, {"image_size": 56, "position": "channel"}], ids=["one token", "four tokens"])
def test_an_exported_program_gives_the_models_logits(tmp_path, kind, change):
    """For batches of any size, of mosaics as they are cut."""
    network, config, facts = small_model(**change)
    save_model(tmp_path / "model", network.state_dict(), config, facts)
    model = load_model(tmp_path / "model")
    path = export_model(model, kind, tmp_path / "out")
    size = config.model.image_size
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (facts.transform.mean, facts.transform.std))
    for count in (1, 7):
        mosaics = torch.rand(count, 3, size, size) * 255
        expected = model.logits((mosaics - mean) / std)
        if kind == "torch":
            found = torch.export.load(path).module()(mosaics)
        else:
            onnxruntime = pytest.importorskip("onnxruntime")
            session = onnxruntime.InferenceSession(path)
            assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(facts.classes)
            found = torch.from_numpy(session.run(None, {"mosaics": mosaics.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_upstreams_weights_come_back(folder, tmp_path, capsys):
    assert main(["export", str(folder), "--format", "upstream", "--out", str(tmp_path / "out")]) == 0
    assert "HTNet.pth" in capsys.readouterr().out
    weights = from_upstream(tmp_path / "out" / FORMATS["upstream"])
    expected = load_model(folder).network.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_an_export_without_its_package_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert main(["export", str(folder), "--format", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "htnet export: --format onnx needs the package onnxruntime: pip install 'htnet[onnx]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_another_programs_logits_are_never_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("htnet.export._TOLERANCE", -1.0)
    with pytest.raises(AssertionError, match=r"model.pt2: logits of a batch of 1 differ"):
        export_model(load_model(folder), "torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()
