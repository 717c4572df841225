"""Recipes: what they say is what comes out, and a mistake is told in one line with its place."""

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from arra.config import (
    Recipe,
    built_in_recipes,
    dump_recipe,
    find_recipe,
    json_schema,
    load_recipe,
    parse_recipe,
    read_recipe_file,
    recipes_folder,
    row_names,
    write_schema,
)
from arra.errors import ArraError
from arra.settings import Settings

ROOT = Path(__file__).parent.parent


class Align(Settings):
    layer: int = Field(1, ge=0)
    target: Literal["hybnext", "rep"] = "hybnext"
    weight: float = Field(1.0, ge=0)


class Small(Settings):
    kind: Literal["small"] = "small"
    width: int = 8


class Large(Settings):
    kind: Literal["large"] = "large"
    depth: int = 2

    @field_validator("depth")
    @classmethod
    def _even(cls, depth: int) -> int:
        if depth % 2:
            raise ValueError(f"{depth} is odd; the two halves share blocks, use an even number")
        return depth


class Train(Settings):
    steps: int = Field(gt=0)
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    amp: bool = False
    device: int | Literal["auto"] = "auto"
    tags: list[str] = []

    @model_validator(mode="after")
    def _together(self) -> "Train":
        if self.amp and self.lr > 1:
            raise ValueError("lr above 1 with amp overflows; lower lr")
        return self


class Toy(Settings):
    name: str
    row: str | None = None
    train: Train
    align: Align | None = None
    model: Annotated[Small | Large, Field(discriminator="kind")] = Small()
    expect: dict[str, float] = {}


TEXT = """\
name: toy
train: {steps: 10, lr: 2e-5}
align: {layer: 2}
model: {kind: large, depth: 4}
rows:
  baseline: {align: null}
  deeper:
    align: {layer: 3}
    model: {depth: 6}
  broken: {align: {layr: 3}}
  same:
"""


def toy(text: str = TEXT, row: str | None = None, overrides: tuple[str, ...] = ()) -> Toy:
    return parse_recipe(text, Toy, source="toy.yaml", row=row, overrides=overrides)


def line(text: str = TEXT, row: str | None = None, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ArraError) as caught:
        toy(text, row, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_base_is_what_the_file_says():
    recipe = toy()
    assert recipe.train.steps == 10
    assert recipe.train.lr == 2e-5  # YAML 1.1 alone would read this as text
    assert recipe.align == Align(layer=2)
    assert recipe.row is None


def test_rows_differ_where_they_say():
    assert toy(row="baseline").align is None
    deeper = toy(row="deeper")
    assert deeper.align == Align(layer=3)
    assert deeper.model == Large(depth=6)
    assert deeper.row == "deeper"
    assert toy(row="same").model_dump(exclude={"row"}) == toy().model_dump(exclude={"row"})


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=500", "train.steps", 500),
        ("train.lr=1e-4", "train.lr", 1e-4),
        ("train.betas=[0.8, 0.9]", "train.betas", (0.8, 0.9)),
        ("train.amp=true", "train.amp", True),
        ("align=null", "align", None),
        ("align.target=rep", "align.target", "rep"),
        ("name=a=b", "name", "a=b"),
        ("expect.frechet=57.3", "expect", {"frechet": 57.3}),
    ],
)
def test_overrides_are_yaml_values(override: str, path: str, value: object):
    found: object = toy(overrides=(override,))
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_later_overrides_win_over_earlier_ones_and_rows():
    assert toy(row="deeper", overrides=("align.layer=4", "align.layer=5")).align == Align(layer=5)


def test_override_reaches_into_a_section_that_is_null():
    assert toy(row="baseline", overrides=("align.layer=7",)).align == Align(layer=7)


