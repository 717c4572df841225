"""One pass over a set: the same whatever the batch, the sizes, the ranks; references are looked at once."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from arra.distributed import ALONE, Ranks
from arra.errors import ArraError
from arra.evaluate.collecting import Look, Seen, collect, look_of
from arra.evaluate.references import see_reference
from arra.evaluate.sets import SomePictures
from tests.evaluate.toy_pictures import ToyPictures, ToySpace, drawn
from tests.train.forked_ranks import on_ranks

CPU = torch.device("cpu")
SIDES = ((8, 8), (8, 12), (16, 4))


def looks(**named: str) -> list[Look]:
    return [look_of(ToySpace(**named), ["features", "logits"], distributions=["features"])]


@pytest.fixture
def pass_over(tmp_path: Path) -> Callable[..., Seen]:
    number = iter(range(100))

    def run(pictures: ToyPictures | SomePictures, *, batch_size: int = 4, keep: int = 1000) -> Seen:
        folder = tmp_path / str(next(number))
        folder.mkdir()
        return collect(pictures, looks(), folder=folder, ranks=ALONE, device=CPU, batch_size=batch_size, keep=keep)

    return run


def same(one: Seen, other: Seen) -> None:
    assert (one.count, one.shapes) == (other.count, other.shapes)
    assert np.array_equal(one.digests, other.digests)
    for key, found in one.outputs.items():
        theirs = other.outputs[key]
        assert np.array_equal(found.features, theirs.features)
        assert np.array_equal(found.rows, theirs.rows)
        assert (found.moments is None) == (theirs.moments is None)
        if found.moments is not None and theirs.moments is not None:
            np.testing.assert_allclose(found.moments.mean, theirs.moments.mean, rtol=1e-12)
            np.testing.assert_allclose(found.moments.covariance, theirs.moments.covariance, rtol=1e-10, atol=1e-14)


def test_features_are_each_pictures_own_and_moments_are_of_all(pass_over: Callable[..., Seen]) -> None:
    pictures = ToyPictures(drawn(23, sides=SIDES))
    seen = pass_over(pictures)
    own = np.stack(
        [ToySpace().encode(torch.from_numpy(image)[None])["features"][0].numpy() for image in pictures.images]
    )
    np.testing.assert_allclose(seen.outputs["toy.features"].features, own, rtol=1e-6)
    moments = seen.outputs["toy.features"].moments
    assert moments is not None
    assert moments.count == 23
    np.testing.assert_allclose(moments.covariance, np.cov(own.astype(np.float64), rowvar=False), rtol=1e-6, atol=1e-9)
    assert seen.outputs["toy.logits"].moments is None
    assert seen.shapes == {"8 x 8": 8, "12 x 8": 8, "4 x 16": 7}
    assert pictures.num_read == 23


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_batch_changes_nothing(batch_size: int, pass_over: Callable[..., Seen]) -> None:
    pictures = ToyPictures(drawn(23, sides=SIDES))
    same(pass_over(pictures, batch_size=7), pass_over(pictures, batch_size=batch_size))


def test_of_a_large_set_some_vectors_are_kept_and_all_are_counted(pass_over: Callable[..., Seen]) -> None:
    pictures = ToyPictures(drawn(30))
    whole, some = pass_over(pictures), pass_over(pictures, keep=9)
    kept = some.outputs["toy.features"]
    assert len(np.unique(kept.rows)) == 9
    assert np.array_equal(kept.features, whole.outputs["toy.features"].features[kept.rows])
    assert kept.moments is not None
    assert kept.moments.count == 30
    assert len(some.digests) == 30


def test_two_ranks_see_what_one_sees(tmp_path: Path, pass_over: Callable[..., Seen]) -> None:
    pictures, folder = ToyPictures(drawn(11, sides=SIDES)), tmp_path / "ranks"
    folder.mkdir()
    alone = pass_over(pictures)

    def work(ranks: Ranks) -> None:
        found = collect(pictures, looks(), folder=folder, ranks=ranks, device=CPU, batch_size=2)
        same(found, alone)

    assert on_ranks(2, tmp_path / "store", work) == [0, 0]


def test_equal_pictures_are_found(pass_over: Callable[..., Seen]) -> None:
    images = drawn(6)
    seen = pass_over(ToyPictures([*images, images[2], images[4], images[4]]))
    assert seen.num_duplicates == 3
    assert pass_over(ToyPictures(drawn(6))).num_duplicates == 0
    assert seen.shared_with(pass_over(ToyPictures([images[4], *drawn(3, seed=9)]))) == 3
    flat = [np.zeros((2, 8, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)]  # the same bytes
    assert pass_over(ToyPictures(flat)).num_duplicates == 0


def test_one_picture_is_no_set(pass_over: Callable[..., Seen]) -> None:
    with pytest.raises(ArraError, match="toy: 1 picture; expected 2 at least"):
        pass_over(ToyPictures(drawn(1)))


def test_some_pictures_are_a_set_of_their_own(pass_over: Callable[..., Seen]) -> None:
    whole = ToyPictures(drawn(8), prompts=[f"p{row}" for row in range(8)])
    some = SomePictures(whole, [5, 1, 6])
    assert some.prompts == ["p5", "p1", "p6"]
    np.testing.assert_array_equal(
        pass_over(some).digests, pass_over(ToyPictures([whole.images[row] for row in (5, 1, 6)])).digests
    )
    others = {SomePictures(whole, rows).content_hash() for rows in ([5, 1, 6], [1, 5, 6], [5, 1])}
    assert len({*others, whole.content_hash()}) == 4


@pytest.fixture
def reference(tmp_path: Path) -> Callable[..., Seen]:
    def see(pictures: ToyPictures, **named: str) -> Seen:
        return see_reference(pictures, looks(**named), cache=tmp_path / "cache", ranks=ALONE, device=CPU, batch_size=4)

    return see


def test_a_reference_is_looked_at_once(
    tmp_path: Path, reference: Callable[..., Seen], pass_over: Callable[..., Seen]
) -> None:
    pictures = ToyPictures(drawn(10))
    first = reference(pictures)
    assert pictures.num_read == 10
    same(first, pass_over(ToyPictures(drawn(10))))
    same(reference(pictures), first)
    assert pictures.num_read == 10
    moved = ToyPictures(drawn(10), name="elsewhere")
    same(reference(moved), first)
    assert moved.num_read == 0
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"content": "two"}, {}), ({"resize": "16 -> 8 bicubic"}, {}), ({}, {"weights": "w2"}), ({}, {"name": "other"})],
)
def test_whatever_could_change_it_is_seen_anew(
    change: dict[str, str], named: dict[str, str], reference: Callable[..., Seen]
) -> None:
    reference(ToyPictures(drawn(10)))
    again = ToyPictures(drawn(10), **change)  # type: ignore[arg-type]
    reference(again, **named)
    assert again.num_read == 10


@pytest.mark.parametrize("damage", ["about.json", "moments.safetensors", "toy.features.npy", "digests.npy"])
def test_what_is_damaged_is_seen_anew(damage: str, tmp_path: Path, reference: Callable[..., Seen]) -> None:
    pictures = ToyPictures(drawn(10))
    first = reference(pictures)
    expected = np.array(first.outputs["toy.features"].features)
    (kept,) = (tmp_path / "cache").glob(f"*/{damage}")
    kept.write_bytes(kept.read_bytes()[:20])
    again = reference(pictures)
    assert pictures.num_read == 20
    np.testing.assert_array_equal(again.outputs["toy.features"].features, expected)
    assert json.loads(next((tmp_path / "cache").glob("*/about.json")).read_text())["count"] == 10
