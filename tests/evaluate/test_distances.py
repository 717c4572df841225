"""Laws of the distances: closed forms, a second way of computing, invariance, and intervals that cover."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.distances import (
    FrechetStatistic,
    KernelStatistic,
    MeanStatistic,
    bootstrap,
    draw_counts,
    frechet_distance,
    kernel_distance,
    percentile_interval,
)

Distance = Callable[[Tensor, Tensor], float]


def gaussian(num: int, num_features: int, *, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num, num_features, generator=generator) + shift


def frechet_by_matrix_root(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root))


def kernel_by_loops(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x.double() @ y.double()) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = sum(kernel(a[i], b[j]) for i in range(n) for j in range(m)) / (n * m)
    return 1000 * (within_a + within_b - 2 * across)


@pytest.mark.parametrize("num_components", [None, 4])
def test_frechet_of_a_set_with_itself_is_zero(num_components: int | None) -> None:
    a = gaussian(50, 12, seed=0)
    assert frechet_distance(a, a, num_components=num_components) == pytest.approx(0, abs=1e-9)


def test_frechet_is_symmetric_without_projection() -> None:
    a, b = gaussian(60, 12, seed=0), gaussian(45, 12, seed=1, shift=0.3, scale=1.4)
    there, back = frechet_distance(a, b, num_components=None), frechet_distance(b, a, num_components=None)
    assert there == pytest.approx(back, rel=1e-9)


@pytest.mark.parametrize("num_features", [6, 80])  # below and above the number of pictures: both ways of computing
def test_frechet_equals_the_matrix_root(num_features: int) -> None:
    a, b = gaussian(40, num_features, seed=0), gaussian(55, num_features, seed=1, shift=0.4, scale=1.3)
    # A singular covariance leaves the matrix root with errors of about sqrt(epsilon).
    assert frechet_distance(a, b, num_components=None) == pytest.approx(frechet_by_matrix_root(a, b), rel=1e-4)


def test_frechet_projection_equals_the_matrix_root_of_projected_features() -> None:
    a, b = gaussian(200, 10, seed=0, shift=0.2), gaussian(220, 10, seed=1) * torch.linspace(3, 0.2, 10)
    centered = (b - b.mean(0)).double()
    axes = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :4]
    projected = frechet_by_matrix_root(a.double() @ axes, b.double() @ axes)
    assert frechet_distance(a, b, num_components=4) == pytest.approx(projected, rel=1e-6)


def test_frechet_has_the_closed_form_of_a_shift_and_a_scale() -> None:
    # |shift|^2 * F + F * (scale - 1)^2, with a small-sample bias of order F^2 / N.
    a, b = gaussian(20_000, 5, seed=0, shift=0.5, scale=2.0), gaussian(20_000, 5, seed=1)
    assert frechet_distance(a, b, num_components=None) == pytest.approx(5 * 0.25 + 5 * 1.0, rel=0.03)


def test_a_pure_shift_of_the_same_pictures_is_exact() -> None:
    a = gaussian(64, 8, seed=0)
    assert frechet_distance(a + 0.5, a, num_components=None) == pytest.approx(8 * 0.25, rel=1e-5)


def test_projection_keeps_no_more_axes_than_the_reference_has() -> None:
    a, b = gaussian(30, 100, seed=0), gaussian(10, 100, seed=1)
    assert frechet_distance(a, b, num_components=64) == pytest.approx(frechet_distance(a, b, num_components=9))


def test_kernel_equals_the_double_sum() -> None:
    a, b = gaussian(17, 6, seed=0), gaussian(23, 6, seed=1, shift=0.4)
    assert kernel_distance(a, b) == pytest.approx(kernel_by_loops(a, b), rel=1e-9)


def test_kernel_is_unbiased_at_equal_distributions() -> None:
    values = [kernel_distance(gaussian(30, 4, seed=2 * i), gaussian(40, 4, seed=2 * i + 1)) for i in range(400)]
    standard_error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * standard_error


def test_kernel_has_the_closed_form_of_a_shift_in_one_dimension() -> None:
    # E (x y + 1)^3 for independent x ~ N(p, 1), y ~ N(q, 1), from the first three moments; MMD^2 between p = 1 and 0.
    def expected(p: float, q: float) -> float:
        moments = [(1.0, m, m**2 + 1, m**3 + 3 * m) for m in (p, q)]
        return sum(c * x * y for c, x, y in zip((1, 3, 3, 1), *moments, strict=True))

    exact = 1000 * (expected(1, 1) + expected(0, 0) - 2 * expected(1, 0))
    measured = kernel_distance(gaussian(3000, 1, seed=0, shift=1.0), gaussian(3000, 1, seed=1))
    assert measured == pytest.approx(exact, rel=0.15)


def test_kernel_is_the_same_in_any_block() -> None:
    a, b = gaussian(37, 6, seed=0), gaussian(29, 6, seed=1)
    assert kernel_distance(a, b, block_images=5) == pytest.approx(kernel_distance(a, b), rel=1e-12)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_order_of_pictures_does_not_matter(distance: Distance) -> None:
    a, b = gaussian(40, 8, seed=0), gaussian(50, 8, seed=1, shift=0.2)
    assert distance(a.flip(0), b.roll(7, 0)) == pytest.approx(distance(a, b), rel=1e-9)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distance_grows_with_a_shift(distance: Distance) -> None:
    a, b = gaussian(80, 8, seed=0), gaussian(90, 8, seed=1)
    values = [distance(a + shift, b) for shift in (0.0, 0.25, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_statistics_at_unit_counts_are_the_distances() -> None:
    a, b = gaussian(40, 8, seed=0), gaussian(40, 8, seed=1, shift=0.2)
    ones = np.ones(40)
    assert FrechetStatistic(a, b)(ones) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    assert KernelStatistic(a, b)(ones) == pytest.approx(kernel_distance(a, b), rel=1e-9)
    assert KernelStatistic(a, b)(ones, ones) == pytest.approx(kernel_distance(a, b), rel=1e-9)


@pytest.mark.parametrize("num_features", [6, 60])
def test_frechet_of_counts_is_the_frechet_of_repeated_pictures(num_features: int) -> None:
    a, b = gaussian(20, num_features, seed=0), gaussian(25, num_features, seed=1, shift=0.3)
    counts_a, counts_b = next(draw_counts(20, seed=3)), next(draw_counts(25, seed=4))
    repeated = frechet_distance(
        a.repeat_interleave(torch.from_numpy(counts_a).long(), 0),
        b.repeat_interleave(torch.from_numpy(counts_b).long(), 0),
        num_components=None,
    )
    assert FrechetStatistic(a, b, num_components=None)(counts_a, counts_b) == pytest.approx(repeated, rel=1e-9)


def test_copies_do_not_raise_the_kernel_distance_of_resamples() -> None:
    # Paired pictures, each very like its own reference: counting copies, or own pairs twice, would show at once.
    b = gaussian(60, 5, seed=0)
    a = b + 0.3 * gaussian(60, 5, seed=1)
    statistic = KernelStatistic(a, b)
    resampled = np.array([statistic(counts) for counts in draw_counts(60, num_resamples=3000)])
    standard_error = resampled.std() / np.sqrt(len(resampled))
    assert abs(resampled.mean() - statistic(np.ones(60))) < 4 * standard_error


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_cover_what_other_pictures_would_give(paired: bool) -> None:
    for kind in (FrechetStatistic, KernelStatistic):
        name = kind.__name__
        values, intervals = [], []
        for i in range(60):
            b = gaussian(80, 4, seed=1000 + i)
            a = 0.8 * (b if paired else gaussian(80, 4, seed=5000 + i)) + 0.5 * gaussian(
                80, 4, seed=3000 + i, shift=1.0
            )
            interval = bootstrap(kind(a, b), num_reference=None if paired else 80, num_resamples=150, seed=i)
            assert interval.low < interval.value < interval.high
            values.append(interval.value)
            intervals.append(interval)
        expected = np.mean(values)
        covered = np.mean([interval.low <= expected <= interval.high for interval in intervals])
        assert covered >= 0.85, f"{name}: covers {covered:.0%} of 60"
        half = np.mean([(interval.high - interval.low) / 2 for interval in intervals])
        assert half == pytest.approx(1.96 * np.std(values), rel=0.35), f"{name}: width"


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = gaussian(400, 1, seed=0)[:, 0]
    interval = bootstrap(MeanStatistic(values), num_resamples=4000)
    half = 1.96 * float(values.std()) / 20
    assert interval.value == pytest.approx(float(values.double().mean()))
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.06)


def test_one_picture_of_difference_is_not_pushed_across_zero() -> None:
    hits = torch.zeros(343)
    hits[5] = 1.0
    for seed in range(20):
        assert bootstrap(MeanStatistic(hits), seed=seed).low == 0.0


def test_centering_moves_a_biased_resample_onto_the_value() -> None:
    resampled = np.linspace(2.0, 4.0, 1001)
    interval = percentile_interval(1.0, resampled, center=True)
    assert (interval.low, interval.high) == pytest.approx((0.05, 1.95))
    plain = percentile_interval(1.0, resampled, center=False)
    assert (plain.low, plain.high) == pytest.approx((2.05, 3.95))


def test_same_seed_same_resamples_and_the_global_generator_is_left_alone() -> None:
    expected = np.random.RandomState(3).random_sample()
    np.random.seed(3)
    first, again, other = (list(draw_counts(9, num_resamples=3, seed=seed)) for seed in (5, 5, 6))
    assert all((x == y).all() for x, y in zip(first, again, strict=True))
    assert any((x != y).any() for x, y in zip(first, other, strict=True))
    assert all(counts.sum() == 9 for counts in first)
    assert np.random.random_sample() == expected


def test_groups_are_drawn_whole_and_widen_the_interval() -> None:
    groups = torch.arange(100).repeat_interleave(4) * 3 + 7  # any labels will do
    values = gaussian(100, 1, seed=0)[:, 0].repeat_interleave(4)
    for counts in draw_counts(400, num_resamples=5, groups=groups):
        assert (counts.reshape(100, 4) == counts.reshape(100, 4)[:, :1]).all()
    apart = bootstrap(MeanStatistic(values))
    together = bootstrap(MeanStatistic(values), groups=groups)
    assert together.high - together.low == pytest.approx(2 * (apart.high - apart.low), rel=0.2)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_bad_features_are_named(distance: Distance) -> None:
    a = gaussian(5, 3, seed=0)
    broken = a.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(ArraError, match="generated features: picture 3"):
        distance(broken, a)
    with pytest.raises(ArraError, match="reference features: 1 pictures"):
        distance(a, a[:1])


def test_two_hundred_resamples_of_both_distances_are_quick() -> None:
    a, b = gaussian(350, 1280, seed=0), gaussian(350, 1280, seed=1, shift=0.05)
    start = time.process_time()
    for statistic in (FrechetStatistic(a, b), KernelStatistic(a, b)):
        bootstrap(statistic, num_resamples=200)
    assert time.process_time() - start < 10
