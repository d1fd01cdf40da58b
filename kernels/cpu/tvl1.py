"""The scheme of TV-L1 for one pair of pictures at one level of the pyramid (IPOL 3, 2013, algorithm 1).

What :mod:`htnet.data.tvl1` computes plane by plane for a batch, here in whole passes over planes that stay in the
second-level cache: a step of the scheme reads and writes some forty planes where single operations take a hundred, and
threads do not wait for Python. Both give the same flow but for rounding.

Written in loops and without assignments of whole slices, whose checks take longer to compile than all the rest.

Planes are (H, W) float32 with one column more, flat, W + 1 numbers a row, so that a neighbour is a fixed distance away
and a pass is one loop without borders. The column in excess, and a row of them below, repeat the border of the flow,
which makes differences across the border zero; a dual variable stands one place after its pixel (to the right, or
below), and what would be before the first is zero.
"""

# Numba types arguments at the call; hints would say less than the docstrings and be checked by nobody
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import numpy as np

from kernels.cpu.compiled import compiled

__all__ = ["refine"]

_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_1, _2, _3 = np.uint64(1), np.uint64(2), np.uint64(3)  # an index that may be negative is checked at every access


@compiled
def refine(onset, apex, flow, warps, iterations, check_every, tolerance, tau, attachment, tightness, median):
    """Linearise, solve and filter ``warps`` times, in place.

    Args:
        onset, apex: (H, W) float32 grey values; H and W at least 2.
        flow: (2, H, W) float32, u and v in pixels; the start, then the result.
        warps, iterations, check_every, median: int, as in :class:`htnet.data.tvl1.TVL1`.
        tolerance, tau, attachment, tightness: float32, likewise.
    """
    height, width = onset.shape
    stride = width + 1
    size, room = height * stride, (height + 1) * stride + 1
    u, v = np.zeros(room, np.float32), np.zeros(room, np.float32)
    right_u, down_u = np.zeros(room, np.float32), np.zeros(room, np.float32)
    right_v, down_v = np.zeros(room, np.float32), np.zeros(room, np.float32)
    gradient_x, gradient_y = np.zeros(size, np.float32), np.zeros(size, np.float32)
    constant, inverse = np.zeros(size, np.float32), np.zeros(size, np.float32)
    warped, scratch = np.empty((height, width), np.float32), np.empty(size, np.float32)
    bound, ratio = attachment * tightness, tau / tightness
    enough = tolerance * tolerance * np.float32(height * width)
    wide = _padded(apex, 2)
    for _ in range(warps):
        _warp(wide, flow, warped)
        _linearise(onset, warped, flow, stride, gradient_x, gradient_y, constant, inverse)
        _spread(flow[0], u, stride)
        _spread(flow[1], v, stride)
        for done in range(1, iterations + 1):
            _data_term(constant, inverse, gradient_x, gradient_y, u[:size], v[:size], scratch, bound)
            change = _primal(gradient_x, scratch, u, right_u, down_u, stride, tightness)
            change += _primal(gradient_y, scratch, v, right_v, down_v, stride, tightness)
            _dual(u, right_u, down_u, scratch, stride, height, ratio)
            _dual(v, right_v, down_v, scratch, stride, height, ratio)
            if done % check_every == 0 and change < enough:
                break
        _gather(u, flow[0], stride)
        _gather(v, flow[1], stride)
        for plane in flow:
            if median == 3:
                _median_of_nine(plane)
            elif median > 3:
                _median(plane, median)


@compiled
def _spread(plane, flat, stride):
    """(H, W) to the flat layout, its border repeated."""
    height, width = plane.shape
    for y in range(height):
        for x in range(width):
            flat[y * stride + x] = plane[y, x]
    _repeat_border(flat, stride, height)


@compiled
def _gather(flat, plane, stride):
    height, width = plane.shape
    for y in range(height):
        for x in range(width):
            plane[y, x] = flat[y * stride + x]


@compiled
def _repeat_border(flat, stride, height):
    for y in range(1, height + 1):
        flat[y * stride - 1] = flat[y * stride - 2]
    last = height * stride
    for x in range(stride):
        flat[last + x] = flat[last + x - stride]


@compiled
def _data_term(constant, inverse, gradient_x, gradient_y, u, v, force, bound):
    """How far each pixel goes along the gradient of the picture (IPOL eq. 13)."""
    for i in range(force.shape[0]):
        residual = (constant[i] + gradient_x[i] * u[i] + gradient_y[i] * v[i]) * inverse[i]
        force[i] = min(max(residual, -bound), bound)


