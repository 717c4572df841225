"""What a run has saved on its way, and a model from it: `arra checkpoint`."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from rich.table import Table

from arra.config import Recipe, parse_recipe
from arra.errors import ArraError
from arra.models import Painter, load_outline, save_model
from arra.models.adapters import merge_adapters
from arra.runs import Run, atomic_write
from arra.stages.language import first_language_model, language_card
from arra.stages.live import validation_losses
from arra.stages.model import told_to_painters
from arra.train.checkpoints import SavedStep, read_tensors, saved_step, steps_in

BEST, NEWEST = "best", "newest"


def checkpoint_table(folder: Path) -> Table:
    """The run's checkpoints: step, validation loss where the step was validated, size on the disk.

    Raises:
        ArraError: no run.
    """
    run = Run.open(folder)
    losses = validation_losses(run.read_metrics())
    steps = steps_in(folder / "checkpoints")
    best = _best(steps, losses)
    table = Table(box=None)
    for name in ("step", "validation", "GiB", ""):
        table.add_column(name, justify="left" if not name else "right")
    for step in steps:
        size = sum(path.stat().st_size for path in (folder / "checkpoints" / f"step-{step:07d}").iterdir())
        told = [BEST] * (step == best) + [NEWEST] * (step == steps[-1])
        table.add_row(
            str(step), f"{losses[step]:.4f}" if step in losses else "", f"{size / 2**30:.3f}", ", ".join(told)
        )
    return table


def model_of_checkpoint(folder: Path, which: str, *, out: Path, average: bool = True) -> Path:
    """A model's folder, from a checkpoint of a run that may not be finished: as the run's end would save it.

    `which` is a step, "newest" or "best" (of lowest validation loss); the averaged weights are taken where there are
    any, unless `average` is false.

    Raises:
        ArraError: there is no such checkpoint, it is damaged, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArraError(f"{out}: exists already; name a new folder")
    run = Run.open(folder)
    saved = saved_step(folder / "checkpoints", chosen_step(run, which))
    recipe = parse_recipe(run.recipe_yaml(), Recipe, source=str(run.recipe_path))
    model = whole_model(run, recipe, saved=saved, average=average)
    model.about |= told_to_painters(recipe, run.manifest().get("codes_of"))
    model.about["checkpoint"] = {"run": str(folder), "step": saved.step}
    for file in sorted((folder / "tokenizer").glob("*")):
        atomic_write(out / "tokenizer" / file.name, file.read_bytes())
    return save_model(model, out)


def chosen_step(run: Run, which: str) -> int:
    """The step that a person means.

    Raises:
        ArraError: no step, or the run has saved none that fits.
    """
    if which.isdecimal():
        return int(which)
    if which not in (BEST, NEWEST):
        raise ArraError(f"--step {which}: expected a step, '{BEST}' or '{NEWEST}'")
    steps = steps_in(run.path / "checkpoints")
    if not steps:
        raise ArraError(f"{run.path / 'checkpoints'}: holds no checkpoint yet")
    if which == NEWEST:
        return steps[-1]
    best = _best(steps, validation_losses(run.read_metrics()))
    if best is None:
        raise ArraError(
            f"{run.path}: none of the saved steps ({', '.join(map(str, steps))}) was validated; name one, or set "
            "train.keep_best next time"
        )
    return best


def _best(steps: Iterable[int], losses: Mapping[int, float]) -> int | None:
    """The step of the lowest validation loss."""
    return min((step for step in steps if step in losses), key=losses.__getitem__, default=None)


def whole_model(run: Run, recipe: Recipe, *, saved: SavedStep, average: bool) -> Painter:
    """The model with a checkpoint's weights, as an ordinary one: adapters are merged, the projector is left behind."""
    averaged = {name for name in saved.tensors if name.startswith("average.")} if average else set[str]()
    tensors = read_tensors(saved, [name for name in saved.tensors if name.startswith("model.") or name in averaged])
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    state |= {key: tensors[f"average.{key}"] for key in state if f"average.{key}" in tensors}
    if recipe.model.llm is None:
        return load_outline(run.path / "checkpoints", weights=state)
    model = first_language_model(recipe, language_card(recipe))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])
    if recipe.model.llm.train != "all":
        merge_adapters(model.lm)
    return model
