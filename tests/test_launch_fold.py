"""Guarantees of a fold to a sweep: the same record whatever happened on the way, or a reason why there is none."""

from __future__ import annotations

import json
import os
import pickle
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_samples
from test_dali_pipelines_frame_flow import write_frames

from htnet.config import AugmentConfig, Config, TimeJitterConfig
from htnet.config.identity import config_hash
from htnet.config.load import dump_config
from htnet.data.loso import loso_folds, validation_subjects
from htnet.data.store.reader import open_store
from htnet.data.store.writer import write_store
from htnet.scoring.record import FoldRecord
from launch.run import progress
from launch.run.progress import Progress, read_progress
from launch.tasks import fold as fold_task
from launch.tasks.fold import FoldSpec, FoldTraining, fold_seed, run_fold

KILLED = 137


@pytest.fixture(autouse=True)
def process_settings():
    """A fold sets threads and determinism of its process; put them back for the other tests."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def make_spec(tiny_config, tmp_path):
    """A fold of the tiny store; sections of the configuration may be changed: ``train={"epochs": 2}``."""

    def make(number=1, *, run="run", attempt=1, store=None, **sections) -> FoldSpec:
        config: Config = tiny_config
        for name, changes in sections.items():
            config = replace(config, **{name: replace(getattr(config, name), **changes)})
        if store is not None:
            config = replace(config, data=replace(config.data, store=str(store.path)))
        opened = open_store(Path(config.data.store))
        (tmp_path / run).mkdir(exist_ok=True)
        (tmp_path / run / "config.yaml").write_text(dump_config(config))  # as the driver does
        return FoldSpec(
            config=config,
            fold=loso_folds(opened)[number],
            run_dir=tmp_path / run,
            config_hash=config_hash(config, opened.digest),
            attempt=attempt,
        )

    return make


def result_of(spec: FoldSpec) -> FoldRecord:
    """The record without what may differ between two runs: time, place and attempts."""
    outcome = run_fold(spec)
    assert outcome.reason is None, outcome.reason
    return comparable(spec)


def comparable(spec: FoldSpec) -> FoldRecord:
    return replace(FoldRecord.read(spec.record_path), seconds=0.0, environment={}, attempts=1)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def die_in_epoch(monkeypatch):
    """Makes training stop in the given epoch, between two optimizer steps, as often as asked."""

    def arrange(epoch: int, times: int = 1):
        train_step, left = FoldTraining._train_epoch, [times]

        def dying(self):
            if self.epoch + 1 == epoch and left[0]:
                left[0] -= 1
                batch = self.stream.next()
                self.engine.train_step(batch.images, batch.labels, 0.1)
                raise RuntimeError("the lights went out")
            return train_step(self)

        monkeypatch.setattr(FoldTraining, "_train_epoch", dying)

    return arrange


def test_a_fold_leaves_a_valid_record_and_nothing_else(make_spec):
    spec = make_spec()
    outcome = run_fold(spec)
    assert (outcome.fold, outcome.reason, outcome.resumed_epoch) == ("casme2/sub01", None, 0)
    assert outcome.seconds > 0
    record = FoldRecord.read(spec.record_path)
    samples = open_store(Path(spec.config.data.store)).samples
    assert record.fold == "casme2/sub01"
    assert record.config_hash == spec.config_hash
    assert record.labels == tuple(samples[row].label for row in spec.fold.test)
    assert [sample.clip for sample in record.samples] == ["EP00", "EP01", "EP02", "EP03"]
    assert record.epochs == len(record.train_loss) == 5
    assert np.argmax(record.final_logits, axis=1).tolist() == list(record.test_predictions[-1])
    assert record.validation is None
    assert record.attempts == 1
    assert record.seconds > 0
    assert {"host", "device", "threads", "name", "precision", "versions"} <= set(record.environment)
    assert set(record.environment["versions"]) == {"torch", "deepspeed", "ray", "dali"}
    assert files_in(spec.run_dir) == ["config.yaml", "folds/casme2__sub01.json", "machine.json"]


def test_training_learns_what_there_is_to_learn(make_spec):
    record = result_of(make_spec(train={"epochs": 25, "learning_rate": 3e-3}, model={"dropout": 0.0}))
    assert record.train_loss[-1] < 0.3 * record.train_loss[0]
    hits = sum(guess == label for guess, label in zip(record.test_predictions[-1], record.labels, strict=True))
    assert hits >= 3  # of four; the random landmarks cut some of the signal off


def test_a_fold_with_a_record_is_done(make_spec, monkeypatch):
    spec = make_spec()
    run_fold(spec)
    before = spec.record_path.read_bytes()
    monkeypatch.setattr(fold_task, "FoldTraining", None)  # calling it would fail
    again = run_fold(replace(spec, attempt=2))
    assert (again.reason, again.seconds, again.resumed_epoch) == (None, 0.0, 5)
    assert spec.record_path.read_bytes() == before


@pytest.mark.parametrize("name", ["deepspeed", "torch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_fold_gives_the_undisturbed_record(make_spec, die_in_epoch, name, precision):
    """An interrupted fold gives the record of an undisturbed one."""
    changes = {
        "engine": {"name": name, "precision": precision},
        "train": {"schedule": "cosine", "warmup_epochs": 1.5, "clip_norm": 1.0, "class_weights": "balanced"},
        "resources": {"checkpoint_every": 2},
        "data": {"validation_subjects": 2},
    }
    undisturbed = result_of(make_spec(run="undisturbed", **changes))
    spec = make_spec(run="interrupted", **changes)
    die_in_epoch(4)
    outcome = run_fold(spec)
    assert outcome.reason == "RuntimeError: the lights went out"
    assert "in dying" in outcome.traceback
    assert spec.checkpoint_path.exists()
    assert not spec.record_path.exists()
    torch.rand(17)  # the process has lived on
    outcome = run_fold(replace(spec, attempt=2))
    assert (outcome.reason, outcome.resumed_epoch) == (None, 2)
    assert comparable(spec) == undisturbed
    assert FoldRecord.read(spec.record_path).attempts == 2
    assert files_in(spec.run_dir) == ["config.yaml", "folds/casme2__sub01.json", "machine.json"]


def test_a_fold_whose_frames_change_resumes_to_the_same_record(make_spec, die_in_epoch, tmp_path):
    store = write_frames(tmp_path / "frames")
    augment = AugmentConfig(time_jitter=TimeJitterConfig(frames=1))
    changes = {"data": {"input": "frames", "augment": augment}, "train": {"epochs": 3, "batch_size": 4}}
    changes |= {"resources": {"checkpoint_every": 1}, "store": store}
    undisturbed = result_of(make_spec(run="undisturbed", **changes))
    spec = make_spec(**changes)
    die_in_epoch(3)
    assert run_fold(spec).reason == "RuntimeError: the lights went out"
    assert result_of(spec.again()) == undisturbed
    still = {**changes, "data": {"input": "frames"}}
    assert result_of(make_spec(run="still", **still)).train_loss != undisturbed.train_loss


def test_many_interruptions_still_give_the_same_record(make_spec, monkeypatch):
    """A fold that is interrupted again and again still gives the same record."""
    undisturbed = result_of(make_spec(run="undisturbed"))
    spec = make_spec(run="interrupted", resources={"checkpoint_every": 1})
    write = FoldTraining._write_checkpoint

    def stop_after_each(self):
        write(self)
        raise RuntimeError("preempted")

    monkeypatch.setattr(FoldTraining, "_write_checkpoint", stop_after_each)
    resumed = [run_fold(spec).resumed_epoch for _ in range(4)]
    assert run_fold(spec).resumed_epoch == 4
    assert resumed == [0, 0, 0, 0]  # an outcome with a reason does not say where it had resumed
    assert comparable(spec) == undisturbed


def test_without_checkpoints_an_interrupted_fold_starts_again(make_spec, die_in_epoch):
    undisturbed = result_of(make_spec(run="undisturbed"))
    spec = make_spec(run="interrupted", resources={"checkpoint_every": 0})
    die_in_epoch(5)
    assert run_fold(spec).reason is not None
    assert not spec.checkpoint_path.exists()
    outcome = run_fold(spec)
    assert (outcome.reason, outcome.resumed_epoch) == (None, 0)
    assert comparable(spec) == undisturbed


_DIES = """
import os, pickle, sys
from pathlib import Path
import launch.tasks.fold as fold_task
from launch.tasks.fold import FoldTraining, run_fold

