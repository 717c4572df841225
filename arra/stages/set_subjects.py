"""What a run paints to be measured, and whose encoders it was aligned to.

RUN, protocol --arra.stages.paint--> RUN/samples/evaluation-... --> arra.stages.evaluate_set
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from arra.config import Recipe, parse_recipe
from arra.encoders import SPECS
from arra.runs import Run
from arra.sample.chosen import read_chosen
from arra.stages.evaluate import family
from arra.stages.makers import used_choices
from arra.stages.paint import paint
from arra.stages.process import Progress, silent
from arra.stages.request import PaintOptions, PaintRequest
from arra.stages.set_options import Plan, SetOptions
from arra.stages.store_pictures import open_run_records
from arra.stages.wishes import ALL, Asked


def paint_for_set(
    folder: Path, plan: Plan, options: SetOptions, *, progress: Progress = silent
) -> tuple[Path, SetOptions]:
    """The folder of what a run paints for a protocol, and the options with its reference and training pictures named.

    Every record of the split is painted once, each with a seed of its own; of a model of classes the classes in turn.
    Pictures that are there already are kept; those of a model that has changed are in the way unless `replace` is set.

    Raises:
        ArraError: no finished run, no such split, or a model of classes of which nobody says how many pictures.
    """
    run = Run.open(folder)
    recipe = parse_recipe(run.recipe_yaml(), Recipe, source=str(run.recipe_path))
    split = options.split or plan.protocol.split
    num_images = options.num_images or plan.protocol.num_images
    classes = recipe.model.condition == "class" and plan.protocol.per_class is not None
    if not classes:
        split = split if split is not None else recipe.evaluate.splits[0]
    name = f"evaluation-{'classes' if classes else split}"
    name += f"-{num_images}" if num_images is not None else ""
    name += f"-cfg{options.cfg_scale:g}" if options.cfg_scale is not None else ""
    name += f"-seed{options.seed}" if options.seed else ""
    if (chosen := read_chosen(folder, steps=recipe.train.steps)) is not None:  # what was painted before it stays
        name += f"-chosen-{hashlib.sha256(chosen.model_dump_json().encode()).hexdigest()[:8]}"
    asked = Asked(labels=(ALL,)) if classes else Asked(split=split)
    count = num_images if classes else _count(folder, str(split), num_images)
    request = PaintRequest(
        folder,
        asked,
        seeds=(options.seed,),
        num_images=count,
        sampling={} if options.cfg_scale is None else {"cfg_scale": options.cfg_scale},
        tokenizer_weights=options.tokenizer_weights,
    )
    out = folder / "samples" / name
    paint(
        request,
        options=PaintOptions(out=out, batch_size=options.batch_size, device=options.device, replace=options.replace),
        progress=progress,
    )
    return out, replace(
        options,
        split=split,
        reference=options.reference or (None if classes else str(folder)),
        partners_alone=options.reference is None,
        training=options.training or (str(folder) if plan.wants("copied") else None),
    )


def _count(folder: Path, split: str, most: int | None) -> int:
    """Pictures that a split's records are painted as, one each."""
    count = len(open_run_records(folder, split=split))
    return count if most is None else min(count, most)


def known_teachers(subject: Path | str, given: Sequence[str]) -> dict[str, str] | None:
    """Family by name of the encoders that the pictures' model was aligned to; None where nobody says.

    A folder of pictures is of the run that it lies in.
    """
    if given:
        return {name: SPECS[name].family if name in SPECS else name for name in given}
    path = Path(subject).resolve()
    for folder in (path, *list(path.parents)[:3]):
        if (folder / "recipe.yaml").is_file():
            recipe = parse_recipe(Run.open(folder).recipe_yaml(), Recipe, source=str(folder / "recipe.yaml"))
            return {choice.name: family(choice) for choice in used_choices(recipe).values()}
    return None
