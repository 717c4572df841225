"""Laws of the scores: closed forms, two other libraries, splits and orders, influences that are derivatives, sizes."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

from arra.errors import ArraError
from arra.evaluate.scores import inception_score, ms_ssim, ms_ssim_within


def logits_of(num: int, num_classes: int, *, seed: int) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal((num, num_classes))).astype(np.float32)


def by_definition(logits: np.ndarray, *, weights: np.ndarray | None = None) -> float:
    """exp of the mutual information of picture and class, pictures weighted."""
    weights = np.full(len(logits), 1 / len(logits)) if weights is None else weights / weights.sum()
    shares = torch.from_numpy(logits).double().softmax(1).numpy()
    return float(np.exp(weights @ (shares * (np.log(shares) - np.log(weights @ shares))).sum(1)))


def test_the_score_of_certain_and_balanced_pictures_is_the_number_of_classes() -> None:
    certain = np.float32(2000) * np.eye(6, dtype=np.float32)[np.arange(60) % 6]
    assert inception_score(certain).value == pytest.approx(6, rel=1e-12)
    assert inception_score(certain[:1].repeat(5, axis=0)).value == pytest.approx(1, rel=1e-12)


def test_splits_are_those_of_adm_with_a_shorter_last_one() -> None:
    logits = logits_of(23, 7, seed=0)
    expected = np.mean([by_definition(logits[start : start + 10]) for start in (0, 10, 20)])
    assert inception_score(logits, split_size=10).value == pytest.approx(expected, rel=1e-9)
    assert inception_score(logits).value == pytest.approx(by_definition(logits), rel=1e-9)


@pytest.mark.parametrize("num", [50, 53])
def test_splits_of_torch_fidelity_give_its_score(num: int) -> None:
    logits = logits_of(num, 9, seed=1)
    theirs = isc_features_to_metric(torch.from_numpy(logits))["inception_score_mean"]
    order = np.random.RandomState(2020).permutation(num)
    assert inception_score(logits, num_splits=10, order=order).value == pytest.approx(theirs, rel=1e-6)


def test_values_stand_beside_their_pictures_whatever_the_order() -> None:
    logits, order = logits_of(23, 7, seed=0), np.random.default_rng(0).permutation(23)
    moved = inception_score(logits, split_size=10, order=order)
    plain = inception_score(logits[order], split_size=10)
    assert moved.value == plain.value != inception_score(logits, split_size=10).value
    np.testing.assert_array_equal(moved.per_picture[order], plain.per_picture)


def test_influences_are_derivatives_and_their_mean_is_zero() -> None:
    logits = logits_of(17, 5, seed=2)
    splits, num, step = (slice(0, 7), slice(7, 14), slice(14, 17)), 17, 1e-5
    result = inception_score(logits, split_size=7)

    def score(counts: np.ndarray) -> float:
        return float(np.mean([by_definition(logits[split], weights=counts[split]) for split in splits]))

    numeric = np.array([(score(1 + step * e) - score(1 - step * e)) * num / (2 * step) for e in np.eye(num)])
    np.testing.assert_allclose(result.per_picture - result.value, numeric, rtol=1e-5, atol=1e-7)
    assert result.per_picture.mean() == pytest.approx(result.value, rel=1e-12)


def test_blocks_of_a_long_split_are_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(40, 6, seed=3)
    whole = inception_score(logits).value
    monkeypatch.setattr("arra.evaluate.scores._BLOCK_IMAGES", 7)
    assert inception_score(logits).value == pytest.approx(whole, rel=1e-12)


def test_refusals_of_the_inception_score_say_what_to_do() -> None:
    logits = logits_of(10, 4, seed=0)
    broken = logits.copy()
    broken[6, 1] = np.inf
    with pytest.raises(ArraError, match="1 pictures, expected at least 2"):
        inception_score(logits[:1])
    with pytest.raises(ArraError, match="picture 6 has a logit that is not finite"):
        inception_score(broken, split_size=4)
    with pytest.raises(ArraError, match=r"11 splits of 10 pictures; expected 1..10"):
        inception_score(logits, num_splits=11)
    with pytest.raises(ValueError, match="no permutation"):
        inception_score(logits, order=np.zeros(10, dtype=np.int64))


def pictures(num: int, *, seed: int, size: int = 176) -> np.ndarray:
    """Smooth colour pictures: noise alone would have similarities of zero."""
    coarse = torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (255 * smooth).byte().permute(0, 2, 3, 1).contiguous().numpy()


def reader(images: Sequence[np.ndarray]) -> Callable[[Sequence[int]], list[np.ndarray]]:
    return lambda rows: [images[row] for row in rows]


def noisy(images: np.ndarray, *, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-40, 41, images.shape)
    return np.clip(images.astype(np.int64) + noise, 0, 255).astype(np.uint8)


def test_ms_ssim_is_that_of_torchmetrics_and_of_a_picture_with_itself_1() -> None:
    images = pictures(3, seed=0)
    others = noisy(images, seed=0)
    values = ms_ssim(torch.from_numpy(images), torch.from_numpy(others))
    theirs = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0)
    one, other = (torch.from_numpy(each).permute(0, 3, 1, 2) / 255 for each in (images, others))
    assert values.mean() == pytest.approx(float(theirs(one, other)), rel=1e-6)
    assert (values < 0.99).all()
    np.testing.assert_allclose(ms_ssim(torch.from_numpy(images), torch.from_numpy(images)), 1, rtol=1e-6)


def test_a_pair_scores_alone_as_in_a_batch_and_grey_as_one_channel() -> None:
    images = pictures(3, seed=0)[..., :1].repeat(3, axis=-1)
    others = noisy(images[..., :1], seed=1).repeat(3, axis=-1)
    batch = ms_ssim(torch.from_numpy(images), torch.from_numpy(others))
    alone = ms_ssim(torch.from_numpy(images[1:2]), torch.from_numpy(others[1:2]))
    assert alone[0] == pytest.approx(batch[1], rel=1e-6)
    one, other = (torch.from_numpy(each[..., :1]).permute(0, 3, 1, 2) / 255 for each in (images, others))
    theirs = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0)(one, other)
    assert batch.mean() == pytest.approx(float(theirs), rel=1e-6)


def test_pairs_within_a_set_share_no_picture() -> None:
    images, asked = pictures(4, seed=0), list[int]()

    def read(rows: Sequence[int]) -> list[np.ndarray]:
        asked.extend(rows)
        return [images[row % 4] for row in rows]

    result = ms_ssim_within(read, num_images=9, num_pairs=100, seed=3)
    assert result.per_picture.shape == (4,)
    assert len(set(asked)) == len(asked) == 8
    first = list(asked)
    asked.clear()
    assert ms_ssim_within(read, num_images=9, num_pairs=2, seed=3).per_picture.shape == (2,)
    assert len(asked) == 4
    asked.clear()
    ms_ssim_within(read, num_images=9, num_pairs=100, seed=3)
    assert asked == first


def test_one_picture_over_and_over_is_without_variety() -> None:
    same, varied = pictures(1, seed=0).repeat(8, axis=0), pictures(8, seed=0)
    assert ms_ssim_within(reader([*same]), num_images=8).value == pytest.approx(1, rel=1e-6)
    assert ms_ssim_within(reader([*varied]), num_images=8).value < 0.9


def test_refusals_of_ms_ssim_say_what_to_do() -> None:
    small = torch.zeros(1, 175, 200, 3, dtype=torch.uint8)
    with pytest.raises(ArraError, match="pictures of 175 x 200 pixels, expected at least 176 per side"):
        ms_ssim(small, small)
    mixed = [*pictures(1, seed=0), *pictures(1, seed=0, size=192)]
    sides = r"(176 x 176 pixels and .* 192 x 192|192 x 192 pixels and .* 176 x 176); .*--image-size"
    with pytest.raises(ArraError, match=sides):
        ms_ssim_within(reader(mixed), num_images=2)
    with pytest.raises(ArraError, match="1 pictures, expected at least 2"):
        ms_ssim_within(reader(mixed), num_images=1)
