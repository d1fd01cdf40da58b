"""The training loss and its class weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["class_weights", "cross_entropy", "padded_cross_entropy"]


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Return balanced weights, samples / (classes * samples of the class); (num_classes,) float32, 0 without samples.

    ``labels`` are (n,) int64.
    """
    counts = torch.bincount(labels, minlength=num_classes).float()
    return torch.where(counts > 0, labels.numel() / (num_classes * counts.clamp(min=1)), torch.zeros(()))


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Return the mean cross entropy in fp32, a scalar.

    Args:
        logits: (B, num_classes), of any floating dtype.
        labels: (B,) int64, or (B, num_classes) float32 shares.
        weights: (num_classes,) float32.
        smoothing: share of the target that is spread over all classes.
    """
    return F.cross_entropy(logits.float(), labels, weight=weights, label_smoothing=smoothing)


def padded_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float, real: Tensor
) -> Tensor:
    """Return :func:`cross_entropy` of the rows whose ``real`` is 1; rows of 0 add exact zeros to it and to gradients.

    ``real`` is (B,) float32. The mean is a sum over the rows here, so that it rounds differently.
    """
    losses = F.cross_entropy(logits.float(), labels, weight=weights, label_smoothing=smoothing, reduction="none")
    share = real if weights is None or labels.is_floating_point() else real * weights[labels]
    return (losses * real).sum() / share.sum()
