"""TV-L1's scheme for one pair of pictures at one level of the pyramid (IPOL 3, 2013, algorithm 1).

:mod:`htnet.data.flow.tvl1` computes the same plane by plane for a batch. Here whole passes run over planes that stay in
the second-level cache: a step reads and writes some thirty planes, single operations a hundred, and threads do not wait
for Python. Both give the same flow but for rounding.

Written in loops: assignments of whole slices have checks that take longer to compile than everything else.

Planes are (H, W) float32 stored flat with one more column, W + 1 numbers a row. A neighbour is thus a fixed distance
away, and a pass is one loop without borders. The extra column, and an extra row below, repeat the border of the flow,
so that differences across the border are zero. A dual variable is stored one place after its pixel (to the right, or
below); the place before the first is zero.
"""

# Numba types arguments at the call; hints would say less than the docstrings, and nothing would check them
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import numpy as np

from kernels.cpu.compiled import compiled, inner

__all__ = ["refine"]

_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_LANES = 64  # four of the widest vectors (16 numbers) at once hide the latency of an addition
_1, _2, _3 = np.uint64(1), np.uint64(2), np.uint64(3)  # an index that may be negative is checked at every access


@compiled
def refine(onset, apex, flow, warps, iterations, check_every, tolerance, tau, attachment, tightness, median):
    """Linearise, solve and filter ``warps`` times, in place.

    Args:
        onset, apex: (H, W) float32 grey values; H and W at least 2.
        flow: (2, H, W) float32, u and v in pixels; the start, then the result.
        warps, iterations, check_every, median: int, as in :class:`htnet.data.flow.tvl1.TVL1`.
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
    warped, force = np.empty((height, width), np.float32), np.empty(size, np.float32)
    bound, ratio = attachment * tightness, tau / tightness
    enough = tolerance * tolerance * np.float32(height * width)
    wide = _padded(apex, 2)
    for _ in range(warps):
        _warp(wide, flow, warped)
        _linearise(onset, warped, flow, stride, gradient_x, gradient_y, constant, inverse)
        _spread(flow[0], u, stride)
        _spread(flow[1], v, stride)
        for done in range(1, iterations + 1):
            _data_term(constant, inverse, gradient_x, gradient_y, u[:size], v[:size], force, bound)
            change = _primal(gradient_x, force, u, right_u, down_u, stride, tightness)
            change += _primal(gradient_y, force, v, right_v, down_v, stride, tightness)
            _dual(u, right_u, down_u, stride, height, ratio)
            _dual(v, right_v, down_v, stride, height, ratio)
            if done % check_every == 0 and change < enough:
                break
        _gather(u, flow[0], stride)
        _gather(v, flow[1], stride)
        for plane in flow:
            if median == 3:
                _median_of_nine(plane)
            elif median > 3:
                _median(plane, median)


@inner
def _spread(plane, flat, stride):
    """Copy (H, W) to the flat layout and repeat its border."""
    height, width = plane.shape
    for y in range(height):
        for x in range(width):
            flat[y * stride + x] = plane[y, x]
    _repeat_border(flat, stride, height)


@inner
def _gather(flat, plane, stride):
    height, width = plane.shape
    for y in range(height):
        for x in range(width):
            plane[y, x] = flat[y * stride + x]


@inner
def _repeat_border(flat, stride, height):
    for y in range(1, height + 1):
        flat[y * stride - 1] = flat[y * stride - 2]
    last = height * stride
    for x in range(stride):
        flat[last + x] = flat[last + x - stride]


@inner
def _data_term(constant, inverse, gradient_x, gradient_y, u, v, force, bound):
    """Compute each pixel's step along the gradient of the picture (IPOL eq. 13)."""
    for i in range(force.shape[0]):
        residual = (constant[i] + gradient_x[i] * u[i] + gradient_y[i] * v[i]) * inverse[i]
        force[i] = min(max(residual, -bound), bound)


@inner
def _primal(gradient, force, u, right, down, stride, tightness):
    """Advance a component by data term and divergence of its duals (eq. 14); return its summed squared changes."""
    size = force.shape[0]
    across, along = (right[1 : size + 1], right[:size]), (down[stride : size + stride], down[:size])
    change = _advance(gradient, force, u[:size], across, along, tightness)
    _repeat_border(u, stride, size // stride)
    return change


@inner
def _advance(gradient, force, u, across, along, tightness):
    """Advance in lanes, each with its own sum: a plain sum is one chain of additions, which vectors may not split."""
    size = force.shape[0]
    whole = size - size % _LANES
    squares = np.zeros(_LANES, np.float32)
    for start in range(0, whole, _LANES):
        for lane in range(_LANES):
            squares[lane] += _advance_pixel(gradient, force, u, across, along, tightness, start + lane)
    for lane in range(size - whole):
        squares[lane] += _advance_pixel(gradient, force, u, across, along, tightness, whole + lane)
    total = np.float32(0.0)
    for square in squares:
        total += square
    return total


@inner
def _advance_pixel(gradient, force, u, across, along, tightness, i):
    (right, right_before), (down, down_before) = across, along
    change = gradient[i] * force[i] + tightness * (right[i] - right_before[i] + down[i] - down_before[i])
    u[i] += change
    return change * change


@inner
def _dual(u, right, down, stride, height, ratio):
    """Advance the duals of one component and project them (eq. 15)."""
    size = height * stride
    here, to_right, below = u[:size], u[1 : size + 1], u[stride : size + stride]
    _project(here, to_right, below, right[1 : size + 1], down[stride : size + stride], ratio)
    for y in range(1, height + 1):  # left by the extra column
        right[y * stride] = 0.0
        down[(y + 1) * stride - 1] = 0.0


@inner
def _project(here, to_right, below, right, down, ratio):
    for i in range(here.shape[0]):
        x, y = to_right[i] - here[i], below[i] - here[i]
        shrink = _ONE / (_ONE + ratio * np.sqrt(x * x + y * y))
        right[i] = (right[i] + ratio * x) * shrink
        down[i] = (down[i] + ratio * y) * shrink


@inner
def _linearise(onset, warped, flow, stride, gradient_x, gradient_y, constant, inverse):
    """Compute the constant part of rho(u) = warped + gradient . (u - flow) - onset, and -1 / |gradient|^2."""
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


@inner
def _warp(wide, flow, out):
    """Compute ``image(p + flow(p))`` by cubic convolution (Keys 1981); exact where the flow is whole.

    ``wide`` is the image with its border repeated twice, so that all sixteen pixels around a place exist.
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


@inner
def _line(image, i, a, b, c, d):
    return a * image[i] + b * image[i + _1] + c * image[i + _2] + d * image[i + _3]


@inner
def _taps(place, side):
    """Return the first of four places in the widened image and their weights, a = -0.5; NaN counts as place 0."""
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


@inner
def _median_of_nine(plane):
    """Apply a 3 x 3 median in place; the border is repeated."""
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


@inner
def _sorted(a, b, c):
    low, high = min(a, b), max(a, b)
    return min(low, c), max(low, min(high, c)), max(high, c)


@inner
def _median(plane, side):
    """Apply a ``side`` x ``side`` median in place; the border is repeated. Each window is sorted by insertion."""
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


@inner
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
