"""Configuration: sections as frozen dataclasses, YAML files, identity."""

from htnet.config.augment import (
    AugmentConfig,
    DropRegionConfig,
    FlipConfig,
    JitterConfig,
    MagnifyConfig,
    MixConfig,
    PhotometricConfig,
    RotateConfig,
    TimeJitterConfig,
)
from htnet.config.data import DataConfig
from htnet.config.model import HTNetConfig
from htnet.config.prepare import PrepareConfig, SourceConfig
from htnet.config.run import Config, ResourcesConfig, ScoreConfig
from htnet.config.scale import LoggingConfig, ScaleConfig
from htnet.config.training import EngineConfig, TrainConfig

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "DropRegionConfig",
    "EngineConfig",
    "FlipConfig",
    "HTNetConfig",
    "JitterConfig",
    "LoggingConfig",
    "MagnifyConfig",
    "MixConfig",
    "PhotometricConfig",
    "PrepareConfig",
    "ResourcesConfig",
    "RotateConfig",
    "ScaleConfig",
    "ScoreConfig",
    "SourceConfig",
    "TimeJitterConfig",
    "TrainConfig",
]
