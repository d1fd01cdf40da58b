"""Guarantees of the engines to a fold: the same bits from both, true Adam, exact resumption, no side effects."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from htnet.config import EngineConfig, HTNetConfig, TrainConfig
from htnet.errors import InputError
from htnet.model import HTNet
from htnet.training.deepspeed_engine import deepspeed_config
from htnet.training.engine import Engine, create_engine, resolve_device
from htnet.training.loss import class_weights, cross_entropy
from htnet.training.master_adam import MasterAdam
from htnet.training.optimizers import build_optimizer
from htnet.training.precision import clip_gradients
from htnet.training.schedule import learning_rate
from htnet.training.world import ALONE

pytestmark = pytest.mark.usefixtures("process_settings")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ENGINES = ["deepspeed", "torch"]
TINY = HTNetConfig(dim=8, heads=2, depths=(1, 1, 1))
WITH_DROPOUT = HTNetConfig(dim=8, heads=2, depths=(1, 1, 1), dropout=0.3)
PAPER = TrainConfig(optimizer="adam", learning_rate=5e-5, weight_decay=0.0)


def batches(count: int, device: str, size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size - step % 2, 3, 28, 28, generator=generator).to(device),  # the last batch may be short
            torch.randint(3, (size - step % 2,), generator=generator).to(device),
        )
        for step in range(count)
    ]


def make_engine(
    name: str = "torch", *, train=PAPER, precision="fp32", device="cpu", model=TINY, weights=None, seed=0
) -> Engine:
    torch.manual_seed(seed)
    config = EngineConfig(name=name, precision=precision)
    return create_engine(HTNet(model), train, config, device=torch.device(device), weights=weights)


def run_steps(engine: Engine, data, rate: float = 1e-3) -> list[float]:
    return [engine.train_step(images, labels, rate).item() for images, labels in data]


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in engine.model.state_dict().items()}


def assert_equal_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


VARIANTS = {
    "paper": (PAPER, None),
    "adamw": (TrainConfig(weight_decay=0.1), None),
    "clipped": (TrainConfig(clip_norm=0.05), None),
    "weighted": (TrainConfig(), (0.2, 1.7, 3.0)),
    "smoothed": (TrainConfig(label_smoothing=0.1), None),
    "all": (TrainConfig(optimizer="adam", weight_decay=0.1, clip_norm=0.5, label_smoothing=0.2), (0.5, 1.0, 2.0)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_and_plain_torch_give_the_same_bits(variant, precision, device):
    train, weights = VARIANTS[variant]
    data = batches(5, device)
    results = []
    for name in ENGINES:
        engine = make_engine(
            name,
            train=train,
            precision=precision,
            device=device,
            model=WITH_DROPOUT,
            weights=None if weights is None else torch.tensor(weights),
        )
        torch.manual_seed(42)
        losses = run_steps(engine, data)
        results.append((losses, weights_of(engine), engine.logits(data[0][0])))
        engine.close()
    (losses, left, logits), (other_losses, right, other_logits) = results
    assert losses == other_losses
    assert len(set(losses)) == 5
    assert_equal_weights(left, right)
    assert torch.equal(logits, other_logits)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENGINES)
def test_half_precision_trains_on_a_gpu_and_its_scaler_resumes(name, tmp_path):
    data = batches(6, "cuda")
    engine = make_engine(name, precision="fp16", device="cuda")
    run_steps(engine, data[:3])
    engine.save(tmp_path)()
    assert torch.load(tmp_path / "engine.pt", weights_only=True)["scaler"]["scale"] > 0
    losses = run_steps(engine, data[3:])
    other = make_engine(name, precision="fp16", device="cuda", seed=9)
    other.load(tmp_path)
    assert run_steps(other, data[3:]) == losses
    assert_equal_weights(weights_of(engine), weights_of(other))


@pytest.mark.parametrize("device", DEVICES)
def test_the_papers_optimizer_is_adam_without_decay(device):
    torch.manual_seed(0)
    ours, plain = (HTNet(TINY).to(device) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    fused = build_optimizer(ours, PAPER, "fp32")
    reference = torch.optim.Adam(plain.parameters(), lr=5e-5, weight_decay=0.0, fused=False, foreach=False)
    for _ in range(5):
        for left, right in zip(ours.parameters(), plain.parameters(), strict=True):
            if left.requires_grad:
                left.grad = torch.randn_like(left)
                right.grad = left.grad.clone()
        fused.step()
        reference.step()
    for left, right in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ENGINES)
def test_the_papers_training_is_that_of_a_plain_loop(name):
    data = batches(5, "cpu")
    engine = make_engine(name)
    torch.manual_seed(0)
    model = HTNet(TINY)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5, fused=False, foreach=False)
    for images, labels in data:
        loss = F.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert engine.train_step(images, labels, 5e-5).item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(engine.logits(data[0][0]), model.eval()(data[0][0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_without_weight_decay_no_weight_decays(optimizer):
    groups = build_optimizer(HTNet(TINY), TrainConfig(optimizer=optimizer), "fp32").param_groups
    assert [group["weight_decay"] for group in groups] == [0.0]
    trained = [parameter for parameter in HTNet(TINY).parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_weight_decay_reaches_the_matrices_and_nothing_else(optimizer):
    model = HTNet(TINY)
    built = build_optimizer(
        model, TrainConfig(optimizer=optimizer, weight_decay=0.3, eps=1e-7, betas=(0.8, 0.9)), "fp32"
    )
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {name for name in trained if name.endswith(("weight", "value")) and "norm" not in name}
    for name, parameter in trained.items():
        assert decay.pop(id(parameter)) == (0.3 if name in matrices else 0.0), name
    assert not decay
    assert all((group["eps"], group["betas"]) == (1e-7, (0.8, 0.9)) for group in built.param_groups)
    # decoupled decay shrinks the weights by the rate even where the gradient is zero
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in built.param_groups:
        group["lr"] = 0.1
    built.step()
    for name, parameter in model.named_parameters():
        shrinks = optimizer == "adamw" and name in matrices
        assert (not torch.equal(parameter, before[name])) == shrinks or optimizer == "adam", name
        if shrinks:
            torch.testing.assert_close(parameter.detach(), before[name] * 0.97)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(["constant", "cosine"]),
    epochs=st.integers(1, 12),
    steps=st.integers(1, 9),
    share=st.floats(0, 1),
    peak=st.floats(1e-6, 1.0),
)
def test_the_learning_rate_follows_its_schedule(schedule, epochs, steps, share, peak):
    """The learning rate rises to its peak and then stays or falls to zero."""
    warmup = share * epochs
    train = TrainConfig(schedule=schedule, epochs=epochs, warmup_epochs=warmup, learning_rate=peak)
    rates = [learning_rate(train, step, steps) for step in range(epochs * steps)]
    rising = min(round(warmup * steps), len(rates))
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    for step in range(rising):
        assert rates[step] == pytest.approx(peak * (step + 1) / round(warmup * steps))
    rest = rates[rising:]
    if rest:
        assert rest[0] == pytest.approx(peak)
    if schedule == "constant":
        assert set(rest) <= {peak}
    else:
        assert all(later <= earlier for earlier, later in pairwise(rest))
    if schedule == "cosine" and rest:
        assert learning_rate(train, epochs * steps, steps) == pytest.approx(0.0, abs=1e-9 * peak)


def test_the_engine_steps_at_the_rate_it_is_given():
    data = batches(1, "cpu")
    moved = []
    for rate in (1e-3, 2e-3):
        engine = make_engine("deepspeed")
        before = weights_of(engine)["head.weight"]
        run_steps(engine, data, rate)
        moved.append((weights_of(engine)["head.weight"] - before).abs().mean())
    # the first step of Adam is the rate times the sign of the gradient
    assert moved[0] == pytest.approx(1e-3, rel=0.01)
    assert moved[1] == pytest.approx(2e-3, rel=0.01)


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_balanced_weights_give_every_class_the_same_say(labels):
    """Balanced weights give every class that is there the same say."""
    weights = class_weights(torch.tensor(labels), 3)
    assert weights.dtype == torch.float32
    for label in range(3):
        count = labels.count(label)
        wanted = len(labels) / (3 * count) if count else 0.0
        assert weights[label].item() == pytest.approx(wanted)


def test_the_loss_is_torchs_in_fp32_whatever_the_logits_are():
    logits, labels = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 2])
    weights = torch.tensor([0.5, 1.0, 2.0])
    loss = cross_entropy(logits, labels, weights, 0.1)
    assert loss.dtype == torch.float32
    assert loss == nn.CrossEntropyLoss(weight=weights, label_smoothing=0.1)(logits.float(), labels)


@pytest.mark.parametrize("limit", [0.01, 1.0, 1e3])
def test_clipping_shortens_only_long_gradients(limit):
    """Clipping shortens a long gradient and leaves a short one as it is."""
    parameters = [nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    gradients = [torch.randn(4, 5), torch.randn(3)]
    for parameter, gradient in zip(parameters, gradients, strict=False):  # the last one took no part
        parameter.grad = gradient.clone()
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    clip_gradients(parameters, limit)
    for parameter, gradient in zip(parameters, gradients, strict=False):
        torch.testing.assert_close(parameter.grad, gradient * min(1.0, limit / norm))
    assert parameters[2].grad is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_engine_goes_on_bit_for_bit(name, precision, device, tmp_path):
    """The state is that of the moment of saving, though it is written when training has gone on."""
    train = TrainConfig(weight_decay=0.05, clip_norm=1.0)
    data = batches(7, device)

    def random_state():
        return torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None

    engine = make_engine(name, train=train, precision=precision, device=device, model=WITH_DROPOUT)
    run_steps(engine, data[:3])
    write, (cpu, cuda) = engine.save(tmp_path), random_state()
    losses = run_steps(engine, data[3:])
    write()

    other = make_engine(name, train=train, precision=precision, device=device, model=WITH_DROPOUT, seed=77)
    other.load(tmp_path)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    assert run_steps(other, data[3:]) == losses
    assert_equal_weights(weights_of(engine), weights_of(other))
    assert torch.equal(engine.logits(data[0][0]), other.logits(data[0][0]))


def test_a_checkpoint_of_one_engine_is_good_for_the_other(tmp_path):
    data = batches(5, "cpu")
    source = make_engine("deepspeed")
    run_steps(source, data[:3])
    target = make_engine("torch", seed=5)
    source.save(tmp_path)()
    target.load(tmp_path)
    assert run_steps(target, data[3:]) == run_steps(source, data[3:])


def test_deepspeed_does_not_measure_each_step():
    """Its timers would wait for the device twice a step."""
    from deepspeed.runtime.config import DeepSpeedConfig

    timers = DeepSpeedConfig(deepspeed_config(PAPER, "fp32", ALONE)).timers_config
    assert not timers.enabled


def test_an_engine_sets_its_process_to_determinism():
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = True
    make_engine("torch")
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()  # on a CPU
    assert not torch.backends.cudnn.allow_tf32
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [28, 56])
def test_training_on_a_gpu_is_deterministic_in_strict_mode(size):
    """Level changes of 4x4 and 2x2 maps, and of 8x8 ones: an operation without a deterministic form would raise."""
    data = [(torch.nn.functional.interpolate(images, size), labels) for images, labels in batches(3, "cuda")]
    model = HTNetConfig(image_size=size, dim=8, heads=2, depths=(1, 1, 1), dropout=0.3, attention_backend="sdpa")
    results = []
    for _ in range(2):
        engine = make_engine("torch", device="cuda", model=model)
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        torch.manual_seed(1)
        results.append((run_steps(engine, data), weights_of(engine)))
    assert results[0][0] == results[1][0]
    assert_equal_weights(results[0][1], results[1][1])


def test_half_precision_on_a_cpu_is_refused():
    with pytest.raises(InputError, match=r"engine\.precision=fp16 needs a GPU"):
        resolve_device(EngineConfig(precision="fp16"), 0)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        EngineConfig(precision="fp16", device="cpu")


@pytest.mark.parametrize("engine", [EngineConfig(), EngineConfig(device="cpu")])
def test_a_fold_without_a_share_of_a_gpu_runs_on_the_cpu(engine):
    assert resolve_device(engine, 0) == torch.device("cpu")
    assert resolve_device(EngineConfig(device="cpu"), 1) == torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_engines_in_one_process_do_not_touch_each_other(precision):
    data = batches(4, "cpu")
    alone = make_engine("deepspeed", precision=precision)
    losses, weights = run_steps(alone, data), weights_of(alone)
    alone.close()

    first = make_engine("deepspeed", precision=precision)
    second = make_engine("deepspeed", precision=precision, seed=1)
    interleaved = []
    for batch in data:
        interleaved += run_steps(first, [batch])
        run_steps(second, [batch])
    second.close()
    assert interleaved == losses
    assert_equal_weights(weights_of(first), weights)


def test_an_fp32_engine_after_a_bf16_one_computes_in_fp32():
    data = batches(3, "cpu")
    plain = make_engine("torch")
    losses = run_steps(plain, data)
    for close in (True, False):
        before = make_engine("deepspeed", precision="bf16")
        run_steps(before, data)
        if close:
            before.close()
        assert run_steps(make_engine("deepspeed"), data) == losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_fp32_and_free_of_dropout_and_gradient(name, precision, device):
    engine = make_engine(name, precision=precision, device=device, model=WITH_DROPOUT)
    images = batches(1, device)[0][0]
    before = torch.get_rng_state()
    first, second = engine.logits(images), engine.logits(images)
    assert first.dtype == torch.float32
    assert first.shape == (6, 3)
    assert not first.requires_grad
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    # looking at the logits does not change the training that follows
    torch.manual_seed(3)
    looked = run_steps(engine, batches(2, device))
    engine = make_engine(name, precision=precision, device=device, model=WITH_DROPOUT)
    torch.manual_seed(3)
    assert run_steps(engine, batches(2, device)) == looked


_PROBE = """
import json, os, socket
from pathlib import Path
import torch
import torch.distributed as dist
from test_htnet_engine import batches, make_engine, run_steps
from htnet.config import TrainConfig