@pytest.mark.parametrize("row", [None, "baseline", "deeper", "same"])
def test_dump_loads_back_equal(row: str | None):
    recipe = toy(row=row)
    assert toy(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("name", ["1e-4", "null", "yes", "12", "ünï: #x", "", "2024-01-01"])
def test_dump_quotes_text_that_looks_like_something_else(name: str):
    recipe = toy().model_copy(update={"name": name})
    assert toy(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layer: 2", "layr: 2", "toy.yaml: align.layr: unknown key; did you mean 'layer'?"),
        ("layer: 2", "zzz: 2", "toy.yaml: align.zzz: unknown key; expected one of: layer, target, weight"),
        ("name: toy", "nam: toy", "toy.yaml: nam: unknown key; did you mean 'name'? (and 1 more)"),
        ("name: toy", "", "toy.yaml: name: missing; expected text"),
        ("align:", "aling:", "toy.yaml: aling: unknown key; did you mean 'align'?"),
        ("steps: 10", "steps: many", "toy.yaml: train.steps: expected an integer > 0, found 'many'"),
        ("steps: 10", "steps: 0", "toy.yaml: train.steps: expected an integer > 0, found 0"),
        ("steps: 10", "steps: 1.5", "toy.yaml: train.steps: expected an integer > 0, found 1.5"),
        ("steps: 10, ", "", "toy.yaml: train.steps: missing; expected an integer > 0"),
        ("steps: 10", "steps: 10, amp: often", "toy.yaml: train.amp: expected true or false, found 'often'"),
        ("steps: 10", "steps: 10, betas: [1]", "toy.yaml: train.betas.1: missing; expected a number"),
        ("steps: 10", "steps: 10, betas: [1, x]", "toy.yaml: train.betas.1: expected a number, found 'x'"),
        ("steps: 10", "steps: 10, betas: 3", "toy.yaml: train.betas: expected a list of 2, found 3"),
        ("steps: 10", "steps: 10, tags: [a, 3]", "toy.yaml: train.tags.1: expected text, found 3"),
        (
            "steps: 10",
            "steps: 10, device: cpux",
            "toy.yaml: train.device: expected an integer or 'auto', found 'cpux' (and 1 more)",
        ),
        (
            "layer: 2",
            "target: hybnxt",
            "toy.yaml: align.target: expected 'hybnext' or 'rep', found 'hybnxt'; did you mean 'hybnext'?",
        ),
        ("{layer: 2}", "3", "toy.yaml: align: expected a section of keys or null, found 3"),
        ("depth: 4", "dept: 4", "toy.yaml: model.dept: unknown key; did you mean 'depth'?"),
        ("depth: 4", "depth: 3", "toy.yaml: model.depth: 3 is odd; the two halves share blocks, use an even number"),
        (
            "kind: large",
            "kind: larg",
            "toy.yaml: model.kind: expected 'large' or 'small', found 'larg'; did you mean 'large'?",
        ),
        ("kind: large, ", "", "toy.yaml: model.kind: missing; expected 'large' or 'small'"),
        (
            "lr: 2e-5",
            "lr: 2, amp: true",
            "toy.yaml: train: lr above 1 with amp overflows; lower lr",
        ),
        ("lr: 2e-5", "lr: 2e-5, steps: 11", "toy.yaml: line 2: 'steps' is written twice; keep one"),
        ("name: toy", "name: toy\nname: again", "toy.yaml: line 2: 'name' is written twice; keep one"),
        ("name: toy", "3: toy", "toy.yaml: line 1: expected a name as key, found 3; put it in quotes"),
        ("{layer: 2}", "{layer: 2", "toy.yaml: line 4: not YAML:"),
        ("{layer: 2}", "!!python/name:os.system", "toy.yaml: line 3: not YAML:"),
        ("name: toy", "name: 2024-30-01", "toy.yaml: month must be in 1..12; put text in quotes"),
        (TEXT, "", "toy.yaml: expected sections such as 'train:', found null"),
        (TEXT, "- a", "toy.yaml: expected sections such as 'train:', found ['a']"),
        ("  baseline: {align: null}", "  baseline: 3", "toy.yaml: rows.baseline: expected what differs from the base"),
    ],
)
def test_mistakes_are_told_in_one_line(old: str, new: str, message: str):
    assert old in TEXT
    assert line(TEXT.replace(old, new, 1)).startswith(message)


