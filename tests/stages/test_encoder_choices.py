"""Which encoder, and what of it, from the recipe to the store: columns, their makers, and what may stand for them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arra.config import Recipe, dump_recipe, load_recipe, parse_recipe
from arra.data.store import Store
from arra.encoders import SPECS, Encoder, EncoderChoice, EncoderSpec, open_encoder
from arra.encoders.base import EncoderStates, VisionEncoder
from arra.errors import ArraError
from arra.stages import makers
from arra.stages.evaluate import SAME_FAMILY, family, protocol_of
from arra.stages.judging import Judge
from arra.stages.makers import (
    GREY,
    FeaturesMaker,
    above,
    build_makers,
    feature_choices,
    picture_columns,
    teacher_made_by,
    used_choices,
    views_of,
    wanted_columns,
)
from arra.stages.origin import columns_of
from arra.stages.painters import load_run
from arra.stages.prepare import PrepareOptions, asked_features, prepare
from tests.conftest import Pipeline

INLINE = PrepareOptions(workers=0, batch_size=8, threads=1)
CPU = torch.device("cpu")
PLAIN = {
    "encoder": "efficientnet-lite0",
    "weights": SPECS["efficientnet-lite0"].weights_sha256,
    "aggregate": "mean",
    "crop": "center_crop(128)",
    "input": 128,
    "dtype": "float32",
}
"""What stores say that were made before an encoder had choices."""
PATCHES = "{name: efficientnet-lite0, output: patches, layers: [11], grid: 4}"


class Means(VisionEncoder):
    """Quarters of a picture as patches, their mean colours as features: what it says can be told by hand."""

    def states_of(self, pixels: Tensor, layers: Any) -> list[EncoderStates]:
        """Of every layer the same."""
        patches = torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(2).transpose(1, 2)
        return [EncoderStates(patches, (2, 2), cls=pixels.amax((2, 3)))] * (len(layers) + 1)


MEANS = EncoderSpec(
    name="means", feature_size=3, image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), weights_sha256="",
    family="colours", licence="", source="", outputs=("mean", "cls", "concat", "patches"), num_layers=4, patch_size=2,
)  # fmt: skip


@dataclass
class Opened:
    """Stands in for the encoders that would have to be fetched, and counts how often it is asked."""

    spec: EncoderSpec = MEANS
    count: int = 0
    factor: float = 1.0

    def __call__(self, choice: EncoderChoice, *, device: Any = "cpu") -> Encoder:
        if not choice.name.startswith("python:"):
            return open_encoder(choice, device=device)
        self.count += 1
        size = choice.image_size or self.spec.image_size
        encoder = Means(replace(self.spec, image_size=size), torch.nn.Identity(), weights_hash="a" * 64)
        if self.factor != 1:
            encoder.spec = replace(encoder.spec, std=(1 / self.factor,) * 3)
        return encoder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    stand_in = Opened()
    monkeypatch.setattr(makers, "open_encoder", stand_in)
    return stand_in


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, draw_pictures: Callable[[Path], Path]) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("choices") / "pictures")


@pytest.fixture
def recipe_for(pictures: Path, toy_settings: tuple[str, ...]) -> Callable[..., Recipe]:
    def recipe(*more: str, row: str = "aligned") -> Recipe:
        own = ["data.source=folder", f"data.path={pictures}", "data.shard_records=16"]
        chosen = [text for text in toy_settings if row == "aligned" or not text.startswith("align.")]
        return load_recipe("demo", row=row, overrides=[*own, *chosen, "data.encoder_image_size=null", *more])

    return recipe


def maker_of(recipe: Recipe, column: str) -> FeaturesMaker:
    (maker,) = build_makers(recipe, [column], None, device=CPU, batch_size=4)
    assert isinstance(maker, FeaturesMaker)
    return maker


# The recipe


def test_a_name_alone_is_the_choice_of_that_name() -> None:
    recipe = load_recipe("demo")
    assert recipe.encoder.choice("teacher") == EncoderChoice(name="efficientnet-lite0")
    assert recipe.encoder.choice("judge") == EncoderChoice(name="efficientnet-lite1")
    assert list(recipe.encoder.choices()) == ["teacher"]
    full = load_recipe("demo", overrides=[f"encoder.others={{fine: {PATCHES}, wide: efficientnet-lite2}}"])
    assert list(full.encoder.choices()) == ["teacher", "fine", "wide"]
    assert full.encoder.choice("fine").layers == (11,)
    assert parse_recipe(dump_recipe(full), Recipe, source="dumped") == full


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("encoder.teacher=clip", "--set encoder.*'clip': unknown; known are clip-b32"),
        (
            "encoder.teacher={name: efficientnet-lite0, output: cls}",
            "teacher: efficientnet-lite0 has no output 'cls'; it",
        ),
        (
            "encoder.teacher={name: efficientnet-lite0, outputs: mean}",
            "teacher.outputs: unknown key; did you mean 'output'",
        ),
        ("encoder.teacher={output: mean}", "encoder.teacher.name: missing"),
        ("encoder.teacher=3", "encoder.teacher: expected text or a section of keys, found 3"),
        ("encoder.judge={name: efficientnet-lite1, output: patches}", "judge: it says one vector of a picture"),
        ("encoder.judge={name: efficientnet-lite1, bands: 2}", "judge: it says one vector of a picture"),
        ("encoder.others={teacher: efficientnet-lite2}", "others: 'teacher' is no name for a teacher"),
        ("encoder.others={judge: efficientnet-lite2}", "others: 'judge' is no name"),
        ("encoder.others={a-b: efficientnet-lite2}", "others: 'a-b' is no name"),
        (
            "encoder.others={again: {name: efficientnet-lite0, weights: mine.pth}}",
            "others.again: would have the column 'features.efficientnet-lite0' of teacher, made otherwise",
        ),
    ],
)
def test_a_mistake_is_told_at_its_key(change: str, message: str) -> None:
    with pytest.raises(ArraError, match=message):
        load_recipe("demo", overrides=[change])


def test_an_unknown_choice_is_told() -> None:
    with pytest.raises(ArraError, match="encoder 'dino': the recipe has none of this name; it has teacher"):
        load_recipe("demo").encoder.choice("dino")


# What the store says


def test_a_plain_name_is_made_by_what_it_always_was(recipe_for: Callable[..., Recipe]) -> None:
    recipe = recipe_for()
    assert teacher_made_by(recipe, recipe.encoder.choice("teacher")) == PLAIN
    assert list(picture_columns(recipe, None)) == ["pictures", "sizes", "pixels", "features.efficientnet-lite0"]
    old = recipe_for("data.encoder_image_size=48")
    assert teacher_made_by(old, old.encoder.choice("teacher")) == {**PLAIN, "crop": "center_crop(48)"}


def test_what_differs_from_the_default_stands_in_name_and_entry(recipe_for: Callable[..., Recipe]) -> None:
    recipe = recipe_for(
        f"encoder.others={{fine: {PATCHES}, seen: {{name: efficientnet-lite0, bands: 3, image_size: 64}}}}"
    )
    fine, seen = recipe.encoder.choice("fine"), recipe.encoder.choice("seen")
    assert fine.column == "features.efficientnet-lite0.patches.layers-11.grid4"
    assert teacher_made_by(recipe, fine) == {**PLAIN, "aggregate": "patches", "layers": [11], "grid": 4}
    assert seen.column == "features.efficientnet-lite0.px64.bands3"
    of_seen = teacher_made_by(recipe, seen)
    assert of_seen == {**PLAIN, "crop": "center_crop(64)", "input": 64, "bands": 3, "grey": GREY}


def test_preparation_makes_every_teacher_and_training_needs_the_used_ones(recipe_for: Callable[..., Recipe]) -> None:
    others = f"encoder.others={{fine: {PATCHES}, wide: efficientnet-lite2}}"
    column = "features.efficientnet-lite0.patches.layers-11.grid4"
    recipe = recipe_for(others, "align.more={p: {target: patch, encoder: fine}}")
    assert list(feature_choices(recipe)) == ["teacher", "fine", "wide"]
    assert list(used_choices(recipe)) == ["teacher", "fine"]
    assert columns_of(recipe) == ["codes", "features.efficientnet-lite0", column]
    alone = recipe_for(others, "align.target=patch", "align.encoder=fine")
    assert columns_of(alone) == ["codes", column]
    plain = recipe_for(others, row="baseline")
    assert used_choices(plain) == {}
    assert columns_of(plain) == ["codes"]
    assert list(picture_columns(plain, None)) == list(picture_columns(recipe, None))  # so the rows share a store
    named = picture_columns(recipe, None, only=("features.efficientnet-lite2", "sizes"))
    assert list(named) == ["sizes", "features.efficientnet-lite2"]


# What is made


def test_each_encoder_sees_the_crop_made_at_its_own_size(recipe_for: Callable[..., Recipe], opened: Opened) -> None:
    twins = "small: 'python:m:n', twin: {name: 'python:m:n', output: cls}"
    others = f"encoder.others={{{twins}, big: {{name: 'python:m:n', image_size: 16}}}}"
    recipe = recipe_for(others)
    names = [choice.column for choice in feature_choices(recipe).values()]
    made = build_makers(recipe, names, None, device=CPU, batch_size=4)
    assert [maker.views for maker in made] == [("large-128",), ("large-8",), ("large-8",), ("large-16",)]
    views = views_of(recipe, [view for maker in made for view in maker.views])
    assert {name: view.size for name, view in views.items()} == {"large-128": 128, "large-8": 8, "large-16": 16}
    assert opened.count == 2  # one network gives both outputs at 8 pixels
    fixed = recipe_for(others, "data.encoder_image_size=48")
    made = build_makers(fixed, names, None, device=CPU, batch_size=4)
    assert {maker.views for maker in made} == {("large-48",)}
    assert {maker.made_by["crop"] for maker in made} == {"center_crop(48)"}
    with pytest.raises(ArraError, match=r"column 'features.no': no encoder of the recipe makes it; it has features\."):
        build_makers(recipe, ["features.no"], None, device=CPU, batch_size=4)


def test_the_shape_is_that_of_what_is_made(recipe_for: Callable[..., Recipe], opened: Opened) -> None:
    def shape(text: str) -> tuple[int | None, ...]:
        recipe = recipe_for(f"encoder.others={{x: {text}}}")
        return maker_of(recipe, recipe.encoder.choice("x").column).shape

    assert shape("'python:m:n'") == (3,)
    assert shape("{name: 'python:m:n', output: concat, layers: [1, 4]}") == (12,)
    assert shape("{name: 'python:m:n', output: patches}") == (4, 3)
    assert shape("{name: 'python:m:n', output: patches, grid: 1}") == (1, 3)
    assert shape("{name: 'python:m:n', output: cls, bands: 5}") == (5, 3)
    assert shape(PATCHES) == (16, 112)


def test_band_b_is_of_the_picture_down_to_its_end(recipe_for: Callable[..., Recipe], opened: Opened) -> None:
    """What is hidden changes nothing; the last band is of the whole picture."""
    recipe = recipe_for("encoder.others={seen: {name: 'python:m:n', bands: 4}, whole: 'python:m:n'}")
    banded = maker_of(recipe, recipe.encoder.choice("seen").column)
    whole = maker_of(recipe, recipe.encoder.choice("whole").column)
    one = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = one.clone()
    other[:, 4:] = 255 - other[:, 4:]
    first, second = banded.encode(one), banded.encode(other)
    torch.testing.assert_close(first[:, :2], second[:, :2], rtol=0, atol=0)
    assert (first[:, 2:] != second[:, 2:]).any(-1).all()
    torch.testing.assert_close(first[:, -1], whole.encode(one), rtol=0, atol=0)
    by_hand = one.clone()
    by_hand[:, 2:] = GREY
    torch.testing.assert_close(first[:, 0], whole.encode(by_hand), rtol=0, atol=0)


@pytest.mark.parametrize(("fit", "seen"), [("crop", "the middle square"), ("pad", "a padded square"), ("squash", None)])
@pytest.mark.parametrize(("what", "key"), [("patches", "output: patches"), ("bands", "bands: 4")])
def test_patches_and_bands_lie_where_the_codes_do(
    fit: Any, seen: str | None, what: str, key: str, recipe_for: Callable[..., Recipe], opened: Opened
) -> None:
    """An encoder that cuts or pads what is no square would place them elsewhere."""
    opened.spec = replace(MEANS, fit=fit)
    others = f"encoder.others={{x: {{name: 'python:m:n', {key}}}, whole: 'python:m:n'}}"
    shapes = recipe_for(others, "data.crop={kind: buckets, patch: 8}")
    for recipe in (shapes, recipe_for(others)):
        maker_of(recipe, recipe.encoder.choice("whole").column)
        column = recipe.encoder.choice("x").column
        if seen is None or recipe is not shapes:
            maker_of(recipe, column)
            continue
        with pytest.raises(ArraError, match=f"sees {seen}, so its {what} do not lie where the codes do; set data.crop"):
            maker_of(recipe, column)


@pytest.mark.parametrize(("height", "bands"), [(8, 4), (7, 3), (5, 8), (224, 32), (1, 2)])
def test_bands_cover_a_picture_in_order(height: int, bands: int) -> None:
    picture = torch.zeros(1, height, 2, 3, dtype=torch.uint8)
    shown = [int((above(picture, band, bands)[0, :, 0, 0] == 0).sum()) for band in range(bands + 1)]
    assert shown[0] == 0
    assert shown[-1] == height
    assert shown == sorted(shown)
    assert max(np.diff(shown)) - min(np.diff(shown)) <= 1


def test_values_beyond_the_stored_type_are_no_silent_infinity(
    tmp_path: Path, recipe_for: Callable[..., Recipe], opened: Opened
) -> None:
    opened.factor = 1e6
    half = recipe_for("encoder.teacher='python:m:n'", "data.features_dtype=float16")
    with pytest.raises(ArraError, match=r"features.python-m-n: the encoder gives values beyond float16; set data.feat"):
        prepare(half, tmp_path / "store", options=INLINE, only=("features",))
    opened.factor = float("inf")
    with pytest.raises(ArraError, match="the encoder gives no finite numbers; check its weights"):
        prepare(recipe_for("encoder.teacher='python:m:n'"), tmp_path / "store", options=INLINE, only=("features",))


# The store


def test_every_kind_of_feature_is_stored_as_the_encoder_says_it(
    tmp_path: Path, recipe_for: Callable[..., Recipe], opened: Opened
) -> None:
    others = "{fine: {name: 'python:m:n', output: patches}, seen: {name: 'python:m:n', bands: 2}}"
    recipe = recipe_for(f"encoder.others={others}", "encoder.teacher='python:m:n'")
    store = prepare(recipe, tmp_path / "store", options=INLINE, only=("features",)).checked()
    plain, fine, seen = (store.column(choice.column) for choice in feature_choices(recipe).values())
    assert (plain.shape, fine.shape, seen.shape) == ((60, 3), (60, 4, 3), (60, 2, 3))
    np.testing.assert_allclose(fine.mean(1), plain, rtol=1e-5)
    np.testing.assert_array_equal(seen[:, -1], plain)
    assert len(np.unique(plain.round(4), axis=0)) > 20  # the pictures differ
    again = prepare(recipe, tmp_path / "store", options=INLINE, only=("features",))
    assert (again.done, again.already) == (0, 60)


def test_one_teacher_is_extracted_by_name(tmp_path: Path, recipe_for: Callable[..., Recipe], opened: Opened) -> None:
    recipe = recipe_for("encoder.others={fine: {name: 'python:m:n', output: patches}}")
    assert asked_features(recipe, None) == (recipe, ("features",))
    assert asked_features(recipe, "fine") == (recipe, ("features.python-m-n.patches",))
    assert asked_features(recipe, "python:m:n") == (recipe, ("features.python-m-n.patches",))
    more, columns = asked_features(recipe, "efficientnet-lite2")
    assert columns == ("features.efficientnet-lite2",)
    assert list(more.encoder.choices()) == ["teacher", "fine", "extracted"]
    with pytest.raises(ArraError, match="encoder 'clip': unknown"):
        asked_features(recipe, "clip")
    store = prepare(recipe, tmp_path / "store", options=INLINE, only=("features.python-m-n.patches",)).checked()
    assert store.column_names() == ["features.python-m-n.patches", "pictures", "sizes"]


# What may stand for the encoder


@pytest.fixture
def stored(tmp_path: Path, recipe_for: Callable[..., Recipe], opened: Opened) -> Store:
    """A store whose features an encoder made that is gone then."""
    recipe = recipe_for("encoder.teacher='python:m:n'")
    return prepare(recipe, tmp_path / "store", options=INLINE, only=("features",)).checked()


def test_training_does_not_need_the_teacher(
    stored: Store, recipe_for: Callable[..., Recipe], opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(choice: EncoderChoice, **options: Any) -> VisionEncoder:
        raise ArraError(f"encoder {choice.name}: no such module")

    monkeypatch.setattr(makers, "open_encoder", gone)
    recipe = recipe_for("encoder.teacher='python:m:n'")
    column = "features.python-m-n"
    assert wanted_columns(recipe, None, stored, [column])[column] == stored.entry(column).made_by  # type: ignore[union-attr]
    assert prepare(recipe, stored.path, options=INLINE, only=("features",)).already == 60
    with pytest.raises(ArraError, match="no such module"):  # without the column it is needed
        teacher_made_by(recipe, recipe.encoder.choice("teacher"))
    with pytest.raises(ArraError, match=r"was made with crop 'center_crop.8.', the recipe says 'center_crop.48.'"):
        prepare(
            recipe_for("encoder.teacher='python:m:n'", "data.encoder_image_size=48"), stored.path, options=INLINE,
            only=("features",),
        )  # fmt: skip


def test_weights_that_are_here_must_be_those_of_the_column(
    tmp_path: Path, stored: Store, recipe_for: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(f"encoder.teacher={{name: 'python:m:n', weights: {tmp_path}}}")
    monkeypatch.setattr(makers, "encoder_weights_hash", lambda choice: "b" * 64)
    made_by = teacher_made_by(recipe, recipe.encoder.choice("teacher"), stored)
    assert made_by["weights"] == "b" * 64
    with pytest.raises(ArraError, match=r"was made with weights 'aaaa.*, the recipe says 'bbbb"):
        stored.require("features.python-m-n", made_by)


def test_teachers_that_are_not_used_need_not_be_here(
    pipeline: Pipeline, tmp_path: Path, toy_settings: tuple[str, ...]
) -> None:
    """The store was made without them, and training looks at none of theirs."""
    store = Store.open(pipeline.store)
    own = ["data.source=auto", f"data.path={pipeline.pictures}", *toy_settings]
    recipe = load_recipe("demo", row="aligned", overrides=[*own, "encoder.others={dino: dinov2-b14}"])
    columns = columns_of(recipe)
    assert set(wanted_columns(recipe, None, store, columns)) == {"features.efficientnet-lite0"}


# The judge


def test_the_judge_says_what_its_choice_asks_for() -> None:
    choice = EncoderChoice(name="efficientnet-lite1", layers=(5, 9), image_size=64)
    judge, encoder = Judge(choice), open_encoder(choice)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert judge.spec.image_size == 64
    torch.testing.assert_close(judge.encode(images), encoder.encode(images, layers=(5, 9)))
    assert judge.weights_hash == encoder.weights_hash


def test_a_card_says_whether_a_used_teacher_is_of_the_judges_family(toy_copy: Pipeline) -> None:
    aligned, baseline = (protocol_of(load_run(folder), None) for folder in (toy_copy.aligned, toy_copy.baseline))
    assert (aligned[SAME_FAMILY], aligned["model_teachers"]) == (True, "efficientnet-lite0")
    assert (baseline[SAME_FAMILY], baseline["model_teachers"]) == (False, None)
    differing = {key for key in aligned if aligned[key] != baseline[key]}
    assert all(key.startswith("model") for key in differing)  # else they could not be compared
    path = toy_copy.aligned / "recipe.yaml"
    shutil.copy(path, path.with_suffix(".old"))
    text = path.read_text().replace("judge: efficientnet-lite1", "judge: {name: efficientnet-lite1, layers: [3]}")
    path.write_text(text)
    changed = protocol_of(load_run(toy_copy.aligned), None)
    assert changed["judge_output"] == "mean of layers 3"
    assert json.dumps(changed)
    assert family(EncoderChoice(name="timm:resnet18")) == "timm:resnet18"