spec = pickle.loads(Path(sys.argv[1]).read_bytes())
steps, last = [0], int(sys.argv[2])
create = FoldTraining.__init__

def init(self, spec):
    create(self, spec)
    step = self.engine.train_step
    def counted(*arguments):
        if steps[0] == last:
            os._exit(137)
        steps[0] += 1
        return step(*arguments)
    self.engine.train_step = counted

FoldTraining.__init__ = init
outcome = run_fold(spec)
print(outcome)
"""


@pytest.mark.slow
def test_a_fold_resumes_after_a_death_at_any_step(make_spec, tmp_path):
    """A process that dies at any step leaves a fold that resumes."""
    changes = {"resources": {"checkpoint_every": 1}, "data": {"validation_subjects": 1}}
    undisturbed = result_of(make_spec(run="undisturbed", **changes))
    spec = make_spec(run="killed", **changes)
    packed = tmp_path / "spec.pickle"
    packed.write_bytes(pickle.dumps(spec))
    last = int(np.random.default_rng().integers(1, 10))  # 5 epochs of 2 steps; any must do
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _DIES, str(packed), str(last)]
    died = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert died.returncode == KILLED, died.stderr
    assert not spec.record_path.exists()
    outcome = run_fold(spec)
    assert (outcome.reason, outcome.resumed_epoch) == (None, last // 2), f"died at step {last}"
    assert comparable(spec) == undisturbed, f"died at step {last}"


def test_a_death_while_saving_leaves_the_checkpoint_before(make_spec, monkeypatch):
    """A death while a checkpoint is written leaves the one before."""
    undisturbed = result_of(make_spec(run="undisturbed"))
    spec = make_spec(run="interrupted", resources={"checkpoint_every": 1})
    save, calls = torch.save, []

    def half(state, file):
        calls.append(state["epoch"])
        if len(calls) == 3:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", half)
    assert "No space left on device" in run_fold(spec).reason
    outcome = run_fold(replace(spec, attempt=2))
    assert (outcome.reason, outcome.resumed_epoch) == (None, 2)
    assert comparable(spec) == undisturbed
    assert files_in(spec.run_dir) == ["config.yaml", "folds/casme2__sub01.json", "machine.json"]


def test_a_fold_does_not_depend_on_what_its_process_did_before(make_spec):
    alone = result_of(make_spec(4, run="alone"))
    for number in (0, 7):
        run_fold(make_spec(number, run="busy"))
    torch.manual_seed(1234)
    np.random.seed(5)
    assert result_of(make_spec(4, run="busy")) == alone
    torch.set_num_threads(2)  # the configuration says one
    assert result_of(make_spec(4, run="threads")) == alone


def test_folds_and_seeds_differ(make_spec):
    assert fold_seed(0, "casme2/sub01") == fold_seed(0, "casme2/sub01")
    seeds = {fold_seed(seed, fold) for seed in range(20) for fold in ("casme2/sub01", "casme2/sub02", "samm/006")}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**31 for seed in seeds)
    one, other = result_of(make_spec(0, run="a")), result_of(make_spec(3, run="a"))
    assert one.train_loss != other.train_loss


def test_a_loss_that_blows_up_ends_the_fold_and_says_where(make_spec):
    outcome = run_fold(make_spec(train={"learning_rate": 1e30, "epochs": 3}))
    assert outcome.reason.startswith("fold casme2/sub01: the training loss became ")
    assert "in epoch 1 of 3, step 2 of 2" in outcome.reason
    assert "a lower train.learning_rate" in outcome.reason
    assert outcome.traceback is None


def test_weights_that_blow_up_in_the_last_step_are_noticed_too(make_spec):
    # a single step: its loss is finite, what it leaves behind is not
    spec = make_spec(train={"learning_rate": 1e38, "epochs": 1, "batch_size": 64})
    outcome = run_fold(spec)
    assert outcome.reason.startswith("fold casme2/sub01: the output for casme2/sub01/EP00 is not finite")
    assert "after epoch 1 of 1" in outcome.reason
    assert not spec.record_path.exists()


def store_with_nan(folder: Path, number: int):
    samples = list(random_samples())
    flow = samples[number].flow_image.copy()
    flow[10:20, 10:20] = np.nan
    samples[number] = replace(samples[number], flow_image=flow)
    return write_store(folder, iter(samples), {})


@pytest.mark.parametrize("standardise", [False, True])
def test_a_flow_image_that_holds_nan_is_no_training(make_spec, tmp_path, standardise, monkeypatch):
    monkeypatch.setattr("htnet.data.store.writer._check_image", lambda item: None)  # as a store from elsewhere may be
    store = store_with_nan(tmp_path / "store", 0)
    outcome = run_fold(make_spec(1, store=store, data={"standardise": standardise}))
    assert outcome.reason.startswith("fold casme2/sub01: the training loss became nan in epoch 1 of 5, step ")
    # where it is a test sample, it is named
    outcome = run_fold(make_spec(0, store=store, data={"standardise": standardise}))
    assert outcome.reason.startswith("fold casme2/sub00: the output for casme2/sub00/EP00 is not finite")


@pytest.mark.parametrize("content", [b"", b"garbage", "half", [1, 2], {"epoch": 3}])
def test_a_damaged_checkpoint_is_a_reason_that_names_the_file(make_spec, die_in_epoch, content):
    spec = make_spec(resources={"checkpoint_every": 2})
    die_in_epoch(3)
    run_fold(spec)
    if content == "half":
        whole = spec.checkpoint_path.read_bytes()
        spec.checkpoint_path.write_bytes(whole[: len(whole) // 2])
    elif isinstance(content, bytes):
        spec.checkpoint_path.write_bytes(content)
    else:
        torch.save(content, spec.checkpoint_path)
    outcome = run_fold(spec)
    assert outcome.reason.startswith(f"{spec.checkpoint_path}: ")
    assert "delete it to start the fold again" in outcome.reason
    assert outcome.traceback is None
    spec.checkpoint_path.unlink()
    assert run_fold(spec).reason is None


def test_a_checkpoint_is_no_way_to_run_code(make_spec, tmp_path):
    class Surprise:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    spec = make_spec()
    spec.checkpoint_path.parent.mkdir(parents=True)
    torch.save({"config_hash": spec.config_hash, "epoch": Surprise()}, spec.checkpoint_path)
    assert "damaged checkpoint" in run_fold(spec).reason
    assert not (tmp_path / "ran").exists()


def test_a_foreign_checkpoint_is_refused(make_spec, die_in_epoch):
    """The checkpoint of another configuration or version is refused."""
    spec = make_spec(resources={"checkpoint_every": 2})
    for key, value, rule in (
        ("config_hash", "another", "the checkpoint belongs to another configuration"),
        ("format", 1, "written by another version of htnet"),
    ):
        die_in_epoch(3)
        run_fold(spec)
        state = torch.load(spec.checkpoint_path, weights_only=True)
        torch.save(state | {key: value}, spec.checkpoint_path)
        outcome = run_fold(spec)
        assert outcome.reason == f"{spec.checkpoint_path}: {rule}; delete it to start the fold again"
        assert not spec.record_path.exists()
        spec.checkpoint_path.unlink()


def test_validation_subjects_are_kept_out_of_training(make_spec):
    """Validation subjects are kept out of training, and their predictions are kept."""
    spec = make_spec(data={"validation_subjects": 3})
    store = open_store(Path(spec.config.data.store))
    inner = validation_subjects(store, spec.fold, 3, spec.config.seed)
    training = FoldTraining(spec)
    trained = {store.samples[row].subject for row in training.stream.sampler.rows}
    assert len(trained) == 5
    assert not trained & {*inner, spec.fold.subject}
    training.run()
    record = FoldRecord.read(spec.record_path)
    assert set(record.validation.subjects) == set(inner)
    assert spec.fold.subject not in record.validation.subjects
    assert len(record.validation.predictions) == 5
    rows = [row for row in spec.fold.train if store.samples[row].subject in inner]
    assert record.validation.labels == tuple(store.samples[row].label for row in rows)


def test_progress_tells_the_watchdog_from_the_first_moment(make_spec, monkeypatch):
    """Progress tells the watchdog from the first moment how far a fold is."""
    spec = make_spec(attempt=2)
    seen = []
    create, train = FoldTraining.__init__, FoldTraining._train_epoch

    def watched_create(self, spec):
        seen.append(read_progress(spec.progress_path))  # a fold that hangs while it reads its data is noticed, too
        create(self, spec)

    def watched_train(self):
        seen.append(read_progress(spec.progress_path))
        return train(self)

    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(FoldTraining, "__init__", watched_create)
    monkeypatch.setattr(FoldTraining, "_train_epoch", watched_train)
    assert read_progress(spec.progress_path) is None
    run_fold(spec)
    assert seen == [Progress(epoch=epoch, start=0) for epoch in (0, 0, 1, 2, 3, 4)]
    assert read_progress(spec.progress_path) is None


def test_progress_says_which_epochs_a_checkpoint_held(make_spec, die_in_epoch, monkeypatch):
    spec = make_spec(resources={"checkpoint_every": 2})
    die_in_epoch(5)
    run_fold(spec)
    seen, train = [], FoldTraining._train_epoch

    def watched(self):
        seen.append(read_progress(spec.progress_path))
        return train(self)

    monkeypatch.setattr(FoldTraining, "_train_epoch", watched)
    assert run_fold(spec).resumed_epoch == 4
    assert seen == [Progress(epoch=4, start=4)]


def test_two_submissions_never_write_the_same_file(make_spec):
    one = make_spec()
    other = make_spec()  # of a second driver: the same attempt
    third = one.again()
    assert third.attempt == 2
    assert len({spec.progress_path for spec in (one, other, third)}) == 3
    one.progress_path.parent.mkdir(parents=True)
    one.progress_path.write_text(json.dumps({"epoch": 4, "start": 0, "epochs": 5}))
    assert read_progress(other.progress_path) is None
    assert read_progress(one.progress_path) == Progress(epoch=4, start=0)
    one.progress_path.write_text('{"epoch": 2, "ep')
    assert read_progress(one.progress_path) is None
    assert run_fold(third).resumed_epoch == 0
    assert files_in(one.run_dir) == ["config.yaml", "folds/casme2__sub01.json", "machine.json"]


def test_a_fold_that_another_driver_finished_meanwhile_is_done(make_spec, monkeypatch):
    run = FoldTraining.run

    def overtaken(self):
        run(self)
        raise FileNotFoundError("the other driver's worker has tidied up")

    monkeypatch.setattr(FoldTraining, "run", overtaken)
    outcome = run_fold(make_spec())
    assert (outcome.reason, outcome.resumed_epoch) == (None, 5)  # nothing was trained here


def test_a_node_that_does_not_see_the_store_says_so(make_spec, tmp_path):
    spec = make_spec()

    def with_store(place) -> FoldSpec:
        return replace(spec, config=replace(spec.config, data=replace(spec.config.data, store=str(place))))

    shared = "the store must lie on storage that all nodes share"
    reason = run_fold(with_store("nowhere")).bad_node
    assert reason == f"node {platform.node()}: nowhere: no such store; make it with htnet prepare; {shared}"
    other = write_store(tmp_path / "other", random_samples(subjects=4), {}).path
    assert run_fold(with_store(other)).bad_node == (
        f"node {platform.node()}: {other}: not the store of this run; {shared}"
    )
    assert files_in(spec.run_dir) == ["config.yaml"]


def test_a_node_without_the_runs_folder_writes_nothing(make_spec, tmp_path):
    """A node that does not see the run's folder writes nothing and says so."""
    spec = make_spec()
    shared = "the run's folder must lie on storage that all nodes share"
    elsewhere = tmp_path / "not" / "mounted"
    outcome = run_fold(replace(spec, run_dir=elsewhere))
    assert outcome.bad_node == (
        f"node {platform.node()}: {elsewhere / 'config.yaml'}: no such configuration file; {shared}"
    )
    assert outcome.traceback is None
    assert not elsewhere.parent.exists()
    other = make_spec(run="another", train={"epochs": 9})
    assert run_fold(replace(spec, run_dir=other.run_dir)).bad_node == (
        f"node {platform.node()}: {other.run_dir}: holds another run; {shared}"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_fold_that_asks_for_a_gpu_where_there_is_none_says_so(make_spec):
    outcome = run_fold(make_spec(resources={"gpus_per_fold": 1.0}))
    assert "no CUDA device is visible; set engine.device=cpu" in outcome.bad_node


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["deepspeed", "torch"])
def test_an_interrupted_fold_on_a_gpu_gives_the_same_record(make_spec, die_in_epoch, name, precision):
    """An interrupted fold on a GPU gives the record of an undisturbed one."""
    changes = {
        "engine": {"name": name, "precision": precision},
        "resources": {"gpus_per_fold": 0.5, "checkpoint_every": 2},
    }
    undisturbed = result_of(make_spec(run="undisturbed", **changes))
    spec = make_spec(run="interrupted", **changes)
    die_in_epoch(4)
    assert run_fold(spec).reason is not None
    assert result_of(replace(spec, attempt=2)) == undisturbed
    assert FoldRecord.read(spec.record_path).environment["device"] == "cuda"
