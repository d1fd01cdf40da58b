"""Guarantees of the rules that join sections: each names key, value and rule, and takes what is right."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from conftest import random_samples

from htnet.config import Config, DataConfig, EngineConfig, HTNetConfig, PrepareConfig, ResourcesConfig
from htnet.config.augment import AugmentConfig, JitterConfig, MixConfig, RotateConfig, TimeJitterConfig
from htnet.config.section import takes_gpu
from htnet.data.store.writer import write_store
from htnet.errors import InputError
from htnet.rules import check_fold_device, check_gpu, check_samples, check_task_device
from launch.commands.sweep import check_folds

JITTER = AugmentConfig(time_jitter=TimeJitterConfig(frames=1))
TURNED = AugmentConfig(rotate=RotateConfig(degrees=5.0))
PUBLISHED = {"sources": [{"adapter": "htnet_release", "flow": {"scaling": "min-max per channel to 0..255"}}]}
FLOW = {"flow": {"size": 28, "working_size": 64, "strain": "central"}}


def with_frames(item):
    return replace(item, frames=(("onset.jpg", b"1"), ("apex.jpg", b"2")))


@pytest.fixture
def store(tmp_path, request):
    """A store of two subjects a dataset, made as its parameter says: of pictures, of flow, with frames or without."""
    recipe, change = request.param
    return write_store(tmp_path / "store", map(change, random_samples(subjects=2)), recipe)


@pytest.mark.parametrize(
    ("store", "config", "key", "value", "rule"),
    [
        (({}, lambda item: item), Config(model=HTNetConfig(in_channels=2)), "model.in_channels", "2", "has 3 channels"),
        (({}, lambda item: item), Config(model=HTNetConfig(num_classes=2)), "model.num_classes", "2", "has label 2"),
        (
            ({}, lambda item: item),
            Config(data=DataConfig(input="frames")),
            "data.input",
            "frames",
            "htnet prepare made",
        ),
        ((FLOW, lambda item: item), Config(data=DataConfig(input="frames")), "data.input", "frames", "keep_frames"),
        (
            (FLOW, with_frames),
            Config(data=DataConfig(input="frames", augment=JITTER)),
            *("data.augment.time_jitter.frames", "1", "needs prepare.keep_neighbours of at least 1"),
        ),
        (
            (PUBLISHED, lambda item: item),
            Config(data=DataConfig(augment=TURNED)),
            *("data.augment.rotate.degrees", "5", "no angle turns them"),
        ),
    ],
    indirect=["store"],
)
def test_a_rule_of_a_store_names_key_value_and_rule(store, config, key, value, rule):
    """The rule is that of the samples which are used: none are, and nothing is refused but the network's channels."""
    rows = range(len(store.rows))
    with pytest.raises(InputError) as caught:
        check_samples(config, store, rows)
    for part in (key, value, rule):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    check_samples(Config(), store, rows)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize("gpus", [0.0, 0.25, 1.0, 2.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_fold_has_one_device_that_takes_its_precision(device, gpus, precision):
    """A fold is refused where it asks for more than a device, for one it has no share of, for halves on a CPU."""
    if device == "cpu" and precision == "fp16":
        return  # no such section: htnet.config refuses it
    config = Config(
        engine=EngineConfig(device=device, precision=precision), resources=ResourcesConfig(gpus_per_fold=gpus)
    )
    reasons = {
        "resources.gpus_per_fold=2: a fold trains on one device": gpus > 1,
        "engine.device=cuda needs resources.gpus_per_fold > 0": device == "cuda" and gpus == 0,
        "engine.precision=fp16 needs a GPU: set resources.gpus_per_fold": precision == "fp16" and gpus == 0,
    }
    said = next((text for text, holds in reasons.items() if holds), None)
    if said is None:
        check_fold_device(config)
    else:
        with pytest.raises(InputError, match=re.escape(said)):
            check_fold_device(config)


def test_a_task_on_a_gpu_has_a_share_of_one():
    with pytest.raises(InputError, match=r"prepare\.device=cuda needs prepare\.gpus_per_task > 0 .*k tasks on a GPU"):
        check_task_device(PrepareConfig(device="cuda"))
    for prepare in (PrepareConfig(device="cuda", gpus_per_task=0.5), PrepareConfig(gpus_per_task=1.0), PrepareConfig()):
        check_task_device(prepare)


def test_a_machine_without_a_gpu_is_refused_with_a_way_out():
    check_gpu("engine.device=cuda", visible=True, instead="engine.device=cpu")
    said = "engine.device=cuda: no CUDA device is visible; set engine.device=cpu to run on the CPU"
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        check_gpu("engine.device=cuda", visible=False, instead="engine.device=cpu")


def test_auto_takes_the_gpu_that_it_was_given():
    assert [takes_gpu(device, gpus) for device in ("auto", "cpu", "cuda") for gpus in (0.0, 0.5)] == [
        *(False, True),
        *(False, False),
        *(True, True),
    ]


def test_what_is_changed_together_has_one_flow_size(tmp_path):
    """Samples of two flow sizes train together as they are; a sweep that changes them is refused before any fold."""
    samples = [*random_samples(datasets=("casme2",)), *random_samples(datasets=("samm",), flow_size=64)]
    mixed = write_store(tmp_path / "store", iter(samples), {})
    data = DataConfig(augment=AugmentConfig(jitter=JitterConfig(shift=0.1)))
    said = "data.augment needs flow images of one size: casme2/sub02/EP02 has 28, samm/sub02/EP02 has 64"
    with pytest.raises(InputError, match=re.escape(said)):
        check_folds(Config(data=data), mixed)
    check_folds(Config(data=replace(data, datasets=("samm",))), mixed)
    check_folds(Config(data=DataConfig(augment=AugmentConfig(mix=MixConfig(kind="mixup")))), mixed)
