"""One pass over a set: the same whatever the batch, the sizes, the ranks; references are looked at once."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from arra.distributed import ALONE, Ranks
from arra.errors import ArraError
from arra.evaluate.collecting import Look, Seen, collect, look_of
from arra.evaluate.references import see_reference
from arra.evaluate.sets import SomePictures, chosen_rows
from tests.evaluate.toy_pictures import ToyPictures, ToySpace, drawn
from tests.train.forked_ranks import on_ranks

CPU = torch.device("cpu")
SIDES = ((8, 8), (8, 12), (16, 4))


def looks(**named: str) -> list[Look]:
    space = ToySpace(**named)
    return [look_of(space, ["features", "logits"], name=space.name, distributions=["features"])]


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
    [
        ({"content": "two"}, {}),
        ({"resize": "16 -> 8 bicubic"}, {}),
        ({}, {"weights": "w2"}),
        ({}, {"name": "other"}),
        ({}, {"resize": "299 px"}),
    ],
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


@pytest.mark.parametrize(
    "change",
    [
        {"toy.features.mean": np.zeros(11)},
        {"toy.features.covariance": np.zeros((12, 11))},
        {"toy.features.rows": np.arange(1, 11)},
        {"toy.features.mean": np.zeros(12, np.float32)},
        {"digests": np.zeros((9, 16), np.uint8)},
        {"digests": np.zeros((10, 16))},
        {"count": np.array(11)},
    ],
)
def test_what_is_kept_of_another_shape_is_seen_anew(
    change: dict[str, np.ndarray], tmp_path: Path, reference: Callable[..., Seen]
) -> None:
    pictures = ToyPictures(drawn(10))
    reference(pictures)
    (kept,) = (tmp_path / "cache").glob("*/moments.safetensors")
    save_file(load_file(kept) | change, kept)
    if "digests" in change:
        np.save(kept.with_name("digests.npy"), change["digests"])
    if "count" in change:
        about = kept.with_name("about.json")
        about.write_text(about.read_text().replace('"count": 10', '"count": 11'))
    reference(pictures)
    assert pictures.num_read == 20


def test_what_is_kept_for_one_use_stays_for_another(tmp_path: Path) -> None:
    pictures, space = ToyPictures(drawn(10)), ToySpace()

    def see(outputs: list[str], distributions: list[str], keep: int) -> Seen:
        asked = [look_of(space, outputs, name="toy", distributions=distributions)]
        return see_reference(pictures, asked, cache=tmp_path, ranks=ALONE, device=CPU, batch_size=4, keep=keep)

    uses = [
        (["features"], ["features"], 9),
        (["features"], [], 9),
        (["logits"], [], 9),
        (["features"], ["features"], 4),
    ]
    for _ in range(2):
        for outputs, distributions, keep in uses:
            seen = see(outputs, distributions, keep)
            assert list(seen.outputs) == [f"toy.{output}" for output in outputs]
            one = seen.outputs[f"toy.{outputs[0]}"]
            assert len(one.features) == keep
            assert (one.moments is not None) == bool(distributions)
    assert pictures.num_read == 40


def test_what_another_process_has_kept_meanwhile_stays(tmp_path: Path) -> None:
    cache, before = tmp_path / "cache", tmp_path / "before"

    def work(ranks: Ranks) -> None:
        def after_the_first(done: int, total: int) -> None:
            if done == 4:
                ranks.barrier()  # neither has found anything kept
            if done == total and ranks.rank == 1:
                ranks.barrier()

        pictures = ToyPictures(drawn(10))
        found = see_reference(
            pictures, looks(), cache=cache, ranks=ALONE, device=CPU, batch_size=4, progress=after_the_first
        )
        assert pictures.num_read == 10
        (kept,) = cache.glob("[!.]*")
        if ranks.rank == 0:
            before.write_text(str(kept.stat().st_ino))
            ranks.barrier()
        else:
            assert before.read_text() == str(kept.stat().st_ino)
            assert not list(cache.glob(".*"))
        assert found.outputs["toy.features"].features.shape == (10, 12)

    assert on_ranks(2, tmp_path / "store", work) == [0, 0]


def test_what_is_not_finite_is_refused_by_name(pass_over: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ToySpace.encode

    def broken(self: ToySpace, images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = usual(self, images)
        is_broken = images[:, 0, 0, :1] == 7
        return {**found, "logits": found["logits"].masked_fill(is_broken, torch.nan)}

    monkeypatch.setattr(ToySpace, "encode", broken)
    images = [np.full((8, side, 3), value, np.uint8) for value, side in ((3, 8), (5, 9), (7, 8), (8, 9))]
    with pytest.raises(ArraError, match=r"toy: toy\.logits of picture 002 is not finite"):
        pass_over(ToyPictures(images))


def test_chosen_rows_are_of_the_whole_set() -> None:
    rows = chosen_rows(1000, 100)
    assert np.array_equal(rows, np.unique(rows))
    assert np.array_equal(rows, chosen_rows(1000, 100))
    assert all(3 <= np.sum(rows // 100 == part) <= 20 for part in range(10))
    assert 30 <= np.sum(rows % 2) <= 70  # not of every second class alone
    assert np.array_equal(chosen_rows(9, 9), np.arange(9))


def test_names_of_spaces_may_have_colons_and_slashes(tmp_path: Path) -> None:
    names = ("open_clip:hf-hub:org/net", "python:judges:mine")
    asked = [look_of(ToySpace(), ["features"], name=name) for name in names]
    pictures = ToyPictures(drawn(5))
    for _ in range(2):
        seen = see_reference(pictures, asked, cache=tmp_path, ranks=ALONE, device=CPU, batch_size=4)
        assert list(seen.outputs) == [f"{name}.features" for name in names]
    assert pictures.num_read == 5


def test_what_one_rank_cannot_read_ends_all(tmp_path: Path) -> None:
    """The rank that meets it is not the first, which must not wait for it."""
    pictures, folder = ToyPictures(drawn(8)), tmp_path / "ranks"
    folder.mkdir()
    read = pictures.read

    def broken(rows: Sequence[int]) -> list[np.ndarray]:
        if 6 in rows:
            raise ArraError("toy/006: broken")
        return read(rows)

    pictures.read = broken  # type: ignore[method-assign]

    def work(ranks: Ranks) -> None:
        with pytest.raises(ArraError, match="toy/006: broken"):
            collect(pictures, looks(), folder=folder, ranks=ranks, device=CPU, batch_size=2)

    assert on_ranks(2, tmp_path / "store", work) == [0, 0]