def test_a_mistake_is_told_where_it_stands():
    assert line(row="broken") == "toy.yaml: rows.broken.align.layr: unknown key; did you mean 'layer'?"
    assert line(overrides=("align.layr=3",)) == "--set align.layr: unknown key; did you mean 'layer'?"
    assert line(overrides=("trian.steps=3",)) == "--set trian: unknown key; did you mean 'train'?"
    assert line(overrides=("train.steps=-3",)) == "--set train.steps: expected an integer > 0, found -3"
    assert line(overrides=("train.steps",)).startswith("--set train.steps: expected section.key=value")
    assert line(overrides=("train.steps=[",)).startswith("--set train.steps: line 1: not YAML")
    assert line(overrides=("rows.deeper.align=null",)).endswith("use --row NAME and set the key itself")


def test_unknown_row_lists_the_rows():
    assert line(row="deepr") == (
        "toy.yaml: no row 'deepr'; did you mean 'deeper'?; rows: baseline, deeper, broken, same"
    )
    assert line("name: toy\ntrain: {steps: 1}", row="a") == "toy.yaml: no row 'a'; it has none"


def test_merge_keys_and_anchors_of_yaml_work():
    text = "name: toy\ntrain: &t {steps: 3, lr: 0.1}\nrows:\n  a:\n    train: {<<: *t, steps: 4}\n"
    assert toy(text, row="a").train == Train(steps=4, lr=0.1)


def test_recipes_never_change_after_reading():
    with pytest.raises(ValidationError, match="frozen"):
        toy().train.steps = 3  # type: ignore[misc]


def test_files_are_found_and_missing_ones_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\ntrain: {steps: 10}\nrows: {a: {name: other}, b: }\n")
    base = load_recipe("mine.yaml")
    assert (base.name, base.row) == ("mine", None)
    changed = load_recipe("mine.yaml", row="a", overrides=["train.steps=20"])
    assert (changed.name, changed.row, changed.train.steps) == ("other", "a", 20)
    assert row_names("mine.yaml") == ["a", "b"]
    with pytest.raises(ArraError, match=r"^nowhere/demo.yaml: no such file.*built-in recipes: "):
        load_recipe("nowhere/demo.yaml")
    with pytest.raises(ArraError, match="is a folder, expected a recipe file"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArraError, match="expected YAML text in UTF-8"):
        load_recipe("binary.yaml")


@pytest.mark.parametrize("path", built_in_recipes(), ids=lambda path: path.stem)
def test_every_row_of_every_built_in_recipe_loads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    monkeypatch.chdir(tmp_path)  # built-in recipes are found from anywhere
    assert find_recipe(path.stem) == find_recipe(f"recipes/{path.name}") == path
    for row in [None, *row_names(path.stem)]:
        recipe = load_recipe(path.stem, row=row)
        assert parse_recipe(dump_recipe(recipe), Recipe, source="dump") == recipe


# Bases and tables

