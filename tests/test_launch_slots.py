"""Guarantees of folds that share a process: each is what it is alone, and what ends one leaves the others be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_launch_fold import comparable, files_in

from dali_pipelines import EpochSampler, FlowStream, FlowTables, fit_transform, open_resident
from htnet.config import AugmentConfig, Config, MixConfig
from htnet.config.augment import FlipConfig, JitterConfig, RotateConfig
from htnet.config.plain import config_hash, dump_config
from htnet.data.loso import loso_folds
from htnet.data.store.reader import open_store
from htnet.errors import InputError
from htnet.training import slots
from launch.run.progress import read_progress
from launch.tasks import group as group_task
from launch.tasks.fold import FoldSpec, run_fold
from launch.tasks.group import FoldGroup, run_folds

pytestmark = pytest.mark.usefixtures("process_settings")

CHANGED = AugmentConfig(
    flip=FlipConfig(probability=0.5),
    rotate=RotateConfig(degrees=8.0),
    jitter=JitterConfig(shift=0.05),
    mix=MixConfig(kind="cutmix", alpha=1.0),
)


@pytest.fixture
def make_specs(tiny_config, tmp_path):
    """Folds of the tiny store on engine ``graphs``; sections of the configuration may be changed."""

    def make(count=4, *, run="run", **sections) -> tuple[FoldSpec, ...]:
        engine = replace(tiny_config.engine, name="graphs", precision="fp32")
        config: Config = replace(tiny_config, engine=engine, model=replace(tiny_config.model, dropout=0.0))
        for name, changes in sections.items():
            config = replace(config, **{name: replace(getattr(config, name), **changes)})
        store = open_store(Path(config.data.store))
        (tmp_path / run).mkdir(exist_ok=True)
        (tmp_path / run / "config.yaml").write_text(dump_config(config))
        identity = config_hash(config, store.digest)
        return tuple(
            FoldSpec(config=config, fold=fold, run_dir=tmp_path / run, config_hash=identity, attempt=1)
            for fold in loso_folds(store)[:count]
        )

    return make


def records_of(specs):
    outcome = run_folds(FoldGroup(specs=specs))
    assert outcome.bad_node is None
    assert [end.reason for end in outcome.outcomes] == [None] * len(specs)
    return [comparable(spec) for spec in specs]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"data": {"augment": CHANGED}, "train": {"class_weights": "balanced"}, "engine": {"precision": "bf16"}},
        {"data": {"validation_subjects": 2, "balance": "class"}, "train": {"clip_norm": 0.5, "weight_decay": 0.1}},
    ],
    ids=["plain", "changed", "validated"],
)
def test_folds_side_by_side_are_those_one_at_a_time(make_specs, sections):
    together = records_of(make_specs(run="together", **sections, resources={"slots_per_gpu": 3}))
    one_by_one = records_of(make_specs(run="alone", **sections, resources={"slots_per_gpu": 1}))
    assert together == one_by_one
    specs = make_specs(run="fold", **sections)
    assert run_fold(specs[2]).reason is None  # the task of one fold takes the same way
    assert comparable(specs[2]) == one_by_one[2]


def test_slots_train_as_the_plain_engine_does(make_specs):
    """But for the last bits: a batch that is filled up adds in another order."""
    [graphed] = records_of(make_specs(1, run="graphs"))
    [spec] = make_specs(1, run="torch", engine={"name": "torch"})
    assert run_fold(spec).reason is None
    plain = comparable(spec)
    np.testing.assert_allclose(graphed.train_loss, plain.train_loss, rtol=1e-4)
    np.testing.assert_allclose(graphed.final_logits, plain.final_logits, rtol=1e-2, atol=1e-3)


def test_a_killed_group_goes_on_from_its_snapshots(make_specs, monkeypatch):
    expected = records_of(make_specs(run="whole"))
    specs = make_specs(resources={"slots_per_gpu": 3, "checkpoint_minutes": 1e-9})
    monkeypatch.setattr(slots, "LOOK_SECONDS", 0.0)  # a round for each epoch
    count = group_task._Group._count_epoch

    def dying(self, trainer):
        count(self, trainer)
        if self._epochs == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(group_task._Group, "_count_epoch", dying)
        with pytest.raises(KeyboardInterrupt):
            run_folds(FoldGroup(specs=specs))
    outcome = run_folds(FoldGroup(specs=specs).again())
    assert [end.reason for end in outcome.outcomes] == [None] * 4
    assert sum(end.resumed_epoch for end in outcome.outcomes) >= 3
    assert [comparable(spec) for spec in specs] == expected
    assert not (specs[0].run_dir / "checkpoints").exists() or not files_in(specs[0].run_dir / "checkpoints")


def test_a_fold_that_fails_leaves_its_slot_to_the_next(make_specs, monkeypatch):
    expected = records_of(make_specs(run="whole"))
    specs = make_specs(resources={"slots_per_gpu": 2})
    load = group_task.load_data

    def failing(spec, *arguments):
        if spec == specs[1]:
            raise InputError("the tar is torn")
        return load(spec, *arguments)

    monkeypatch.setattr(group_task, "load_data", failing)
    ends = {end.fold: end for end in run_folds(FoldGroup(specs=specs)).outcomes}
    assert ends[specs[1].name].reason == "the tar is torn"
    assert not specs[1].record_path.exists()
    good = [0, 2, 3]
    assert all(ends[specs[number].name].reason is None for number in good)
    assert [comparable(specs[number]) for number in good] == [expected[number] for number in good]


def test_a_lost_device_ends_the_process_and_not_each_fold(make_specs, monkeypatch):
    """Otherwise every fold after it would be given up for the fault of one."""

    def lose(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(group_task, "load_data", lose)
    specs = make_specs(3)
    with pytest.raises(torch.AcceleratorError):
        run_folds(FoldGroup(specs=specs))
    assert not any(spec.record_path.exists() for spec in specs)


def test_weights_that_blow_up_end_their_fold_alone(make_specs):
    specs = make_specs(2, train={"learning_rate": 1e30})
    ends = run_folds(FoldGroup(specs=specs)).outcomes
    for spec, end in zip(specs, sorted(ends, key=lambda end: end.fold), strict=True):
        assert end.reason.startswith(f"fold {spec.name}: the ")
        assert end.traceback is None
        assert not spec.record_path.exists()


def test_a_group_tells_the_epochs_of_all_its_folds(make_specs, monkeypatch):
    seen = []
    specs = make_specs(3)
    end = group_task.end_fold

    def looking(spec, *arguments):
        seen.append(read_progress(FoldGroup(specs=specs).progress_path))
        end(spec, *arguments)

    monkeypatch.setattr(group_task, "end_fold", looking)
    monkeypatch.setattr("launch.run.progress.PROGRESS_SECONDS", 0.0)
    records_of(specs)
    epochs = specs[0].config.train.epochs
    assert FoldGroup(specs=specs).epochs == 3 * epochs
    assert next(progress.epoch for progress in seen if progress is not None) >= epochs


def test_samples_that_are_not_resident_are_refused(make_specs):
    specs = make_specs(2, data={"cache_mb": 0})
    for end in run_folds(FoldGroup(specs=specs)).outcomes:
        assert end.reason.startswith("engine.name=graphs: the samples take more than data.cache_mb=0; raise it, or")
        assert end.traceback is None


@pytest.mark.parametrize("augment", [AugmentConfig(), CHANGED], ids=["plain", "changed"])
def test_tables_make_the_batches_of_the_stream(tiny_config, augment):
    store = open_store(Path(tiny_config.data.store))
    fold = loso_folds(store)[1]
    resident = open_resident(
        store, fold.train, data=tiny_config.data, mosaic_size=28, device=torch.device("cpu"), threads=1
    )
    transform = fit_transform(resident, fold.train, standardise=True)
    sampler = EpochSampler(rows=fold.train, batch_size=8, seed=3, shuffle=True)
    options = {"augment": augment, "transform": transform, "num_classes": 3}
    stream, tables = FlowStream(resident, sampler, **options), FlowTables(resident, sampler, **options)
    for _ in range(2):
        epoch = tables.next_tables()
        for step in range(tables.steps_per_epoch):
            batch = stream.next()
            images, labels, real = tables.batch(epoch, step)
            count = len(batch.images)
            assert real.tolist() == [1.0] * count + [0.0] * (len(real) - count)
            assert torch.equal(images[:count], batch.images)
            assert torch.equal(labels[:count], batch.labels)
            assert images.isfinite().all()
    assert tables.state() == stream.state()
