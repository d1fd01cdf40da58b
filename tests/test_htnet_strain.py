"""Optical strain: the formula, zero for rigid motion, and each public variant as its derivatives define it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from htnet.data.flow.strain import optical_strain

KINDS = ("central", "forward", "backward", "sobel")


def strain(field: np.ndarray, kind="central") -> np.ndarray:
    """Of an (H, W, 2) field."""
    return optical_strain(torch.from_numpy(np.ascontiguousarray(field.transpose(2, 0, 1)))[None], kind)[0].numpy()


def random_field(height=14, width=17) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((height, width, 2)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rigid_shift_has_none(kind):
    assert not strain(np.broadcast_to(np.array([1.25, -0.5], np.float32), (20, 30, 2)), kind).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_field_has_what_the_formula_says(kind):
    """u = 0.1 x + 0.3 y, v = 0.2 y: sqrt(0.1^2 + 0.2^2 + 0.3^2 / 2) inside."""
    y, x = np.mgrid[0:12, 0:15].astype(np.float32)
    found = strain(np.stack([0.1 * x + 0.3 * y, 0.2 * y], axis=-1), kind)
    np.testing.assert_allclose(found[1:-1, 1:-1], np.sqrt(0.01 + 0.04 + 0.045), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotation_has_no_strain_but_in_one_variant(kind):
    """A rotation has no strain, except where the variant forgets the mixed term."""
    y, x = np.mgrid[0:12, 0:12].astype(np.float32)
    inside = strain(np.stack([-0.1 * y, 0.1 * x], axis=-1), kind)[1:-1, 1:-1]
    np.testing.assert_allclose(inside, 0.1 if kind == "sobel" else 0.0, atol=1e-6)


def test_central_differences_are_numpys():
    field = random_field()
    (u_y, u_x), (v_y, v_x) = (np.gradient(field[..., channel]) for channel in (0, 1))
    np.testing.assert_allclose(strain(field), np.sqrt(u_x**2 + v_y**2 + 0.5 * (u_y + v_x) ** 2), rtol=1e-5)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_one_sided_differences_are_zero_at_the_edge(kind):
    """One-sided differences are half a pixel off, and zero where there is no neighbour."""
    field = random_field()
    down, right = np.zeros_like(field), np.zeros_like(field)
    place = slice(None, -1) if kind == "forward" else slice(1, None)
    down[place], right[:, place] = np.diff(field, axis=0), np.diff(field, axis=1)
    wanted = np.sqrt(right[..., 0] ** 2 + down[..., 1] ** 2 + 0.5 * (down[..., 0] + right[..., 1]) ** 2)
    np.testing.assert_allclose(strain(field, kind), wanted, rtol=1e-5)


def test_sobels_derivatives_are_opencvs():
    field = random_field()
    options = {"ddepth": -1, "ksize": 3, "scale": 1 / 8, "borderType": cv2.BORDER_REPLICATE}
    right, down = cv2.Sobel(field, dx=1, dy=0, **options), cv2.Sobel(field, dx=0, dy=1, **options)
    shear = down[..., 0] ** 2 + right[..., 1] ** 2
    np.testing.assert_allclose(
        strain(field, "sobel"), np.sqrt(right[..., 0] ** 2 + down[..., 1] ** 2 + 0.5 * shear), rtol=1e-4
    )


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="strain must be one of central, forward, backward, sobel, got 'x'"):
        strain(random_field(), "x")
