"""Guarantees of a fold to a sweep: the same record whatever happened on the way, or a reason why there is none."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_samples
from test_dali_pipelines_frame_flow import write_frames

from dali_pipelines import load_set, open_resident
from htnet.config import AugmentConfig, Config, TimeJitterConfig
from htnet.config.plain import config_hash, dump_config
from htnet.data.loso import loso_folds, validation_subjects
from htnet.data.store.reader import open_store
from htnet.data.store.writer import write_store
from htnet.model_folder import load_model
from htnet.scoring.record import FoldRecord
from htnet.training.snapshot import Snapshots
from htnet.training.trainer import Trainer
from launch.run import progress
from launch.run.progress import Progress, read_progress
from launch.tasks import fold as fold_task
from launch.tasks.fold import FoldSpec, fold_seed, run_fold

pytestmark = pytest.mark.usefixtures("process_settings")

KILLED = 137
EVERY_EPOCH = {"checkpoint_minutes": 1e-9}
SNAPSHOT = ["engine.pt", "random.pt", "snapshot.json", "trainer.json"]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "fold_records.json").read_text())


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


def test_a_kept_model_predicts_what_the_record_says(make_spec, tiny_config):
    """It has not seen the fold's subject, and holds all that makes the network's input of a flow image."""
    spec = make_spec(resources={"keep_models": True})
    record = result_of(spec)
    model = load_model(spec.run.model(spec.fold.subject))
    store = open_store(Path(tiny_config.data.store))
    assert spec.fold.subject not in model.facts.trained_on.subjects
    assert set(model.facts.trained_on.subjects) == {store.samples[row].subject for row in spec.fold.train}
    options = {"mosaic_size": model.facts.transform.mosaic_size, "device": torch.device("cpu"), "threads": 1}
    resident = open_resident(store, spec.fold.test, data=model.config.data, **options)
    batch = load_set(resident, spec.fold.test, model.facts.transform)
    np.testing.assert_allclose(model.logits(batch.images), record.final_logits, rtol=1e-5, atol=1e-5)


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
        train_epoch, left = Trainer.train_epoch, [times]

        def dying(self):
            if self.epoch + 1 == epoch and left[0]:
                left[0] -= 1
                batch = self.source.next()
                self.engine.train_step(batch.images, batch.labels, 0.1)
                raise RuntimeError("the lights went out")
            return train_epoch(self)

        monkeypatch.setattr(Trainer, "train_epoch", dying)

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


@pytest.mark.parametrize("engine", ["deepspeed", "torch"])
@pytest.mark.parametrize("case", GOLDEN)
def test_a_fold_gives_the_golden_record(make_spec, case, engine):
    """The record is that of the training loop before it was a Trainer, to rounding: other processors sum otherwise."""
    golden = GOLDEN[case]
    spec = make_spec(
        engine={"name": engine},
        model={"dropout": 0.2 if case == "dropout" else 0.0},
        train={
            **{"schedule": "cosine", "warmup_epochs": 1.5, "clip_norm": 1.0},
            **{"class_weights": "balanced", "label_smoothing": 0.1},
        },
        data={"validation_subjects": 2},
    )
    record = result_of(spec)
    assert record.fold == golden["fold"]
    np.testing.assert_allclose(record.train_loss, golden["train_loss"], rtol=1e-4)
    np.testing.assert_allclose(record.final_logits, golden["final_logits"], rtol=1e-3, atol=1e-4)
    assert [list(epoch) for epoch in record.test_predictions] == golden["test_predictions"]
    assert [list(epoch) for epoch in record.validation.predictions] == golden["validation_predictions"]


def test_a_fold_needs_no_package_that_it_does_not_use(make_spec, monkeypatch):
    """Without DeepSpeed's distribution a fold of the torch engine ends with a record that leaves its version out."""

    def version(package):
        if package == "deepspeed":
            raise PackageNotFoundError(package)
        return importlib.metadata.version(package)

    monkeypatch.setattr("kernels.machine.version", version)
    spec = make_spec(engine={"name": "torch"})
    assert run_fold(spec).reason is None
    assert set(FoldRecord.read(spec.record_path).environment["versions"]) == {"torch", "ray", "dali"}


def test_a_record_names_card_and_driver(make_spec, monkeypatch):
    card = {"name": "H9000", "capability": "9.0", "uuid": "GPU-1", "driver": "570", "cuda": "13.0", "nccl": "2.29"}
    monkeypatch.setattr("launch.run.environment.card_facts", lambda device: card)
    spec = make_spec()
    assert run_fold(spec).reason is None
    environment = FoldRecord.read(spec.record_path).environment
    assert (environment["device_name"], environment["card"]) == ("H9000", card)


def test_a_fold_opens_its_store_once(make_spec, monkeypatch):
    """The store that the node is checked by is the one that is trained on: its manifest is read and digested once."""
    spec, opened = make_spec(), []
    monkeypatch.setattr(fold_task, "open_stores", lambda paths: opened.append(paths) or open_store(Path(paths)))
    assert run_fold(spec).reason is None
    assert opened == [spec.config.data.store]


