"""Mixup and cutmix of a batch: pairs of samples become one, and so do their labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from htnet.config import MixConfig
from htnet.training.batch import Batch, send

_SALT = 0x6D6978


def mix_batch(batch: Batch, config: MixConfig, *, num_classes: int, seed: int, step: int, rank: int = 0) -> Batch:
    """Mix each sample with a partner of the same batch; the draws depend on seed, step and rank alone.

    ``mixup``: ``share * a + (1 - share) * b``, share from Beta(alpha, alpha). ``cutmix``: each region is b's with
    probability ``1 - share``. Its labels are mixed by the number of regions, so no cut goes through a region.

    Returns:
        The batch with labels (B, num_classes) float32; unchanged where ``config.kind`` is none.
    """
    if config.kind == "none":
        return batch
    rng = np.random.default_rng([seed, step, rank, _SALT])
    count = len(batch.images)
    device = batch.images.device
    partner = send(rng.permutation(count), device)
    share = rng.beta(config.alpha, config.alpha, count)
    if config.kind == "cutmix":
        kept = rng.random((count, 4)) < share[:, None]
        share = kept.mean(axis=1)
        weights = _region_weights(kept, batch.images.shape[-1])
    else:
        weights = share[:, None, None, None]
    first = send(weights.astype(np.float32), device)
    images = first * batch.images + (1 - first) * batch.images[partner]
    target = torch.nn.functional.one_hot(batch.labels, num_classes).float()
    of_first = send(share.astype(np.float32), device)[:, None]
    return replace(batch, images=images, labels=of_first * target + (1 - of_first) * target[partner])


def _region_weights(kept: NDArray[np.bool_], side: int) -> NDArray[np.float64]:
    """Spread (B, 4) by region over pixels, (B, 1, S, S): 1 where the first sample's region stays."""
    quarters = kept.reshape(-1, 2, 2).astype(np.float64)
    return quarters.repeat(side // 2, axis=1).repeat(side // 2, axis=2)[:, None]
