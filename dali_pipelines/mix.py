"""Mixup and cutmix of a batch: pairs of samples become one, and so do their labels."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.resample import spread_regions
from htnet.config import MixConfig
from htnet.training.batch import Batch, send

_SALT = 0x6D6978


class Mix(NamedTuple):
    """Pairs of a batch of B samples."""

    partner: Tensor
    """(B,) int64, place in the batch."""
    regions: Tensor
    """(B, 4) float32, share of the first sample in each region."""
    share: Tensor
    """(B,) float32, its share of the label."""


def draw_mix(config: MixConfig, count: int, *, seed: int, step: int, rank: int = 0) -> Mix:
    """Draw the pairs of ``count`` samples, on the CPU; the draws depend on seed, step and rank alone.

    ``mixup``: shares from Beta(alpha, alpha). ``cutmix``: each region is the partner's with probability ``1 - share``,
    and its labels are mixed by the number of regions, so no cut goes through a region.
    """
    rng = np.random.default_rng([seed, step, rank, _SALT])
    partner = rng.permutation(count)
    share = rng.beta(config.alpha, config.alpha, count)
    regions = np.repeat(share[:, None], 4, axis=1)
    if config.kind == "cutmix":
        regions = (rng.random((count, 4)) < share[:, None]).astype(np.float64)
        share = regions.mean(axis=1)
    return Mix(torch.from_numpy(partner), *(torch.from_numpy(x.astype(np.float32)) for x in (regions, share)))


def mix_samples(images: Tensor, labels: Tensor, mix: Mix, num_classes: int) -> tuple[Tensor, Tensor]:
    """Compute ``share * a + (1 - share) * b`` of images (B, 3, S, S) and labels (B,); labels become (B, num_classes).

    ``mix`` is on the device of the images.
    """
    first = spread_regions(mix.regions, images.shape[-1] // 2)
    target = torch.nn.functional.one_hot(labels, num_classes).float()
    of_first = mix.share[:, None]
    mixed = first * images + (1 - first) * images[mix.partner]
    return mixed, of_first * target + (1 - of_first) * target[mix.partner]


def mix_batch(batch: Batch, config: MixConfig, *, num_classes: int, seed: int, step: int, rank: int = 0) -> Batch:
    """Mix each sample with a partner of the same batch.

    Returns:
        The batch with labels (B, num_classes) float32; unchanged where ``config.kind`` is none.
    """
    if config.kind == "none":
        return batch
    drawn = draw_mix(config, len(batch.images), seed=seed, step=step, rank=rank)
    mix = Mix(*(send(table, batch.images.device) for table in drawn))
    images, labels = mix_samples(batch.images, batch.labels, mix, num_classes)
    return replace(batch, images=images, labels=labels)