PAPER = """\
base: below
name: paper
table:
  title: Table 9
  about: what is tested
  protocol: general
  columns: {fd: FID, clip_score: CLIP-Score}
rows:
  plain: {align: null, expect: {fd: 5}, label: w/o}
  aligned: {align: {layer: 1}, expect: {fd: 4.5}, against: plain, note: short, embedded: {row: arra}}
  theirs: {external: true, expect: {fd: 9}}
"""
BELOW = "name: below\ntrain: {steps: 7}\nmodel: {num_layers: 2, hidden_size: 32}\nrows:\n  hidden: {align: null}\n"


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "below.yaml").write_text(BELOW)
    (tmp_path / "files" / "paper.yaml").write_text(PAPER)
    return tmp_path / "files" / "paper.yaml"


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ArraError) as caught:
        read_recipe_file(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def test_a_row_on_a_base_is_the_same_as_a_flat_file(paper: Path):
    flat = "name: paper\ntrain: {steps: 7}\nmodel: {num_layers: 2, hidden_size: 32}\nalign: {layer: 1}\nrow: aligned\n"
    assert load_recipe(paper, row="aligned") == parse_recipe(flat, Recipe, source="flat")
    assert load_recipe(paper, row="plain").align is None
    assert row_names(paper) == ["plain", "aligned"]  # neither the base's rows nor other systems'
    deeper = load_recipe(paper, row="aligned", overrides=["model.num_layers=3"])
    assert (deeper.model.num_layers, deeper.train.steps) == (3, 7)
    file = read_recipe_file(paper)
    assert file.settings["train"] == {"steps": 7}
    assert file.differences["aligned"] == {"align": {"layer": 1}}
    assert (file.facts["aligned"].against, file.facts["aligned"].embedded) == ("plain", {"row": "arra"})
    assert file.facts["plain"].expect == {"fd": 5.0}
    again = parse_recipe(dump_recipe(load_recipe(paper, row="aligned")), Recipe, source="dump")
    assert again == load_recipe(paper, row="aligned")  # a run's recipe carries nothing of the table
    with pytest.raises(ArraError, match="row 'theirs' is another system's, only its numbers are told"):
        load_recipe(paper, row="theirs")


def test_a_base_is_beside_the_file_or_built_in_and_nowhere_else(paper: Path, tmp_path: Path):
    (tmp_path / "below.yaml").write_text(BELOW.replace("7", "8"))  # in the working folder
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo.yaml").write_text(BELOW.replace("7", "9"))
    assert load_recipe(paper).train.steps == 7
    paper.write_text("base: demo\nname: own\n")
    assert load_recipe(paper).train.steps == load_recipe(recipes_folder() / "demo.yaml").train.steps
    (tmp_path / "embedded").mkdir()
    assert read_recipe_file("table1").stand_ins.source == str(recipes_folder() / "embedded.yaml")


@pytest.mark.parametrize(
    "base", ["../below", "./below", "/etc/passwd", "files/below", "below.yml", "3", "[below]", "''", "..", "~/below"]
)
def test_a_base_is_a_name_and_no_path(paper: Path, base: str):
    told = refused(paper, f"base: {base}\nname: x\n")
    assert told.startswith("base: expected the name of a recipe, built in or beside this file, found ")
    assert refused(paper, PAPER.replace("protocol: general", "protocol: general\n  embedded: 3")).startswith("table")
    paper.write_text(PAPER.replace("protocol: general", "protocol: general\n  embedded: ../below"))
    with pytest.raises(ArraError, match=r"table\.embedded: expected the name of a recipe"):
        _ = read_recipe_file(paper).stand_ins


def test_bases_that_stand_on_themselves_or_are_none(paper: Path, tmp_path: Path):
    assert "base: no recipe 'belw', built in or beside this file" in refused(paper, "base: belw\nname: x\n")
    assert refused(paper, "base: dem\nname: x\n").endswith("did you mean 'demo'?")
    assert "base: paper stands on itself" in refused(paper, "base: paper\nname: x\n")
    (paper.parent / "below.yaml").write_text("base: paper\nname: y\n")
    assert "stands on itself" in refused(paper, "base: below\nname: x\n")
    for number in range(6):
        (paper.parent / f"b{number}.yaml").write_text(f"base: b{number + 1}\nname: x\n")
    (paper.parent / "b4.yaml").write_text("name: x\ntrain: {steps: 3}\n")
    assert load_recipe(paper.parent / "b0.yaml").train.steps == 3
    (paper.parent / "b4.yaml").write_text("base: b5\nname: x\n")
    (paper.parent / "b5.yaml").write_text("name: x\ntrain: {steps: 3}\n")
    assert "or on more than 4 others" in refused(paper, "base: b0\nname: x\n")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "expect: {fd: 5}",
            "expect: {fid: 5}",
            "rows.plain.expect.fid: no column of the table; did you mean 'fd'?; it",
        ),
        ("expect: {fd: 5}", "expect: {fd: low}", "rows.plain.expect.fd: expected a number, found 'low'"),
        ("expect: {fd: 5}", "expect: {fd: .nan}", "rows.plain.expect.fd: expected "),
        ("expect: {fd: 5}", "expect: {fd: .inf}", "rows.plain.expect.fd: expected "),
        ("expect: {fd: 5}", "expect: 5", "rows.plain.expect: expected a section of keys, found 5"),
        ("label: w/o", "label: [w/o]", "rows.plain.label: expected text or null, found ['w/o']"),
        ("against: plain", "against: aligned", "rows.aligned.against: 'aligned' is no other row of the table"),
        (
            "against: plain",
            "against: plane",
            "rows.aligned.against: 'plane' is no other row of the table; did you mean",
        ),
        ("{row: arra}", "{row: [arra]}", "rows.aligned: embedded.row: expected the name of a row, found ['arra']"),
        ("{row: arra}", "arra", "rows.aligned.embedded: expected a section of keys, found 'arra'"),
        (
            "external: true",
            "external: true, against: plain",
            "rows.theirs: external: of another system's row nothing is",
        ),
        (
            "{layer: 1}, expect",
            "{layer: 1}, protocol: mimic, expect",
            "rows.aligned.protocol: protocol 'mimic': unknown",
        ),
        (
            "protocol: general",
            "protocol: genral",
            "table.protocol: protocol 'genral': unknown; did you mean 'general'?",
        ),
        ("{fd: FID, clip", "{fdd: FID, clip", "table.columns: 'fdd' is no measure; known are nll,"),
        ("{fd: FID, clip_score: CLIP-Score}", "{}", "table.columns: "),
        ("title: Table 9", "titel: Table 9", "table.titel: unknown key; did you mean 'title'?"),
        ("  title: Table 9\n", "", "table.title: missing; expected text"),
        ("note: short", "note: 3", "rows.aligned.note: expected text or null, found 3"),
    ],
)
def test_facts_of_a_table_that_cannot_be(paper: Path, old: str, new: str, told: str):
    assert old in PAPER
    assert refused(paper, PAPER.replace(old, new, 1)).startswith(told)


