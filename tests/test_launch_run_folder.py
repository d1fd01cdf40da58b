"""A run's folder: damage is set aside and named, left-overs go, and kinds of machine do not mix."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from htnet.config import EngineConfig
from htnet.data.loso import loso_folds
from htnet.errors import InputError
from htnet.scoring.record import FoldRecord, RecordedSample
from launch.run.environment import deciding_facts, differences, fold_environment, processor_kind
from launch.run.folder import RunFolder, check_run, open_run
from launch.tasks import fold as fold_task
from launch.tasks.fold import FoldSpec, check_machine

HEX = "0f" * 16


@pytest.fixture
def run(tiny_config, tiny_store, tmp_path):
    """A run with a record of two folds that holds in all respects, made up instead of trained."""
    with open_run(tmp_path / "run", tiny_config, tiny_store) as opened:
        for fold in loso_folds(tiny_store)[:2]:
            record_of(fold, tiny_store, tiny_config, opened.config_hash).write(opened.record(fold.subject))
    return opened


def record_of(fold, store, config, identity: str) -> FoldRecord:
    samples = tuple(RecordedSample.of(store.samples[row]) for row in fold.test)
    epochs = config.train.epochs
    return FoldRecord(
        fold=fold.subject,
        config_hash=identity,
        samples=samples,
        test_predictions=((0,) * len(samples),) * epochs,
        train_loss=(0.5,) * epochs,
        final_logits=((1.0, 0.0, 0.0),) * len(samples),
        seconds=1.0,
        environment={"device": "cpu"},
    )


def events(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.events.read_text().splitlines()]


def names(run: RunFolder) -> list[str]:
    return sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())


def test_records_that_hold_are_done_and_their_left_overs_go(run, tiny_config, tiny_store):
    """Records that hold are done, and their checkpoints go."""
    run.checkpoint("casme2/sub00").mkdir(parents=True)
    with open_run(run.path, tiny_config, tiny_store) as opened:
        assert list(opened.records()) == ["casme2/sub00", "casme2/sub01"]
        assert opened.damage == []
    assert not run.checkpoint("casme2/sub00").exists()
    assert names(run) == ["config.yaml", "environment.json", "folds/casme2__sub00.json", "folds/casme2__sub01.json"]


def rewritten(path, **changes) -> None:
    """Write a record anew, with a checksum that fits: no edit but a record of something else."""
    replace(FoldRecord.read(path), **changes).write(path)


def edited(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def with_another_label(content) -> None:
    content["samples"][0]["label"] = (content["samples"][0]["label"] + 1) % 3


def without_checksum(content) -> None:
    content.update(checksum=None, format=1)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe"),
    "a label": lambda path: edited(path, with_another_label),
    "a subject": lambda path: edited(path, lambda c: c.update(fold="samm/sub00")),
    "a label of an old record": lambda path: edited(path, lambda c: (with_another_label(c), without_checksum(c))),
    "a clip of an old record": lambda path: edited(
        path, lambda c: (c["samples"][0].update(clip="EP99"), without_checksum(c))
    ),
    "another run": lambda path: rewritten(path, config_hash="0123"),
    "fewer epochs": lambda path: rewritten(
        path, test_predictions=FoldRecord.read(path).test_predictions[1:], train_loss=(0.5,) * 4
    ),
    "another fold": lambda path: shutil.copy(path.with_name("casme2__sub00.json"), path),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_record_that_does_not_hold_is_set_aside_and_named(run, tiny_config, tiny_store, what):
    path = run.record("casme2/sub01")
    DAMAGE[what](path)
    damaged = path.read_bytes()
    with open_run(run.path, tiny_config, tiny_store) as opened:
        assert list(opened.records()) == ["casme2/sub00"]
        [line] = opened.damage
    assert line.startswith(str(path))
    assert line.endswith("; set aside as casme2__sub01.json.damaged-1")
    assert path.with_name("casme2__sub01.json.damaged-1").read_bytes() == damaged
    [event] = [event for event in events(run) if event["event"] == "set_aside"]
    assert (event["path"], event["now"]) == (str(path), "casme2__sub01.json.damaged-1")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", b'{"resumed": 7}'),
        ("environment.json", b"{"),
        ("environment.json", b"[]"),
        ("environment.json", b"\xff"),
        ("machine.json", b'{"torch": 2}'),
        ("machine.json", b""),
        ("events.jsonl", b'{"event": "sweep_started"}\n\xff\xfe\n'),
    ],
)
def test_notes_that_are_damaged_are_set_aside_and_begun_anew(run, tiny_config, tiny_store, name, content):
    (run.path / name).write_bytes(content)
    with open_run(run.path, tiny_config, tiny_store) as opened:
        [line] = opened.damage
        assert list(opened.records()) == ["casme2/sub00", "casme2/sub01"]
    assert line.startswith(str(run.path / name))
    assert (run.path / f"{name}.damaged-1").read_bytes() == content
    assert events(run)[0]["event"] == "set_aside"
    assert json.loads(run.environment.read_text())["config_hash"] == opened.config_hash


def test_an_event_after_a_line_that_was_cut_short_is_a_line(run, tiny_config, tiny_store):
    run.events.write_text('{"event": "fold_done", "fo')
    with open_run(run.path, tiny_config, tiny_store) as opened:
        opened.event("sweep_started", folds=9)
    assert json.loads(run.events.read_text().splitlines()[1])["event"] == "sweep_started"


def test_a_run_without_environment_keeps_its_configuration(run, tiny_config, tiny_store):
    """Without its environment a run still belongs to its configuration."""
    run.environment.write_text("{")
    assert check_run(run.path, tiny_config, tiny_store) == run.config_hash
    assert run.environment.read_text() == "{"  # a look changes nothing
    other = replace(tiny_config, train=replace(tiny_config.train, epochs=9))
    with pytest.raises(InputError, match=r"it differs in train\.epochs"):
        check_run(run.path, other, tiny_store)


def test_left_overs_of_a_killed_driver_and_its_workers_are_gone(run, tiny_config, tiny_store):
    before = names(run)
    state = run.checkpoint("casme2/sub02") / "state.pt"
    left = [run.path / f".config.yaml.{HEX}.tmp", run.folds / f".casme2__sub02.json.{HEX}.tmp"]
    left += [state.with_name(f".state.pt.{HEX}.tmp"), run.checkpoints / f".casme2__sub02.{HEX}.tmp" / "part"]
    told = run.progress("casme2/sub02", HEX)
    for path in (*left, state, told, told.with_name(f".{told.name}.{HEX}.tmp")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    told.write_text("{}")
    with open_run(run.path, tiny_config, tiny_store) as opened:
        opened.records()
    assert names(run) == sorted([*before, "checkpoints/casme2__sub02/state.pt"])  # the open fold goes on from there


def test_what_is_left_of_a_fold_goes_and_nothing_of_a_like_name(tmp_path):
    run, other, own = RunFolder(path=tmp_path), "0" * 32, "f" * 32
    kept = [run.checkpoint("a/s1.b") / "x.pt", run.progress("a/s1.b", other), run.progress("a/s12", other)]
    left = [run.checkpoint("a/s1") / "x.pt", run.progress("a/s1", own)]
    left.append(left[1].with_name(f".{left[1].name}.{own}.tmp"))
    odd = run.progress("a/s[12]", own)
    for path in (*kept, *left, odd):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run.remove_leftovers("a/s[12]")
    assert {path for path in tmp_path.rglob("*.*") if path.is_file()} == {*kept, *left}
    run.remove_leftovers("a/s1")
    assert {path for path in tmp_path.rglob("*.*") if path.is_file()} == set(kept)


# --- the kind of machine


def spec_of(run, config, store) -> FoldSpec:
    fold = loso_folds(store)[2]
    return FoldSpec(config=config, fold=fold, run_dir=run.path, config_hash=run.config_hash, attempt=1)


def test_facts_that_differ_are_named_with_both_values():
    first = {"device": "cuda", "name": "H100", "torch": "2.12", "deepspeed": "0.19"}
    assert differences(first, dict(first)) == []
    here = {"device": "cuda", "name": "H200", "torch": "2.12", "triton": "3.7"}
    assert differences(first, here) == [
        "deepspeed none instead of 0.19",
        "name H200 instead of H100",
        "triton 3.7 instead of none",
    ]


def test_processors_of_one_generation_are_of_one_kind():
    intel = {"vendor_id": "GenuineIntel", "cpu family": "6", "model": "143", "cpu MHz": "2100"}
    one = processor_kind(intel | {"model name": "Xeon 8480", "flags": "fpu avx512f avx2 amx_bf16 fma"})
    assert one == "GenuineIntel 6 143 amx_bf16 avx2 avx512f fma"
    assert (
        processor_kind(intel | {"model name": "Xeon 8470", "flags": "avx2 fma avx512f amx_bf16", "cpu MHz": "3"}) == one
    )
    assert processor_kind(intel | {"flags": "fpu avx2 fma"}) != one
    assert processor_kind({"CPU implementer": "0x41", "Features": "fp asimd sve"}) == "0x41 asimd sve"
    assert processor_kind({}) != ""


def test_a_machine_unlike_that_of_the_first_fold_refuses(run, tiny_config, tiny_store, monkeypatch):
    """The first fold decides and a machine that differs refuses."""
    spec = spec_of(run, tiny_config, tiny_store)
    check_machine(spec)
    facts = json.loads(run.machine.read_text())
    assert {"device", "processor", "torch", "numpy", "dali", "deepspeed"} == facts.keys()
    check_machine(spec)
    monkeypatch.setattr(fold_task, "deciding_facts", lambda engine, device: facts | {"torch": "1.0"})
    with pytest.raises(InputError) as caught:
        check_machine(spec)
    assert str(caught.value).endswith(
        f": not of the kind of the run's first fold: torch 1.0 instead of {facts['torch']}; "
        "resources.mixed_devices=true lets a run mix them"
    )
    assert "\n" not in str(caught.value)
    mixing = replace(tiny_config, resources=replace(tiny_config.resources, mixed_devices=True))
    check_machine(replace(spec, config=mixing))
    assert check_run(run.path, mixing, tiny_store) == run.config_hash  # no other run


def test_what_is_mixed_is_noted_in_the_record(tiny_config):
    device = torch.device("cpu")
    facts = deciding_facts(EngineConfig(), device)
    plain = fold_environment(tiny_config, device, facts)
    assert plain["decides"] == facts
    assert "mixed_devices" not in plain
    mixed = fold_environment(tiny_config, device, facts | {"torch": "1.0"})
    assert mixed["mixed_devices"] == [f"torch {facts['torch']} instead of 1.0"]
    assert "deepspeed" not in deciding_facts(EngineConfig(name="torch"), device)


def test_only_a_run_with_records_binds_a_machine(run, tiny_config, tiny_store):
    """A run without a record binds no machine and records bind theirs."""
    run.machine.write_text('{"torch": "1.0"}')
    with open_run(run.path, tiny_config, tiny_store):
        assert run.machine.exists()
    run.machine.unlink()
    rewritten(run.record("casme2/sub00"), environment={"decides": {"torch": "2.0"}})
    with open_run(run.path, tiny_config, tiny_store) as opened:
        opened.records()
    assert json.loads(run.machine.read_text()) == {"torch": "2.0"}
    shutil.rmtree(run.folds)
    with open_run(run.path, tiny_config, tiny_store):
        assert not run.machine.exists()
