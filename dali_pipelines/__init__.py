"""Input of the folds through NVIDIA DALI: sampler, graph and streams, the same on CPU and GPU."""

from nvidia.dali import __version__ as DALI_VERSION

from dali_pipelines.frame_flow import flow_from_frames
from dali_pipelines.graph import FlowTransform
from dali_pipelines.sampler import EpochSampler, balance_groups
from dali_pipelines.stream import FlowStream, fit_transform, load_set, self_test
from htnet.training.batch import Batch

__all__ = [
    "DALI_VERSION",
    "Batch",
    "EpochSampler",
    "FlowStream",
    "FlowTransform",
    "balance_groups",
    "fit_transform",
    "flow_from_frames",
    "load_set",
    "self_test",
]
