"""Every row of every recipe passes `arra plan`, and every table's small version does."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from arra.config import Recipe, load_recipe, read_recipe_file, recipes_folder, row_names
from arra.stages import planned_model as planned_models
from arra.stages.plan import plan
from arra.stages.plan_data import training_records
from arra.stages.plan_machines import parse_machine
from arra.stages.plan_report import in_short
from arra.stages.planned_model import KnownPasses, planned_model, with_known_passes
from arra.stages.tables import Scale, read_table
from arra.tokenizers import load_tokenizer
from arra.train.settings import TrainSettings

BUILT_IN = [path.stem for path in sorted(recipes_folder().glob("*.yaml"))]
TABLES = [name for name in BUILT_IN if read_recipe_file(name).table is not None]
OF_STEPS = ("batch_size", "micro_batch_size", "precision", "recompute", "optimizer", "parallel", "ema_decay")
"""Settings of training that plans follow from, besides its steps."""
known: KnownPasses = {}
traced: dict[tuple[object, ...], Any] = {}


tokenizer = cache(load_tokenizer)


@pytest.fixture(autouse=True)
def _passes_of_each_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all sizes of a model the first one's passes, of a block or two.

    What is asked here is that there is a plan. Its numbers are asked for in test_plan.py.
    """

    def once(make: Any) -> Any:
        def made(model: Any, settings: TrainSettings, *, inputs: Any, sharded: bool) -> Any:
            condition = getattr(model.settings, "condition", None)
            key = make, type(model), condition, settings.precision, settings.recompute, sharded
            if key not in traced:
                traced[key] = make(model, settings, inputs=inputs, sharded=sharded)
            return traced[key]

        return made

    monkeypatch.setattr("arra.train.activations.TRACED_BLOCKS", (1, 2))
    monkeypatch.setattr("arra.stages.model.load_named", lambda recipe: tokenizer(recipe.tokenizer.name))
    for name in ("traced_passes", "looking_bytes"):
        monkeypatch.setattr(planned_models, name, once(getattr(planned_models, name)))


def alike(recipe: Recipe) -> str:
    """The same for recipes of the same plan but for the number of steps and the projectors' sizes."""
    said = recipe.model_dump(mode="json")
    said["model"] |= {"weights": None, "seed": 0}
    if said["model"]["llm"] is not None:
        said["model"]["llm"]["folder"] = "models/none"
    align = [len(recipe.align_terms()), recipe.has_rep]
    steps = {name: said["train"][name] for name in OF_STEPS}
    return json.dumps([said["data"]["image_size"], said["tokenizer"], said["model"], align, steps])


def differing(recipes: Iterator[Recipe]) -> list[Recipe]:
    """One of those with the same plan; of all it is known how many steps they have."""
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        assert isinstance(recipe.train.steps, int) or training_records(recipe, None)[0], (recipe.name, recipe.row)
        found.setdefault(alike(recipe), recipe)
    return list(found.values())


def of_tables(scale: Scale) -> Iterator[Recipe]:
    for name in TABLES:
        yield from (row.recipe for row in read_table(name, scale=scale).rows if row.recipe is not None)


def without_table() -> Iterator[Recipe]:
    for name in BUILT_IN:
        if name not in TABLES:
            yield from (load_recipe(name, row=row) for row in (None, *row_names(recipes_folder() / f"{name}.yaml")))


def lines(recipes: list[Recipe], machine: str) -> None:
    """Nothing; each has parameters, memory and hours on the machine, and fits it or is told what to change."""
    for recipe in recipes:
        paints = recipe.model.llm is not None and recipe.tokenizer.name != "chameleon"  # `arra init` makes its model
        model = planned_model(recipe, "chameleon-7b" if paints else None)
        model = with_known_passes(model, recipe, known=known)
        found = plan(recipe, machines=[parse_machine(machine)], planned=model)
        (each,) = found.machines
        assert each.memory.activations > 0
        assert each.hours is not None
        assert each.hours > 0
        assert each.fits or in_short(found), (recipe.name, recipe.row)


def test_every_row_of_every_table() -> None:
    lines(differing(of_tables("full")), "8xh100-80g")


def test_every_row_of_every_table_at_embedded_scale() -> None:
    lines(differing(of_tables("embedded")), "cpu-16g")


def test_every_row_of_every_other_recipe() -> None:
    lines(differing(without_table()), "8xh100-80g")