def test_facts_of_rows_need_a_table(paper: Path):
    flat = PAPER[: PAPER.index("table:")] + PAPER[PAPER.index("rows:") :]
    assert refused(paper, flat) == "rows.plain.label: is of a paper's table; add a 'table' section"
    assert refused(paper, flat.split("rows:")[0] + "table: 3\n").startswith("table: ")
    paper.write_text(flat.split("rows:")[0])
    with pytest.raises(ArraError, match="has no 'table' section"):
        _ = read_recipe_file(paper).stand_ins


def test_schema_says_what_files_of_tables_may_say():
    schema = json_schema(Recipe)
    assert schema["properties"]["table"] == {"$ref": "#/$defs/TableSection"}
    assert schema["properties"]["base"]["type"] == "string"
    row, facts = schema["$defs"]["RecipeChange"]["properties"], schema["$defs"]["TableRow"]["properties"]
    assert {"expect", "against", "external", "embedded", "label"} <= set(facts)
    assert facts.items() <= row.items()
    assert "train" not in schema["required"]  # a base may have it
    assert all(name.removeprefix("#/$defs/") in schema["$defs"] for name in _references(schema))


def test_schema_of_rows_requires_nothing_and_allows_null():
    schema = json_schema(Toy)
    definitions = schema["$defs"]
    assert schema["required"] == ["name", "train"]
    assert definitions["Train"]["required"] == ["steps"]
    for name in ("RecipeChange", "TrainChange", "AlignChange"):
        assert "required" not in definitions[name]
    assert definitions["RecipeChange"]["properties"]["train"]["anyOf"][1] == {"type": "null"}
    references = _references(schema)
    assert references
    assert all(reference.removeprefix("#/$defs/") in definitions for reference in references)


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [reference for part in node.values() for reference in _references(part)]
    return [reference for part in node for reference in _references(part)] if isinstance(node, list) else []


def test_schema_accepts_every_built_in_recipe_and_refuses_misspelt_facts():
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema())
    found = {path.stem: yaml.safe_load(path.read_text()) for path in built_in_recipes()}
    for name, content in found.items():
        assert not [error.message for error in validator.iter_errors(content)], name
    table = found["table1"]
    for wrong in (
        {"rows": {"adapt-rep": {"expct": {"fd": 4.85}}}},
        {"rows": {"adapt-rep": {"expect": {"fd": "low"}}}},
        {"table": table["table"] | {"colums": {}}},
        {"base": 3},
    ):
        assert not validator.is_valid(table | wrong), wrong


