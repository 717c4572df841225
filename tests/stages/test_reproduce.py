"""Tables of the paper, trained small: every row through all stages, nothing twice, what is held against what."""

import errno
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import arra.encoders
import arra.stages.evaluate_set
import arra.stages.prepare
import arra.stages.reproduce
import arra.stages.reproduce_options
import arra.stages.reproduce_results
import arra.stages.squares
import arra.stages.training_data
import arra.tokenizers.image
from arra.config import Recipe, built_in_recipes, load_recipe, read_recipe_file
from arra.display import Display
from arra.errors import ArraError
from arra.evaluate.card import CARD_FILE, Card, Evaluation, measure_row, row_values
from arra.evaluate.measured import Measured
from arra.runs import Run
from arra.stages.reproduce import list_rows, run_reproduce
from arra.stages.reproduce_options import ReproduceOptions, card_folder, parse_options
from arra.stages.reproduce_results import Placed, Reproduced
from arra.stages.set_options import SetOptions
from arra.stages.tables import PaperTable, read_table, start_of
from arra.stages.tasks import Places
from arra.stages.train import given_weights

TABLES = [path.stem for path in built_in_recipes() if read_recipe_file(path).table is not None]
TINY = (
    "encoder.teacher.image_size=32",
    "encoder.judge.image_size=32",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.num_layers=6",
    "align.components=null",  # principal axes of so many dimensions take half a second
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
FEW_DIMENSIONS = (*TINY, "align.components=8")
"""As much for an aligned step as for one without, more or less, so that steps are left to a row of equal compute."""
NUM_IMAGES = 40


def small(recipe: Recipe | None) -> Recipe | None:
    """The recipe on few and smaller ones of its pictures."""
    if recipe is None:
        return None
    asked: dict[str, Any] = {"kind": "openmoji"} if recipe.data.sources is None else recipe.data.sources[0].model_dump()
    told = recipe.model_dump()
    told["data"]["sources"] = [asked | {"num_images": NUM_IMAGES}]
    told["data"]["image_size"] //= 2
    told["evaluate"]["splits"] = ["train"]  # the others have too few
    if recipe.model.condition == "text":
        told["model"]["prefix_length"] = 56  # a text tokenizer of so few captions knows few words
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
    for module, name in ((arra.tokenizers.image, "_load_folder"), (arra.encoders, "load_efficientnet_lite")):
        monkeypatch.setattr(module, name, lru_cache(maxsize=None)(getattr(module, name)))  # frozen, and read by all
    for module in (arra.stages.prepare, arra.stages.squares, arra.stages.training_data):
        monkeypatch.setattr(module, "default_workers", lambda: 0)  # forks take longer than so few pictures

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
    named = {Path(folder).parent.name for folder in told["runs"].values()}
    others = {path.stem for path in (tmp_path / "recipes").iterdir()} - named
    assert all(name.startswith("general-") for name in others)  # which other rows start from


def test_rows_of_several_tables_are_trained_once_and_nothing_is_done_twice(
    begin: Callable[..., Reproduced], tmp_path: Path
):
    asked: dict[str, Any] = {"out": tmp_path, "equal": True, "overrides": FEW_DIMENSIONS}
    first = begin("appendix2", **asked)
    before = times(tmp_path)
    both = begin("appendix2", "appendix4", **asked)
    after = times(tmp_path)
    assert after.items() >= before.items()
    runs = {row.split(",")[0]: folder for row, folder in both.runs.items()}
    assert runs["appendix4: cosine"] == runs["appendix2: mlp"] != runs["appendix2: maxpool"]
    assert len(set(runs.values())) == 3
    assert both.page.tables[0] == first.page.tables[0]


def test_rows_get_the_compute_of_their_recipe_without_alignment(begin: Callable[..., Reproduced], tmp_path: Path):
    steps = (*FEW_DIMENSIONS, "train.steps=12", "train.validate_every_steps=12", "train.checkpoint_every_steps=12")
    done = begin("table1", out=tmp_path, equal=True, rows=("arra-hybnext",), overrides=steps)
    taken = {row.name: row.steps for row in done.page.tables[0].rows}
    aligned = taken["arra-hybnext"]
    assert taken["arra-none"] == 12
    assert aligned is not None
    assert 6 < aligned < 12
    assert set(taken) == {"arra-hybnext", "arra-rep", "arra-none"}  # with those it is held against


def test_adaptation_starts_from_the_general_models_run_wherever_the_command_runs(
    begin: Callable[..., Reproduced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = begin("table1", out=Path("out"), rows=("adapt-none",))
    (folder,) = done.runs.values()
    weights = Path(str(Run(Path(folder)).recipe_yaml()).split("weights: ")[-1].splitlines()[0])
    assert weights.parent.parent == tmp_path / "out" / "runs"
    assert weights.parent.name.startswith("general-")
    assert (weights / "model.safetensors").is_file()
    assert not (weights / CARD_FILE).exists()  # nothing is asked of it
    before = times(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = begin("table1", out=Path("../out"), rows=("adapt-none",))
    assert again.page.tables == done.page.tables
    assert times(tmp_path / "out") == before


def test_parts_of_a_job_array_make_the_whole(begin: Callable[..., Reproduced], tmp_path: Path):
    printed = io.StringIO()
    half = begin("appendix2", out=tmp_path, shard=(1, 2), console=Console(file=printed, width=120))
    missing = [row.missing for row in half.page.tables[0].rows]
    assert missing == ["not trained, or not evaluated", None]
    whole = begin("appendix2", out=tmp_path, shard=(0, 2))
    assert [row.missing for row in whole.page.tables[0].rows] == [None, None]


MINE = """\
base: embedded
name: mine
table:
  title: Table 9
  about: two protocols
  protocol: mimic-cxr
  columns: {fd: FID, fid: FID}
rows:
  general: {align: null, expect: {fd: 5}}
  again: {align: null, protocol: deepeyenet, expect: {fid: 50}}
  adapted: {model: {weights: "row:general"}, align: null, protocol: deepeyenet, against: again, expect: {fid: 40}}
  theirs: {external: true, expect: {fd: 7}}
"""


def card_of(options: SetOptions) -> Evaluation:
    """As a protocol's evaluation leaves it: one number."""
    metric, space = ("fd", "xrv-densenet121") if options.protocol == "mimic-cxr" else ("fid", "inception")
    found = Measured(value=5.0, per_picture=np.linspace(4, 6, 20))
    row = measure_row(found, metric=metric, split="test", space=space, num_resamples=2)
    card = Card(run="toy", protocol={"protocol": options.protocol}, results=(row,))
    return Evaluation(card=card, values=row_values(row, found))


def test_full_scale_trains_the_rows_as_they_stand_and_measures_each_by_its_protocol(
    begin: Callable[..., Reproduced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine.yaml").write_text(MINE)
    opened, measured = [], []

    def measures(folder: Path, options: SetOptions) -> None:
        assert options.out is not None
        assert options.out.parent == folder / "protocols"
        measured.append((folder.parent.name, options.protocol, options.without))
        card_of(options).save(options.out)

    monkeypatch.setattr(
        arra.stages.reproduce_options, "open_networks", lambda plan, options, **_: opened.append(plan.spaces)
    )
    monkeypatch.setattr(arra.stages.evaluate_set, "evaluate_set", measures)
    asked = {"scale": "full", "measuring": SetOptions(without=("ms_ssim", "rad-dino"))}
    done = begin(str(tmp_path / "mine.yaml"), out=tmp_path / "out", **asked)
    assert done.failures == ()
    assert opened == [("xrv-densenet121", "inception", "biomedclip"), ("inception", "biomedclip", "dinov2-l14")]
    general, again, adapted, theirs = done.page.tables[0].rows
    assert [row.missing for row in (general, again, adapted)] == [None] * 3
    assert theirs.external
    runs = {row.split(",")[0].split(": ")[1]: Path(folder).parent.name for row, folder in done.runs.items()}
    assert runs["general"] == runs["again"] != runs["adapted"]  # one recipe, two protocols
    assert sorted(measured) == sorted(
        [
            (runs["general"], "mimic-cxr", ("ms_ssim", "rad-dino")),
            (runs["general"], "deepeyenet", ("ms_ssim",)),
            (runs["adapted"], "deepeyenet", ("ms_ssim",)),
        ]
    )
    assert [cell.measure.metric for cell in general.cells][:1] == ["fd"]
    assert [cell.measure.metric for cell in adapted.cells][:1] == ["fid"]
    assert (
        f"weights: {tmp_path / 'out' / 'runs' / runs['general']}/seed-0\n"
        in (tmp_path / "out" / "recipes" / f"{runs['adapted']}.yaml").read_text()
    )
    measured.clear()
    assert begin(str(tmp_path / "mine.yaml"), out=tmp_path / "out", **asked).page.tables == done.page.tables
    assert measured == []
    asked["references"] = {"deepeyenet": str(tmp_path)}  # every number of it is another one
    compared = begin(str(tmp_path / "mine.yaml"), out=tmp_path / "out", **asked)
    assert [protocol for _, protocol, _ in measured] == ["deepeyenet", "deepeyenet"]
    assert f"--reference deepeyenet={tmp_path}" in compared.page.command
    measured.clear()
    (card,) = (tmp_path / "out" / "runs" / runs["general"] / "seed-0").glob(f"protocols/mimic-cxr*/{CARD_FILE}")
    card.write_text("half of ")
    assert begin(str(tmp_path / "mine.yaml"), out=tmp_path / "out", **asked).page.tables == compared.page.tables
    assert [protocol for _, protocol, _ in measured] == ["mimic-cxr"]  # a damaged card is made again


def test_cards_lie_apart_by_all_that_says_how_they_are_measured():
    measured = [
        SetOptions(protocol="general", reference=reference, without=without, weights=weights)
        for reference in (None, "pictures")
        for without in ((), ("cmmd",))
        for weights in ({}, {"inception": "a.pt"}, {"inception": "b.pt"})
    ]
    folders = [card_folder(Path("run"), each) for each in measured]
    assert len(set(folders)) == len(measured)
    assert folders[0] == Path("run/protocols/general")
    assert card_folder(Path("run"), None) == Path("run")
    elsewhere = replace(measured[1], out=Path("x"), device="cpu", threads=1)
    assert card_folder(Path("run"), elsewhere) == folders[1]


def test_rows_are_listed_whole_on_a_narrow_screen(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(MINE)
    for tables, told in (
        (("table1", "table2"), ("as table1: arra-hybnext", "over embedded: arra-adapt")),
        ((str(tmp_path / "mine.yaml"),), ("over embedded as it is: the row has no embedded.row", "another system's")),
    ):
        shown = io.StringIO()
        Console(file=shown, width=80).print(list_rows(ReproduceOptions(tables=tables)))
        assert "…" not in shown.getvalue()
        for word in " ".join(told).split():  # the last column may go over several lines
            assert word in shown.getvalue()


def test_another_rows_run_is_no_weights_for_a_training_alone():
    recipe = load_recipe("embedded", row="arra-adapt")
    with pytest.raises(ArraError, match=r"^model\.weights: 'row:general' is the finished run of another row, .*; name"):
        given_weights(recipe)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("general: {align: null, ", "general: {align: rep, ", "align: expected"),
        ("general: {align: null, ", "general: {align: true, ", "align: expected"),
        ("base: embedded\nname: mine\n", "base: embedded\n", None),
        ("base: embedded\nname: mine\n", "", None),
    ],
)
def test_a_row_that_is_no_recipe_is_refused_in_a_line(old: str, new: str, told: str | None, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(MINE.replace(old, new))
    if told is None:  # what stands in has all that the file has not
        assert read_table(str(tmp_path / "mine.yaml"), scale="embedded").rows[0].recipe is not None
        return
    with pytest.raises(ArraError, match=told) as refused:
        read_table(str(tmp_path / "mine.yaml"), scale="embedded")
    assert "\n" not in str(refused.value)


def test_names_of_rows_lead_to_no_other_folder(tmp_path: Path):
    told = MINE.replace("  general:", '  "../../x y":').replace("row:general", "row:../../x y")
    (tmp_path / "mine.yaml").write_text(told)
    table = read_table(str(tmp_path / "mine.yaml"), scale="full")
    assert list(table.starts) == ["../../x y"]
    name = arra.stages.reproduce._run_name("../../x y", "0123", tmp_path)
    assert (tmp_path / "runs" / name).resolve().parent == tmp_path / "runs"
    assert name == "..-..-x-y-0123"


def test_what_goes_wrong_inside_is_not_the_folders_fault(tmp_path: Path):
    display = Display(Console(file=io.StringIO()))
    with pytest.raises(PermissionError), arra.stages.reproduce._alone(tmp_path, display):
        raise PermissionError(errno.EACCES, "of a picture")
    (tmp_path / "file").touch()
    with (
        pytest.raises(ArraError, match="part of this path is a file"),
        arra.stages.reproduce._alone(tmp_path / "file", display),
    ):
        pass


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
    monkeypatch.setattr(train, "train", real)
    assert [row.missing for row in begin("appendix4", out=tmp_path).page.tables[0].rows] == [None, None]


def test_a_damaged_run_is_told_and_the_others_are_judged(begin: Callable[..., Reproduced], tmp_path: Path):
    def no_cards() -> None:
        for card in (tmp_path / "runs").rglob(CARD_FILE):
            card.unlink()

    first = begin("appendix4", out=tmp_path)
    no_cards()
    cosine, mse = (Path(folder) for folder in first.runs.values())
    (cosine / "model.safetensors").write_bytes(b"half of it")
    done = begin("appendix4", out=tmp_path)
    assert [(failure.task.folder, failure.what) for failure in done.failures] == [(cosine, "evaluating")]
    assert "model.safetensors" in done.failures[0].why
    assert [row.missing is None for row in done.page.tables[0].rows] == [False, True]
    assert list(done.runs.values()) == [str(mse)]


def test_a_number_that_is_none_is_a_failure_of_its_run(
    begin: Callable[..., Reproduced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from arra.stages import evaluate

    real = evaluate.evaluate

    def diverged(folder: Path, **options: Any) -> Any:
        def to_json(card: Card) -> str:
            row = replace(card.results[0], value=float("nan"))
            return written(replace(card, results=(row, *card.results[1:])))

        written = Card.to_json
        with monkeypatch.context() as patch:
            if folder.parent.name.startswith("mse"):
                patch.setattr(Card, "to_json", to_json)
            return real(folder, **options)

    monkeypatch.setattr(evaluate, "evaluate", diverged)
    done = begin("appendix4", out=tmp_path)
    (failure,) = done.failures
    assert "is nan, expected a number" in failure.why
    assert [row.missing is None for row in done.page.tables[0].rows] == [True, False]


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
        ({"tables": ["appendix2", "recipes/appendix2.yaml"]}, "recipes/appendix2.yaml: named twice"),
        ({"references": ["general=real"]}, "--weights, --without, --reference: of the protocols of --scale full"),
        ({"scale": "full", "references": ["real"]}, "--reference real: expected PROTOCOL=PATH, as in"),
        ({"scale": "full", "references": ["a=b", "a=c"]}, "--reference a=c: expected PROTOCOL=PATH once"),
        ({"scale": "full", "references": ["general=b"]}, "--reference general=b: these rows are measured by mimic-cxr"),
        ({"scale": "full", "references": ["mimic-cxr=b"]}, "--reference mimic-cxr=b: no such file or folder"),
        ({"devices": "0"}, "--devices 0: torch sees no accelerator here"),
        ({"scale": "full", "without": ["nonsense"]}, "--without nonsense: nothing of mimic-cxr"),
        ({"scale": "full", "weights": ["clip-l14=x"]}, "--weights clip-l14: nothing of mimic-cxr"),
        ({"scale": "full", "tables": ["table4_imagenet"]}, "imagenet-256: compares with VIRTUAL_imagenet256_labeled"),
    ],
)
def test_what_a_user_can_mend(changes: dict[str, Any], told: str, tmp_path: Path):
    usual: dict[str, Any] = {"tables": ["appendix2"], "rows": None, "scale": "embedded", "seeds": 1, "processes": None}
    usual |= {"devices": None, "ranks": 1, "shard": None, "equal_compute": None, "overrides": ()}
    with pytest.raises(ArraError, match=r"^[^\n]*$") as refused:
        run_reproduce(parse_options(**{**usual, **changes}), tmp_path / "out", console=Console(file=io.StringIO()))
    assert told in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_changes_the_speed_alone_changes_no_run(begin: Callable[..., Reproduced], tmp_path: Path):
    first = begin("appendix4", out=tmp_path)
    before = times(tmp_path)
    again = begin("appendix4", out=tmp_path, overrides=(*TINY, "train.micro_batch_size=2", "train.keep_checkpoints=2"))
    assert again.runs == first.runs
    assert times(tmp_path) == before
    assert again.page.tables == first.page.tables


def test_only_settings_of_the_training_make_numbers_incomparable():
    free = ["data.path=x", "train.parallel.reshard=false", "train.micro_batch_size=1", "model.llm.folder=y"]
    assert arra.stages.reproduce_results._changed_settings(free) == ""
    told = arra.stages.reproduce_results._changed_settings([*free, "train.steps=3", "align.weight = 2"])
    assert told == "train.steps, align.weight"


def test_spread_over_seeds_is_of_rows_that_are_trained_alike(
    begin: Callable[..., Reproduced], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    placed: dict[tuple[str, str], Placed] = {}
    real = arra.stages.reproduce_results._spreads

    def noted(found: Mapping[tuple[str, str], Placed]) -> Any:
        placed.update(found)
        return real(found)

    monkeypatch.setattr(arra.stages.reproduce_results, "_spreads", noted)
    begin("appendix6", "table1", out=tmp_path)
    alike = {place: one.variant.alike for place, one in placed.items()}
    of_table1 = {row: value for (table, row), value in alike.items() if table == "table1"}
    assert len(set(of_table1.values())) == 2  # from random weights, and adapted
    assert of_table1["arra-rep"] == of_table1["arra-none"] != of_table1["adapt-none"]
    sizes = {row: value for (table, row), value in alike.items() if table == "appendix6"}
    recipes = {row: placed["appendix6", row].variant.recipe for row in sizes}
    for one in sizes:
        for other in sizes:
            same = all(
                getattr(section(recipes[one]), name) == getattr(section(recipes[other]), name)
                for section, name in (
                    (lambda recipe: recipe.model, "hidden_size"),
                    (lambda recipe: recipe.data, "max_train_records"),
                    (lambda recipe: recipe.train, "steps"),
                )
            )
            assert (sizes[one] == sizes[other]) == same, (one, other)


def test_overrides_of_the_alignment_pass_by_rows_without_it():
    table = read_table("appendix5", scale="embedded", overrides=["align.weight=3", "train.steps=7"])
    for row in table.rows:
        assert row.recipe is not None
        assert row.recipe.train.steps == 7
        assert (row.recipe.align is None) == row.name.endswith("none")
        assert row.recipe.align is None or row.recipe.align.weight == 3
    assert {start_of(row.recipe) for row in table.rows if row.recipe} == {None, "general"}
