"""Measures that scikit-learn has too, on the same features."""

import numpy as np
import pytest

from arra.evaluate.findings import FindingLabels, findings_auroc
from arra.evaluate.kernels import cmmd, kid
from arra.evaluate.neighbours import nearest, prdc

metrics = pytest.importorskip("sklearn.metrics", reason="pip install -e '.[dev]'")
neighbors = pytest.importorskip("sklearn.neighbors")


def drawn(num: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num, 24)) + shift).astype(np.float32)


GENERATED, REFERENCE = drawn(150, seed=0, shift=0.3), drawn(120, seed=1)


def test_kernel_distances_are_means_of_its_kernels() -> None:
    x, y = GENERATED.astype(np.float64), REFERENCE.astype(np.float64)

    def apart(kernel: np.ndarray) -> float:
        return float((kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)))

    cubic = metrics.pairwise.polynomial_kernel  # degree 3, gamma 1 / F, constant 1
    expected = 1000 * (apart(cubic(x)) + apart(cubic(y)) - 2 * cubic(x, y).mean())
    assert kid(GENERATED, REFERENCE).generated.value == pytest.approx(expected, rel=1e-9)
    x, y = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, y))
    gaussian = metrics.pairwise.rbf_kernel
    pairs = [gaussian(a, b, gamma=1 / 200).mean() for a, b in ((x, x), (y, y), (x, y))]
    expected = 1000 * (pairs[0] + pairs[1] - 2 * pairs[2])
    assert cmmd(GENERATED, REFERENCE).generated.value == pytest.approx(expected, rel=1e-6)


def test_neighbourhoods_are_those_of_its_search() -> None:
    k = 4
    trees = [neighbors.NearestNeighbors(algorithm="kd_tree").fit(each) for each in (GENERATED, REFERENCE)]
    radii = [tree.kneighbors(n_neighbors=k)[0][:, -1] for tree in trees]  # of its own pictures, without itself
    between = metrics.pairwise_distances(GENERATED, REFERENCE)
    found = prdc(GENERATED, REFERENCE, k=k)
    assert found.precision.value == pytest.approx((between <= radii[1]).any(1).mean(), rel=1e-12)
    assert found.recall.value == pytest.approx((between <= radii[0][:, None]).any(0).mean(), rel=1e-12)
    assert found.density.value == pytest.approx((between < radii[1]).sum(1).mean() / k, rel=1e-12)
    assert found.coverage.value == pytest.approx((between < radii[1]).any(0).mean(), rel=1e-12)
    distances, rows = trees[1].kneighbors(GENERATED, n_neighbors=1)
    ours = nearest(GENERATED, REFERENCE, is_cosine=False)
    np.testing.assert_array_equal(ours.rows, rows[:, 0])
    np.testing.assert_allclose(ours.distances, distances[:, 0], rtol=1e-6)


def test_aurocs_are_its_own() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (200, 3)).astype(np.int8)
    scores = np.round(labels + rng.standard_normal((200, 3)), 1)  # with ties
    found = findings_auroc(scores, FindingLabels(("Edema", "Mass", "Hernia"), labels))
    expected = metrics.roc_auc_score(labels, scores, average=None)
    np.testing.assert_allclose([one.value for one in found.by_finding.values()], expected, rtol=1e-12)
    assert found.macro is not None
    assert found.macro.value == pytest.approx(metrics.roc_auc_score(labels, scores), rel=1e-12)