def test_written_schema_is_current(tmp_path: Path):
    write_schema(tmp_path / "schema.json")
    stored = ROOT / "recipes" / "recipe.schema.json"
    assert json.loads(stored.read_text()) == json.loads((tmp_path / "schema.json").read_text()), (
        "out of date; write it again: "
        "python -c \"from arra.config import write_schema; write_schema('recipes/recipe.schema.json')\""
    )


def test_constraints_pin_every_declared_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {
        row.split("==")[0].lower().replace("_", "-")
        for row in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in row
    }
    names = {
        re.split(r"[\[>]", package)[0].lower().replace("_", "-") for package in declared
    }  # without extras, as ray[data]
    assert names <= pinned


def model_of(*overrides: str) -> Any:
    text = "name: x\ntrain: {steps: 1}\ntext_encoder: {name: flan-t5-xl}\n"
    return parse_recipe(text, Recipe, source="x.yaml", overrides=overrides).model


def test_sizes_are_llamagens_and_are_not_mixed_with_shapes():
    small = model_of()
    assert (small.condition, small.num_layers, small.num_heads, small.hidden_size) == ("text", 4, 4, 128)
    assert (small.prefix_length, small.multiple_of) == (14, 32)
    large = model_of("model.size=3b", "model.condition=class")
    assert (large.num_layers, large.num_heads, large.hidden_size) == (24, 32, 3200)
    assert (large.prefix_length, large.multiple_of) == (1, 256)
    assert model_of("model.condition=caption").prefix_length == 120
    # a saved recipe is resolved: the shape stands beside the size
    recipe = parse_recipe("name: x\ntrain: {steps: 1}\nmodel: {size: b}\n", Recipe, source="x.yaml")
    assert parse_recipe(dump_recipe(recipe), Recipe, source="again") == recipe


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.size=b", "model.num_layers=3"], "size 'b' has num_layers 12, found 3; leave num_layers out"),
        (["model.size=b", "model.ffn_hidden_size=64"], "ffn_hidden_size follows from size 'b'"),
        (["model.size=m"], "'1b', '3b' or '7b' or null, found 'm'"),
        (["model.condition=class", "model.prefix_length=4"], "a class takes one position, found 4"),
        (["model.prefix_length=1"], "text and the begin-of-image token need 2, found 1"),
        (["model.num_classes=4"], "a model conditioned on text has no classes"),
        (["model.condition=caption", "text_encoder=null"], "caption needs a 'text_encoder' section"),
        (["model.condition=clas"], "did you mean 'class'?"),
        (["model.size=l", "align.layer=25"], "align.layer: 25 is outside 0..24"),
        (
            ["model.llm.folder=x", "model.num_layers=3"],
            "'num_layers' is the decoder's, and a language model has its own",
        ),
        (["model.llm.folder=x", "model.weights=y"], "'weights' is the decoder's"),
        (["model.llm.folder=x", "model.condition=class"], "a language model reads text, found 'class'"),
        (["model.llm.folder=x", "model.llm.four_bit=true"], "go with 'train: lora', it is 'all'"),
        (["model.llm.folder=x", "model.llm.frozen_dtype=bfloat16"], "with 'train: all' that is nothing"),
        (
            ["model.llm.folder=x", "model.llm.template=draw"],
            "model.llm.template: expected a text with {prompt} in it once",
        ),
        (["model.llm.folder=x", "model.llm.template='{prompt}, {hight}'"], "{hight} in '{prompt}, {hight}' is nothing"),
        (["model.llm.folder=x", "train.word_dropout=0.1"], "word_dropout: is the decoder's"),
    ],
)
def test_models_that_cannot_be(overrides: list[str], told: str):
    with pytest.raises(ArraError) as caught:
        model_of(*overrides)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