def test_a_fold_with_a_record_is_done(make_spec, monkeypatch):
    spec = make_spec()
    run_fold(spec)
    before = spec.record_path.read_bytes()
    monkeypatch.setattr(fold_task, "train_fold", None)  # calling it would fail
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
        "resources": EVERY_EPOCH,
        "data": {"validation_subjects": 2},
    }
    undisturbed = result_of(make_spec(run="undisturbed", **changes))
    spec = make_spec(run="interrupted", **changes)
    die_in_epoch(4)
    outcome = run_fold(spec)
    assert outcome.reason == "RuntimeError: the lights went out"
    assert "in dying" in outcome.traceback
    assert [path.name for path in spec.snapshot_path.iterdir()] == ["6"]
    assert not spec.record_path.exists()
    torch.rand(17)  # the process has lived on
    outcome = run_fold(replace(spec, attempt=2))
    assert (outcome.reason, outcome.resumed_epoch) == (None, 3)
    assert comparable(spec) == undisturbed
    assert FoldRecord.read(spec.record_path).attempts == 2
    assert files_in(spec.run_dir) == ["config.yaml", "folds/casme2__sub01.json", "machine.json"]


def test_a_fold_whose_frames_change_resumes_to_the_same_record(make_spec, die_in_epoch, tmp_path):
    store = write_frames(tmp_path / "frames")
    augment = AugmentConfig(time_jitter=TimeJitterConfig(frames=1))
    changes = {"data": {"input": "frames", "augment": augment}, "train": {"epochs": 3, "batch_size": 4}}
    changes |= {"resources": EVERY_EPOCH, "store": store}
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
    spec = make_spec(run="interrupted", resources=EVERY_EPOCH)
    save = Snapshots.save_when_due

    def stop_after_each(self, trainer):
        save(self, trainer)
        if not trainer.finished:
            raise RuntimeError("preempted")

    monkeypatch.setattr(Snapshots, "save_when_due", stop_after_each)
    resumed = [run_fold(spec).resumed_epoch for _ in range(4)]
    assert run_fold(spec).resumed_epoch == 4
    assert resumed == [0, 0, 0, 0]  # an outcome with a reason does not say where it had resumed
    assert comparable(spec) == undisturbed


def test_without_checkpoints_an_interrupted_fold_starts_again(make_spec, die_in_epoch):
    undisturbed = result_of(make_spec(run="undisturbed"))
    spec = make_spec(run="interrupted", resources={"checkpoint_minutes": 0.0})
    die_in_epoch(5)
    assert run_fold(spec).reason is not None
    assert not spec.snapshot_path.exists()
    outcome = run_fold(spec)
    assert (outcome.reason, outcome.resumed_epoch) == (None, 0)
    assert comparable(spec) == undisturbed


_DIES = """
import os, pickle, sys
from pathlib import Path
from htnet.training.trainer import Trainer
from launch.tasks.fold import run_fold

spec = pickle.loads(Path(sys.argv[1]).read_bytes())
steps, last = [0], int(sys.argv[2])
run = Trainer.run

def counting(self):
    step = self.engine.train_step
    def counted(*arguments):
        if steps[0] == last:
            os._exit(137)
        steps[0] += 1
        return step(*arguments)
    self.engine.train_step = counted
    run(self)

Trainer.run = counting
outcome = run_fold(spec)
print(outcome)
"""


