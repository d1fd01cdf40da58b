"""A fold's input."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from htnet.config.augment import (
    AugmentConfig,
    DropRegionConfig,
    FlipConfig,
    MagnifyConfig,
    PhotometricConfig,
    RotateConfig,
    TimeJitterConfig,
)
from htnet.config.section import NOT_IDENTITY, Count, section

CropRule = Literal["upstream", "anatomical"]
Scaling = Literal["minmax", "stored"]
Balance = Literal["none", "class", "dataset"]


def _check_stores(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Refuse with one line, where a union would name the rule of each of its types."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError(f"must be a folder or a list of folders, got {value!r}") from None


# not strict: behind a validator in Python, JSON's list arrives as a list
Stores = Annotated[str | Annotated[tuple[str, ...], Field(strict=False)], WrapValidator(_check_stores)]
"""Folder of a store, or a list of them, which are read as one."""


@section
class DataConfig:
    """A fold's input: what it reads from the store, and the way from there to a mosaic."""

    store: Annotated[Stores, NOT_IDENTITY] = "stores/composite"
    """Folder that ``htnet prepare`` wrote, or a list of them, read as one."""
    datasets: tuple[str, ...] = ()
    """Use only these datasets of the store; empty: all."""
    subjects: Annotated[tuple[str, ...], NOT_IDENTITY] = ()
    """Hold out only these subjects (casme2/sub17); every sample still trains. Empty: all."""
    validation_subjects: Count = 0
    """Training subjects set aside to choose the epoch (selection ``validated``), drawn with the seed; 0: none."""
    validation_datasets: tuple[str, ...] = ()
    """Datasets that ``htnet train`` sets aside as a whole to choose the epoch; a sweep has no use for them."""
    crop: CropRule = "anatomical"
    """Rule by which regions are cut: anatomical at the landmarks; upstream swaps x and y as the public code does."""
    scaling: Scaling = "minmax"
    """minmax stretches each channel of each flow image to 0..255, as the paper's data has it; stored leaves it."""
    standardise: bool = True
    """Subtract the mean and divide by the standard deviation of the fold's training mosaics, per channel."""
    shuffle: bool = True
    """A new seeded order of the training samples each epoch; the paper's code keeps the file order."""
    balance: Balance = "none"
    """Show every class, or every dataset, equally often; an epoch keeps its length. Needs shuffle."""
    input: Literal["flow", "frames"] = "flow"
    """flow reads the stored flow images; frames computes them from the stored onset and apex (prepare.keep_frames)."""
    cache_mb: Annotated[Count, NOT_IDENTITY] = 2048
    """Decoded samples stay on the device up to this many MiB; what is larger is read again each epoch."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the training samples."""

    def __post_init__(self) -> None:
        if self.balance != "none" and not self.shuffle:
            raise ValueError(f"balance={self.balance} needs shuffle=true: a balanced epoch has no file order")
        augment = self.augment
        if self.input != "frames":
            self._refuse_what_needs_frames()
        if self.scaling == "minmax" and augment.magnify != MagnifyConfig():
            raise ValueError(
                "augment.magnify needs scaling=stored: minmax stretches every flow image to 0..255, magnified or not"
            )
        if self.scaling == "minmax" and not self.standardise and augment.drop_region != DropRegionConfig():
            raise ValueError(
                "augment.drop_region with scaling=minmax needs standardise=true: in a picture stretched to 0..255 "
                "0 is not rest but the strongest motion one way"
            )
        if self.crop == "upstream" and (augment.flip != FlipConfig() or augment.rotate != RotateConfig()):
            raise ValueError(
                "augment.flip and augment.rotate need crop=anatomical: the upstream rule swaps x and y, so that a "
                "mirrored or turned face is not cut at the same parts"
            )

    def _refuse_what_needs_frames(self) -> None:
        for name, value, plain in (
            ("augment.photometric", self.augment.photometric, PhotometricConfig()),
            ("augment.time_jitter", self.augment.time_jitter, TimeJitterConfig()),
        ):
            if value != plain:
                raise ValueError(f"{name} needs input=frames: with input={self.input} no flow is computed")