for precision in ("fp32", "bf16"):
    if precision == "bf16":
        engine.close()
    engine = make_engine("deepspeed", precision=precision, train=TrainConfig(clip_norm=1.0))
    run_steps(engine, batches(2, "cpu"))
other = make_engine("deepspeed")
engine.close()
joined = [dist.is_initialized()]  # the other engine is in use
links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
mine = {os.readlink(link) for link in links if os.path.islink(link)}
ports = []
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
            ports.append(int(fields[1].rpartition(":")[2], 16))
other.close()
joined.append(dist.is_initialized())
built = [str(path) for path in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*")]
print(json.dumps({"ports": ports, "built": built, "joined": joined}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_deepspeed_compiles_nothing_and_leaves_nothing(tmp_path):
    compilers = tmp_path / "bin"
    compilers.mkdir()
    for name in ("c++", "g++", "gcc", "cc", "clang", "nvcc", "ninja"):
        (compilers / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/compiled\nexit 1\n")
        (compilers / name).chmod(0o755)
    (tmp_path / "extensions").mkdir()
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "PATH": f"{compilers}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["built"] == []
    assert found["joined"] == [True, False]  # the process group goes with the last engine
    assert not (tmp_path / "compiled").exists()
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    # gloo opens sockets of its own choice; a number fixed by us would make a second fold fail
    assert all(low <= port <= high for port in found["ports"])


@pytest.mark.parametrize("decoupled", [False, True])
def test_masters_follow_the_adam_of_torch(decoupled):
    """Masters follow torch's Adam, and the weights are their rounding."""
    torch.manual_seed(0)
    start = torch.randn(3, 50)
    exact, rounded = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = kind([{"params": [exact], "weight_decay": 0.1}], lr=0.01)
    ours = MasterAdam(
        [{"params": [rounded], "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.999), eps=1e-8, decoupled=decoupled
    )
    ours.narrow(torch.bfloat16)
    for _ in range(5):
        rounded.grad = torch.randn(3, 50).bfloat16()
        exact.grad = rounded.grad.float()
        theirs.step()
        ours.step()
    torch.testing.assert_close(ours.state[rounded]["master"], exact.data, rtol=1e-6, atol=1e-7)
    assert torch.equal(rounded.data, ours.state[rounded]["master"].bfloat16())


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_step_of_all_parameters_is_the_one_of_each_alone(decoupled):
    """A group is updated in one call, whatever the layout of a gradient and whoever got none."""

    def trained(together):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7,), (5, 3), (2, 65), (4,))]
        kept = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:]}]
        alone = [[{**group, "params": [weight]}] for group in kept for weight in group["params"]]
        options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "decoupled": decoupled}
        optimizers = [MasterAdam(groups, **options) for groups in ([kept] if together else alone)]
        for optimizer in optimizers:
            optimizer.narrow(torch.bfloat16)
        for _ in range(4):
            for weight in weights[:3]:
                weight.grad = torch.randn(weight.shape[::-1]).bfloat16().t()  # another layout than the weight's
            for optimizer in optimizers:
                optimizer.step()
        return weights

    for left, right in zip(trained(True), trained(False), strict=True):
        assert torch.equal(left, right)


