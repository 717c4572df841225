"""Copies: equal files, and pictures that look the same, against a comparison of everything with everything."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from arra.data.duplicates import (
    VIEW_SIDE,
    Copies,
    Fingerprints,
    find_copies,
    num_repeats,
    num_straddling,
    perceptual_hashes,
    shared_with,
    small_copy,
)
from arra.data.images import center_crop
from arra.data.loading import picture_digest
from arra.data.openmoji import SAME_PICTURE_RMS


def scene(seed: int, *, size: int = 240) -> Image.Image:
    """A picture with soft and hard edges."""
    chance = np.random.default_rng(seed)
    patches = Image.fromarray(chance.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    image = patches.resize((size, size), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        left, top, across, down = chance.integers(0, size // 2, 4).tolist()
        color = tuple(chance.integers(0, 256, 3).tolist())
        pen.ellipse((left, top, left + across + 9, top + down + 9), fill=color)
    return image


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    with Image.open(content) as found:
        return found.convert("RGB")


def copies_of(images: list[Image.Image], scratch: Path, *, unread: tuple[int, ...] = ()) -> Copies:
    """The clusters of pictures, as the check finds them."""
    found = Fingerprints(len(images), scratch)
    rows = np.array([row for row in range(len(images)) if row not in unread])
    found.add(
        rows,
        [picture_digest(images[row].tobytes()) for row in rows],
        np.stack([small_copy(center_crop(images[row], VIEW_SIDE)) for row in rows]),
    )
    return find_copies(found)


def test_reencoded_and_resized_pictures_are_near_copies_and_others_are_not(tmp_path: Path) -> None:
    originals = [scene(seed) for seed in range(40)]
    changed = [jpeg(image, 60) for image in originals] + [image.resize((171, 171)) for image in originals]
    found = copies_of([*originals, *changed], tmp_path / "small")
    assert len(np.unique(found.exact)) == 120
    for seed in range(40):
        assert found.near[seed] == found.near[40 + seed] == found.near[80 + seed]
    assert len(np.unique(found.near)) == 40


def test_no_near_pair_is_missed_that_comparing_all_with_all_finds(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    small = np.stack([small_copy(center_crop(scene(seed), VIEW_SIDE)) for seed in range(30)]).astype(int)
    noisy = [np.clip(small + chance.integers(-width, width + 1, small.shape), 0, 255) for width in (2, 5, 8)]
    small = np.concatenate([small, *noisy]).astype(np.uint8)
    found = Fingerprints(len(small), tmp_path / "small")
    found.add(np.arange(len(small)), [bytes([row, *[1] * 15]) for row in range(len(small))], small)
    near = find_copies(found).near
    x = small.astype(np.float64) / 255
    rms = np.sqrt(np.square(x[:, None] - x[None]).mean((2, 3, 4)))
    same = near[:, None] == near[None]
    assert 30 < (rms < SAME_PICTURE_RMS).sum() < len(small) ** 2 / 2
    assert same[rms < SAME_PICTURE_RMS].all()
    assert not same[rms > 2 * SAME_PICTURE_RMS].any()


def test_equal_files_share_a_number_and_unread_ones_have_none(tmp_path: Path) -> None:
    images = [scene(0), scene(1), scene(0), jpeg(scene(0), 80), scene(1)]
    found = copies_of(images, tmp_path / "small", unread=(4,))
    assert found.exact[0] == found.exact[2] != found.exact[3]
    assert found.near[0] == found.near[2] == found.near[3] != found.near[1]
    assert found.exact[4] == found.near[4] == -1


def test_the_order_of_the_pictures_does_not_matter(tmp_path: Path) -> None:
    images = [scene(seed // 2) if seed % 2 else jpeg(scene(seed // 2), 70) for seed in range(20)]
    order = np.random.default_rng(1).permutation(20)
    near = copies_of(images, tmp_path / "one").near
    mixed = copies_of([images[place] for place in order], tmp_path / "other").near
    assert ((near[order][:, None] == near[order][None]) == (mixed[:, None] == mixed[None])).all()


def test_a_crowd_of_nearly_blank_pictures_is_one_cluster(tmp_path: Path) -> None:
    chance = np.random.default_rng(2)
    small = chance.integers(252, 256, (600, 32, 32, 3), dtype=np.uint8)
    found = Fingerprints(600, tmp_path / "small")
    found.add(np.arange(600), [row.to_bytes(16, "big") for row in range(600)], small)
    assert len(np.unique(perceptual_hashes(small))) == 1
    assert len(np.unique(find_copies(found).near)) == 1


def test_pictures_of_one_hash_and_brightness_are_looked_at(tmp_path: Path) -> None:
    plain = np.full((32, 32, 3), 128, dtype=np.uint8)
    checkered = plain + np.where(np.indices((32, 32)).sum(0) % 2, 20, -20).astype(np.uint8)[..., None]
    small = np.stack([plain, checkered, plain + np.uint8(1)])
    assert len(np.unique(perceptual_hashes(small))) == 1
    found = Fingerprints(3, tmp_path / "small")
    found.add(np.arange(3), [bytes([row] * 16) for row in range(3)], small)
    near = find_copies(found).near
    assert near[0] == near[2] != near[1]


def test_pictures_read_in_parts_are_those_read_at_once(tmp_path: Path) -> None:
    small = np.random.default_rng(3).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    found = Fingerprints(9, tmp_path / "small")
    found.add(np.array([5, 6, 8]), [bytes(16)] * 3, small[3:6])
    found.add(np.array([0, 2]), [bytes(16)] * 2, small[:2])
    found.add(np.array([], dtype=np.int64), [], small[:0])
    np.testing.assert_array_equal(found.small(np.array([8, 0, 5])), small[[5, 0, 3]])
    assert np.nonzero(found.read)[0].tolist() == [0, 2, 5, 6, 8]


def test_the_small_copy_is_pillows_mean() -> None:
    square = scene(4, size=128)
    expected = np.asarray(square.reduce(4)).astype(int)
    assert np.abs(small_copy(np.asarray(square)) - expected).max() <= 1


def test_a_set_without_any_readable_picture_has_no_copies(tmp_path: Path) -> None:
    found = find_copies(Fingerprints(3, tmp_path / "small"))
    assert found.exact.tolist() == found.near.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [([0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 1]), ([0, 0, 0, 0, 0, 0], [0] * 6)],
)
def test_what_is_shared_with_train(held_out: list[int], expected: list[int]) -> None:
    keys = np.array([7, 8, 7, 9, 9, 8])
    train = np.array([1, 1, 0, 0, 0, 0], dtype=bool)
    assert shared_with(keys, np.array(held_out, dtype=bool), train).astype(int).tolist() == expected


def test_repeats_and_straddling_keys_are_counted() -> None:
    assert num_repeats(np.array([1, 1, 1, 2])) == 2
    assert num_straddling(np.array([1, 1, 2, 2, 3]), np.array([0, 0, 0, 1, 1])) == 1
    assert num_straddling(np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == 0
