"""Input of the folds through NVIDIA DALI: sampler, graph and streams, the same on CPU and GPU."""

from nvidia.dali import __version__ as DALI_VERSION

from dali_pipelines.frame_flow import flow_from_frames
from dali_pipelines.resident import Resident, fit_transform, load_set, open_resident
from dali_pipelines.sampler import EpochSampler, balance_groups
from dali_pipelines.stream import FlowStream, self_test
from dali_pipelines.tables import FlowTables, padded_images
from htnet.data.transform import FlowTransform
from htnet.training.batch import Batch

__all__ = [
    "DALI_VERSION",
    "Batch",
    "EpochSampler",
    "FlowStream",
    "FlowTables",
    "FlowTransform",
    "Resident",
    "balance_groups",
    "fit_transform",
    "flow_from_frames",
    "load_set",
    "open_resident",
    "padded_images",
    "self_test",
]