def test_masters_are_clipped_by_the_norm_of_all_their_gradients():
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2, 2))]
    groups = [{"params": [weight]} for weight in weights]
    optimizer = MasterAdam(groups, lr=1.0, betas=(0.0, 0.0), eps=1e8, decoupled=False, clip_norm=0.5)
    optimizer.narrow(torch.bfloat16)
    for weight in weights:
        weight.grad = torch.full(weight.shape, 2.0, dtype=torch.bfloat16)
    optimizer.step()
    # with such an eps a step is -gradient / eps; the norm was 2 * sqrt(7)
    for weight in weights:
        wanted = torch.full(weight.shape, -0.5 / math.sqrt(7) / 1e8)
        torch.testing.assert_close(optimizer.state[weight]["master"], wanted, rtol=1e-4, atol=0)


def test_a_gradient_that_is_no_number_spoils_its_weight():
    """A gradient that is no number leaves a weight that is no number."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = MasterAdam([weight], lr=1e-4, betas=(0.9, 0.999), eps=1e-8, decoupled=False)
    optimizer.narrow(torch.bfloat16)
    weight.grad = torch.tensor([0x7FFF, 0x7F80, 0], dtype=torch.int16).view(torch.bfloat16)  # a NaN of all ones, inf, 0
    optimizer.step()
    assert weight.isnan().tolist() == [True, True, False]


def test_small_steps_are_not_lost_to_narrow_weights():
    """Masters are finer than the weights, so small steps are not lost."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = MasterAdam([weight], lr=1e-4, betas=(0.9, 0.999), eps=1e-8, decoupled=False)
    optimizer.narrow(torch.bfloat16)
    for _ in range(100):
        weight.grad = torch.ones(4, dtype=torch.bfloat16)
        optimizer.step()
    torch.testing.assert_close(weight.data.float(), torch.full((4,), 0.99), rtol=5e-3, atol=0)
    assert weight.data[0] < 1  # a step of 1e-4 is less than half a unit in the last place of bf16 at 1
