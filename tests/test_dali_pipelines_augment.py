"""Augmentations leave a flow image a flow image: each against a plain numpy or OpenCV statement, and against a law."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from conftest import random_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dali_pipelines_flow import DEVICES

from dali_pipelines import EpochSampler, FlowStream, FlowTransform, Resident, fit_transform
from dali_pipelines.augment import (
    FaceGeometry,
    draw,
    kept_regions,
    mirrored_starts,
    plan_changes,
    turned_points,
    vector_matrices,
)
from dali_pipelines.mix import mix_batch
from htnet.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DropRegionConfig,
    FlipConfig,
    JitterConfig,
    MagnifyConfig,
    MixConfig,
    RotateConfig,
)
from htnet.data.flow.strain import optical_strain
from htnet.data.regions import mosaic, region_starts, scale_minmax
from htnet.data.store.reader import Store
from htnet.data.store.writer import PreparedSample, write_store
from htnet.errors import InputError
from htnet.training.batch import Batch
from launch.commands.sweep import check_folds

RAW = FlowTransform(mosaic_size=28, minmax=False)
STORED = DataConfig(scaling="stored", standardise=False)


@pytest.fixture(scope="module")
def smooth_store(tmp_path_factory) -> Store:
    """Twelve smooth flow images, whose interpolation has small errors."""
    blurred = (
        replace(item, flow_image=(20 * cv2.GaussianBlur(item.flow_image.astype(np.float32), (0, 0), 3)).astype("f2"))
        for item in islice(random_samples(), 12)
    )
    return write_store(tmp_path_factory.mktemp("smooth") / "store", blurred, {})


def resident_of(store: Store, *, cache_mb: int = 2048, device: str = "cpu", threads: int = 1) -> Resident:
    data = replace(STORED, cache_mb=cache_mb)
    place = {"device": torch.device(device), "threads": threads}
    return Resident(store, range(len(store.rows)), data=data, mosaic_size=28, **place)


def batch_of(store: Store, *, seed: int = 3, steps: int = 1, transform=RAW, device: str = "cpu", **augment) -> Batch:
    sampler = EpochSampler(rows=tuple(range(len(store.rows))), batch_size=64, seed=seed, shuffle=False)
    resident = resident_of(store, device=device)
    stream = FlowStream(resident, sampler, augment=AugmentConfig(**augment), transform=transform, num_classes=3)
    return [stream.next() for _ in range(steps)][-1]


def as_mosaic(batch: Batch, index: int) -> np.ndarray:
    return batch.images[index].cpu().numpy().transpose(1, 2, 0)


def raw(store: Store, row: int) -> np.ndarray:
    return store.read_flow(row).astype(np.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_flip_mirrors_the_mosaic_and_turns_u_round(smooth_store, device):
    flipped = batch_of(smooth_store, device=device, flip=FlipConfig(probability=1.0))
    for row, sample in enumerate(smooth_store.samples):
        plain = mosaic(raw(smooth_store, row), sample.landmarks, "anatomical")
        np.testing.assert_allclose(as_mosaic(flipped, row), plain[:, ::-1] * [-1, 1, 1], atol=1e-4 * np.ptp(plain))


def test_at_half_probability_some_flip_and_the_others_stay(smooth_store):
    """A flip of probability one half mirrors some samples and leaves the others as they are."""
    plain, some = batch_of(smooth_store), batch_of(smooth_store, flip=FlipConfig(probability=0.5))
    same = [torch.allclose(plain.images[i], some.images[i], atol=1e-3) for i in range(12)]
    assert 0 < sum(same) < 12


@given(numbers=st.lists(st.integers(0, 14), min_size=16, max_size=16), size=st.integers(28, 60))
def test_mirroring_regions_twice_is_the_identity(numbers, size):
    starts = np.array(numbers, np.int32).reshape(2, 4, 2)
    sides, sizes = np.array([14, 10]), np.array([size, 28])
    assert np.array_equal(mirrored_starts(mirrored_starts(starts, sides, sizes), sides, sizes), starts)


@settings(max_examples=50)
@given(degrees=st.floats(-45, 45), mirrored=st.booleans(), factor=st.floats(0.2, 5))
def test_the_vector_matrix_scales_strain_and_lengths_alike(degrees, mirrored, factor):
    """The vector matrix keeps strain and the lengths of vectors, up to the factor of magnification."""
    [matrix] = vector_matrices(np.array([degrees]), np.array([mirrored]), np.array([factor]))
    vectors = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    mapped = vectors @ matrix.T
    np.testing.assert_allclose(np.hypot(*mapped[:, :2].T), factor * np.hypot(*vectors[:, :2].T), rtol=2e-5)
    np.testing.assert_allclose(mapped[:, 2], factor * vectors[:, 2], rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_turning_by_zero_is_the_identity(smooth_store, device):
    [matrix] = vector_matrices(np.zeros(1), np.zeros(1, bool), np.ones(1))
    assert np.array_equal(matrix, np.eye(3, dtype=np.float32))
    points = np.random.default_rng(1).uniform(0, 27, (3, 5, 2))
    np.testing.assert_allclose(turned_points(points, np.zeros(3), np.full(3, 28)), points, rtol=1e-13)
    almost = batch_of(smooth_store, device=device, rotate=RotateConfig(degrees=1e-9))
    torch.testing.assert_close(almost.images, batch_of(smooth_store, device=device).images, rtol=1e-5, atol=1e-4)


def turned_by_opencv(image: np.ndarray, degrees: float) -> np.ndarray:
    """Picture and vectors turned counter-clockwise about the centre, plainly."""
    centre = (image.shape[0] - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), degrees, 1.0)
    moved = cv2.warpAffine(image, matrix, image.shape[:2], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    # OpenCV's matrix maps points (x, y), and vectors are differences of points
    moved[..., :2] = moved[..., :2] @ matrix[:, :2].T.astype(np.float32)
    return moved


@pytest.mark.parametrize("device", DEVICES)
def test_rotation_is_opencvs_with_the_vectors_turned_along(smooth_store, device):
    config = RotateConfig(degrees=20.0)
    batch = batch_of(smooth_store, device=device, rotate=config)
    draws, places = draw(3, 0, len(smooth_store.rows)), FaceGeometry.of(smooth_store.samples)
    changes = plan_changes(AugmentConfig(rotate=config), draws, places=places, rule="anatomical")
    turned = turned_points(places.points, 20.0 * (2 * draws["rotate"][:, 0] - 1), places.sizes)
    for row, points in enumerate(turned):
        assert np.array_equal(changes.starts[row], region_starts(points, 28, "anatomical"))
        degrees = 20.0 * (2 * draws["rotate"][row, 0] - 1)
        wanted = mosaic(turned_by_opencv(raw(smooth_store, row), degrees), points, "anatomical")
        # OpenCV's linear interpolation has 1/32 pixel steps
        assert np.abs(as_mosaic(batch, row) - wanted).max() < 0.03 * np.abs(wanted).max()


def strain(field: np.ndarray) -> np.ndarray:
    """Of an (H, W, 2) field."""
    return optical_strain(torch.from_numpy(field.transpose(2, 0, 1).astype(np.float32))[None])[0].numpy()


def test_the_strain_of_a_turned_field_is_the_turned_strain():
    y, x = np.mgrid[0:64, 0:64].astype(np.float32) - 31.5
    field = np.dstack([np.exp(-((x - 4) ** 2 + y**2) / 200), 0.5 * np.exp(-(x**2 + (y + 6) ** 2) / 150)])
    image = np.dstack([field, strain(field)]).astype(np.float32)
    turned = turned_by_opencv(image, 25.0)
    inner = slice(14, 50)
    again = strain(turned[..., :2])[inner, inner]
    assert np.abs(again - turned[inner, inner, 2]).max() < 0.05 * image[..., 2].max()


def test_points_turn_with_the_picture():
    image = np.zeros((41, 41, 3), np.float32)
    image[10, 30] = 1.0
    turned = turned_by_opencv(image, 30.0)
    row, column = np.unravel_index(np.argmax(turned[..., 2]), (41, 41))
    [[[x, y]]] = turned_points(np.array([[[30.0, 10.0]]]), np.array([30.0]), np.array([41]))
    assert abs(x - column) < 1
    assert abs(y - row) < 1


@pytest.mark.parametrize("device", DEVICES)
def test_magnification_multiplies_flow_and_strain_alike(smooth_store, device):
    plain = batch_of(smooth_store, device=device).images
    strong = batch_of(smooth_store, device=device, magnify=MagnifyConfig(low=0.5, high=3.0)).images
    factors = [(strong[i] / plain[i])[plain[i].abs() > 0.1] for i in range(12)]
    for values in factors:
        torch.testing.assert_close(values, values.mean().expand_as(values), rtol=1e-4, atol=0)
    means = [float(values.mean()) for values in factors]
    assert 0.5 <= min(means) < 1.0 < max(means) <= 3.0


def test_landmark_jitter_moves_the_cut_inside_the_picture(smooth_store):
    """Landmark jitter cuts beside the landmark but inside the picture."""
    config = AugmentConfig(jitter=JitterConfig(shift=0.2, scale=0.2))
    draws, places = draw(0, 5, len(smooth_store.rows)), FaceGeometry.of(smooth_store.samples)
    changes = plan_changes(config, draws, places=places, rule="anatomical")
    assert (changes.starts >= 0).all()
    assert (changes.starts + changes.side[:, None] <= 28).all()
    assert len(set(changes.side[:, 0])) > 2
    batch = batch_of(smooth_store, jitter=config.jitter)
    assert batch.images.shape == (12, 3, 28, 28)
    assert not torch.equal(batch.images, batch_of(smooth_store).images)


@given(numbers=st.lists(st.floats(0, 1, exclude_max=True), min_size=8, max_size=8), probability=st.floats(0, 1))
def test_one_region_always_stays(numbers, probability):
    kept = kept_regions(np.array(numbers).reshape(2, 4), probability)
    assert (kept.sum(axis=1) >= 1).all()
    assert set(kept.flat) <= {0.0, 1.0}


@pytest.mark.parametrize("device", DEVICES)
def test_vectors_are_mapped_before_pictures_are_stretched(smooth_store, device):
    """Stretched pictures are stretched after their vectors are mapped."""
    stretched = FlowTransform(mosaic_size=28, minmax=True)
    batch = batch_of(smooth_store, device=device, transform=stretched, flip=FlipConfig(probability=1.0))
    for row, sample in enumerate(smooth_store.samples):
        turned_round = scale_minmax(raw(smooth_store, row) * np.float32([-1, 1, 1]))
        wanted = mosaic(turned_round, sample.landmarks, "anatomical")[:, ::-1]
        np.testing.assert_allclose(as_mosaic(batch, row), wanted, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [0.0, 0.3, -0.5, 1000.0])
def test_a_channel_that_does_not_vary_is_zero_after_stretching(tmp_path, value, device):
    item = next(random_samples())
    image = item.flow_image.copy()
    image[..., 0] = value
    store = write_store(tmp_path / "store", [replace(item, flow_image=image)], {})
    stretched = FlowTransform(mosaic_size=28, minmax=True, mean=(3.0, 0.0, 0.0), std=(2.0, 1.0, 1.0))
    batch = batch_of(store, device=device, transform=stretched, flip=FlipConfig(probability=1.0))
    assert torch.equal(batch.images[:, 0], torch.full((1, 28, 28), -1.5, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_a_dropped_region_is_the_training_mean(smooth_store, device):
    transform = fit_transform(resident_of(smooth_store), range(12), standardise=True)
    batch = batch_of(smooth_store, device=device, transform=transform, drop_region=DropRegionConfig(probability=0.5))
    plain = batch_of(smooth_store, device=device, transform=transform)
    dropped = 0
    for image, before in zip(batch.images, plain.images, strict=True):
        for y in (0, 14):
            for x in (0, 14):
                part = image[:, y : y + 14, x : x + 14]
                if part.abs().max() < 1e-5:
                    dropped += 1
                else:
                    torch.testing.assert_close(part, before[:, y : y + 14, x : x + 14], rtol=1e-4, atol=1e-4)
    assert 10 < dropped < 40


EVERYTHING = AugmentConfig(
    flip=FlipConfig(probability=0.5),
    rotate=RotateConfig(degrees=8.0),
    jitter=JitterConfig(shift=0.05, scale=0.1),
    magnify=MagnifyConfig(low=0.8, high=1.25),
    drop_region=DropRegionConfig(probability=0.1),
    mix=MixConfig(kind="mixup"),
)


def make_stream(
    store: Store, *, batch_size=5, threads=1, state=None, cache_mb=2048, augment=EVERYTHING, device="cpu", **changes
):
    options = {"rows": tuple(range(len(store.rows))), "batch_size": batch_size, "seed": 9, "shuffle": True}
    resident = resident_of(store, cache_mb=cache_mb, device=device, threads=threads)
    sampler = EpochSampler(**(options | changes))
    return FlowStream(resident, sampler, augment=augment, transform=RAW, num_classes=3, state=state)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "labels", "rows"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augment", [EVERYTHING, AugmentConfig(), AugmentConfig(mix=MixConfig(kind="cutmix"))])
def test_threads_cache_and_interruptions_change_no_batch(smooth_store, augment, device):
    """Neither threads nor cache nor an interruption changes a batch."""
    stream = make_stream(smooth_store, device=device, augment=augment)
    undisturbed = [stream.next() for _ in range(7)]
    for options in ({"threads": 2}, {"cache_mb": 0}):
        other = make_stream(smooth_store, device=device, augment=augment, **options)
        assert all(same(other.next(), batch) for batch in undisturbed)
    walking = make_stream(smooth_store, device=device, augment=augment)
    for step in range(4):
        # a step in the middle of an epoch, continued with another cache
        resumed = make_stream(smooth_store, device=device, augment=augment, state=walking.state(), cache_mb=0)
        assert all(same(resumed.next(), batch) for batch in undisturbed[step:])
        walking.next()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_mb", [2048, 0], ids=["resident", "streamed"])
@pytest.mark.parametrize("kind", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("size", [28, 40], ids=["whole pixels", "resized"])
def test_a_batch_is_the_same_wherever_it_is_made(tmp_path, size, kind, cache_mb, device):
    """Of the CPU's resident stream, to the bit on a CPU; on a GPU within 1e-4 of the largest value.

    Interpolation adds up in another order there; what is drawn, labels and rows are the CPU's.
    """
    items = (
        replace(item, flow_image=(20 * cv2.GaussianBlur(item.flow_image.astype("f4"), (0, 0), 3)).astype("f2"))
        for item in islice(random_samples(flow_size=size), 12)
    )
    store = write_store(tmp_path / "store", items, {})
    augment = replace(EVERYTHING, mix=MixConfig(kind=kind))
    expected, found = (
        make_stream(store, augment=augment, **options) for options in ({}, {"device": device, "cache_mb": cache_mb})
    )
    tolerance = 0.0 if device == "cpu" else 1e-4
    for _ in range(4):
        one, other = found.next(), expected.next()
        assert str(one.images.device) == str(one.labels.device) == device
        assert torch.equal(one.rows, other.rows)
        torch.testing.assert_close(one.labels.cpu(), other.labels, rtol=0, atol=1e-6)
        difference = (one.images.cpu() - other.images).abs().max()
        assert difference <= tolerance * other.images.abs().max()


def test_epochs_and_seeds_draw_differently(smooth_store):
    first = make_stream(smooth_store, batch_size=12)
    assert not torch.equal(first.next().images.sum(0), first.next().images.sum(0))
    other = make_stream(smooth_store, batch_size=12, seed=10)
    assert not torch.equal(make_stream(smooth_store, batch_size=12).next().images, other.next().images)


def test_a_rank_gets_its_part_of_the_batch_of_one_process(smooth_store):
    """A rank gets its part of the very batch that one process would get."""
    augment = replace(EVERYTHING, mix=MixConfig())
    whole = make_stream(smooth_store, batch_size=6, augment=augment)
    parts = [make_stream(smooth_store, batch_size=6, augment=augment, rank=rank, ranks=2) for rank in (0, 1)]
    for _ in range(4):
        batch = whole.next()
        for rank, part in enumerate(parts):
            mine = part.next()
            assert torch.equal(mine.rows, batch.rows[rank::2])
            assert torch.equal(mine.images, batch.images[rank::2])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_labels_say_what_the_picture_holds(kind):
    # sample i is a picture of the number i with label i % 3, so that the shares can be read off the pixels
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 8)
    labels = torch.arange(6) % 3
    plain = Batch(images=images, labels=labels, rows=torch.arange(6))
    batch = mix_batch(plain, MixConfig(kind=kind, alpha=1.0), num_classes=3, seed=1, step=2)
    assert batch.labels.shape == (6, 3)
    torch.testing.assert_close(batch.labels.sum(1), torch.ones(6))
    if kind == "cutmix":
        assert set(batch.images.unique().tolist()) <= set(range(6))
        for image, target in zip(batch.images[:, 0], batch.labels, strict=True):
            share = torch.stack([((image.long() % 3) == c).float().mean() for c in range(3)])
            torch.testing.assert_close(share, target)
    else:
        for index, target in enumerate(batch.labels):
            value = batch.images[index, 0, 0, 0]
            own = target[labels[index]]
            assert own > 0
            assert 0 <= value <= 5
    assert not same(batch, mix_batch(plain, MixConfig(kind=kind, alpha=1.0), num_classes=3, seed=1, step=3))
    assert same(batch, mix_batch(plain, MixConfig(kind=kind, alpha=1.0), num_classes=3, seed=1, step=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": AugmentConfig(magnify=MagnifyConfig(high=2.0))}, r"augment\.magnify needs scaling=stored"),
        ({"augment": AugmentConfig(flip=FlipConfig(probability=0.5)), "crop": "upstream"}, "need crop=anatomical"),
        (
            {"augment": AugmentConfig(drop_region=DropRegionConfig(probability=0.5)), "standardise": False},
            "drop_region with scaling=minmax needs standardise=true",
        ),
        ({"balance": "class", "shuffle": False}, "balance=class needs shuffle=true"),
        ({"cache_mb": -1}, r"cache_mb\s+Input should be greater than or equal to 0 .*-1"),
    ],
)
def test_useless_and_wrong_settings_are_refused(changes, message):
    """Settings that would do nothing, or the wrong thing, are refused."""
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


PUBLISHED = {"sources": [{"adapter": "htnet_release", "flow": {"scaling": "min-max per channel to 0..255"}}]}


def with_onset(item: PreparedSample, dataset: str) -> PreparedSample:
    """A sample that was made of frames where it is of the dataset."""
    return replace(item, sample=replace(item.sample, onset=1)) if item.sample.id.dataset == dataset else item


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"augment": AugmentConfig(flip=FlipConfig(probability=0.5)), "scaling": "stored"}, "flip.probability=0.5: "),
        ({"augment": AugmentConfig(rotate=RotateConfig(degrees=5.0))}, "rotate.degrees=5: "),
        ({"augment": AugmentConfig(magnify=MagnifyConfig(high=2.0)), "scaling": "stored"}, "magnify.high=2: "),
        ({"augment": AugmentConfig(magnify=MagnifyConfig(low=0.5)), "scaling": "stored"}, "magnify.low=0.5: "),
        (
            {
                "augment": AugmentConfig(drop_region=DropRegionConfig(probability=0.5)),
                "scaling": "stored",
                "standardise": False,
            },
            "drop_region.probability=0.5: ",
        ),
    ],
)
def test_published_pictures_refuse_changes_that_need_zero_rest(tmp_path, tiny_store, changes, said):
    """Changes that need rest at zero are refused on published pictures, and not on flow in pixels."""
    data = DataConfig(**changes)
    published = write_store(tmp_path / "published", random_samples(subjects=2), PUBLISHED)
    with pytest.raises(InputError, match=rf"{published.path}: data\.augment\.{said}casme2/sub00/EP00 is a published"):
        check_folds(Config(data=data), published)
    check_folds(Config(data=data), tiny_store)
    mixed = (with_onset(item, "casme2") for item in random_samples(subjects=2))
    check_folds(
        Config(data=replace(data, datasets=("casme2",))), write_store(tmp_path / "mixed", mixed, PUBLISHED)
    )  # the store holds both, the folds pixels only


def test_published_pictures_take_the_changes_that_are_right(tmp_path):
    """Published pictures are mirrored, cut elsewhere, mixed and have regions dropped where that is right."""
    published = write_store(tmp_path / "store", random_samples(subjects=2), PUBLISHED)
    harmless = AugmentConfig(jitter=JitterConfig(shift=0.1, scale=0.1), drop_region=DropRegionConfig(probability=0.2))
    check_folds(Config(data=DataConfig(augment=replace(harmless, flip=FlipConfig(probability=0.5)))), published)
    check_folds(Config(data=DataConfig(augment=harmless, scaling="stored")), published)
    check_folds(Config(data=DataConfig(scaling="stored", standardise=False, crop="upstream")), published)


def test_published_pictures_and_pixels_do_not_mix_as_stored(tmp_path):
    """Published pictures and flow in pixels do not train together on stored values."""
    samples = (with_onset(item, "samm") for item in random_samples(subjects=2))
    mixed = write_store(tmp_path / "store", samples, PUBLISHED)
    both = (
        "data.scaling=stored: casme2/sub00/EP00 is a published picture of 0..255 and samm/sub00/EP00 is flow in pixels"
    )
    with pytest.raises(InputError, match=both):
        check_folds(Config(data=DataConfig(scaling="stored")), mixed)
    check_folds(Config(data=DataConfig(scaling="stored", datasets=("casme2", "smic"))), mixed)
    check_folds(Config(), mixed)


def test_a_mirrored_published_picture_has_255_minus_u():
    """A mirrored published picture has 255 minus u in place of u under min-max scaling."""
    picture = np.random.default_rng(0).integers(0, 256, (28, 28, 3)).astype(np.float32)
    picture[0, 0], picture[27, 27] = 0, 255
    turned = scale_minmax(picture * np.array([-1, 1, 1], np.float32))
    assert np.allclose(turned[..., 0], 255 - picture[..., 0], atol=1e-4)
    assert np.allclose(turned[..., 1:], picture[..., 1:], atol=1e-4)
