"""Fixtures that every test file may use."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal

# a thread for each test process: two fight for two cores, and results are compared at one thread anyway
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:  # imported where they are used: tests of the kernels run where the packages for data are absent
    from htnet.config import Config
    from htnet.data.store.reader import Store
    from htnet.data.store.writer import PreparedSample
    from htnet.model import HTNet
    from htnet.model_folder import ModelFacts

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 280.0
"""Seconds for what takes a few on an idle machine: Ray starts slowly where both cores are busy."""
PATHS = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
"""PYTHONPATH of a worker that has to find the test files."""
LONG_FILES = (
    "test_launch_sweep.py",
    "test_launch_train.py",
    "test_launch_prepare.py",
    "test_htnet_parallel.py",
    "test_kernels_compile.py",
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real inputs (``megc2019/``, ``htnet_release/``, ...); skips where it is absent.

    It lies beside the checkout and is not part of the repository; HTNET_SHARED names another place.
    """
    data = Path(os.environ.get("HTNET_SHARED", ROOT.parent / "shared")) / "data"
    if not data.is_dir():
        pytest.skip(f"real data not found at {data}; set HTNET_SHARED to the folder that holds data/")
    return data


@pytest.fixture(scope="module")
def ray():
    """One small Ray for a file, with two GPUs that exist on paper only."""
    ray = importlib.import_module("ray")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        ray.init(
            address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
    yield ray
    ray.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def process_settings() -> Iterator[None]:
    """One thread, for two wait for each other on a busy machine; it and determinism, set by engines, are put back."""
    import torch

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def random_samples(*, datasets=("casme2", "samm", "smic"), subjects=3, flow_size=28) -> Iterator[PreparedSample]:
    """Noise with a bump whose place tells the class; 3 or 4 clips a subject, landmarks that are not whole pixels."""
    from htnet.data.samples import Sample, SampleId
    from htnet.data.store.writer import PreparedSample

    rng = np.random.default_rng(7)
    for dataset in datasets:
        for person in range(subjects):
            for clip in range(3 + person % 2):
                label = (person + clip) % 3
                flow = rng.normal(size=(flow_size, flow_size, 3))
                flow[flow_size // 4 * label :][: flow_size // 4, :, label] += 3.0
                points = rng.uniform(0.2, 0.8, size=(5, 2)) * flow_size
                yield PreparedSample(
                    sample=Sample(
                        id=SampleId(dataset=dataset, subject=f"sub{person:02d}", clip=f"EP{clip:02d}"),
                        label=label,
                        landmarks=tuple(tuple(point) for point in points.astype(np.float32).tolist()),
                        flow_size=flow_size,
                    ),
                    flow_image=flow.astype(np.float16),
                )


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory) -> Store:
    """A store of three datasets with three subjects each: nine folds, thirty clips of 28 pixels. Do not change it."""
    from htnet.data.store.writer import write_store

    return write_store(tmp_path_factory.mktemp("tiny") / "store", random_samples(), {"sources": "random"})


@pytest.fixture(scope="session")
def tiny_config(tiny_store) -> Config:
    """A sweep of the tiny store that takes a fraction of a second a fold, with everything random switched on."""
    from htnet.config import Config, DataConfig, HTNetConfig, ScoreConfig, TrainConfig

    return Config(
        seed=3,
        data=DataConfig(store=str(tiny_store.path)),
        model=HTNetConfig(dim=8, heads=2, depths=(1, 1, 1), dropout=0.2),
        train=TrainConfig(epochs=5, batch_size=16, weight_decay=0.01),
        score=ScoreConfig(bootstrap=20, chance_trials=5),
    )


def small_model(**changes) -> tuple[HTNet, Config, ModelFacts]:
    """Return a small seeded network that nobody trained, its configuration, and facts as a training has them."""
    import torch

    from htnet.config import Config, HTNetConfig
    from htnet.data.transform import FlowTransform
    from htnet.model import HTNet
    from htnet.model_folder import ModelFacts, TrainedOn

    size = changes.get("image_size", 28)
    config = Config(model=HTNetConfig(**{"dim": 6, "depths": (1, 1, 1)} | changes))
    torch.manual_seed(1)
    row = {"uf1": 0.5, "uar": 0.4, "samples": 12, "interval": {"uf1": [0.4, 0.6], "uar": [0.3, 0.5]}}
    facts = ModelFacts(
        classes=("negative", "positive", "surprise"),
        recipe={"flow": {"method": "tvl1", "size": 28, "strain": "central"}},
        transform=FlowTransform(mosaic_size=size, minmax=True, mean=(120.0, 125.0, 40.0), std=(30.0, 35.0, 20.0)),
        crop="anatomical",
        trained_on=TrainedOn(
            stores=("0f",),
            subjects=("casme2/sub01", "smic/s01"),
            samples={"negative": 4, "positive": 3, "surprise": 2},
            motion=(0.1, 0.4),
            fps=(100.0, 200.0),
        ),
        selection="final",
        epoch=3,
        scores={"composite": row},
        versions={"htnet": "0.1.0"},
    )
    return HTNet(config.model), config, facts


def pytest_addoption(parser) -> None:
    parser.addoption("--failures", metavar="FILE", help="add each failure to FILE at once, for a run that may be cut")


class FailureFile:
    """A plugin that writes each failure down at once: pytest prints them at its end, if it reaches that."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"=== {report.nodeid} ({getattr(report, 'when', 'collect')})\n{report.longreprtext}\n")

    def pytest_collectreport(self, report) -> None:
        self.pytest_runtest_logreport(report)


def pytest_configure(config) -> None:
    """Import the Triton kernels for Triton's interpreter, unless GPU tests are asked for: one process has one kind.

    Before any test module, for Triton itself must be imported under the variable too, and other packages import Triton.
    The environment is as before afterwards, so that subprocesses see nothing of it.
    """
    chosen = config.option.markexpr.replace("not gpu", "").replace("not multigpu", "")
    if "gpu" not in chosen and importlib.util.find_spec("triton"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            for name in ("local_attention.kernels", "adam", "pointwise"):
                importlib.import_module(f"kernels.{name}")
            # imported by Triton at the first launch, and insists on the variable then
            importlib.import_module("triton.experimental.gluon")
    if config.option.failures and not hasattr(config, "workerinput"):  # workers tell the process that started them
        config.pluginmanager.register(FailureFile(Path(config.option.failures)))


def pytest_collection_modifyitems(items) -> None:
    """Put the files that take minutes first, the longest before the others: begun last, they leave no work beside."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def interpreted_kernels() -> None:
    """Skips where the Triton kernels do not run on CPU tensors."""
    kernels = pytest.importorskip("kernels.local_attention.kernels", exc_type=ImportError)
    if not kernels.INTERPRETED:
        pytest.skip("the kernels are compiled for the GPU in this process")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request) -> str:
    """Choose where the Triton kernels run: interpreted on the CPU, or, under the marker gpu, compiled on a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("interpreted_kernels")
    elif importlib.import_module("kernels.local_attention.kernels").INTERPRETED:
        pytest.fail("the kernels were imported for the interpreter; select GPU tests alone: pytest -m gpu")
    return request.param
