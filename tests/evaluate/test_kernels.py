"""Laws of kernel distances: definitions by loops, two other libraries, influences that are derivatives, coverage."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.functional.pairwise import pairwise_cosine_similarity
from torchmetrics.image.kid import poly_mmd

from arra.errors import ArraError
from arra.evaluate.distances import KernelStatistic, kernel_distance
from arra.evaluate.kernels import KernelDistance, cmmd, kid

Distance = Callable[..., KernelDistance]


def normal(num: int, num_features: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num, num_features)) + shift).astype(np.float32)


def cmmd_by_definition(
    x: np.ndarray, y: np.ndarray, *, weights: np.ndarray | None = None, others: np.ndarray | None = None
) -> float:
    """With float64 matrices as google-research/cmmd has them; the weights of either set sum to one."""
    x, y = (each.astype(np.float64) / np.linalg.norm(each.astype(np.float64), axis=1)[:, None] for each in (x, y))
    p = np.full(len(x), 1 / len(x)) if weights is None else weights
    q = np.full(len(y), 1 / len(y)) if others is None else others

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200)

    return float(1000 * (p @ kernel(x, x) @ p + q @ kernel(y, y) @ q - 2 * p @ kernel(x, y) @ q))


def test_kid_is_that_of_torch_fidelity_and_torchmetrics() -> None:
    x, y = (torch.from_numpy(normal(60, 24, seed=seed, shift=0.3 * seed)).double() for seed in (0, 1))
    ours = kid(x.float().numpy(), y.float().numpy()).generated.value
    fidelity = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert ours == pytest.approx(1000 * fidelity["kernel_inception_distance_mean"], rel=1e-6)
    assert ours == pytest.approx(1000 * float(poly_mmd(x, y)), rel=1e-6)
    assert ours == pytest.approx(kernel_distance(x.float(), y.float()), rel=1e-9)


def test_kid_of_sets_of_unequal_size_is_that_of_all_pairs() -> None:
    x, y = normal(40, 8, seed=0, shift=0.2), normal(55, 8, seed=1)
    assert kid(x, y).generated.value == pytest.approx(kernel_distance(torch.tensor(x), torch.tensor(y)), rel=1e-9)


def test_cmmd_is_its_definition() -> None:
    x, y = normal(30, 16, seed=0, shift=0.2), normal(45, 16, seed=1)
    assert cmmd(x, y).generated.value == pytest.approx(cmmd_by_definition(x, y), rel=1e-9)
    cosine = pairwise_cosine_similarity(torch.tensor(x).double(), torch.tensor(y).double())
    across = torch.exp((cosine - 1) / 100).mean()
    within = [
        torch.exp((pairwise_cosine_similarity(z, z, zero_diagonal=False) - 1) / 100).mean()
        for z in (torch.tensor(x).double(), torch.tensor(y).double())
    ]
    assert cmmd(x, y).generated.value == pytest.approx(1000 * float(sum(within) - 2 * across), rel=1e-6)


def test_cmmd_keeps_its_digits_where_sets_hardly_differ() -> None:
    x = normal(200, 16, seed=0)
    y = x.copy()
    y[0, 0] += np.float32(0.01)
    value = cmmd(x, y).generated.value
    gap = x[0].astype(np.float64) / np.linalg.norm(x[0].astype(np.float64))
    gap -= y[0].astype(np.float64) / np.linalg.norm(y[0].astype(np.float64))
    # One picture of N moved by a small gap: 1000 |gap|^2 / (100 N^2), some 1e-9.
    assert value == pytest.approx(1000 * (gap @ gap) / 100 / 200**2, rel=1e-3, abs=1e-12)


def test_cmmd_of_a_set_with_itself_is_zero_and_does_not_see_length() -> None:
    x = normal(50, 12, seed=0)
    assert cmmd(x, x).generated.value == pytest.approx(0, abs=1e-10)
    assert cmmd(x, 4 * x).generated.value == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_sets_change_places_freely(distance: Distance) -> None:
    x, y = normal(40, 8, seed=0, shift=0.2), normal(30, 8, seed=1)
    there, back = distance(x, y), distance(y, x)
    assert there.generated.value == pytest.approx(back.generated.value, rel=1e-9)
    np.testing.assert_allclose(there.generated.per_picture, back.reference.per_picture, rtol=1e-9)
    assert (there.generated.of, there.reference.of) == ("generated", "reference")


@pytest.mark.parametrize("distance", [kid, cmmd])
@pytest.mark.parametrize("block_images", [3, 16, 40])
def test_blocks_change_no_value(distance: Distance, block_images: int) -> None:
    x, y = normal(40, 8, seed=0, shift=0.2), normal(30, 8, seed=1)
    whole, parts = distance(x, y), distance(x, y, block_images=block_images)
    assert parts.generated.value == pytest.approx(whole.generated.value, rel=1e-9)
    for side in ("generated", "reference"):
        np.testing.assert_allclose(getattr(parts, side).per_picture, getattr(whole, side).per_picture, rtol=1e-8)


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_the_mean_of_the_values_is_the_value(distance: Distance) -> None:
    result = distance(normal(40, 8, seed=0, shift=0.2), normal(30, 8, seed=1))
    for side, num in ((result.generated, 40), (result.reference, 30)):
        assert side.per_picture.shape == (num,)
        assert side.per_picture.mean() == pytest.approx(side.value, rel=1e-12)


def numeric_influence(statistic: Callable[[np.ndarray], float], num: int) -> np.ndarray:
    """N times the derivative with respect to each picture's count, all others being 1."""
    step, influence = 1e-4, np.empty(num)
    for i in range(num):
        counts = np.ones(num)
        counts[i] += step
        more = statistic(counts)
        counts[i] -= 2 * step
        influence[i] = num * (more - statistic(counts)) / (2 * step)
    return influence


