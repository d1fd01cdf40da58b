"""Input of the folds through NVIDIA DALI: sampler, graph and streams, the same on CPU and GPU."""

from nvidia.dali import __version__ as DALI_VERSION

from dali_pipelines.flow import Batch, FlowStream, fit_transform, load_set, self_test
from dali_pipelines.graph import FlowTransform
from dali_pipelines.sampler import EpochSampler

__all__ = [
    "DALI_VERSION",
    "Batch",
    "EpochSampler",
    "FlowStream",
    "FlowTransform",
    "fit_transform",
    "load_set",
    "self_test",
]
