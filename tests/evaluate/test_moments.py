"""Laws of streamed moments and of the Frechet distance: closed forms, other libraries, influences, extrapolation."""

import numpy as np
import pytest
import torch

from arra.errors import ArraError
from arra.evaluate.distances import FrechetStatistic
from arra.evaluate.moments import FrechetTo, Moments, MomentSums, frechet, frechet_infinity


def drawn(count: int, size: int, *, seed: int = 0, falls: float = 0.5, shift: float = 0.0) -> np.ndarray:
    """Features whose axes are mixed and whose variances fall."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(size, size)) / np.sqrt(size)
    scales = np.arange(1, size + 1.0) ** -falls
    return ((generator.normal(size=(count, size)) * scales + shift) @ mixing).astype(np.float32)


def moments_of(features: np.ndarray) -> Moments:
    sums = MomentSums(features.shape[1])
    sums.add(features)
    return sums.finish()


def weighted(features: np.ndarray, weights: np.ndarray) -> Moments:
    """Of pictures that count for so much each, whose weights sum to 1."""
    x, count = features.astype(np.float64), len(features)
    mean = weights @ x
    covariance = (x - mean).T @ ((x - mean) * weights[:, None]) * count / (count - 1)
    return Moments(mean=mean, covariance=covariance, count=count)


def close(a: Moments, b: Moments) -> bool:
    scale = np.abs(b.covariance).max()
    return np.allclose(a.mean, b.mean, rtol=1e-13) and bool(np.abs(a.covariance - b.covariance).max() < 1e-12 * scale)


@pytest.mark.parametrize("batch", [1, 7, 64, 300])
def test_moments_are_the_same_in_any_batches_and_are_numpys(batch: int) -> None:
    features = drawn(300, 5, shift=3.0)
    sums = MomentSums(5)
    for start in range(0, 300, batch):
        sums.add(torch.from_numpy(features[start : start + batch]))
    found = sums.finish()
    assert close(found, Moments(mean=features.mean(0, dtype=np.float64), covariance=np.cov(features.T), count=300))
    assert found.count == 300
    assert found.mean.dtype == found.covariance.dtype == np.float64


def test_nothing_cancels_far_from_zero() -> None:
    near = np.random.default_rng(0).integers(-8, 9, (500, 3)).astype(np.float64)
    sums = MomentSums(3)
    for block in np.split(near + 1e7, 10):  # the sum of squares would have no digit left of the variance
        sums.add(block)
    np.testing.assert_allclose(sums.finish().covariance, np.cov(near.T), rtol=1e-7)


def test_what_ranks_saw_is_joined_in_any_order_with_a_rank_that_saw_nothing() -> None:
    features = drawn(90, 4)
    parts = [MomentSums(4) for _ in range(4)]
    for sums, (start, end) in zip(parts, [(0, 50), (50, 51), (51, 90), (90, 90)], strict=True):
        sums.add(features[start:end])
    states = [part.state() for part in parts]
    assert all(value.dtype == np.float64 for state in states for value in state.values())
    assert close(MomentSums.joined(states).finish(), moments_of(features))
    assert close(MomentSums.joined(states[::-1]).finish(), moments_of(features))
    first = MomentSums.joined(states[:1])
    for part in parts[1:]:
        first.merge(part)
    assert close(first.finish(), moments_of(features))
    assert close(parts[0].finish(), moments_of(features[:50]))  # joining has changed none of them


def test_sums_may_go_on_after_moments_are_taken() -> None:
    features = drawn(40, 3)
    sums = MomentSums(3)
    sums.add(features[:20])
    half = sums.finish()
    sums.add(features[20:])
    assert close(half, moments_of(features[:20]))
    assert close(sums.finish(), moments_of(features))


def test_features_that_are_not_finite_and_single_pictures_are_refused() -> None:
    sums = MomentSums(3)
    sums.add(np.zeros((1, 3), dtype=np.float32))
    with pytest.raises(ArraError, match="needs at least 2 pictures, got 1"):
        sums.finish()
    with pytest.raises(ArraError, match="picture 2 has a value that is not finite"):
        sums.add(np.array([[0, 0, 0], [0, np.nan, 0]], dtype=np.float32))


def test_the_distance_of_gaussians_with_common_axes_is_the_closed_form() -> None:
    generator = np.random.default_rng(0)
    axes = np.linalg.qr(generator.normal(size=(40, 40)))[0]
    a, b = generator.uniform(0.01, 3, 40), generator.uniform(0.01, 3, 40)
    shift = generator.normal(size=40)
    one = Moments(mean=shift, covariance=axes * a @ axes.T, count=None)
    other = Moments(mean=np.zeros(40), covariance=axes * b @ axes.T, count=None)
    assert frechet(one, other) == pytest.approx(shift @ shift + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-12)


def test_the_distance_is_that_of_scipy_torchmetrics_and_torch_fidelity() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    fid = pytest.importorskip("torchmetrics.image.fid")
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = drawn(400, 24), drawn(300, 24, seed=1, falls=0.3, shift=0.2)
    a, b = moments_of(x), moments_of(y)
    found = frechet(a, b)
    root = np.trace(linalg.sqrtm(a.covariance @ b.covariance)).real
    shift = a.mean - b.mean
    assert found == pytest.approx(shift @ shift + np.trace(a.covariance + b.covariance) - 2 * root, rel=1e-10)
    tensors = [torch.from_numpy(value) for value in (a.mean, a.covariance, b.mean, b.covariance)]
    assert found == pytest.approx(float(fid._compute_fid(*tensors)), rel=1e-10)
    statistics = [fidelity.fid_features_to_statistics(torch.from_numpy(each).double()) for each in (x, y)]
    theirs = fidelity.fid_statistics_to_metric(*statistics, verbose=False)[fidelity.KEY_METRIC_FID]
    assert found == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("counts", [(200, 150), (12, 150), (200, 9), (12, 9), (2, 2)])
def test_the_distance_is_symmetric_and_that_of_the_samples_themselves_with_few_pictures_too(
    counts: tuple[int, int],
) -> None:
    x, y = drawn(counts[0], 24), drawn(counts[1], 24, seed=1, shift=0.3)
    a, b = moments_of(x), moments_of(y)
    exact = FrechetStatistic(torch.from_numpy(x), torch.from_numpy(y), num_components=None)
    assert frechet(a, b) == pytest.approx(exact(np.ones(len(x)), np.ones(len(y))), rel=1e-10)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-10)
    assert FrechetTo(b).measured(a, x).value == pytest.approx(frechet(a, b), rel=1e-12)


@pytest.mark.parametrize("count", [200, 9])
@pytest.mark.parametrize("falls", [0.0, 2.0])
def test_a_set_has_no_distance_to_itself(count: int, falls: float) -> None:
    a = moments_of(drawn(count, 24, falls=falls))
    assert 0 <= frechet(a, a) < 1e-12 * np.trace(a.covariance)


def test_rounding_makes_no_distance_negative() -> None:
    found = [frechet(a, a) for a in (moments_of(drawn(30, 4, seed=seed)) for seed in range(40))]
    assert min(found) == 0.0


@pytest.mark.parametrize("falls", [2.0, 4.0])
def test_spectra_beyond_the_digits_of_a_product_keep_theirs(falls: float) -> None:
    x, y = drawn(200, 24, falls=falls), drawn(150, 24, seed=1, falls=falls)
    exact = FrechetStatistic(torch.from_numpy(x), torch.from_numpy(y), num_components=None)
    expected = exact(np.ones(200), np.ones(150))
    reference = FrechetTo(moments_of(y))
    assert reference.value(moments_of(x)) == pytest.approx(expected, rel=1e-12)
    assert reference.measured(moments_of(x), x).value == pytest.approx(expected, rel=1e-12)


def test_features_that_never_vary_are_no_hindrance() -> None:
    x, y = drawn(60, 6), drawn(50, 6, seed=1)
    dead_x, dead_y = (np.concatenate([each, np.full((len(each), 2), 0.7, np.float32)], 1) for each in (x, y))
    assert frechet(moments_of(dead_x), moments_of(dead_y)) == pytest.approx(
        frechet(moments_of(x), moments_of(y)), rel=1e-9
    )
    same = np.repeat(dead_x[:1], 5, 0)  # a set that shows one picture
    reference = moments_of(dead_y)
    a = moments_of(same)
    expected = float(((a.mean - reference.mean) ** 2).sum() + np.trace(reference.covariance))
    for measured in (FrechetTo(reference).measured(a, same), FrechetTo(a).measured(reference, dead_y)):
        assert measured.value == pytest.approx(expected, rel=1e-9)
        assert measured.per_picture.mean() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("counts", [(60, 80), (60, 5), (6, 80), (6, 5)])
def test_influences_are_derivatives_and_sum_to_zero(counts: tuple[int, int]) -> None:
    size = 8
    x, y = drawn(counts[0], size), drawn(counts[1], size, seed=1, shift=0.4)
    reference = FrechetTo(moments_of(y))
    found = reference.measured(moments_of(x), x)
    influences = found.per_picture - found.value
    assert abs(influences.sum()) < 1e-12 * np.abs(influences).sum()
    for picture in range(5):
        towards = np.zeros(len(x))
        towards[picture] = 1.0
        step = 1e-4
        values = [
            reference.value(weighted(x, (1 - by) / len(x) + by * towards)) for by in (-2 * step, -step, step, 2 * step)
        ]
        slope = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
        assert influences[picture] == pytest.approx(slope, rel=1e-6, abs=1e-6 * np.abs(influences).max())


def test_the_spread_that_influences_tell_is_that_of_exact_resamples() -> None:
    x, y = drawn(500, 5), drawn(400, 5, seed=1, falls=0.2, shift=0.3)
    found = FrechetTo(moments_of(y)).measured(moments_of(x), x)
    statistic = FrechetStatistic(torch.from_numpy(x), torch.from_numpy(y), num_components=None)
    generator = np.random.default_rng(0)
    counts = [generator.multinomial(500, np.full(500, 1 / 500)).astype(np.float64) for _ in range(400)]
    exact = np.std([statistic(each, np.ones(400)) for each in counts])
    assert found.per_picture.std() / np.sqrt(500) == pytest.approx(exact, rel=0.1)
    linear = [each @ found.per_picture / 500 for each in counts]
    assert np.corrcoef(linear, [statistic(each, np.ones(400)) for each in counts])[0, 1] > 0.99


@pytest.mark.parametrize("count", [100, 5])
def test_influences_of_some_of_the_pictures_sum_to_zero_too(count: int) -> None:
    x = drawn(count, 6)
    reference = FrechetTo(moments_of(drawn(80, 6, seed=1)))
    whole, some = reference.measured(moments_of(x), x), reference.measured(moments_of(x), x[::3])
    assert some.value == pytest.approx(whole.value, rel=1e-12)
    assert some.per_picture.mean() == pytest.approx(whole.value, rel=1e-12)
    np.testing.assert_allclose(np.diff(some.per_picture), np.diff(whole.per_picture[::3]), rtol=1e-9, atol=1e-12)


def test_block_size_changes_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(100, 6)
    reference = FrechetTo(moments_of(drawn(80, 6, seed=1)))
    found = [(reference.measured(moments_of(x), x), frechet_infinity(reference, x, seed=3))]
    monkeypatch.setattr("arra.evaluate.moments.BLOCK_IMAGES", 7)
    found.append((reference.measured(moments_of(x), x), frechet_infinity(reference, x, seed=3)))
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert one.value == pytest.approx(other.value, rel=1e-10)
        np.testing.assert_allclose(one.per_picture, other.per_picture, rtol=1e-10)


def test_infinitely_many_pictures_have_the_distance_of_the_distributions() -> None:
    size, count = 8, 128
    covariance = np.diag(np.arange(1, size + 1.0) ** -0.5)
    reference = FrechetTo(Moments(mean=np.zeros(size), covariance=covariance, count=None))
    generator = np.random.default_rng(0)
    plain, extrapolated = [], []
    for seed in range(60):
        x = (generator.normal(size=(count, size)) * np.sqrt(np.diag(covariance))).astype(np.float32)
        found = frechet_infinity(reference, x, seed=seed)
        assert found is not None
        assert found.per_picture.mean() == pytest.approx(found.value, abs=1e-12)
        plain.append(reference.value(moments_of(x)))
        extrapolated.append(found.value)
    error = np.std(extrapolated) / np.sqrt(60)
    assert np.mean(plain) > 10 * error  # the bias
    assert abs(np.mean(extrapolated)) < 3 * error
    assert min(extrapolated) < 0


def test_the_spread_of_the_extrapolation_is_that_of_the_distance_far_away() -> None:
    x, reference = drawn(2000, 3, shift=1.0), FrechetTo(moments_of(drawn(500, 3, seed=1)))
    found, plain = frechet_infinity(reference, x), reference.measured(moments_of(x), x)
    assert found is not None
    assert found.per_picture.std() == pytest.approx(plain.per_picture.std(), rel=0.05)
    assert np.corrcoef(found.per_picture, plain.per_picture)[0, 1] > 0.99


def test_the_extrapolation_removes_both_terms_of_the_bias() -> None:
    from arra.evaluate.moments import EXTRAPOLATION

    parts, weights = np.array(list(EXTRAPOLATION)), np.array(list(EXTRAPOLATION.values()))
    np.testing.assert_allclose([weights.sum(), weights @ parts, weights @ parts**2], [1, 0, 0], atol=1e-14)


def test_an_extrapolation_is_the_same_of_one_seed_and_none_of_few_pictures() -> None:
    x = drawn(64, 8)
    reference = FrechetTo(moments_of(drawn(80, 8, seed=1)))
    one, same, other = (frechet_infinity(reference, x, seed=seed) for seed in (0, 0, 1))
    assert one is not None
    assert same is not None
    assert other is not None
    assert one.value == same.value != other.value
    assert frechet_infinity(reference, x[:63]) is None


def test_moments_that_do_not_fit_or_are_none_are_refused() -> None:
    reference = FrechetTo(moments_of(drawn(40, 6)))
    with pytest.raises(ArraError, match="moments of 5 features beside a reference of 6"):
        reference.value(moments_of(drawn(40, 5)))
    hole = Moments(mean=np.full(6, np.inf), covariance=np.eye(6), count=3)
    with pytest.raises(ArraError, match="reference moments: a value is not finite"):
        FrechetTo(hole)
    with pytest.raises(ArraError, match="generated moments: a value is not finite"):
        reference.value(hole)
    with pytest.raises(ArraError, match="reference covariance: an eigenvalue of -1 "):
        FrechetTo(Moments(mean=np.zeros(2), covariance=np.array([[1.0, 2.0], [2.0, 1.0]]), count=None))
