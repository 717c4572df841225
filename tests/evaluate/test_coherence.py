"""Measures of coherence: information beyond chance and place, shuffled patches, and influences that are derivatives."""

import numpy as np
import pytest

from arra.data.shapes import ShapesSource, arrange, draw, read_caption
from arra.errors import ArraError
from arra.evaluate.coherence import (
    ShuffleProbe,
    fit_shuffle_probe,
    frequent_codes,
    is_drawn,
    measure_coherence,
    open_standard,
    shuffle_detectability,
    shuffle_patches,
    token_information,
)

GENERATOR = np.random.default_rng(0)


def test_codes_that_repeat_across_the_picture_share_their_entropy() -> None:
    codes = GENERATOR.integers(0, 4, (400, 8, 8))
    codes[:, :, 4:] = codes[:, :, :4]  # columns 4 apart are equal: 2 bits along rows, nothing along columns
    kept = np.arange(4)
    assert token_information(codes, kept=kept, distance=4).value == pytest.approx(1.0, abs=0.01)
    assert token_information(codes, kept=kept, distance=1).value == pytest.approx(0.0, abs=0.003)
    turned = token_information(codes.swapaxes(1, 2), kept=kept, distance=4)
    assert turned.value == pytest.approx(token_information(codes, kept=kept, distance=4).value, abs=1e-12)


def test_chance_and_place_are_no_information() -> None:
    many = GENERATOR.integers(0, 30, (60, 4, 4))  # few pairs of many codes: plain counting says 1 bit
    assert abs(token_information(many, kept=np.arange(30), distance=2).value) < 0.1
    rows = np.broadcast_to(np.arange(4)[None, :, None], (50, 4, 4))  # a code that tells its row and nothing else
    assert token_information(rows, kept=np.arange(4), distance=1).value == pytest.approx(0.0, abs=1e-12)


def test_rare_codes_count_as_one_and_names_of_codes_tell_nothing() -> None:
    codes = GENERATOR.integers(0, 6, (50, 4, 4))
    kept = np.array([5, 1])
    joined = np.where(np.isin(codes, kept), codes, 0)
    whole = token_information(codes, kept=kept, distance=1)
    assert whole.value == pytest.approx(token_information(joined, kept=kept, distance=1).value)
    renamed = token_information(codes * 100 + 7, kept=kept * 100 + 7, distance=1)
    np.testing.assert_allclose(renamed.per_picture, whole.per_picture)


def test_the_most_frequent_codes_are_kept() -> None:
    codes = np.array([[[3, 3, 3, 7], [7, 7, 9, 1]]])
    assert frequent_codes(codes, num_kept=3).tolist() == [3, 7]
    assert set(frequent_codes(codes).tolist()) == {1, 3, 7, 9}


def test_information_is_the_mean_and_influences_are_its_derivative() -> None:
    """Of pictures with weights: all equal give the value, and one a little heavier moves it by its influence."""
    codes = GENERATOR.integers(0, 3, (12, 4, 4))
    codes[:, :, 2:] = codes[:, :, :2]

    def plain(weights: np.ndarray, shift: int, axis: int) -> float:
        left, right = (codes[:, :2], codes[:, 2:]) if axis == 1 else (codes[:, :, :2], codes[:, :, 2:])
        joint = np.zeros((3, 3))
        for n in range(12):
            m = (n + shift) % 12
            pair = weights[n] * (weights[m] if shift else 1.0)
            np.add.at(joint, (left[n].ravel(), right[m].ravel()), pair)
        joint /= joint.sum()
        expected = joint.sum(1)[:, None] * joint.sum(0)
        return float((joint * np.log2(joint / expected, where=joint > 0, out=np.zeros((3, 3)))).sum())

    def value(weights: np.ndarray) -> float:
        return float(
            np.mean([plain(weights, 0, axis) - np.mean([plain(weights, s, axis) for s in (1, 2)]) for axis in (1, 2)])
        )

    found = token_information(codes, kept=np.arange(3), distance=2, num_shifts=2)
    assert found.value == pytest.approx(value(np.ones(12)))
    assert found.per_picture.mean() == pytest.approx(found.value)
    for picture in (0, 5):
        step = 1e-5 * np.eye(12)[picture]
        slope = (value(np.ones(12) + step) - value(np.ones(12) - step)) / 2e-5
        assert (found.per_picture[picture] - found.value) / 12 == pytest.approx(slope, abs=1e-6)


