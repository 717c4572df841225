"""Tables of the paper, trained small: every row through all stages, nothing twice, what is held against what."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import arra.stages.reproduce
from arra.config import Recipe, read_recipe_file, recipes_folder
from arra.errors import ArraError
from arra.evaluate.card import CARD_FILE
from arra.runs import Run
from arra.stages.reproduce import ReproduceOptions, parse_options, run_reproduce
from arra.stages.reproduce_results import Reproduced
from arra.stages.tables import PaperTable, read_table, start_of
from arra.stages.tasks import Places

TABLES = [path.stem for path in sorted(recipes_folder().glob("*.yaml")) if read_recipe_file(path).table is not None]
TINY = (
    "data.encoder_image_size=32",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.num_layers=6",
    "align.components=8",
    "caption_judge.steps=1",
    "caption_judge.batch_size=8",
    "train.steps=2",
    "train.batch_size=4",
    "train.warmup_steps=1",
    "train.validate_every_steps=2",
    "train.evaluate_every_steps=null",
    "train.checkpoint_every_steps=2",
    "evaluate.max_images=8",
    "evaluate.num_resamples=4",
    "evaluate.frechet_components=2",
    "evaluate.grid_prompts=1",
    "evaluate.grid_seeds=1",
)
NUM_IMAGES = 60


def small(recipe: Recipe | None) -> Recipe | None:
    """The recipe on few of its pictures."""
    if recipe is None:
        return None
    asked: dict[str, Any] = {"kind": "openmoji"} if recipe.data.sources is None else recipe.data.sources[0].model_dump()
    told = recipe.model_dump()
    told["data"]["sources"] = [asked | {"num_images": NUM_IMAGES}]
    if recipe.model.condition == "text":
        told["model"]["prefix_length"] = 40  # a text tokenizer of so few captions knows few words
    told["data"]["max_train_records"] = None if recipe.data.max_train_records is None else 20
    return Recipe.model_validate(told)


def of_few_pictures(name: str, **options: Any) -> PaperTable:
    table = read_table(name, **options)
    rows = tuple(replace(row, recipe=small(row.recipe)) for row in table.rows)
    starts = {name: found for name, recipe in table.starts.items() if (found := small(recipe)) is not None}
    return replace(table, rows=rows, starts=starts)


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Reproduced]:
    """Runs the command on few pictures in this process; `equal` also counts operations."""
    monkeypatch.setattr(arra.stages.reproduce, "read_table", of_few_pictures)

    def run(*tables: str, out: Path, equal: bool = False, console: Console | None = None, **options: Any) -> Reproduced:
        options = {"seeds": 1, "overrides": TINY, **options}
        asked = ReproduceOptions(tables=tables, equal_compute=equal, places=Places(0), **options)
        return run_reproduce(asked, out, console=console or Console(file=io.StringIO(), width=120))

    return run


def times(out: Path) -> Mapping[str, int]:
    """When the files of all runs were written."""
    return {str(path): path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")}


@pytest.mark.parametrize(
    "tables",
    [
        [name for name in TABLES if "4" in name or name in ("appendix1", "appendix6")],
        [name for name in TABLES if not ("4" in name or name in ("appendix1", "appendix6"))] + ["appendix4"],
    ],
    ids=["of models", "of alignments"],
)
def test_every_row_of_every_table_goes_through_all_stages(
    begin: Callable[..., Reproduced], tables: list[str], tmp_path: Path
):
    done = begin(*tables, out=tmp_path)
    assert done.failures == ()
    for table in done.page.tables:
        for row in table.rows:
            assert row.missing is None
            assert row.external == (row.cells == ())
            assert row.external or row.seeds == (0,)
            assert row.against is None or row.cells[0].difference is not None, (table.recipe, row.name)
    for name in ("tables.md", "tables.tex", "tables.csv", "tables.html"):
        assert all(table.title in (tmp_path / name).read_text() for table in done.page.tables if name != "tables.tex")
    told = json.loads((tmp_path / "results.json").read_text())
    assert [table["recipe"] for table in told["tables"]] == tables
    assert {Path(folder).parent.name for folder in told["runs"].values()} == {
        path.stem for path in (tmp_path / "recipes").iterdir() if not path.name.startswith("general")
    }


def test_rows_of_several_tables_are_trained_once_and_nothing_is_done_twice(
    begin: Callable[..., Reproduced], tmp_path: Path
):
    first = begin("appendix2", out=tmp_path, equal=True)
    before = times(tmp_path)
    both = begin("appendix2", "appendix4", out=tmp_path, equal=True)
    after = times(tmp_path)
    assert after.items() >= before.items()
    runs = {row.split(",")[0]: folder for row, folder in both.runs.items()}
    assert runs["appendix4: cosine"] == runs["appendix2: mlp"] != runs["appendix2: maxpool"]
    assert len(set(runs.values())) == 3
    assert both.page.tables[0] == first.page.tables[0]


def test_rows_get_the_compute_of_their_recipe_without_alignment(begin: Callable[..., Reproduced], tmp_path: Path):
    steps = (*TINY, "train.steps=60", "train.validate_every_steps=60", "train.checkpoint_every_steps=60")
    done = begin("table1", out=tmp_path, equal=True, rows=("arra-hybnext",), overrides=steps)
    taken = {row.name: row.steps for row in done.page.tables[0].rows}
    assert taken["arra-none"] == 60
    assert 30 < taken["arra-hybnext"] < 60
    assert set(taken) == {"arra-hybnext", "arra-rep", "arra-none"}  # with those it is held against


def test_adaptation_starts_from_the_general_models_run(begin: Callable[..., Reproduced], tmp_path: Path):
    done = begin("table1", out=tmp_path, rows=("adapt-none",))
    (folder,) = done.runs.values()
    weights = Path(str(Run(Path(folder)).recipe_yaml()).split("weights: ")[-1].splitlines()[0])
    assert weights.parent.parent == tmp_path / "runs"
    assert weights.parent.name.startswith("general-")
    assert (weights / "model.safetensors").is_file()
    assert not (weights / CARD_FILE).exists()  # nothing is asked of it


def test_parts_of_a_job_array_make_the_whole(begin: Callable[..., Reproduced], tmp_path: Path):
    printed = io.StringIO()
    half = begin("appendix2", out=tmp_path, shard=(1, 2), console=Console(file=printed, width=120))
    missing = [row.missing for row in half.page.tables[0].rows]
    assert missing == ["not trained, or not evaluated", None]
    whole = begin("appendix2", out=tmp_path, shard=(0, 2))
    assert [row.missing for row in whole.page.tables[0].rows] == [None, None]


def test_a_run_that_fails_is_told_and_the_others_go_on(
    begin: Callable[..., Reproduced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from arra.stages import train

    real = train.train

    def fails(recipe: Recipe, *arguments: Any, **options: Any) -> Any:
        if recipe.align is not None and recipe.align.loss == "mse":
            raise ArraError("no luck; try another seed")
        return real(recipe, *arguments, **options)

    monkeypatch.setattr(train, "train", fails)
    done = begin("appendix4", out=tmp_path)
    assert [failure.why for failure in done.failures] == ["no luck; try another seed"]
    cosine, mse = done.page.tables[0].rows
    assert cosine.missing is None
    assert mse.missing
    assert "no luck" in (tmp_path / "tables.html").read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scale": "half"}, "--scale half: expected embedded or full"),
        ({"seeds": 0}, "--seeds 0: expected 1 or more"),
        ({"rows": ","}, "--rows: names no row"),
        ({"rows": "mlp,nonsense"}, "--rows nonsense: no row of appendix2"),
        ({"tables": ["demo"]}, "demo: has no 'table' section"),
        ({"tables": ["appendix2", "appendix2"]}, "appendix2: named twice"),
        ({"shard": "2/2"}, "--shard 2/2: expected i/n"),
        ({"processes": -1}, "--processes -1: expected 0"),
        ({"devices": "0,1,2", "ranks": 2}, "--devices 0,1,2: expected a multiple of --ranks (2)"),
        ({"processes": 0, "ranks": 2}, "--ranks 2: expected 1 or more, each in a process of its own"),
        ({"overrides": ["train.step=3"]}, "train.step"),
    ],
)
def test_what_a_user_can_mend(changes: dict[str, Any], told: str, tmp_path: Path):
    usual: dict[str, Any] = {"tables": ["appendix2"], "rows": None, "scale": "embedded", "seeds": 1, "processes": None}
    usual |= {"devices": None, "ranks": 1, "shard": None, "equal_compute": None, "overrides": ()}
    with pytest.raises(ArraError, match=r"^[^\n]*$") as refused:
        run_reproduce(parse_options(**{**usual, **changes}), tmp_path / "out", console=Console(file=io.StringIO()))
    assert told in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_overrides_of_the_alignment_pass_by_rows_without_it():
    table = read_table("appendix5", scale="embedded", overrides=["align.weight=3", "train.steps=7"])
    for row in table.rows:
        assert row.recipe is not None
        assert row.recipe.train.steps == 7
        assert (row.recipe.align is None) == row.name.endswith("none")
        assert row.recipe.align is None or row.recipe.align.weight == 3
    assert {start_of(row.recipe) for row in table.rows if row.recipe} == {None, "general"}
