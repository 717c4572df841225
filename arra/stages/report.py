"""From evaluated runs to one page: `arra report`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.card import CARD_FILE, Evaluation, values_key
from arra.evaluate.compare import compare, compare_seeds
from arra.report.grids import GridColumn, png_bytes, readme_grid
from arra.report.page import NOTE_SAME_FAMILY, Comparison, HeldOut, RunView, Samples, build_report
from arra.runs import atomic_write
from arra.stages.evaluate import PICTURES_FILE, SAME_FAMILY
from arra.stages.live import live_page
from arra.stages.origin import noted
from arra.stages.painters import LoadedRun, load_run


def report(folders: Sequence[Path], out: Path, *, title: str, timings: Sequence[tuple[str, float]] = ()) -> Path:
    """The page that compares evaluated runs; the first run's row is the one the others are held against.

    Runs of one row are training seeds of it. Beside the page lie `grid.png`, the first split's pictures, and the tables
    as `report.md`, `report.tex` and `report.csv`. Of a single run that is not evaluated it is the page of its training,
    as far as that has come.

    Raises:
        ArraError: a run is not evaluated, or two were measured differently.
    """
    if len(folders) == 1 and not (folders[0] / CARD_FILE).is_file():
        return live_page(folders[0], out=out)
    loaded = [load_run(folder) for folder in folders]
    evaluations = {folder: Evaluation.load(folder) for folder in folders}
    labels = run_labels(loaded)
    pictures = [painted_pictures(folder) for folder in folders]
    split_names = loaded[0].recipe.evaluate.splits
    held_out = [grid_references(pictures[0], split) for split in split_names]
    views = [
        RunView(
            label=label,
            rows=one.run.read_metrics(),
            card=evaluations[folder].card,
            samples=tuple(grid_samples(one, painted)),
            seed=one.recipe.train.seed,
            recipe=one.run.recipe_yaml(),
            manifest={key: str(value) for key, value in one.run.manifest().items()},
        )
        for one, folder, label, painted in zip(loaded, folders, labels, pictures, strict=True)
    ]
    by_label: dict[str, dict[int, Evaluation]] = {}
    for one, folder, label in zip(loaded, folders, labels, strict=True):
        by_label.setdefault(label, {})[one.recipe.train.seed] = evaluations[folder]
    baseline, *others = by_label
    settings = loaded[0].recipe.evaluate
    comparisons = [
        compare_rows(baseline, other, by_label, num_resamples=settings.num_resamples, seed=settings.seed)
        for other in others
    ]
    same_family = any(evaluation.card.protocol.get(SAME_FAMILY) for evaluation in evaluations.values())
    page = build_report(
        out,
        title=title,
        runs=views,
        comparisons=comparisons,
        held_out=held_out,
        timings=timings,
        attribution=noted(folders[0]).get("attribution") or None,
        notes=[NOTE_SAME_FAMILY] if same_family else [],
    )
    first = [view for view in views if view.seed == views[0].seed]
    shown = [(view.label, view.samples[0].images) for view in first if view.samples]
    columns = [GridColumn(label="tokenizer", images=held_out[0].reconstructions[:, None])]
    columns += [GridColumn(label=label, images=images) for label, images in shown]
    atomic_write(out / "grid.png", png_bytes(readme_grid(columns, captions=held_out[0].prompts)))
    return page


def run_labels(loaded: Sequence[LoadedRun]) -> list[str]:
    """What each run is called: its row; where that does not tell two runs of one seed apart, its folder.

    Raises:
        ArraError: a run is given twice.
    """
    paths = [one.run.path.resolve() for one in loaded]
    if twice := [str(path) for place, path in enumerate(paths) if path in paths[:place]]:
        raise ArraError(f"{twice[0]}: given twice; name each run once")
    seeds = [one.recipe.train.seed for one in loaded]
    rows = [one.recipe.row or path.name for one, path in zip(loaded, paths, strict=True)]
    for names in (rows, [path.name for path in paths]):
        if len(set(zip(names, seeds, strict=True))) == len(paths):
            return names
    return [str(one.run.path) for one in loaded]


def painted_pictures(folder: Path) -> dict[str, Tensor]:
    """What `arra evaluate` painted.

    Raises:
        ArraError: the file is missing or damaged.
    """
    path = folder / PICTURES_FILE
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise ArraError(f"{path}: missing or damaged; run: arra evaluate {folder}") from error


def compare_rows(
    baseline: str, other: str, by_label: dict[str, dict[int, Evaluation]], *, num_resamples: int, seed: int
) -> Comparison:
    """Two rows compared on the training seeds they share.

    Raises:
        ArraError: they share none.
    """
    seeds = sorted(by_label[baseline].keys() & by_label[other].keys())
    if not seeds:
        raise ArraError(f"report: '{baseline}' and '{other}' share no training seed; train both with the same seeds")
    pairs = [(by_label[baseline][each], by_label[other][each]) for each in seeds]
    return Comparison(
        baseline=baseline,
        candidate=other,
        differences=tuple(compare(*pairs[0], num_resamples=num_resamples, seed=seed)),
        over_seeds=tuple(compare_seeds(pairs, num_resamples=num_resamples, seed=seed)) if len(pairs) > 1 else (),
    )


def grid_references(painted: dict[str, Tensor], split: str) -> HeldOut:
    """The held-out pictures that the grid's prompts belong to."""
    return HeldOut(
        split=split,
        prompts=tuple(json.loads(bytes(painted[f"{split}/grid_prompts"].tolist()).decode())),
        reconstructions=painted[f"{split}/grid_reconstructions"].numpy(),
        raw=painted[f"{split}/grid_raw"].numpy() if f"{split}/grid_raw" in painted else None,
    )


def grid_samples(loaded: LoadedRun, painted: dict[str, Tensor]) -> Iterator[Samples]:
    """The run's pictures of the grid's prompts, for every split and guidance."""
    settings = loaded.recipe.evaluate
    for split in settings.splits:
        for scale in settings.cfg_scales:
            yield Samples(
                split=split,
                cfg_scale=scale,
                prompts=grid_references(painted, split).prompts,
                seeds=tuple(range(settings.grid_seeds)),
                images=painted[values_key("grid", split=split, cfg_scale=scale)].numpy(),
            )
