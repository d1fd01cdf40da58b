"""Augmentation: random changes of training samples."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import Field

from htnet.config.section import Above0, Count, Share, section

_Quarter = Annotated[float, Field(ge=0, le=0.25)]


@section
class FlipConfig:
    """Mirror the face left to right: flow_u changes its sign; published pictures need scaling=minmax."""

    probability: Share = 0.0
    """Share of the samples that are mirrored."""


@section
class RotateConfig:
    """Turn the face in the picture plane; the flow vectors turn with it. Not for published pictures."""

    degrees: Annotated[float, Field(ge=0, le=45)] = 0.0
    """Largest angle; uniform between minus and plus this."""


@section
class JitterConfig:
    """Cut each region a little beside its landmark, as an unsure landmark detector would."""

    shift: _Quarter = 0.0
    """Largest shift of a region along each axis, as a share of the flow image's side."""
    scale: _Quarter = 0.0
    """Largest change of the regions' side, as a share of it; the four regions of a sample share it."""


@section
class MagnifyConfig:
    """Multiply flow_u, flow_v and the strain by one factor, with scaling=stored. Not for published pictures."""

    low: Above0 = 1.0
    """Least factor."""
    high: Above0 = 1.0
    """Largest factor; factors are uniform in their logarithm."""

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got {self.low} and {self.high}")


@section
class DropRegionConfig:
    """Set regions to the training mean (to 0 without standardise), so that no single part of the face decides."""

    probability: Share = 0.0
    """Share of the regions that are dropped; one region of a sample always stays."""


@section
class PhotometricConfig:
    """Change the pictures before flow is computed: onset and apex alike, but for the noise. Needs input=frames."""

    brightness: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift of all grey values, up or down, as a share of the range from black to white."""
    contrast: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Largest change of the distances to mid grey, as a share of them."""
    gamma: Annotated[float, Field(ge=1, le=4)] = 1.0
    """Largest exponent of the grey values as shares of white; the least is its inverse, uniform in the logarithm."""
    blur: Annotated[float, Field(ge=0, le=8)] = 0.0
    """Largest standard deviation of a Gaussian blur, in pixels of prepare.working_size; uniform from 0."""
    noise: Annotated[float, Field(ge=0, le=64)] = 0.0
    """Largest standard deviation of Gaussian noise, in grey values of 255; uniform from 0. Each frame has its own."""


@section
class TimeJitterConfig:
    """Take frames beside onset and apex, as another annotator would. Needs input=frames and prepare.keep_neighbours."""

    frames: Count = 0
    """Largest distance from the annotated frame, drawn for onset and apex each; at most prepare.keep_neighbours."""


@section
class MixConfig:
    """Combine each sample of a batch with another of it, pictures and labels alike."""

    kind: Literal["none", "mixup", "cutmix"] = "none"
    """mixup (Zhang et al., 2018) averages the two mosaics; cutmix (Yun et al., 2019) swaps whole regions."""
    alpha: Above0 = 0.2
    """Both parameters of the Beta distribution that the first sample's share is drawn from."""


@section
class AugmentConfig:
    """Random changes of training samples; all off by default. What they draw depends on seed, step and sample alone."""

    flip: FlipConfig = field(default_factory=FlipConfig)
    """Mirroring."""
    rotate: RotateConfig = field(default_factory=RotateConfig)
    """Rotation."""
    jitter: JitterConfig = field(default_factory=JitterConfig)
    """Landmark jitter."""
    magnify: MagnifyConfig = field(default_factory=MagnifyConfig)
    """Flow magnification."""
    drop_region: DropRegionConfig = field(default_factory=DropRegionConfig)
    """Region dropout."""
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    """Changes of the pictures."""
    time_jitter: TimeJitterConfig = field(default_factory=TimeJitterConfig)
    """Onset and apex jitter."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Mixup or cutmix."""

    @property
    def changes_pixels(self) -> bool:
        """Tell if a sample's mosaic differs from epoch to epoch; mixing does not change it, it comes after."""
        return replace(self, mix=MixConfig()) != AugmentConfig()

    @property
    def changes_frames(self) -> bool:
        """Tell if a sample's pictures differ from step to step, and with them its flow."""
        return (self.time_jitter, self.photometric) != (TimeJitterConfig(), PhotometricConfig())