def test_influences_of_kid_are_derivatives() -> None:
    x, y = normal(20, 6, seed=0, shift=0.3), normal(15, 6, seed=1)
    statistic, result = KernelStatistic(torch.tensor(x), torch.tensor(y)), kid(x, y)
    of_x = numeric_influence(lambda counts: statistic(counts, np.ones(15)), 20)
    of_y = numeric_influence(lambda counts: statistic(np.ones(20), counts), 15)
    np.testing.assert_allclose(result.generated.per_picture - result.generated.value, of_x, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(result.reference.per_picture - result.reference.value, of_y, rtol=1e-5, atol=1e-4)


def test_influences_of_cmmd_are_derivatives() -> None:
    x, y = normal(12, 6, seed=0, shift=0.3), normal(9, 6, seed=1)
    result = cmmd(x, y)
    of_x = numeric_influence(lambda counts: cmmd_by_definition(x, y, weights=counts / counts.sum()), 12)
    of_y = numeric_influence(lambda counts: cmmd_by_definition(x, y, others=counts / counts.sum()), 9)
    np.testing.assert_allclose(result.generated.per_picture - result.generated.value, of_x, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.reference.per_picture - result.reference.value, of_y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("shift", "least", "most"), [(0.0, 1.05, 1.6), (0.5, 0.85, 1.15)])
def test_spread_told_by_influences_is_right_and_where_distributions_are_one_too_wide(
    shift: float, least: float, most: float
) -> None:
    reference = normal(400, 4, seed=99)
    results = [kid(normal(50, 4, seed=seed, shift=shift), reference).generated for seed in range(120)]
    told = np.median([result.per_picture.std() / np.sqrt(50) for result in results])
    assert least < told / np.std([result.value for result in results]) < most


def test_refusals_say_what_to_do() -> None:
    x = normal(20, 4, seed=0)
    broken, zero = x.copy(), x.copy()
    broken[11, 1], zero[3] = np.inf, 0
    for distance in (kid, cmmd):
        with pytest.raises(ArraError, match="reference features: 1 pictures, expected at least 2"):
            distance(x, x[:1])
        with pytest.raises(ArraError, match="generated features: picture 11 has a value that is not finite"):
            distance(broken, x, block_images=8)
    with pytest.raises(ArraError, match="reference features: picture 3 is a zero vector"):
        cmmd(x, zero)
    assert np.isfinite(kid(x, zero).generated.value)


@pytest.mark.parametrize("block_images", [7, 1000])
def test_kid_leaves_pairs_of_partners_out(block_images: int) -> None:
    x, y = normal(20, 8, seed=0, shift=0.2), normal(25, 8, seed=1)
    partners = np.random.default_rng(2).permutation(25)[:20]
    partners[[3, 11]] = -1, partners[5]  # one without, two of one
    kernel = (x.astype(np.float64) @ y.T.astype(np.float64) / 8 + 1) ** 3
    means = [
        np.delete(row, partner).mean() if partner >= 0 else row.mean()
        for row, partner in zip(kernel, partners, strict=True)
    ]
    found, whole = (kid(x, y, partners=each, block_images=block_images) for each in (partners, None))
    assert found.generated.value - whole.generated.value == pytest.approx(2000 * (kernel.mean() - np.mean(means)))
    assert found.generated.per_picture.mean() == pytest.approx(found.generated.value)
    assert found.reference.per_picture.mean() == pytest.approx(found.generated.value)
    none = kid(x, y, partners=np.full(20, -1), block_images=block_images)
    np.testing.assert_array_equal(none.generated.per_picture, whole.generated.per_picture)


def test_kid_of_partners_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    paired, plain = [], []
    for _ in range(200):
        y = rng.standard_normal((20, 4)).astype(np.float32)
        x = (0.9 * y + np.sqrt(1 - 0.9**2) * rng.standard_normal(y.shape)).astype(np.float32)  # of y's distribution
        paired.append(kid(x, y, partners=np.arange(20)).generated.value)
        plain.append(kid(x, y).generated.value)
    error = np.std(paired) / np.sqrt(200)
    assert abs(np.mean(paired)) < 3 * error
    assert np.mean(plain) < -6 * error
    assert kid(y, y, partners=np.arange(20)).generated.value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("partners", [[0, 1, 5], [0, -2, 1]])
def test_partners_that_are_none_are_refused(partners: list[int]) -> None:
    with pytest.raises(ValueError, match="partners are not rows of 5 reference pictures"):
        kid(normal(3, 4, seed=0), normal(5, 4, seed=1), partners=np.array(partners))
