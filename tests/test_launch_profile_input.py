"""``htnet profile input`` compares like with like, writes what it measured, and refuses what it does not know."""

from __future__ import annotations

import functools

import cv2
import pytest
import torch

from dali_pipelines import EpochSampler, FlowStream, Resident, fit_transform
from htnet.config import HTNetConfig
from kernels.benchmarks.race import OVER
from kernels.benchmarks.record import read_records
from launch import cli
from launch.benchmarks import input as profile_input
from launch.benchmarks import input_rivals
from launch.benchmarks.input import CASES, DIFFERENCE, OURS, PROVIDERS, Feed, Plan, check_equal
from launch.benchmarks.input_rivals import PlainBatches, make_frame_store, make_store

CPU = torch.device("cpu")
TINY = ("input", "--samples", 12, "--batch", 8, "--steps", 1, "--rounds", 2)


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """In place of the paper's, whose 140 million weights say nothing more about the share of waiting."""
    config = functools.partial(HTNetConfig, dim=8, heads=1, depths=(1, 1, 1))
    monkeypatch.setattr("htnet.config.HTNetConfig", config)


@pytest.fixture(autouse=True)
def short_timings(monkeypatch):
    monkeypatch.setattr(profile_input, "_SHORTEST", {False: 0.1, True: 0.1})


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["profile", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("input") / "store", samples=30, size=28)


@pytest.mark.parametrize("case", ["plain", "augmented", "streamed"])
def test_the_rival_makes_the_batches_of_folds(case, store):
    """The rival makes the batches that folds train on, over several epochs."""
    data, rows = CASES[case].data, tuple(range(30))
    resident = Resident(store, rows, data=data, mosaic_size=28, device=CPU, threads=1)
    transform = fit_transform(resident, rows, standardise=True)
    sampler = EpochSampler(rows=rows, batch_size=16, seed=5, shuffle=True)
    stream = FlowStream(resident, sampler, augment=data.augment, transform=transform)
    rival = PlainBatches(store, sampler, data=data, transform=transform)
    for step in range(5):
        batch, (images, labels) = stream.next(), rival[step]
        assert torch.equal(labels, batch.labels)
        torch.testing.assert_close(images, batch.images, rtol=0, atol=1e-4 * batch.images.abs().max().item())


def test_the_augmented_case_changes_what_the_plain_one_leaves(store):
    sampler = EpochSampler(rows=tuple(range(30)), batch_size=30, seed=0, shuffle=False)
    for case, changes in (("plain", False), ("augmented", True), ("streamed", False)):
        data = CASES[case].data
        resident = Resident(store, range(30), data=data, mosaic_size=28, device=CPU, threads=1)
        transform = fit_transform(resident, range(30), standardise=True)
        rival = PlainBatches(store, sampler, data=data, transform=transform)
        assert torch.equal(rival[0][0], rival[1][0]) is not changes


def test_the_rival_of_frames_makes_the_batches_of_folds(tmp_path):
    """The rival of frames makes the batches that folds train on."""
    case, plan = CASES["own-flow"], Plan(samples=6, batch=4)
    store = make_frame_store(tmp_path / "store", samples=6, size=28, side=64, working_size=64)
    feed = Feed(case, plan, store, CPU)
    ours, rival = feed.ours(), feed.rival()
    for step in range(3):
        (our_images, our_labels), (images, labels) = ours(), rival[step]
        assert torch.equal(labels, our_labels)
        difference = (images - our_images).abs().max() / our_images.abs().max()
        assert 0 <= difference < case.tolerance


@pytest.mark.parametrize("wrong", ["pixels", "labels", "nan"])
def test_nothing_passes_the_gate_that_is_not_the_same(wrong):
    images, labels = torch.rand(4, 3, 28, 28), torch.arange(4)
    assert check_equal("plain", "other", [(images.clone(), labels)], [(images, labels)]) == 0.0
    other = images.clone()
    if wrong != "labels":
        other[0, 0, 0, 0] += 0.1 if wrong == "pixels" else torch.nan
    with pytest.raises(RuntimeError, match=DIFFERENCE):
        check_equal("plain", "other", [(other, labels.flip(0) if wrong == "labels" else labels)], [(images, labels)])


