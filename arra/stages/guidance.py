"""A search for the guidance, schedule, temperature and top-k that a run paints best with: `arra guidance`.

run + held-out prompts (validation) -> rounds of trials -> guidance.json, guidance.html, a table
                                                        -> sampling.json, by which the run paints from then on
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from arra.distributed import choose_device, set_threads
from arra.errors import ArraError
from arra.evaluate.guidance import (
    FEWEST_IMAGES,
    Objective,
    Role,
    Round,
    Trial,
    direction,
    halve,
    num_pictures,
    plan_rounds,
)
from arra.report.grids import SCALE, GridColumn, data_url, sample_grid
from arra.report.guidance_page import PAGE_FILE, guidance_page
from arra.report.style import format_seconds
from arra.runs import atomic_write
from arra.sample.chosen import CHOSEN_FILE, write_chosen
from arra.sample.logits import SamplingSettings
from arra.stages.guidance_options import Budget, SearchOptions, candidates, short_name
from arra.stages.guidance_pictures import ACCURACY, FOLDER, SHOWN, Eye, Sitting, open_sitting
from arra.stages.painters import LoadedRun, load_run
from arra.stages.probe import store_of
from arra.stages.process import Progress, silent

RESULT_FILE = "guidance.json"
SHOWN_PIXELS = 192
"""Small pictures are enlarged on the page, up to so many pixels a side."""
ALWAYS = 2
"""Settings that are in every round: as the recipe says, and without guidance."""


@dataclass(frozen=True)
class Searched:
    """A search that was made, or (with --dry-run) would be."""

    run: Path
    options: SearchOptions
    rounds: tuple[Round, ...]
    num_settings: int
    metrics: tuple[str, ...]
    """Those that decided."""
    trials: tuple[Trial, ...] = ()
    """The winner first; empty where nothing was painted."""
    seconds: float = 0.0
    """Of painting and judging all that the search used."""
    num_painted: int = 0
    """Pictures that the search used."""
    num_painted_now: int = 0
    """The others were there from an earlier start."""
    notes: tuple[str, ...] = ()


def guidance(
    folder: Path,
    *,
    options: SearchOptions,
    tokenizer_weights: Path | None = None,
    threads: int | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Searched:
    """The search of a run, written into it; started again it goes on, and with `dry_run` it only says what it would do.

    Raises:
        ArraError: no finished run, no store, a split that the run's card reports, an unknown measure or space, or a
            budget that is too small.
    """
    set_threads(threads)
    loaded = load_run(folder, tokenizer_weights=tokenizer_weights)
    recipe = loaded.recipe
    refuse_reported(loaded, options.split)
    codes = loaded.model.settings
    tried = candidates(options, recipe.sample, num_codes=(codes.grid[0] * codes.grid[1], codes.num_codes))
    images = min(options.images, len(store_of(loaded).rows(options.split)))
    if options.dry_run:
        return dry_run(folder, options, len(tried), images)
    place = choose_device(device)
    loaded.on(place)
    sitting = open_sitting(
        loaded,
        split=options.split,
        images=images,
        spaces=options.spaces,
        seed=options.seed,
        batch_size=options.batch_size,
        device=place,
        progress=progress,
    )
    metrics = chosen_metrics(options.metrics, sitting)
    painted_now = 0

    def told(pictures: int) -> None:
        nonlocal painted_now
        painted_now += pictures
        progress("painting and judging", painted_now, 0)

    sitting.told = told
    images = min(images, len(sitting.split.prompts))  # some lack a column
    budget = None if options.budget is None else pictures_of(options.budget, sitting, list(tried))
    rounds = plan_rounds(len(tried), num_images=images, num_kept=ALWAYS, budget=budget)
    trials = halve(
        tried,
        rounds,
        sitting,
        objective=Objective(metrics, options.split, recipe.evaluate.frechet_components),
        metrics=sitting.metrics(),
        seed=options.seed,
        told=lambda text: progress(text, painted_now, 0),
    )
    numbers = [trial.num_images for trial in trials]
    kept = [sitting.painted(trial.settings, trial.num_images) for trial in trials]
    found = Searched(
        folder,
        options,
        tuple(rounds),
        len(tried),
        metrics,
        tuple(trials),
        seconds=sum(each.seconds * n / len(each) for each, n in zip(kept, numbers, strict=True)),
        num_painted=sum(numbers),
        num_painted_now=painted_now,
        notes=tuple(notes_of(trials, metrics, sitting, options)),
    )
    write(found, sitting)
    return found


def refuse_reported(loaded: LoadedRun, split: str) -> None:
    """Nothing; nobody chooses on the pictures that are reported.

    Raises:
        ArraError: the run's card reports the split, or its pictures have many shapes.
    """
    if split in loaded.recipe.evaluate.splits:
        raise ArraError(
            f"--split {split}: the run's card reports it (evaluate.splits), and settings chosen on it would flatter "
            "the card; choose on validation"
        )
    if loaded.recipe.data.crop.kind == "buckets":
        raise ArraError(
            f"{loaded.run.path}: trained on pictures of many shapes, which are not measured yet; give settings to arra "
            "generate by hand"
        )


def dry_run(folder: Path, options: SearchOptions, num_settings: int, images: int) -> Searched:
    """The rounds as they would be; those of a budget in time are not known before something was painted."""
    budget = None if options.budget is None else options.budget.pictures
    rounds = plan_rounds(num_settings, num_images=images, num_kept=ALWAYS, budget=budget)
    notes = []
    if options.budget is not None and options.budget.seconds is not None:
        notes.append(f"At most: how many of these pictures {options.budget.text} allow is measured at the start.")
    return Searched(folder, options, tuple(rounds), num_settings, options.metrics, notes=tuple(notes))


def chosen_metrics(asked: Sequence[str], sitting: Sitting) -> tuple[str, ...]:
    """The measures that decide: those asked for, else the kernel distance of an eye that is no teacher's relative.

    The kernel distance is unbiased; the Fréchet distance of few pictures prefers settings that vary less.

    Raises:
        ArraError: there is no such measure.
    """
    known = sitting.metrics()
    if odd := [name for name in asked if name not in known]:
        raise ArraError(f"--metric {odd[0]}: unknown here; there are {', '.join(known)}")
    if asked:
        return tuple(asked)
    strangers = [eye for eye in sitting.eyes if not eye.is_teachers]
    return (f"{(strangers or list(sitting.eyes))[0].prefix}kid_x1000",)


def pictures_of(budget: Budget, sitting: Sitting, tried: Sequence[SamplingSettings]) -> int:
    """A budget in pictures. Of one in time the price of a picture is measured on the first ones, and kept: a search
    that goes on has the rounds that it began with.
    """
    if budget.seconds is None:
        assert budget.pictures is not None
        return budget.pictures
    name = sitting.name_of([budget.text, [settings.model_dump(mode="json") for settings in tried]])
    path = sitting.loaded.run.path / FOLDER / f"{name}.budget"
    try:
        return int(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not begun yet
        first = sitting.painted(tried[0], min(FEWEST_IMAGES, len(sitting.split.prompts)))
        pictures = int(budget.seconds * len(first) / max(first.seconds, 1e-6))
        atomic_write(path, f"{pictures}\n")
        return pictures


def notes_of(trials: Sequence[Trial], metrics: Sequence[str], sitting: Sitting, options: SearchOptions) -> list[str]:
    """What must be read beside the winner."""
    winner = trials[0]
    notes = []
    if all(is_teachers(name, sitting.eyes) for name in metrics):
        deciding = dict.fromkeys(eye.name for eye in sitting.eyes if eye in [eye_of(m, sitting.eyes) for m in metrics])
        strangers = [eye.name for eye in sitting.eyes if not eye.is_teachers]
        way = f"see what {', '.join(strangers)} says in the record" if strangers else "name a stranger with --space"
        notes.append(
            f"Warning: decided by {', '.join(deciding)} alone, of the family of the recipe's teacher; it may prefer "
            f"what the alignment has taught. For another opinion {way}."
        )
    equal = [trial for trial in trials[1:] if trial.is_within_noise]
    before = next(trial for trial in trials if "before" in trial.roles)
    if before is not winner and before.is_within_noise:
        notes.append(
            f"The winner is not clearly better than what the recipe says ({short_name(before.settings)}) on these "
            f"{winner.num_images} pictures."
        )
    notes.append(
        f"{len(equal)} of the other {len(trials) - 1} settings are within the noise of the winner (95 %, all "
        "comparisons together)."
    )
    scales = sorted({trial.settings.cfg_scale for trial in trials})
    if len(scales) > 1 and winner.settings.cfg_scale == scales[-1]:
        notes.append(f"The winner has the largest guidance that was tried, {scales[-1]:g}; try larger ones (--cfg).")
    notes.append(
        f"The winner's numbers are those of the best of {len(trials)} tries on these pictures, and flatter it; arra "
        "evaluate measures it on others."
    )
    if options.split == "train":
        notes.append("Warning: chosen on pictures that the run was trained on, which it knows better than others.")
    return notes


def eye_of(metric: str, eyes: Sequence[Eye]) -> Eye | None:
    """The eye that a measure belongs to; None of one that no network decides."""
    if metric == ACCURACY:
        return None
    return max((eye for eye in eyes if metric.startswith(eye.prefix)), key=lambda eye: len(eye.prefix))


def is_teachers(metric: str, eyes: Sequence[Eye]) -> bool:
    """Whether a measure is taken in the space of a teacher's relative."""
    eye = eye_of(metric, eyes)
    return eye is not None and eye.is_teachers


