"""Folds in slots: a training is what it is alone, whatever runs beside it or ran before it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from htnet.config import EngineConfig, HTNetConfig, TrainConfig
from htnet.errors import NonFiniteLossError
from htnet.model import HTNet
from htnet.training.engine import create_engine
from htnet.training.loss import cross_entropy, padded_cross_entropy
from htnet.training.slots import Slot
from htnet.training.snapshot import Snapshots
from htnet.training.trainer import Trainer, Watched

pytestmark = pytest.mark.usefixtures("process_settings")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH, LAST, FILLED = 6, 3, 4
EPOCHS = 5
TINY = HTNetConfig(dim=8, heads=2, depths=(1, 1, 1))


@dataclass
class Noise:
    """Two batches an epoch of random samples, in an order that depends on seed and epoch; the last is filled up."""

    seed: int
    device: torch.device
    broken: bool = False
    epoch: int = 0
    steps_per_epoch: int = 2
    shape = "noise"

    def tables(self, epoch):
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        images = torch.randn(BATCH + FILLED, 3, 28, 28, generator=generator)
        if self.broken and epoch == 2:
            images[0] = torch.nan
        real = torch.ones(BATCH + FILLED)
        real[BATCH + LAST :] = 0.0
        labels = torch.randint(3, (BATCH + FILLED,), generator=generator)
        return {"images": images, "labels": labels, "real": real}

    def next_tables(self):
        self.epoch += 1
        return self.tables(self.epoch - 1)

    def batch(self, tables, step):
        own = slice(0, BATCH) if step == 0 else slice(BATCH, None)
        return tables["images"][own], tables["labels"][own], tables["real"][own]

    def state(self):
        return str(self.epoch).encode()


def make_slots(count, device, *, precision="fp32", train=None):
    train = train or TrainConfig(epochs=EPOCHS, batch_size=BATCH)
    config = EngineConfig(name="graphs", precision=precision)
    return [Slot(create_engine(HTNet(TINY), train, config, device=torch.device(device))) for _ in range(count)]


def begin(slot, seed, *, epochs=EPOCHS, snapshot=None, **options):
    """Put the training of a seed into a slot."""
    device = slot.engine.device
    source = Noise(seed, device, epoch=0 if snapshot is None else int(snapshot.source), **options)
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(9)).to(device)
    slot.engine.prepare(source, images)
    torch.manual_seed(seed)
    slot.engine.restart(HTNet(TINY).to(device), None)
    watched = {"test": Watched(images=images[:3], names=("a", "b", "c"))}
    trainer = Trainer(slot.engine, source, TrainConfig(epochs=epochs, batch_size=BATCH), watched=watched)
    if snapshot is not None:
        snapshot.restore(trainer)
    slot.take(trainer, source, images)
    return trainer


def run(*slots):
    while not all(slot.finished for slot in slots):
        for slot in slots:
            slot.advance()


def results_of(trainer):
    weights = {name: value.clone().cpu() for name, value in trainer.engine.model.state_dict().items()}
    return trainer.train_loss, trainer.predictions, trainer.outputs["test"].tolist(), weights


def assert_same(left, right):
    assert left[:3] == right[:3]
    assert all(torch.equal(value, right[3][name]) for name, value in left[3].items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_neither_slot_nor_neighbours_change_a_training(precision, device):
    [alone] = make_slots(1, device, precision=precision)
    trainer = begin(alone, 7)
    run(alone)
    expected = results_of(trainer)
    assert len(set(expected[0])) == EPOCHS

    slots = make_slots(8, device, precision=precision)
    trainers = [begin(slot, 7 if number == 3 else number) for number, slot in enumerate(slots)]
    run(*slots)
    assert_same(results_of(trainers[3]), expected)

    trainer = begin(slots[5], 7)  # after another training
    run(slots[5])
    assert_same(results_of(trainer), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_training_goes_on_in_any_slot(precision, device, tmp_path):
    first, second = make_slots(2, device, precision=precision)
    trainer = begin(first, 7)
    run(first)
    expected = results_of(trainer)

    trainer = begin(first, 7, epochs=2)
    run(first)
    snapshots = Snapshots(tmp_path / "place", identity="x", minutes=1)
    snapshots.save(trainer)
    snapshots.wait()
    begin(second, 1)
    run(second)
    found = snapshots.newest([])
    snapshots.close()
    assert found is not None
    trainer = begin(second, 7, snapshot=found)
    assert trainer.epoch == 2
    run(second)
    assert_same(results_of(trainer), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_that_fails_frees_its_slot(device):
    good, bad = make_slots(2, device)
    trainer = begin(good, 7)
    run(good)
    expected = results_of(trainer)

    trainer = begin(good, 7)
    begin(bad, 3, broken=True)
    with pytest.raises(NonFiniteLossError, match="epoch 3 of 5, step 1 of 2"):
        run(bad)
    bad.leave()
    run(good)
    assert_same(results_of(trainer), expected)
    trainer = begin(bad, 7)
    run(bad)
    assert_same(results_of(trainer), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "train",
    [
        TrainConfig(epochs=EPOCHS, batch_size=BATCH, optimizer="adam", learning_rate=1e-4),
        TrainConfig(epochs=EPOCHS, batch_size=BATCH, weight_decay=0.1, clip_norm=0.3, label_smoothing=0.1),
    ],
    ids=["paper", "decayed-clipped-smoothed"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_slots_follow_the_plain_engine(train, precision, device):
    [slot] = make_slots(1, device, precision=precision, train=train)
    torch.manual_seed(7)
    plain = create_engine(
        HTNet(TINY), train, EngineConfig(name="torch", precision=precision), device=slot.engine.device
    )
    source = Noise(7, slot.engine.device)
    losses = []
    for epoch in range(EPOCHS):
        tables = {name: table.to(slot.engine.device) for name, table in source.tables(epoch).items()}
        for step, count in enumerate((BATCH, LAST)):
            images, labels, _ = source.batch(tables, step)
            losses.append(plain.train_step(images[:count], labels[:count], train.learning_rate).item())
    trainer = begin(slot, 7)
    trainer.train = train
    run(slot)
    wanted = [sum(losses[start : start + 2]) / 2 for start in range(0, len(losses), 2)]
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    torch.testing.assert_close(torch.tensor(trainer.train_loss), torch.tensor(wanted), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0])], ids=["even", "weighted"])
@pytest.mark.parametrize("shares", [False, True], ids=["classes", "shares"])
def test_rows_that_fill_a_batch_up_count_nothing(weights, shares):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=generator, requires_grad=True)
    labels = torch.rand(7, 3, generator=generator) if shares else torch.tensor([0, 2, 1, 1, 0, 2, 2])
    real = torch.tensor([1.0, 1, 1, 1, 1, 0, 0])
    loss = padded_cross_entropy(logits, labels, weights, 0.1, real)
    torch.testing.assert_close(loss, cross_entropy(logits[:5], labels[:5], weights, 0.1))
    loss.backward()
    assert logits.grad[5:].eq(0).all()
    assert logits.grad[:5].ne(0).all()