def test_results_are_appended_with_machine_and_versions(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(profile_input, "PROVIDERS", {OURS: None, "DataLoader": 0})
    for runs in (1, 2):
        code, out, _ = run(capsys, *TINY, "--cases", "plain,augmented,streamed", "--out", tmp_path / "new")
        assert code == 0
        assert "samples/s" in out
        assert "[2 of 3] augmented: " in out
        rows = read_records(tmp_path / "new" / "input.csv")
        assert [(row.case["case"], row.provider) for row in rows[-2:]] == [
            ("streamed", OURS),
            ("streamed", "DataLoader"),
        ]
        assert len(rows) == 6 * runs
        assert cv2.imread(str(tmp_path / "new" / "input.png")).shape[0] > 200
    for row in rows:
        assert all(row.machine[name] for name in ("commit", "processor", "torch", "dali", "opencv", "load", "date"))
        assert row.low <= row.median <= row.high
        assert row.n == 2
    ours, other = rows[:2]
    assert ours.figures["ours_is_times_as_fast"] == 1
    assert other.figures["ours_is_times_as_fast"] == pytest.approx(ours.median / other.median, rel=1e-4)


def test_a_case_whose_rival_differs_stops_no_other(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(profile_input, "PROVIDERS", {OURS: None, "DataLoader": 0})
    monkeypatch.setattr(input_rivals, "changed_image", lambda image, changes, index: image)
    code, out, _ = run(capsys, *TINY, "--cases", "augmented,plain", "--out", tmp_path)
    assert code == 1
    assert "augmented, DataLoader: the batches differ" in out
    rows = read_records(tmp_path / "input.csv")
    assert [(row.case["case"], row.provider, row.status) for row in rows] == [
        ("augmented", "DataLoader", "refused"),
        ("plain", OURS, "ok"),
        ("plain", "DataLoader", "ok"),
    ]


def test_a_case_whose_rival_is_not_installed_is_left_out(monkeypatch, capsys, tmp_path):
    monkeypatch.delattr(profile_input.cv2, "optflow")
    code, out, _ = run(capsys, *TINY, "--cases", "frames", "--out", tmp_path)
    assert code == 1  # nothing was measured
    assert "skipped: this OpenCV has no DualTVL1" in out
    assert {row.status for row in read_records(tmp_path / "input.csv")} == {"skipped"}


def test_the_share_of_waiting_is_measured_over_several_steps(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(profile_input, "PROVIDERS", {OURS: None})
    sizes = ("--samples", 4, "--batch", 2, "--steps", 1, "--rounds", 2)
    code, _, _ = run(capsys, "input", *sizes, "--cases", "plain", "--train-step", "--out", tmp_path)
    assert code == 0
    (row,) = read_records(tmp_path / "input.csv")
    assert row.figures["waiting_n"] == 2
    assert 0 < row.figures["waiting_share"] <= row.figures["waiting_most"] < 1


def test_pictures_are_no_input_of_the_network(monkeypatch, capsys, tmp_path):
    """They have no training step that could wait."""
    monkeypatch.setattr(profile_input, "PROVIDERS", {OURS: None})
    code, _, _ = run(capsys, *TINY, "--cases", "pictures", "--train-step", "--out", tmp_path)
    assert code == 0
    (row,) = read_records(tmp_path / "input.csv")
    assert (row.n, row.figures["waiting_share"]) == (2, None)


@pytest.mark.slow
def test_worker_processes_make_the_same_batches_and_end_quietly(capfd):
    code, out, err = run(capfd, *TINY, "--cases", "augmented", "--rounds", 1)
    assert code == 0, err
    assert list(PROVIDERS)[2] in out
    assert "terminate" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cases", "fine"), "--cases fine: known are plain, augmented, streamed, pictures, frames, own-flow"),
        (("--train-step", "--size", 32), "--train-step: the network takes mosaics of a multiple of 28 pixels"),
        (("--size", 3), "--size 3: must be at least 4"),
        (("--samples", 0), "--samples must be positive, got 0"),
        (("--rounds", 0), "--rounds must be positive, got 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, arguments, message):
    code, _, err = run(capsys, "input", *arguments)
    assert code == 2
    assert err.startswith(f"htnet profile: {message}")
    assert err.count("\n") == 1


def test_a_dry_run_lists_the_cases(capsys, monkeypatch):
    monkeypatch.setattr(profile_input, "_measure", lambda *_: pytest.fail("measured"))
    code, out, _ = run(capsys, "input", "--dry-run")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == list(CASES)


def test_nothing_is_begun_after_the_time_allowed(capsys, tmp_path):
    code, _, _ = run(capsys, *TINY, "--cases", "plain,streamed", "--time-limit", 1e-6, "--out", tmp_path)
    assert code == 1
    rows = read_records(tmp_path / "input.csv")
    assert [row.provider for row in rows] == [*PROVIDERS, *PROVIDERS]
    assert {(row.status, row.reason) for row in rows} == {("skipped", OVER)}
