"""What a recipe's training costs, counted, and how many steps a budget of operations pays for.

    recipe, store --> step_phases (its own first batch, as the trainer runs it) --> steps_within a budget

Place in the pipeline: `arra lab` and `arra reproduce` give rows the same training compute by it. Only counted
operations decide (`arra.train.flops`): clocks of busy machines would not be fair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arra.config import Recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.runs import Run
from arra.stages.makers import FeaturesMaker, build_makers, crop_of, used_choices, views_of
from arra.stages.origin import columns_of
from arra.stages.pictures import require_columns, tokenizer_if_given
from arra.stages.train import first_model
from arra.stages.training_data import training_data, training_rows
from arra.train.alignment import build_alignment
from arra.train.flops import count_flops
from arra.train.loop import Trainer


@dataclass(frozen=True)
class Phase:
    """Steps that cost the same: from `start` on until the next phase."""

    start: int
    flops: int


def step_phases(recipe: Recipe, store: Store) -> list[Phase]:
    """What a training step costs, forward and backward, of model, projectors and losses; anew where a term stops.

    It is counted on the row's own first batch, as the trainer runs it.
    """
    tokenizer = tokenizer_if_given(recipe, store)
    require_columns(recipe, store, tokenizer, columns_of(recipe))
    data = training_data(recipe, store, tokenizer)
    try:
        model = first_model(recipe, data)
        alignment, starts = None, {0}
        if recipe.align is not None and data.features is not None:
            alignment = build_alignment(
                recipe.align, data.features, hidden_size=model.hidden_size, seed=recipe.train.seed
            )
            stops = {term.stop_step for term in recipe.align.terms().values()}
            starts |= {stop for stop in stops if stop is not None and stop < recipe.train.steps}
        trainer = Trainer(
            model=model,
            alignment=alignment,
            batches=data.batches,
            validation=(),
            settings=recipe.train,
            run=Run(Path()),  # nothing is written
        )
        model.train()
        batch = data.batches.batch(0)
        phases = []
        for start in sorted(starts):
            passes = partial(trainer.passes.gradients, batch, step=start)
            phases.append(Phase(start, count_flops(passes)))
    finally:
        data.pictures.close()
    return phases


def total_flops(phases: Sequence[Phase], steps: int) -> int:
    """What so many steps cost."""
    ends = [phase.start for phase in phases[1:]] + [steps]
    return sum(phase.flops * max(0, min(end, steps) - phase.start) for phase, end in zip(phases, ends, strict=True))


def steps_within(phases: Sequence[Phase], budget: int) -> int:
    """The most steps that a budget pays for."""
    steps = 0
    for phase, following in zip(phases, [*phases[1:], None], strict=True):
        left = budget - total_flops(phases, phase.start)
        affordable = phase.start + left // phase.flops
        steps = affordable if following is None else min(affordable, following.start)
        if following is None or affordable < following.start:
            break
    return steps


def teacher_flops(recipe: Recipe, store: Store, *, known: dict[str, int] | None = None) -> int | None:
    """What the row's teachers cost for one pass over the training pictures, all stored crops; None if not here.

    Encoders that share their weights and input pay once: the pass that gives the whole picture gives its patches.
    `known` remembers what a picture costs each of them, for other rows.
    """
    pictures = len(training_rows(recipe, store)) * crop_of(recipe).num_variants
    known = {} if known is None else known
    costs: dict[tuple[Any, ...], int] = {}
    for choice in used_choices(recipe).values():
        named = (
            f"{choice.model_dump_json()} {recipe.data.model_dump_json(include={'image_size', 'encoder_image_size'})}"
        )
        if named not in known:
            try:
                (maker,) = build_makers(recipe, [choice.column], None, device=torch.device("cpu"), batch_size=1)
            except ArraError:  # features that were made elsewhere
                return None
            assert isinstance(maker, FeaturesMaker)
            (view,) = views_of(recipe, maker.views).values()
            picture = torch.zeros(1, view.size, view.size, 3, dtype=torch.uint8)
            known[named] = _cost(maker, picture)
        network = (choice.name, choice.weights, choice.image_size, choice.bands)
        costs[network] = max(costs.get(network, 0), known[named])
    return pictures * sum(costs.values())


def _cost(maker: FeaturesMaker, picture: Tensor) -> int:
    return count_flops(lambda: maker.encode(picture))