@compiled
def _primal(gradient, force, u, right, down, stride, tightness):
    """One component goes on by the data term and the divergence of its duals (eq. 14); the sum of squared changes."""
    size = force.shape[0]
    across, along = (right[1 : size + 1], right[:size]), (down[stride : size + stride], down[:size])
    change = _advance(gradient, force, u[:size], across, along, tightness)
    _repeat_border(u, stride, size // stride)
    return change


@compiled
def _advance(gradient, force, u, across, along, tightness):
    (right, right_before), (down, down_before) = across, along
    total = np.float32(0.0)
    for i in range(force.shape[0]):
        change = gradient[i] * force[i] + tightness * (right[i] - right_before[i] + down[i] - down_before[i])
        u[i] += change
        total += change * change
    return total


@compiled
def _dual(u, right, down, shrink, stride, height, ratio):
    """The duals of one component go on and are projected (eq. 15)."""
    size = shrink.shape[0]
    here, to_right, below = u[:size], u[1 : size + 1], u[stride : size + stride]
    for i in range(size):
        x, y = to_right[i] - here[i], below[i] - here[i]
        shrink[i] = _ONE / (_ONE + ratio * np.sqrt(x * x + y * y))
    _project(here, to_right, right[1 : size + 1], shrink, ratio)
    _project(here, below, down[stride : size + stride], shrink, ratio)
    for y in range(1, height + 1):  # what the column in excess has left
        right[y * stride] = 0.0
        down[(y + 1) * stride - 1] = 0.0


@compiled
def _project(here, there, dual, shrink, ratio):
    for i in range(shrink.shape[0]):
        dual[i] = (dual[i] + ratio * (there[i] - here[i])) * shrink[i]


@compiled
def _linearise(onset, warped, flow, stride, gradient_x, gradient_y, constant, inverse):
    """rho(u) = warped + gradient . (u - flow) - onset, its constant part, and -1 / |gradient|^2."""
    height, width = onset.shape
    for y in range(height):
        above, below = max(y - 1, 0), min(y + 1, height - 1)
        scale = _HALF if below - above == 2 else _ONE
        for x in range(width):
            left, right = max(x - 1, 0), min(x + 1, width - 1)
            along = (warped[y, right] - warped[y, left]) * (_HALF if right - left == 2 else _ONE)
            across = (warped[below, x] - warped[above, x]) * scale
            i = y * stride + x
            gradient_x[i], gradient_y[i] = along, across
            constant[i] = warped[y, x] - onset[y, x] - (along * flow[0, y, x] + across * flow[1, y, x])
            inverse[i] = -_ONE / max(along * along + across * across, np.float32(1e-10))


@compiled
def _warp(wide, flow, out):
    """``image(p + flow(p))``, cubic convolution (Keys 1981); exact where the flow is whole.

    ``wide`` is the image with its border repeated twice, so that the sixteen pixels around a place in it exist.
    """
    height, width = out.shape
    stride, image = np.uint64(width + 4), wide.ravel()
    for y in range(height):
        for x in range(width):
            column, a, b, c, d = _taps(np.float32(x) + flow[0, y, x], width)
            row, e, f, g, h = _taps(np.float32(y) + flow[1, y, x], height)
            i = np.uint64(row) * stride + np.uint64(column)
            total = e * _line(image, i, a, b, c, d)
            total += f * _line(image, i + stride, a, b, c, d)
            total += g * _line(image, i + stride + stride, a, b, c, d)
            out[y, x] = total + h * _line(image, i + stride + stride + stride, a, b, c, d)


@compiled
def _line(image, i, a, b, c, d):
    return a * image[i] + b * image[i + _1] + c * image[i + _2] + d * image[i + _3]


@compiled
def _taps(place, side):
    """The first of four places in the widened image and their weights, a = -0.5; what is no number counts as 0."""
    place = min(place, np.float32(side - 1)) if place > 0 else np.float32(0.0)
    base = np.int64(place)
    t = place - np.float32(base)
    return (
        base + 1,
        ((np.float32(-0.5) * t + _ONE) * t - _HALF) * t,
        (np.float32(1.5) * t - np.float32(2.5)) * t * t + _ONE,
        ((np.float32(-1.5) * t + np.float32(2.0)) * t + _HALF) * t,
        (_HALF * t - _HALF) * t * t,
    )


@compiled
def _median_of_nine(plane):
    """3 x 3 median in place, the border repeated."""
    height, width = plane.shape
    wide = _padded(plane, 1)
    for y in range(height):
        for x in range(width):
            a, b, c = _sorted(wide[y, x], wide[y, x + 1], wide[y, x + 2])
            d, e, f = _sorted(wide[y + 1, x], wide[y + 1, x + 1], wide[y + 1, x + 2])
            g, h, i = _sorted(wide[y + 2, x], wide[y + 2, x + 1], wide[y + 2, x + 2])
            # of three sorted rows: the largest of the least, the median of the middle, the least of the largest
            low, high = max(a, d, g), min(c, f, i)
            middle = max(min(b, e), min(max(b, e), h))
            plane[y, x] = max(min(low, middle), min(max(low, middle), high))


@compiled
def _sorted(a, b, c):
    low, high = min(a, b), max(a, b)
    return min(low, c), max(low, min(high, c)), max(high, c)


@compiled
def _median(plane, side):
    """``side`` x ``side`` median in place, the border repeated; each window is sorted by insertion."""
    height, width = plane.shape
    wide = _padded(plane, side // 2)
    window = np.empty(side * side, np.float32)
    for y in range(height):
        for x in range(width):
            for count, value in enumerate(wide[y : y + side, x : x + side].flat):
                place = count
                while place > 0 and window[place - 1] > value:
                    window[place] = window[place - 1]
                    place -= 1
                window[place] = value
            plane[y, x] = window[side * side // 2]


@compiled
def _padded(plane, reach):
    height, width = plane.shape
    wide = np.empty((height + 2 * reach, width + 2 * reach), np.float32)
    for y in range(height + 2 * reach):
        row = min(max(y - reach, 0), height - 1)
        for x in range(width):
            wide[y, reach + x] = plane[row, x]
        for x in range(reach):
            wide[y, x], wide[y, reach + width + x] = plane[row, 0], plane[row, width - 1]
    return wide
