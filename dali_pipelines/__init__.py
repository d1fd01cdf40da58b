"""Input of the folds through NVIDIA DALI: sampler, graph and streams, the same on CPU and GPU."""

from dali_pipelines.flow import Batch, FlowStream, fit_transform, load_set
from dali_pipelines.graph import FlowTransform
from dali_pipelines.sampler import EpochSampler

__all__ = ["Batch", "EpochSampler", "FlowStream", "FlowTransform", "fit_transform", "load_set"]
