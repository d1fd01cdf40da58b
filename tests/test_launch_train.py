"""``htnet train``: the number of workers and any interruption change nothing but rounding; bad input is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENCE, ROOT, random_samples, small_model
from test_launch_sweep import changed, descendants

import htnet
from htnet.config.plain import dump_config
from htnet.data.store.writer import write_store
from htnet.model_folder import save_model
from htnet.training.world import ALONE
from launch.cli import main
from launch.commands.train import check_division
from launch.run.training import check_training, open_training
from launch.tasks.model import ModelSpec, train_model

STEPS = 5 * 2
"""Five epochs of two steps: 24 clips of two datasets in batches of 16."""


@pytest.fixture
def config(tiny_config):
    """Train on two datasets, validate on the third; every step is looked at."""
    return changed(
        tiny_config,
        data={"validation_datasets": ("smic",)},
        scale={"look_steps": 1},
        resources={"checkpoint_minutes": 1e-9},
    )


def spec_of(config, out: Path) -> ModelSpec:
    from htnet.data.store.merged import open_stores

    store = open_stores(config.data.store)
    identity = check_training(out, config, store)
    with open_training(out, config, store):
        pass
    return ModelSpec(config=config, division=check_division(config, store), out=out, identity=identity)


def trained(config, out: Path):
    """Train in this process, as one worker does."""
    outcome = train_model(spec_of(config, out), ALONE)
    assert (outcome.error, outcome.reason) == (None, None)
    return outcome


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve_of(out: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(out) if "loss" in line]


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def events_of(out: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (out / "training" / "events.jsonl").read_text().splitlines()]


def refused(capsys, path: Path, out: Path, *options: str) -> str:
    assert main(["train", str(path), "--out", str(out), *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("htnet train: ")


def written(config, folder: Path) -> Path:
    path = folder / "train.yaml"
    path.write_text(dump_config(config))
    return path


# --- one process


def test_a_model_knows_its_data_its_scores_and_its_figures(config, tiny_store, tmp_path):
    outcome = trained(config, tmp_path / "model")
    assert (outcome.steps, outcome.resumed) == (STEPS, 0)
    model = htnet.load(tmp_path / "model")
    seen = {sample.subject for sample in tiny_store.samples if sample.id.dataset != "smic"}
    assert set(model.facts.trained_on.subjects) == seen
    assert (model.facts.selection, model.facts.epoch) == ("final", 5)
    lines = metrics_of(tmp_path / "model")
    assert [line["steps"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    step = lines[0]
    assert {"loss", "learning_rate", "samples_per_second", "waiting", "peak_memory_mb"} <= step.keys()
    assert 0 <= step["waiting"] <= 1
    assert step["samples_per_second"] > 0
    epochs = [line for line in lines if "validation" in line]
    assert len(epochs) == 5
    scores = model.facts.scores["validation"]
    assert scores == {**epochs[-1]["validation"], "samples": 10}


def test_the_scores_of_a_model_are_those_of_its_weights(config, tiny_store, tmp_path):
    """Early stopping keeps the best epoch: its weights, read again, score what the file says."""
    from dali_pipelines import load_set, open_resident
    from htnet.scoring.metrics import confusion, pooled_rates

    config = changed(config, train={"patience": 2, "epochs": 12, "learning_rate": 1e-2, "ema": 0.5})
    outcome = trained(config, tmp_path / "model")
    validated = [line for line in metrics_of(tmp_path / "model") if "validation" in line]
    best = max(validated, key=lambda line: (line["validation"]["uf1"], -line["epoch"]))
    model = htnet.load(tmp_path / "model")
    assert (model.facts.selection, model.facts.epoch) == ("validated", best["epoch"])
    assert len(validated) == min(12, best["epoch"] + 2)
    assert outcome.steps == 2 * len(validated)
    rows = [row for row, sample in enumerate(tiny_store.samples) if sample.id.dataset == "smic"]
    resident = open_resident(tiny_store, rows, mosaic_size=28, device=torch.device("cpu"), threads=1, data=config.data)
    batch = load_set(resident, rows, model.facts.transform)
    matrix = confusion(batch.labels.tolist(), model.logits(batch.images).argmax(1).tolist(), 3)
    assert pooled_rates(matrix)["uf1"] == pytest.approx(best["validation"]["uf1"])
    assert not list((tmp_path / "model" / "training").glob("best/*.tmp"))


def test_a_training_stopped_at_every_step_ends_the_same(config, tmp_path):
    """It saves on demand and goes on from there: the weights are those of a training left alone, to the last bit."""
    config = changed(config, train={"ema": 0.9, "schedule": "cosine"})
    trained(config, tmp_path / "whole")
    steps = []
    for _ in range(STEPS + 1):
        spec = spec_of(config, tmp_path / "parts")
        spec.folder.stop.touch()
        outcome = train_model(spec, ALONE)
        assert (outcome.error, outcome.reason) == (None, None)
        steps.append((outcome.resumed, outcome.steps))
        if not outcome.stopped:
            break
    assert steps == [(step, step + 1) for step in range(STEPS)] + [(STEPS, STEPS)]
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert curve_of(tmp_path / "parts") == curve_of(tmp_path / "whole")


def test_a_snapshot_cut_short_is_named_and_passed_over(config, tmp_path):
    spec = spec_of(config, tmp_path / "model")
    for _ in range(4):
        spec.folder.stop.touch()
        train_model(spec, ALONE)
    newest, before = sorted(spec.folder.snapshots.iterdir(), key=lambda path: -int(path.name))
    cut = newest / "engine.pt"
    cut.write_bytes(cut.read_bytes()[:1000])
    spec.folder.stop.unlink()
    outcome = train_model(spec, ALONE)
    assert outcome.resumed == int(before.name)
    [aside] = outcome.damage
    assert aside.path == str(newest)
    assert "engine.pt is not as it was written" in aside.reason
    trained(config, tmp_path / "whole")
    assert weights_of(tmp_path / "model") == weights_of(tmp_path / "whole")


def test_figures_go_to_tensorboard(config, tmp_path):
    trained(changed(config, logging={"tensorboard": True}), tmp_path / "model")
    [file] = (tmp_path / "model" / "training" / "tensorboard").iterdir()
    content = file.read_bytes()
    for name in (b"loss", b"samples_per_second", b"validation/uf1"):
        assert name in content


def test_initial_weights_are_what_a_training_begins_with(config, tmp_path):
    trained(config, tmp_path / "first")
    more = changed(config, train={"init": str(tmp_path / "first"), "learning_rate": 1e-12, "weight_decay": 0.0})
    trained(more, tmp_path / "second")
    first, second = (htnet.load(tmp_path / name) for name in ("first", "second"))
    for one, other in zip(first.network.parameters(), second.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert second.facts.trained_on.subjects == first.facts.trained_on.subjects


@pytest.fixture
def two_stores(tmp_path) -> list[str]:
    samples = list(random_samples())
    parts = [[one for one in samples if (one.sample.id.dataset == "samm") is alone] for alone in (False, True)]
    return [
        str(write_store(tmp_path / f"store{number}", iter(part), {"sources": []}).path)
        for number, part in enumerate(parts)
    ]


def test_merged_stores_train_as_one(config, two_stores, tmp_path):
    """The network sees the same samples, in an order of its own."""
    merged = changed(config, data={"store": tuple(two_stores)})
    trained(merged, tmp_path / "model")
    facts = htnet.load(tmp_path / "model").facts
    assert sum(facts.trained_on.samples.values()) == 20
    assert facts.trained_on.stores != ()


def test_a_clip_of_two_stores_is_refused(config, two_stores, tmp_path, capsys):
    """Under one name, or with one picture under another name."""
    samples = list(random_samples())
    sample = samples[0].sample
    other = replace(samples[0], sample=replace(sample, id=replace(sample.id, clip="EP77")))
    path = write_store(tmp_path / "copies", iter([other]), {"sources": []}).path
    doubled = written(changed(config, data={"store": (*two_stores, two_stores[0])}), tmp_path)
    assert "both hold the clip casme2/sub00/EP00" in refused(capsys, doubled, tmp_path / "model")
    renamed = written(changed(config, data={"store": (two_stores[0], str(path))}), tmp_path)
    line = refused(capsys, renamed, tmp_path / "model")
    assert "both hold the clip casme2/sub00/EP77 (there casme2/sub00/EP00)" in line
    assert not (tmp_path / "model").exists()


# --- bad input


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["scale.workers=30"], "scale.workers=30: only 20 samples to train on: each worker needs one"),
        (["scale.workers=5"], "train.batch_size=16: 20 samples leave a last batch of 4, too few for scale.workers=5"),
        (["engine.name=torch"], "engine.name=torch: htnet train trains by DeepSpeed"),
        (["train.init=nowhere"], "train.init: nowhere: no such model folder"),
        (["data.validation_datasets=[casme3]"], "data.validation_datasets: 'casme3' is not among casme2, samm, smic"),
        (["data.store=nowhere"], "nowhere: no such store"),
        (["logging.mlflow=runs"], "logging.mlflow=runs: needs the extra: pip install htnet[mlflow]"),
        (["train.patience=2", "data.validation_datasets=[]"], "train.patience=2"),
        (["scale.gpus_per_worker=1"], "scale.gpus_per_worker=1"),
    ],
)
def test_what_cannot_be_trained_is_one_line(config, tmp_path, capsys, options, line):
    sets = [text for option in options for text in ("--set", option)]
    assert refused(capsys, written(config, tmp_path), tmp_path / "model", *sets).startswith(line)
    assert not (tmp_path / "model" / "metrics.jsonl").exists()


def test_another_trainings_folder_is_left_alone(config, tmp_path, capsys):
    spec_of(config, tmp_path / "model")
    other = written(changed(config, train={"epochs": 6}), tmp_path)
    line = refused(capsys, other, tmp_path / "model")
    assert (
        line == f"{tmp_path / 'model'}: belongs to another training: it differs in train.epochs; choose another --out"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "is not empty and no training" in refused(capsys, other, tmp_path / "full")
    assert "is a file" in refused(capsys, other, other)


def test_people_that_the_initial_weights_know_judge_nothing(config, tiny_store, tmp_path, capsys):
    """Neither as validation of a training nor as test of a sweep."""
    network, own, facts = small_model()
    seen = replace(facts.trained_on, subjects=("smic/sub01", "casme2/sub00"))
    save_model(tmp_path / "init", network.state_dict(), own, replace(facts, trained_on=seen))
    begun = changed(config, train={"init": str(tmp_path / "init")})
    line = refused(capsys, written(begun, tmp_path), tmp_path / "model")
    assert line.startswith(f"train.init={tmp_path / 'init'}: these weights have seen smic/sub01: a score on them")
    swept = written(changed(begun, data={"validation_datasets": ()}), tmp_path)
    assert main(["sweep", str(swept), "--out", str(tmp_path / "run")]) == 2
    assert "these weights have seen casme2/sub00, smic/sub01" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- several processes under Ray


class Training:
    """``htnet train`` as a program of its own, with a Ray of its own."""

    def __init__(self, path: Path, out: Path, *options: str) -> None:
        command = [sys.executable, "-m", "launch.cli", "train", str(path), "--out", str(out), *options]
        self.out = out
        self._before = self._steps()
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def _steps(self) -> int:
        """Return the steps of the newest snapshot; 0 for none."""
        found = (self.out / "training" / "snapshots").glob("[0-9]*/snapshot.json")
        return max((int(path.parent.name) for path in found), default=0)

    def wait_for_snapshots(self) -> None:
        """Wait until this process, not one before it, has saved twice."""
        deadline = time.monotonic() + PATIENCE
        while self._steps() < self._before + 2:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        text, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, text

    def kill(self) -> None:
        """Kill the driver, Ray and all workers at once."""
        family = descendants(self.process.pid, "")
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start():
    """Starts a :class:`Training`; what a failed test leaves running is ended."""
    started: list[Training] = []

    def begin(path: Path, out: Path, *options: str) -> Training:
        started.append(Training(path, out, *options))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_number_of_workers_gives_the_same_curve(config, start, tmp_path):
    """With the global batch and the seed fixed, losses and weights differ by rounding."""
    config = changed(config, model={"dropout": 0.0}, resources={"checkpoint_minutes": 0.0})
    trained(config, tmp_path / "1")
    for workers in (2, 4):  # on two CPUs
        path = written(changed(config, scale={"workers": workers, "cpus_per_worker": 2 / workers}), tmp_path)
        code, text = start(path, tmp_path / f"{workers}").end()
        assert code == 0, text
    one = curve_of(tmp_path / "1")
    for workers in ("2", "4"):
        np.testing.assert_allclose(curve_of(tmp_path / workers), one, rtol=1e-4)
        model, other = (htnet.load(tmp_path / name) for name in ("1", workers))
        images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(other.logits(images), model.logits(images), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_told_to_stop_it_ends_as_left_alone(config, start, tmp_path):
    """A worker is killed, then everything; then SIGTERM comes. Two workers end with the bits of two left alone."""
    config = changed(config, scale={"workers": 2, "cpus_per_worker": 1.0}, train={"epochs": 80})
    path = written(config, tmp_path)
    code, text = start(path, tmp_path / "whole").end()
    assert code == 0, text

    out = tmp_path / "killed"
    training = start(path, out)
    training.wait_for_snapshots()
    os.kill(descendants(training.process.pid, "ray::_Member")[1], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while events_of(out).count("group_started") < 2:
        assert training.process.poll() is None, training.process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    training.kill()
    assert events_of(out) == ["group_started", "group_lost", "group_started"]
    assert not (out / "model.json").exists()

    training = start(path, out)
    training.wait_for_snapshots()
    training.process.terminate()
    code, text = training.end()
    assert code == 1, text
    assert "Interrupted: saved after" in text
    assert "Run the same command again to resume." in text
    assert "Traceback" not in text

    code, text = start(path, out).end()
    assert code == 0, text
    assert f"{out}: trained in 160 steps" in text
    assert weights_of(out) == weights_of(tmp_path / "whole")
    assert curve_of(out) == curve_of(tmp_path / "whole")
    assert not (out / "training" / "snapshots").exists()
    code, text = start(path, out).end()
    assert (code, text) == (0, f"{out}: is trained already\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_goes_on_with_fewer_workers(config, start, tmp_path):
    """One worker ends two workers' training, with the same global batch, so with the same curve within rounding."""
    config = changed(config, model={"dropout": 0.0}, train={"epochs": 60}, scale={"zero": 2})
    two = written(changed(config, scale={"workers": 2}), tmp_path)
    training = start(two, tmp_path / "model")
    training.wait_for_snapshots()
    training.kill()
    code, text = start(two, tmp_path / "model", "--set", "scale.workers=1").end()
    assert code == 0, text
    trained(config, tmp_path / "whole")
    np.testing.assert_allclose(curve_of(tmp_path / "model"), curve_of(tmp_path / "whole"), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_group_without_room_is_refused(config, tmp_path, capsys):
    path = written(changed(config, scale={"workers": 4, "cpus_per_worker": 100.0}), tmp_path)
    assert "scale.cpus_per_worker=100" in refused(capsys, path, tmp_path / "model")