@pytest.mark.slow
def test_a_fold_resumes_after_a_death_at_any_step(make_spec, tmp_path):
    """A process that dies at any step leaves a fold that resumes."""
    changes = {"resources": EVERY_EPOCH, "data": {"validation_subjects": 1}}
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
    # the newest snapshot may still have been in the writing
    assert outcome.reason is None, f"died at step {last}"
    assert outcome.resumed_epoch in (last // 2, max(0, last // 2 - 1)), f"died at step {last}"
    assert comparable(spec) == undisturbed, f"died at step {last}"


def test_a_death_while_saving_leaves_the_snapshot_before(make_spec, monkeypatch):
    """An error of the thread that writes ends the fold, and the snapshot before is whole."""
    undisturbed = result_of(make_spec(run="undisturbed"))
    spec = make_spec(run="interrupted", resources=EVERY_EPOCH)
    save, calls = torch.save, []

    def half(state, path):
        calls.append(path)
        if len(calls) == 5:  # each snapshot has two such files
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", half)
    assert "no space left on the device" in run_fold(spec).reason
    assert files_in(spec.snapshot_path) == [f"4/{name}" for name in SNAPSHOT]
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


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in SNAPSHOT for damage in ("empty", "half", "gone")]
    + [(name, "one bit") for name in SNAPSHOT if name != "snapshot.json"],  # which may then say something else
)
def test_a_damaged_snapshot_is_set_aside(make_spec, die_in_epoch, caplog, name, damage):
    """The fold starts again by itself; its outcome and the log name the snapshot."""
    undisturbed = result_of(make_spec(run="undisturbed"))
    spec = make_spec(resources=EVERY_EPOCH)
    die_in_epoch(3)
    run_fold(spec)
    path = spec.snapshot_path / "4" / name
    content = path.read_bytes()
    middle = len(content) // 2
    changed = {
        "empty": b"",
        "half": content[:middle],
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    path.unlink() if damage == "gone" else path.write_bytes(changed[damage])
    outcome = run_fold(replace(spec, attempt=2))
    assert (outcome.reason, outcome.resumed_epoch) == (None, 0)
    [aside] = outcome.damage
    assert (aside.path, aside.now) == (str(spec.snapshot_path / "4"), "4.damaged-1")
    assert str(aside).startswith(f"{spec.snapshot_path / '4'}: damaged snapshot (")
    assert str(aside) in caplog.text
    assert comparable(spec) == undisturbed


def test_an_older_snapshot_serves_where_the_newest_is_damaged(make_spec, die_in_epoch):
    spec = make_spec(resources=EVERY_EPOCH)
    die_in_epoch(3)
    run_fold(spec)
    shutil.copytree(spec.snapshot_path / "4", spec.snapshot_path / "6")  # as a kill between the two steps leaves it
    (spec.snapshot_path / "6" / "engine.pt").write_bytes(b"")
    outcome = run_fold(replace(spec, attempt=2))
    assert (outcome.reason, outcome.resumed_epoch) == (None, 2)


def test_a_snapshot_is_no_way_to_run_code(make_spec, die_in_epoch, tmp_path):
    class Surprise:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    spec = make_spec(resources=EVERY_EPOCH)
    die_in_epoch(3)
    run_fold(spec)
    folder = spec.snapshot_path / "4"
    torch.save({"model": Surprise()}, folder / "engine.pt")
    manifest = json.loads((folder / "snapshot.json").read_text())
    manifest["crc32"]["engine.pt"] = zlib.crc32((folder / "engine.pt").read_bytes())
    (folder / "snapshot.json").write_text(json.dumps(manifest))
    assert "UnpicklingError" in run_fold(spec).reason
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("identity", "another", "the snapshot belongs to another configuration"),
        ("format", 1, "the snapshot was written by another version of htnet"),
    ],
)
def test_a_foreign_snapshot_is_refused(make_spec, die_in_epoch, key, value, rule):
    """The snapshot of another configuration or version is refused."""
    spec = make_spec(resources=EVERY_EPOCH)
    die_in_epoch(3)
    run_fold(spec)
    path = spec.snapshot_path / "4" / "snapshot.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    outcome = run_fold(spec)
    assert outcome.reason == f"{path.parent}: {rule}; delete it to start again"
    assert outcome.traceback is None
    assert not spec.record_path.exists()


def test_validation_subjects_are_kept_out_of_training(make_spec):
    """Validation subjects are kept out of training, and their predictions are kept."""
    spec = make_spec(data={"validation_subjects": 3})
    store = open_store(Path(spec.config.data.store))
    inner = validation_subjects(store, spec.fold, 3, spec.config.seed)
    data = fold_task.load_data(spec, store, torch.device("cpu"), None)
    trained = {store.samples[row].subject for row in data.source.sampler.rows}
    assert len(trained) == 5
    assert not trained & {*inner, spec.fold.subject}
    assert run_fold(spec).reason is None
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
    load, train = fold_task.load_data, Trainer.train_epoch

    def watched_load(*arguments):
        seen.append(read_progress(spec.progress_path))  # a fold that hangs while it reads its data is noticed, too
        return load(*arguments)

    def watched_train(self):
        seen.append(read_progress(spec.progress_path))
        return train(self)

    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(fold_task, "load_data", watched_load)
    monkeypatch.setattr(Trainer, "train_epoch", watched_train)
    assert read_progress(spec.progress_path) is None
    run_fold(spec)
    assert seen == [Progress(epoch=epoch, start=0) for epoch in (0, 0, 1, 2, 3, 4)]
    assert read_progress(spec.progress_path) is None


def test_progress_says_which_epochs_a_snapshot_held(make_spec, die_in_epoch, monkeypatch):
    spec = make_spec(resources=EVERY_EPOCH)
    die_in_epoch(5)
    run_fold(spec)
    seen, train = [], Trainer.train_epoch

    def watched(self):
        seen.append(read_progress(spec.progress_path))
        return train(self)

    monkeypatch.setattr(Trainer, "train_epoch", watched)
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
    train = fold_task.train_fold

    def overtaken(*arguments):
        train(*arguments)
        raise FileNotFoundError("the other driver's worker has tidied up")

    monkeypatch.setattr(fold_task, "train_fold", overtaken)
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
        "resources": {"gpus_per_fold": 0.5, **EVERY_EPOCH},
    }
    undisturbed = result_of(make_spec(run="undisturbed", **changes))
    spec = make_spec(run="interrupted", **changes)
    die_in_epoch(4)
    assert run_fold(spec).reason is not None
    assert result_of(replace(spec, attempt=2)) == undisturbed
    assert FoldRecord.read(spec.record_path).environment["device"] == "cuda"
