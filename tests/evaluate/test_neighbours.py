"""Laws of neighbourhoods: their definitions on whole matrices, ties, duplicates, blocks that change nothing, copies."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from arra.errors import ArraError
from arra.evaluate import neighbours
from arra.evaluate.neighbours import Neighbours, copied, nearest, prdc

MEASURES = ("precision", "recall", "density", "coverage")


def normal(num: int, num_features: int, *, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((num, num_features))
    return (scale * drawn + shift).astype(np.float32)


def lattice(num: int, *, seed: int, num_features: int = 3) -> np.ndarray:
    """Small whole numbers: many equal pictures, and hundreds of distances that are exactly equal."""
    return np.random.default_rng(seed).integers(-2, 3, (num, num_features)).astype(np.float32)


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    gaps = x[:, None].astype(np.float64) - y[None].astype(np.float64)
    return np.sqrt((gaps**2).sum(-1))


def by_definition(generated: np.ndarray, reference: np.ndarray, *, k: int) -> dict[str, np.ndarray]:
    between = distances(generated, reference)
    # Column 0 of the sorted distances is the picture itself.
    of_fakes, of_reals = (np.sort(distances(x, x), axis=1)[:, k] for x in (generated, reference))
    return {
        "precision": (between <= of_reals[None]).any(1),
        "recall": (between <= of_fakes[:, None]).any(0),
        "density": (between < of_reals[None]).sum(1) / k,
        "coverage": (between < of_reals[None]).any(0),
    }


def require_equal(result: Neighbours, expected: dict[str, np.ndarray]) -> None:
    for name in MEASURES:
        measured = getattr(result, name)
        np.testing.assert_array_equal(measured.per_picture, expected[name], err_msg=name)
        assert measured.value == expected[name].mean()
        assert measured.of == ("reference" if name in ("recall", "coverage") else "generated")


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("draw", ["normal", "lattice", "far from zero", "clusters", "one picture"])
def test_prdc_is_its_definition_picture_by_picture(draw: str, k: int) -> None:
    generated, reference = normal(60, 8, seed=0, shift=0.2), normal(50, 8, seed=1)
    if draw == "lattice":
        generated, reference = lattice(60, seed=0), lattice(50, seed=1)
    elif draw == "far from zero":
        generated, reference = generated + 3000, reference + 3000
    elif draw == "clusters":  # float32 products cannot tell the pictures of a cluster apart
        center = normal(4, 8, seed=2, scale=100.0)
        generated = center[np.arange(60) % 4] + np.float32(1e-3) * generated
        reference = center[np.arange(50) % 4] + np.float32(1e-3) * reference
    elif draw == "one picture":
        generated, reference = np.repeat(generated[:1], 60, axis=0), np.concatenate([generated[:1], reference])
    require_equal(prdc(generated, reference, k=k), by_definition(generated, reference, k=k))


@pytest.mark.parametrize("block_images", [4, 7, 28])
@pytest.mark.parametrize("ties", [True, False])
def test_blocks_change_no_value(block_images: int, ties: bool) -> None:
    draw = lattice if ties else lambda num, *, seed: normal(num, 5, seed=seed)
    generated, reference = draw(30, seed=0), draw(25, seed=1)
    whole, parts = (prdc(generated, reference, k=3, block_images=size) for size in (2048, block_images))
    for name in MEASURES:
        np.testing.assert_array_equal(getattr(whole, name).per_picture, getattr(parts, name).per_picture)
    for is_cosine in (True, False):
        # A lattice point may be zero, which has no direction.
        shift = np.float32(3)
        asked = (generated + shift, reference + shift)
        one, other = (nearest(*asked, is_cosine=is_cosine, block_images=size) for size in (2048, block_images))
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.distances, other.distances)


def test_precision_and_recall_are_those_of_torch_fidelity() -> None:
    generated, reference = normal(90, 16, seed=0, scale=0.8), normal(70, 16, seed=1)
    theirs = prc_features_to_metric(
        torch.from_numpy(generated).double(), torch.from_numpy(reference).double(), prc_neighborhood=3, verbose=False
    )
    ours = prdc(generated, reference, k=3)
    assert ours.precision.value == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours.recall.value == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0.05 < ours.recall.value < ours.precision.value < 1  # a case that tells the two apart


def test_a_set_beside_itself_is_precise_and_covered() -> None:
    reference = normal(40, 6, seed=0)
    result = prdc(reference, reference, k=2)
    assert result.precision.value == result.recall.value == result.coverage.value == 1


def test_precision_and_recall_change_places_with_the_sets() -> None:
    a, b = normal(40, 6, seed=0, scale=0.7), normal(30, 6, seed=1)
    there, back = prdc(a, b, k=3), prdc(b, a, k=3)
    np.testing.assert_array_equal(there.precision.per_picture, back.recall.per_picture)
    np.testing.assert_array_equal(there.recall.per_picture, back.precision.per_picture)


def test_float32_bounds_hold_what_float64_says() -> None:
    x, y = normal(40, 300, seed=0, shift=5.0), normal(30, 300, seed=1, shift=5.0)
    sides = neighbours._sides(x, y, names=("x", "y"), block_images=16)
    exact = distances(x, y) ** 2
    for dtype in (np.float32, np.float64):
        lower, upper = neighbours._bounds(*sides, slice(0, 40), slice(0, 30), dtype=dtype)
        assert (lower <= exact).all()
        assert (exact <= upper).all()
        assert ((upper - lower) / exact).max() < 400 * np.finfo(dtype).eps


@pytest.mark.parametrize("is_cosine", [True, False])
def test_nearest_is_the_smallest_of_all_distances(is_cosine: bool) -> None:
    queries, training = normal(30, 6, seed=0), normal(80, 6, seed=1)
    if is_cosine:
        units = [x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (queries, training)]
        expected = 1 - units[0] @ units[1].T
    else:
        expected = distances(queries, training)
    result = nearest(queries, training, is_cosine=is_cosine)
    np.testing.assert_array_equal(result.rows, expected.argmin(1))
    np.testing.assert_allclose(result.distances, expected.min(1), rtol=1e-9)


def test_of_equally_near_pictures_the_first_is_named_and_a_copy_is_at_zero() -> None:
    training = normal(50, 6, seed=0)
    training[40] = training[11]
    for is_cosine in (True, False):
        result = nearest(training[[11, 40, 3]], training, is_cosine=is_cosine, block_images=16)
        assert result.rows.tolist() == [11, 11, 3]
        assert result.distances.tolist() == [0, 0, 0]


def test_a_cosine_does_not_see_length() -> None:
    queries, training = normal(20, 6, seed=0), normal(30, 6, seed=1)
    assert nearest(4 * queries, training).rows.tolist() == nearest(queries, training).rows.tolist()


def test_copies_are_counted_and_shown_first() -> None:
    training, held_out, generated = (normal(num, 8, seed=seed) for seed, num in enumerate((300, 199, 40)))
    generated[[5, 17]] = training[[8, 200]] + np.float32(1e-4)
    result = copied(generated, training, held_out=held_out)
    assert result.copied.per_picture[[5, 17]].all()
    assert result.copied.value == result.copied.per_picture.mean() <= 4 / 40
    assert {tuple(pair) for pair in result.closest(2).tolist()} == {(5, 8), (17, 200)}
    assert result.expected == 2 / 200
    assert result.threshold == np.sort(result.nearest_held_out.distances)[1]


def test_a_picture_as_far_as_the_threshold_is_no_copy() -> None:
    training, held_out = normal(100, 6, seed=0), normal(99, 6, seed=1)
    result = copied(held_out, training, held_out=held_out, level=0.1)
    assert result.copied.per_picture.sum() == 9  # all that are nearer than the tenth


def test_a_generator_of_new_pictures_copies_the_expected_share() -> None:
    shares = []
    for seed in range(40):
        training, held_out, generated = (normal(num, 4, seed=10 * seed + i) for i, num in enumerate((80, 99, 100)))
        result = copied(generated, training, held_out=held_out, level=0.1)
        assert result.expected == pytest.approx(0.1)
        shares.append(result.copied.value)
    standard_error = np.std(shares) / np.sqrt(len(shares))
    assert abs(np.mean(shares) - 0.1) < 3 * standard_error


def test_refusals_say_what_to_do() -> None:
    a = normal(20, 4, seed=0)
    broken, zero = a.copy(), a.copy()
    broken[7, 2], zero[3] = np.nan, 0
    with pytest.raises(ArraError, match=r"generated features: 3 pictures, expected at least k \+ 1 = 4"):
        prdc(a[:3], a, k=3)
    with pytest.raises(ArraError, match="reference features: picture 7 has a value that is not finite"):
        prdc(a, broken, k=3)
    with pytest.raises(ArraError, match="training features: picture 3 is a zero vector"):
        nearest(a, zero)
    assert nearest(a, zero, is_cosine=False).distances.shape == (20,)
    with pytest.raises(ArraError, match="training features: 0 pictures"):
        nearest(a, a[:0])
    with pytest.raises(ArraError, match=r"20 pictures cannot tell a share of 0.01, expected at least 99"):
        copied(a, a, held_out=a)
    with pytest.raises(ArraError, match="generated features: 0 pictures"):
        copied(a[:0], a, held_out=normal(99, 4, seed=1))
    with pytest.raises(ArraError, match=r"20 of 119 pictures \(the first is 99\) are in the training set"):
        copied(a, a, held_out=np.concatenate([normal(99, 4, seed=1), a]))
    with pytest.raises(ValueError, match="k is 0"):
        prdc(a, a, k=0)