def write(found: Searched, sitting: Sitting) -> None:
    """Nothing; the run's folder holds the record, the page, and last what the run paints with from now on."""
    record = record_of(found, sitting)
    atomic_write(found.run / RESULT_FILE, json.dumps(record, indent=2, allow_nan=False) + "\n")
    atomic_write(found.run / PAGE_FILE, guidance_page(record, pictures=pictures_url(found, sitting)))
    winner = found.trials[0]
    about = {key: record[key] for key in ("metrics", "split", "images", "settings_tried", "model_sha256")}
    about |= {"by": f"arra guidance, see {RESULT_FILE}", "values": dict(winner.values)}
    write_chosen(found.run, winner.settings, steps=sitting.loaded.recipe.train.steps, about=about)


def record_of(found: Searched, sitting: Sitting) -> dict[str, Any]:
    """The search as guidance.json tells it."""
    options = found.options
    return {
        "run": str(found.run),
        "step": sitting.loaded.recipe.train.steps,
        "split": options.split,
        "images": found.trials[0].num_images,
        "metrics": list(found.metrics),
        "settings_tried": found.num_settings,
        "rounds": [dataclasses.asdict(each) for each in found.rounds],
        "budget": None if options.budget is None else options.budget.text,
        "pictures_painted": found.num_painted,
        "seconds": found.seconds,
        "seed": options.seed,
        "model_sha256": sitting.identity["model_sha256"],
        "tokenizer_sha256": sitting.identity["tokenizer_sha256"],
        "store_sha256": sitting.identity["store_sha256"],
        "eyes": [
            {
                "measures": f"{eye.prefix}...",
                "name": eye.name,
                "sha256": eye.weights_sha256,
                "teachers": eye.is_teachers,
            }
            for eye in sitting.eyes
        ],
        "teachers_measures": [name for name in sitting.metrics() if is_teachers(name, sitting.eyes)],
        "chosen": found.trials[0].settings.model_dump(mode="json"),
        "notes": list(found.notes),
        "trials": [trial_facts(trial) for trial in found.trials],
    }


