"""One experiment: all sections, its scores and its places."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from htnet.config.data import DataConfig
from htnet.config.model import HTNetConfig
from htnet.config.prepare import PrepareConfig
from htnet.config.scale import LoggingConfig, ScaleConfig
from htnet.config.section import NOT_IDENTITY, Above0, Count, NotNegative, Positive, section
from htnet.config.training import EngineConfig, TrainConfig


@section
class ScoreConfig:
    """Intervals and the chance level of the scores."""

    bootstrap: Count = 1000
    """Resamplings of subjects for the intervals of the scores; 0: none."""
    chance_trials: Count = 200
    """Simulated guessers for the chance level of test-selected scores; 0: none."""


@section
class ResourcesConfig:
    """Places in which folds run. Nothing here changes a prediction, but gpus_per_fold decides between CPU and GPU."""

    cpus_per_fold: Above0 = 1.0
    """CPUs that Ray reserves for a fold; at least engine.threads is sensible."""
    gpus_per_fold: NotNegative = 0.0
    """Share of a GPU that Ray reserves for a fold, or with engine.name=graphs for a process: 0, 1 or 1/k."""
    slots_per_gpu: Positive = 4
    """Folds that train at once in a process, with engine.name=graphs; the paper's network takes 1.7 GiB for each."""
    max_parallel_folds: Count = 0
    """Folds in flight at once; 0: as many as the cluster's resources allow."""
    checkpoint_minutes: NotNegative = 10.0
    """Least minutes between snapshots of a fold; an interrupted fold goes on from the last one. 0: none."""
    retries: Count = 3
    """Times a fold is tried again after its worker died; a dead or unfit node does not count."""
    stall_minutes: NotNegative = 30.0
    """A fold without a finished epoch for so long is cancelled and submitted again; 0: never."""
    keep_models: bool = False
    """Keep the network of each fold as a model folder, RUN/models/<fold>; a fold that is done already has none."""
    mixed_devices: bool = False
    """Let folds of a run compute on other kinds of device, or other versions, than the first: other last bits."""

    def __post_init__(self) -> None:
        if self.gpus_per_fold > 1 and self.gpus_per_fold != int(self.gpus_per_fold):
            raise ValueError(f"gpus_per_fold above 1 must be whole, got {self.gpus_per_fold}")


@section
class Config:
    """One experiment, from raw folders to scores."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, sample order, dropout and bootstrap; the same seed gives the same predictions."""
    prepare: Annotated[PrepareConfig, NOT_IDENTITY] = field(default_factory=PrepareConfig)
    """Preparation of the store."""
    data: DataConfig = field(default_factory=DataConfig)
    """Input of a fold."""
    model: HTNetConfig = field(default_factory=HTNetConfig)
    """The network."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimisation."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Engine that trains."""
    score: Annotated[ScoreConfig, NOT_IDENTITY] = field(default_factory=ScoreConfig)
    """Scores."""
    scale: Annotated[ScaleConfig, NOT_IDENTITY] = field(default_factory=ScaleConfig)
    """One training over several processes."""
    logging: Annotated[LoggingConfig, NOT_IDENTITY] = field(default_factory=LoggingConfig)
    """Places for a training's figures."""
    resources: Annotated[ResourcesConfig, NOT_IDENTITY] = field(default_factory=ResourcesConfig)
    """Places in which it runs."""

    def anchored(self, store: str | tuple[str, ...]) -> Config:
        """Return this configuration with absolute paths, for workers with a working directory of their own."""
        init = str(Path(self.train.init).resolve()) if self.train.init else ""
        return replace(self, data=replace(self.data, store=store), train=replace(self.train, init=init))

    def __post_init__(self) -> None:
        if self.model.image_size % 2:
            raise ValueError(f"model.image_size must be even (a mosaic is 2 x 2 regions), got {self.model.image_size}")
        if self.engine.name == "graphs" and self.model.dropout:
            raise ValueError(
                f"engine.name=graphs needs model.dropout=0, got {self.model.dropout:g}: folds of a process would draw "
                "from one generator"
            )
