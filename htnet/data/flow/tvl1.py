"""TV-L1 optical flow, batched over pairs of pictures, on CPU and GPU.

Minimises ``sum |grad u| + lambda |I1(x + u) - I0(x)|`` by the duality scheme of Zach, Pock and Bischof ("A Duality
Based Approach for Realtime TV-L1 Optical Flow", DAGM 2007) with the pyramid, warps and parameters of Sanchez,
Meinhardt-Llopis and Facciolo ("TV-L1 Optical Flow Estimation", IPOL 3, 2013), the implementation behind the flow that
the HTNet authors ship, and median filtering between warps (Wedel et al., "An Improved Algorithm for TV-L1 Optical
Flow", 2009), which removes outliers that the data term leaves.

Every pair is on its own: it stops by its own rule, and its result does not depend on what else is in the batch, bit
for bit. Only elementwise operations and sums in a fixed order are used, no convolution that chooses its algorithm.

On a GPU a batch goes through the scheme together, an operation of PyTorch at a time. On a CPU that is five times slower
than the loops of :mod:`kernels.cpu.tvl1`, which take a pair at a time, a thread per chunk of pairs, and give the same
flow but for rounding (about 1e-4 pixels).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TVL1", "tvl1"]


@dataclass(frozen=True, kw_only=True)
class TVL1:
    """Parameters; lengths in pixels, grey values 0..255."""

    tau: float = 0.25
    """Step of the dual variables; at most 0.25 for the scheme to converge (Chambolle 2004; IPOL)."""
    attachment: float = 0.15
    """lambda, the weight of the data term (IPOL's default)."""
    tightness: float = 0.3
    """theta, how closely the two halves of the split energy are coupled (IPOL's default)."""
    coarsest: int = 16
    """Least side of a pyramid level; levels halve (IPOL: zoom factor 0.5, levels down to 16 pixels)."""
    warps: int = 5
    """Linearisations of the data term per level (IPOL's default)."""
    iterations: int = 100
    """Most steps of the scheme per warp (IPOL: 300; later ones change nothing here), rounded up to ``check_every``."""
    tolerance: float = 0.01
    """A pair stops when the root mean square change of its flow in one step falls below this (IPOL's epsilon)."""
    check_every: int = 5
    """Steps between two looks at the change; each look makes a GPU wait."""
    median: int = 3
    """Side of the median filter after each warp, 1 (none), 3 or 5."""
    blur: float = 0.8
    """Standard deviation of the Gaussian that both pictures are smoothed with (IPOL)."""

    def __post_init__(self) -> None:
        if self.median not in (1, 3, 5):
            raise ValueError(f"median must be 1, 3 or 5, got {self.median}")
        if not 0 < self.tau <= 0.25:
            raise ValueError(f"tau must be in (0, 0.25], got {self.tau}")
        if self.coarsest < 2:
            raise ValueError(f"coarsest must be at least 2, got {self.coarsest}: a gradient takes two pixels")
        for name in ("attachment", "tightness", "warps", "iterations", "check_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


_CHUNK_PIXELS = 1 << 18
"""Most pixels of the finest level in what a CPU thread takes at once; fewer mean more Python between the loops."""


@torch.no_grad()
def tvl1(onset: Tensor, apex: Tensor, parameters: TVL1 | None = None) -> Tensor:
    """Optical flow of pairs.

    Args:
        onset: (B, H, W) grey values 0..255, any real dtype; H and W at least 8.
        apex: the same shape and device.
        parameters: None for the defaults.

    Returns:
        (B, 2, H, W) float32 pixels: flow_u to the right, flow_v down; onset at p is found at p + flow in apex.

    Raises:
        ValueError: other shapes.
    """
    if onset.dim() != 3 or onset.shape != apex.shape or min(onset.shape[1:]) < 8:
        raise ValueError(
            f"onset and apex must be (B, H, W) of one shape, H and W at least 8, got {tuple(onset.shape)} and "
            f"{tuple(apex.shape)}"
        )
    parameters = TVL1() if parameters is None else parameters
    first, second = onset.float(), apex.float()
    if onset.device.type != "cpu":
        return _flow_of_chunk(first, second, parameters, _refined)
    share = -(-len(onset) // torch.get_num_threads())
    size = max(1, min(share, _CHUNK_PIXELS // (onset.shape[1] * onset.shape[2])))
    chunks = list(zip(first.split(size), second.split(size), strict=True))
    return torch.cat(_on_threads(lambda pair: _flow_of_chunk(*pair, parameters, _refined_by_loops), chunks))


def _on_threads(work: Callable[[tuple[Tensor, Tensor]], Tensor], chunks: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Work on a chunk per thread, without torch's own: after an operation they spin on cores that loops need."""
    threads = min(torch.get_num_threads(), len(chunks))
    if threads == 1:
        return [work(chunk) for chunk in chunks]
    wanted = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(torch.no_grad()(work), chunks))
    finally:
        torch.set_num_threads(wanted)  # the workers' setting is new threads' default as well


Refine = Callable[[Tensor, Tensor, Tensor, TVL1], Tensor]
"""(B, H, W) onset and apex of a level, (B, 2, H, W) flow at its start -> flow at its end."""


def _flow_of_chunk(onset: Tensor, apex: Tensor, p: TVL1, refine: Refine) -> Tensor:
    levels = [(blurred(onset, p.blur), blurred(apex, p.blur))]
    while min(levels[-1][0].shape[1:]) // 2 >= p.coarsest:
        half = [-(-side // 2) for side in levels[-1][0].shape[1:]]
        levels.append((resized(levels[-1][0], half), resized(levels[-1][1], half)))
    flow = onset.new_zeros(len(onset), 2, *levels[-1][0].shape[1:])
    for first, second in reversed(levels):
        flow = refine(first, second, _enlarged(flow, first.shape[1:]), p)
    return flow


def _refined_by_loops(onset: Tensor, apex: Tensor, flow: Tensor, p: TVL1) -> Tensor:
    from kernels.cpu.tvl1 import refine  # Numba, which a GPU does without

    flow = flow.contiguous()
    weights = [np.float32(value) for value in (p.tolerance, p.tau, p.attachment, p.tightness)]
    iterations = -(-p.iterations // p.check_every) * p.check_every
    planes = (tensor.contiguous().numpy() for tensor in (onset, apex, flow))
    for first, second, start in zip(*planes, strict=True):
        refine(first, second, start, p.warps, iterations, p.check_every, *weights, p.median)
    return flow


def _refined(onset: Tensor, apex: Tensor, flow: Tensor, p: TVL1) -> Tensor:
    dual = flow.new_zeros(2, *flow.shape)
    for _ in range(p.warps):
        flow = _solve(onset, warped(apex, flow), flow, dual, p)
        flow = median_filtered(flow, p.median)
    return flow


def _solve(onset: Tensor, apex: Tensor, flow: Tensor, dual: Tensor, p: TVL1) -> Tensor:
    """Solve one linearisation: ``apex`` is warped by ``flow``; ``dual`` (2, B, 2, H, W) is updated in place.

    Pairs that have converged are put aside, so that they cost nothing and change no more.
    """
    state = _State(onset, apex, flow, dual, p)
    found, waiting = torch.empty_like(flow), torch.arange(len(flow), device=flow.device)
    for done in range(p.check_every, p.iterations + p.check_every, p.check_every):
        for _ in range(p.check_every - 1):
            state.step()
        before = state.flow.clone()
        state.step()
        # two sums in a fixed order: the mean of a pair is the same in every batch
        change = (state.flow - before).square_().sum(-1).sum((1, 2))
        moving = change >= p.tolerance**2 * before[0, 0].numel()
        stop = ~moving if done < p.iterations else torch.ones_like(moving)
        if stop.any():
            found[waiting[stop]] = state.flow[stop]
            dual[:, waiting[stop]] = torch.stack([state.dual_x[stop], state.dual_y[stop]])
            if stop.all():
                break
            waiting = waiting[moving]
            state.keep(moving)
    return found


class _State:
    """The planes of the pairs that still move, and the buffers of a step."""

    def __init__(self, onset: Tensor, apex: Tensor, flow: Tensor, dual: Tensor, p: TVL1) -> None:
        self.p = p
        self.flow = flow.clone()
        self.dual_x, self.dual_y = dual[0].clone(), dual[1].clone()
        self.gradient = central_gradient(apex)
        # rho(u) = apex + gradient . (u - flow) - onset
        self.constant = apex - onset - (self.gradient * flow).sum(1)
        self.inverse = -1.0 / self.gradient.square().sum(1).clamp_(min=1e-10)
        self._make_buffers()

    def _make_buffers(self) -> None:
        u = self.flow
        self.rho, self.length = torch.empty_like(self.constant), torch.empty_like(u)
        # what the forward differences do not reach stays zero
        self.right, self.down = torch.zeros_like(u), torch.zeros_like(u)
        # views, made once and not in every step
        self.forces = self.rho.unsqueeze(1)
        self.data_terms = tuple((self.gradient[:, axis], u[:, axis]) for axis in (0, 1))
        later, earlier = (
            tuple(tensor.narrow(axis, first, tensor.shape[axis] - 1) for axis in (3, 2))
            for tensor, first in ((u, 1), (u, 0))
        )
        duals, differences = (
            tuple(tensor.narrow(axis, 0, tensor.shape[axis] - 1) for tensor, axis in zip(pair, (3, 2), strict=True))
            for pair in ((self.dual_x, self.dual_y), (self.right, self.down))
        )
        self.divergences = tuple(zip((self.dual_x, self.dual_y), later, duals, strict=True))
        self.forward_differences = tuple(zip(later, earlier, differences, strict=True))

    def keep(self, chosen: Tensor) -> None:
        """Go on with the chosen pairs, (B,) bool."""
        for name in ("flow", "dual_x", "dual_y", "gradient", "constant", "inverse"):
            setattr(self, name, getattr(self, name)[chosen])
        self._make_buffers()

    def step(self) -> None:
        """Take one step: threshold (IPOL eq. 13), divergence (eq. 14), projection (eq. 15)."""
        p, u = self.p, self.flow
        bound, ratio = p.attachment * p.tightness, p.tau / p.tightness
        (gradient_x, flow_u), (gradient_y, flow_v) = self.data_terms
        torch.addcmul(self.constant, gradient_x, flow_u, out=self.rho)
        self.rho.addcmul_(gradient_y, flow_v).mul_(self.inverse).clamp_(-bound, bound)
        u.addcmul_(self.gradient, self.forces)
        for dual, later, shifted in self.divergences:
            u.add_(dual, alpha=p.tightness)
            later.sub_(shifted, alpha=p.tightness)
        for later, earlier, difference in self.forward_differences:
            torch.sub(later, earlier, out=difference)
        torch.mul(self.right, self.right, out=self.length)
        self.length.addcmul_(self.down, self.down).sqrt_().mul_(ratio).add_(1.0)
        self.dual_x.add_(self.right, alpha=ratio).div_(self.length)
        self.dual_y.add_(self.down, alpha=ratio).div_(self.length)


def central_gradient(image: Tensor) -> Tensor:
    """Return derivatives to x and y of (B, H, W), as (B, 2, H, W); one-sided at the border."""
    y, x = torch.gradient(image, dim=(1, 2))
    return torch.stack([x, y], dim=1)


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Smooth (B, H, W) by a Gaussian cut off at three sigma; the border is repeated."""
    if sigma <= 0:
        return image
    reach = max(1, round(3 * sigma))
    place = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (place / sigma) ** 2)
    taps = (weights / weights.sum()).tolist()
    for axis in (1, 2):
        pad = (reach, reach, 0, 0) if axis == 2 else (0, 0, reach, reach)
        wide, side = F.pad(image.unsqueeze(1), pad, mode="replicate").squeeze(1), image.shape[axis]
        image = torch.zeros_like(image)
        for index, tap in enumerate(taps):
            image.add_(wide.narrow(axis, index, side), alpha=tap)
    return image


def resized(image: Tensor, size: list[int]) -> Tensor:
    """Resize (B, H, W) to (B, *size), averaging over the pixels that become one."""
    return F.interpolate(image.unsqueeze(1), size, mode="bilinear", antialias=True, align_corners=False).squeeze(1)


def _enlarged(flow: Tensor, size: torch.Size) -> Tensor:
    """Enlarge a flow (B, 2, h, w) to (B, 2, *size), in pixels of the new size."""
    if flow.shape[2:] == size:
        return flow
    scale = flow.new_tensor([size[1] / flow.shape[3], size[0] / flow.shape[2]]).view(1, 2, 1, 1)
    return F.interpolate(flow, tuple(size), mode="bilinear", align_corners=False) * scale


def warped(image: Tensor, flow: Tensor) -> Tensor:
    """Return ``image(p + flow(p))`` by cubic convolution (Keys 1981), border repeated; exact where the flow is whole.

    Gathered tap by tap: ``grid_sample`` rounds its normalised coordinates, so that two equal pictures would not stay
    equal under a flow of zero.
    """
    batch, height, width = image.shape
    y = torch.arange(height, device=image.device, dtype=image.dtype).view(1, height, 1)
    x = torch.arange(width, device=image.device, dtype=image.dtype).view(1, 1, width)
    flat = image.reshape(batch, -1)
    columns, rows = _taps(x + flow[:, 0], width), _taps(y + flow[:, 1], height)
    result = torch.zeros_like(image)
    for row, row_weight in rows:
        line = torch.zeros_like(image)
        for column, weight in columns:
            index = (row * width + column).view(batch, -1)
            line.addcmul_(flat.gather(1, index).view_as(image), weight)
        result.addcmul_(line, row_weight)
    return result


def _taps(place: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
    """Four (index, weight) of cubic convolution with a = -0.5 at ``place``, each of its shape."""
    place = place.clamp(0, side - 1)
    base = place.floor()
    t = place - base
    first = base.long()
    weights = (
        ((-0.5 * t + 1.0) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1.0,
        ((-1.5 * t + 2.0) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    )
    return [
        ((first + offset).clamp_(0, side - 1), weight) for offset, weight in zip(range(-1, 3), weights, strict=True)
    ]


_NETWORK_9 = (
    *((1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3)),  # sort threes, then columns
    *((5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2)),
)
"""Exchanges that leave the median of nine at place 4 (Smith, "Implementing median filters in XC4000E FPGAs", 1996)."""


def median_filtered(planes: Tensor, side: int) -> Tensor:
    """Filter each plane of (B, 2, H, W) by the median over ``side`` x ``side`` pixels, the border repeated."""
    if side == 1:
        return planes
    reach = side // 2
    wide = F.pad(planes, (reach,) * 4, mode="replicate")
    height, width = planes.shape[2:]
    taps = [wide[..., i : i + height, j : j + width] for i in range(side) for j in range(side)]
    if side != 3:
        return torch.stack(taps).median(dim=0).values
    for low, high in _NETWORK_9:
        taps[low], taps[high] = torch.minimum(taps[low], taps[high]), torch.maximum(taps[low], taps[high])
    return taps[4]
