"""The training loop and its snapshots, without folds, stores and Ray."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch

from htnet.config import EngineConfig, HTNetConfig, TrainConfig
from htnet.errors import NonFiniteLossError
from htnet.model import HTNet
from htnet.training import snapshot
from htnet.training.batch import Batch
from htnet.training.engine import create_engine
from htnet.training.snapshot import Snapshots
from htnet.training.trainer import Trainer, Watched

pytestmark = pytest.mark.usefixtures("process_settings")

CPU = torch.device("cpu")
STEPS = 3


@dataclass
class Noise:
    """A source of random batches, each a function of seed and step."""

    seed: int
    step: int = 0
    steps_per_epoch: int = STEPS

    def next(self) -> Batch:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.step)
        self.step += 1
        return Batch(
            images=torch.randn(4, 3, 28, 28, generator=generator),
            labels=torch.randint(3, (4,), generator=generator),
            rows=torch.arange(4),
        )

    def state(self) -> bytes:
        return str(self.step).encode()


def make_trainer(seed: int = 0, step: int = 0, *, epochs: int = 4, dropout: float = 0.0, **options) -> Trainer:
    torch.manual_seed(seed)
    train = TrainConfig(epochs=epochs, batch_size=4, learning_rate=options.pop("learning_rate", 1e-3))
    model = HTNet(HTNetConfig(dim=8, heads=2, depths=(1, 1, 1), dropout=dropout))
    engine = create_engine(model, train, EngineConfig(name="torch"), device=CPU)
    images = torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(9))
    watched = {"test": Watched(images=images, names=tuple(f"sample {number}" for number in range(6)))}
    return Trainer(engine, Noise(seed, step), train, watched=watched, **options)


def results_of(trainer: Trainer) -> tuple:
    return trainer.train_loss, trainer.predictions, trainer.logits(trainer.watched["test"].images).tolist()


def test_a_trainer_notes_every_epoch_and_tells_its_hook():
    seen = []
    trainer = make_trainer(after_epoch=lambda trainer: seen.append((trainer.epoch, len(trainer.train_loss))))
    trainer.run()
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert trainer.finished
    assert trainer.source.step == 4 * STEPS
    assert [len(epoch) for epoch in trainer.predictions["test"]] == [6] * 4
    _, _, logits = results_of(trainer)
    assert torch.tensor(logits).argmax(1).tolist() == trainer.predictions["test"][-1]


def test_trainers_that_take_turns_in_a_process_are_as_alone():
    """Without dropout nothing that they share decides a result."""
    alone = []
    for seed in (1, 2):
        trainer = make_trainer(seed)
        trainer.run()
        alone.append(results_of(trainer))
    turns = [threading.Event() for _ in range(2)]

    def hand_over(number):
        def after_epoch(trainer):
            turns[1 - number].set()
            if not trainer.finished:
                assert turns[number].wait(60)
                turns[number].clear()

        return after_epoch

    def run(number):
        torch.set_num_threads(1)
        assert turns[number].wait(60)
        turns[number].clear()
        trainers[number].run()

    trainers = [make_trainer(seed, after_epoch=hand_over(number)) for number, seed in enumerate((1, 2))]
    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    turns[0].set()
    for thread in threads:
        thread.join()
    assert [results_of(trainer) for trainer in trainers] == alone


def test_a_loss_that_is_not_finite_names_epoch_and_step():
    with pytest.raises(NonFiniteLossError, match=r"^the training loss became (nan|inf) in epoch 1 of 4, step 2 of 3; "):
        make_trainer(learning_rate=1e38).run()


def test_an_output_that_is_not_finite_names_its_sample():
    trainer = make_trainer()
    trainer.watched["test"].images[4, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"^the output for sample 4 is not finite after epoch 1 of 4: "):
        trainer.run()
    assert trainer.epoch == 0
    assert trainer.train_loss == []


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [0.0]
    monkeypatch.setattr(snapshot.time, "monotonic", lambda: now[0])
    return now


def test_snapshots_are_taken_by_time(clock, tmp_path):
    minutes_of_epochs, taken = iter((4, 6, 11, 17)), []

    def after_epoch(trainer):
        clock[0] = 60.0 * next(minutes_of_epochs)
        snapshots.save_when_due(trainer)
        snapshots.wait()
        taken.append(sorted(path.name for path in tmp_path.glob("place/*")))

    snapshots = Snapshots(tmp_path / "place", identity="one", minutes=5)
    make_trainer(after_epoch=after_epoch).run()
    snapshots.close()
    # at 6 and 11 minutes; the last epoch is the end
    assert taken == [[], [str(2 * STEPS)], [str(3 * STEPS)], [str(3 * STEPS)]]


def test_a_snapshot_is_written_beside_the_training(monkeypatch, tmp_path):
    """Training goes on while a thread writes, and the snapshot holds the epoch at which it was taken."""
    undisturbed = make_trainer(dropout=0.2)
    undisturbed.run()
    trained, written, save = threading.Event(), [], torch.save

    def slow_save(content, path):
        assert trained.wait(60)
        written.append(path.name)
        save(content, path)

    def after_epoch(trainer):
        if trainer.epoch == 2:
            snapshots.save_when_due(trainer)
        if trainer.epoch == 4:
            assert written == []
            trained.set()

    monkeypatch.setattr(torch, "save", slow_save)
    snapshots = Snapshots(tmp_path / "place", identity="one", minutes=1e-9)
    make_trainer(dropout=0.2, after_epoch=after_epoch).run()
    snapshots.close()
    assert written == ["engine.pt", "random.pt"]

    found = Snapshots(tmp_path / "place", identity="one", minutes=0).newest([])
    other = make_trainer(7, dropout=0.2)
    other.source = Noise(0, int(found.source))
    found.restore(other)
    assert (other.epoch, len(other.train_loss)) == (2, 2)
    other.run()
    assert results_of(other) == results_of(undisturbed)


def test_two_processes_that_train_the_same_share_a_snapshot(tmp_path):
    """A stalled worker and its successor write the same bits; the slower of the two leaves those that are there."""
    one, other = (Snapshots(tmp_path / "place", identity="one", minutes=1e-9) for _ in range(2))
    for snapshots in (one, other):
        make_trainer(epochs=2, after_epoch=snapshots.save_when_due).run()
        snapshots.wait()
        snapshots.close()
    assert [path.name for path in tmp_path.glob("place/*")] == [str(STEPS)]
    assert one.newest([]).trainer["epoch"] == 1


def test_an_error_of_the_last_writing_spoils_no_training(monkeypatch, tmp_path, caplog):
    snapshots = Snapshots(tmp_path / "place", identity="one", minutes=1e-9)

    def fail(content, path):
        raise OSError("the disk is gone")

    monkeypatch.setattr(torch, "save", fail)
    trainer = make_trainer(epochs=2, after_epoch=snapshots.save_when_due)
    trainer.run()
    snapshots.close()
    assert trainer.finished
    assert "the last snapshot was not written: OSError: the disk is gone" in caplog.text
    assert list(tmp_path.glob("place/*")) == []