def test_shuffling_moves_whole_patches_of_each_picture() -> None:
    images = np.arange(3 * 8 * 8 * 3, dtype=np.int64).reshape(3, 8, 8, 3).astype(np.uint8)
    shuffled = shuffle_patches(images, seed=1)

    def patches(image: np.ndarray) -> list[bytes]:
        return [image[i : i + 2, j : j + 2].tobytes() for i in range(0, 8, 2) for j in range(0, 8, 2)]

    for before, after in zip(images, shuffled, strict=True):
        assert patches(before) != patches(after)
        assert sorted(patches(before)) == sorted(patches(after))
    np.testing.assert_array_equal(shuffled, shuffle_patches(images, seed=1))
    assert (shuffled != shuffle_patches(images, seed=2)).any()
    np.testing.assert_array_equal(shuffle_patches(images, patches=1), images)
    with pytest.raises(ArraError, match="pictures of 8 x 8 pixels do not part into 3 x 3 patches"):
        shuffle_patches(images, patches=3)


def test_auroc_is_the_share_of_ordered_pairs_and_its_influences_are_its_derivative() -> None:
    probe = ShuffleProbe(center=np.zeros(1), weights=np.ones(1))
    whole = GENERATOR.integers(0, 9, (40, 1)).astype(np.float32)  # ties
    shuffled = GENERATOR.integers(-3, 6, (40, 1)).astype(np.float32)
    found = shuffle_detectability(probe, features=whole, shuffled_features=shuffled)
    ordered = (whole > shuffled.T) + 0.5 * (whole == shuffled.T)

    def plain(weights: np.ndarray) -> float:
        return float(weights @ ordered @ weights / weights.sum() ** 2)

    assert found.value == pytest.approx(plain(np.ones(40)), abs=1e-12)
    assert found.per_picture.mean() == pytest.approx(found.value, abs=1e-12)
    step = 1e-5 * np.eye(40)[7]
    slope = (plain(np.ones(40) + step) - plain(np.ones(40) - step)) / 2e-5
    assert (found.per_picture[7] - found.value) / 40 == pytest.approx(slope, abs=1e-7)


def test_the_probe_finds_what_tells_them_apart_also_with_more_features_than_pictures() -> None:
    for num_features in (5, 300):
        whole, shuffled = GENERATOR.normal(size=(2, 80, num_features)).astype(np.float32)
        whole[:, 0] += 3
        probe = fit_shuffle_probe(whole[:60], shuffled[:60])
        found = shuffle_detectability(probe, features=whole[60:], shuffled_features=shuffled[60:])
        assert found.value > 0.9
        assert abs(probe.weights).argmax() == 0
    nothing = fit_shuffle_probe(np.ones((4, 3), np.float32), np.ones((4, 3), np.float32))
    assert np.isfinite(nothing.weights).all()
    with pytest.raises(ArraError, match="features for the shuffle probe are not finite"):
        fit_shuffle_probe(np.full((2, 2), np.nan), np.zeros((2, 2)))


def encode(images: np.ndarray) -> np.ndarray:
    """Differences of neighbouring pixels, summed in rows: sees seams between patches."""
    gray = images.astype(np.float32).mean(-1)
    return np.concatenate([abs(np.diff(gray, axis=2)).mean(1), abs(np.diff(gray, axis=1)).mean(2)], axis=1)


def test_painted_pictures_are_measured_as_the_held_out_ones() -> None:
    records = list(ShapesSource(num_images=24).scan())
    captions = [record.prompt for record in records]
    assert is_drawn(captions)
    assert not is_drawn([*captions, "a cat"])
    assert not is_drawn([])
    images = np.stack([draw(arrange(read_caption(r.prompt), seed=r.image.place), size=32) for r in records])  # type: ignore[union-attr]
    codes = (images.reshape(24, 8, 4, 8, 4, 3).mean((2, 4, 5)) < 230).astype(np.int64)
    standard = open_standard(images, codes, captions=captions, encode=encode)
    same = measure_coherence(images, codes, captions=captions, encode=encode, standard=standard)
    assert list(same) == list(standard.ceiling)
    assert [name for name in same if name.startswith("token")] == [f"token_information.d{d}" for d in (1, 2, 4)]
    assert same["accuracy.all"].value == standard.ceiling["accuracy.all"].value == 1
    assert same["token_information.d1"].value == standard.ceiling["token_information.d1"].value > 0.05
    turned = captions[1:] + captions[:1]
    wrong = measure_coherence(images, codes, captions=turned, encode=encode, standard=standard)
    assert wrong["accuracy.all"].value < 0.2
    assert all(len(measured.per_picture) == 24 for measured in same.values())
    torn = shuffle_patches(images, seed=5)
    assert measure_coherence(torn, codes, captions=captions, encode=encode, standard=standard)[
        "shuffle_auroc"
    ].value == pytest.approx(0.5, abs=0.2)
    with pytest.raises(ArraError, match="coherence of 4 pictures: expected 8 or more"):
        open_standard(images[:4], codes[:4], captions=captions[:4], encode=encode)