def trial_facts(trial: Trial) -> dict[str, Any]:
    """One line of the record."""
    return {
        "name": short_name(trial.settings),
        "roles": list(trial.roles),
        "num_images": trial.num_images,
        "score": trial.score,
        "difference": trial.difference,
        "margin": trial.margin,
        "is_within_noise": trial.is_within_noise,
        "values": dict(trial.values),
        "settings": trial.settings.model_dump(mode="json"),
    }


def pictures_url(found: Searched, sitting: Sitting) -> str:
    """The first pictures of every setting with a role, side by side: the same prompts and seeds, unpicked."""
    named: dict[SamplingSettings, tuple[Role, ...]] = {
        trial.settings: trial.roles for trial in found.trials if trial.roles
    }
    shown = [(roles, sitting.painted(settings, 1).pictures) for settings, roles in named.items()]
    assert all(pictures is not None for _, pictures in shown)
    columns = [
        GridColumn(label=" = ".join(roles), images=pictures.numpy()[:, None])
        for roles, pictures in shown
        if pictures is not None
    ]
    count = min(SHOWN, *(len(column.images) for column in columns))
    columns = [dataclasses.replace(column, images=column.images[:count]) for column in columns]
    side = max(columns[0].images.shape[2:4])
    scale = max(1, min(SCALE, SHOWN_PIXELS // side))
    return data_url(sample_grid(columns, captions=sitting.split.prompts[:count], scale=scale))


def summary(found: Searched) -> Group:
    """What the command ends with, for a terminal of 80 columns."""
    lines = [
        f"{found.num_settings} settings on split '{found.options.split}': "
        + ", then ".join(f"{each.num_settings} x {each.num_images} pictures" for each in found.rounds)
        + f" ({num_pictures(found.rounds):,} in all)"
    ]
    if not found.trials:
        return Group(*map(Text, [*lines, *found.notes, "nothing painted (--dry-run)"]))
    metric = found.metrics[0] if len(found.metrics) == 1 else "score"
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", metric, "behind", "pictures"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=column != "")
    shown = [trial for trial in found.trials if trial.roles or trial.num_images == found.trials[0].num_images]
    for trial in shown:
        roles = [role for role in trial.roles if role != "no guidance"]  # its name says so
        told = f" ({', '.join(roles)})" if roles else ""
        behind = f"{trial.difference:.4g} ± {trial.margin:.2g}" if trial is not found.trials[0] else ""
        value = trial.values.get(metric, trial.score)
        table.add_row(
            Text(short_name(trial.settings) + told, style="bold" if trial is found.trials[0] else ""),
            f"{value:.4g}",
            behind + (" *" if behind and trial.is_within_noise else ""),
            str(trial.num_images),
        )
    better = "less" if metric == "score" or direction(metric) > 0 else "more"
    lines.append(
        f"{found.num_painted:,} pictures in {format_seconds(found.seconds)}, {found.num_painted_now:,} of them now; "
        f"{better} is better, * within the noise of the winner"
    )
    folder = found.run
    ends = [f"{folder / CHOSEN_FILE}: the run paints so from now on; all trials: {folder / PAGE_FILE}"]
    return Group(*map(Text, lines), table, *map(Text, [*found.notes, *ends]))
