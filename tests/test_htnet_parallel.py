"""Guarantees of a training by several processes: the number of ranks and the ZeRO stage change rounding alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from htnet.config import HTNetConfig, ScaleConfig, TrainConfig
from htnet.model import HTNet

ROOT = Path(__file__).parent.parent
MODEL = HTNetConfig(image_size=16, patch_size=2, dim=6, heads=3, levels=2, depths=(1, 1), mlp_ratio=2)
TRAIN = TrainConfig(batch_size=10, optimizer="adamw", learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0, ema=0.9)
STEPS = 6
CASES = {
    "plain": ("fp32", ScaleConfig()),
    "micro": ("fp32", ScaleConfig(micro_batch=2)),
    "recomputed": ("fp32", ScaleConfig(checkpoint_activations=True)),
    **{f"zero{stage}": ("fp32", ScaleConfig(zero=stage)) for stage in (1, 2, 3)},
    "zero2 micro": ("fp32", ScaleConfig(zero=2, micro_batch=2)),
    "bf16": ("bf16", ScaleConfig()),
    **{f"bf16 zero{stage}": ("bf16", ScaleConfig(zero=stage)) for stage in (1, 3)},
}


def make_data():
    """Batches of 10 and of 7 samples."""
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        size = 7 if step % 3 == 2 else 10
        images = torch.randn(size, 3, 16, 16, generator=generator)
        yield images, torch.randint(0, 3, (size,), generator=generator)


def train_case(name, world, place, *, resume_from=None):
    """Train a case; returns losses, weights of the last step, and averages. ``place`` gets the state after step 3."""
    from htnet.training.parallel_engine import ParallelEngine

    precision, scale = CASES[name]
    torch.manual_seed(0)
    weights = torch.tensor([0.5, 1.0, 2.0])
    options = {"device": torch.device("cpu"), "weights": weights, "world": world}
    engine = ParallelEngine(HTNet(MODEL), TRAIN, scale, precision, **options)
    if resume_from is not None:
        engine.load(resume_from)
    losses = []
    for step, (images, labels) in enumerate(make_data()):
        if resume_from is not None and step < 3:
            continue
        own = slice(world.rank, None, world.ranks)
        losses.append(engine.train_step(images[own], labels[own], 1e-2).item())
        if step == 2 and resume_from is None:
            write = engine.save(place)
            if world.rank == 0:
                place.mkdir(parents=True, exist_ok=True)
                write()
    state = engine._whole(None)
    average = engine.weights()
    engine.close() if world.ranks == 1 else engine._engine.destroy()
    return {"losses": losses, "weights": state, "average": average}


def run_rank(place, rank, ranks):
    """Train all cases, then each again from the states of another number of ranks where they are given."""
    import torch.distributed as dist

    from htnet.training.world import World

    torch.set_num_threads(1)
    place = Path(place)
    world = World(rank=rank, ranks=ranks)
    if ranks > 1:
        store = dist.FileStore(str(place / "meeting"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    results = {}
    for name in CASES:
        state = place / name
        results[name] = train_case(name, world, state)
        dist.barrier() if ranks > 1 else None
        results[f"{name} resumed"] = train_case(name, world, state, resume_from=state)
        other = place.parent / "ranks1" / name
        if other.is_dir() and ranks > 1:
            results[f"{name} moved"] = train_case(name, world, state, resume_from=other)
    if rank == 0:
        torch.save(results, place / "results.pt")
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of one process and of three, which divide no batch evenly, by number and case."""
    folder = tmp_path_factory.mktemp("parallel")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    found = {}
    for ranks in (1, 3):
        place = folder / f"ranks{ranks}"
        place.mkdir()
        command = "import sys; from test_htnet_parallel import run_rank; run_rank(sys.argv[1], *map(int, sys.argv[2:]))"
        started = [
            subprocess.Popen([sys.executable, "-c", command, str(place), str(rank), str(ranks)], env=environment)
            for rank in range(ranks)
        ]
        assert [process.wait(timeout=280) for process in started] == [0] * ranks
        found[ranks] = torch.load(place / "results.pt", weights_only=True)
    return found


def assert_close(one, other, *, rtol, atol):
    for name, value in other.items():
        if not name.endswith("levels.1.pos_emb"):  # its gradient is rounding noise, of which Adam makes whole steps
            torch.testing.assert_close(one[name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_any_ranks_and_stage_train_as_one_process_does(results, case, ranks):
    """The losses of all steps, the weights and their average are those of one process without ZeRO."""
    narrow = case.startswith("bf16")
    expected, found = results[1]["bf16" if narrow else "plain"], results[ranks][case]
    tolerance = {"rtol": 0.02, "atol": 0.02} if narrow else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found["losses"], expected["losses"], **tolerance)
    if not narrow:  # Adam makes steps of full length of the rounding of small gradients
        for key in ("weights", "average"):
            assert_close(found[key], expected[key], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_repeats_every_bit(results, case, ranks):
    whole, resumed = results[ranks][case], results[ranks][f"{case} resumed"]
    assert resumed["losses"] == whole["losses"][3:]
    for key in ("weights", "average"):
        assert resumed[key].keys() == whole[key].keys()
        assert all(torch.equal(value, whole[key][name]) for name, value in resumed[key].items())


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("bf16")])
def test_a_state_of_one_process_goes_on_on_several(results, case):
    whole, moved = results[1][case], results[3][f"{case} moved"]
    torch.testing.assert_close(moved["losses"], whole["losses"][3:], rtol=1e-5, atol=1e-6)
    assert_close(moved["weights"], whole["weights"], rtol=1e-3, atol=2e-4)


def test_a_training_moves_the_weights_and_their_average(results):
    plain = results[1]["plain"]
    assert plain["losses"][-1] != plain["losses"][0]
    assert any(not torch.equal(plain["average"][name], value) for name, value in plain["weights"].items())
    assert plain["average"].keys() == dict(HTNet(MODEL).named_parameters()).keys()
