"""What a run's hidden states know of an encoder's features, and where an alignment would help: `arra probe`.

    run (final, or one of its checkpoints) + held-out pictures -> probe.json, probe.html, a table
Legend: L layers, P positions, M scored pictures.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from arra.config import Recipe
from arra.data.loading import default_workers
from arra.data.store import Store
from arra.distributed import choose_device, set_threads
from arra.encoders.settings import EncoderChoice
from arra.errors import ArraError
from arra.models import CausalLM, Painter
from arra.models.language_folder import LanguageCard
from arra.report.probe_page import PAGE_FILE, probe_page
from arra.runs import atomic_write
from arra.stages.language import first_language_model, language_card
from arra.stages.makers import center_variant, crop_of, used_choices
from arra.stages.origin import noted
from arra.stages.painters import LoadedRun, load_run
from arra.stages.pictures import feature_sample, open_pictures
from arra.stages.process import Progress, silent
from arra.stages.training_data import training_rows
from arra.stages.watch import open_watcher
from arra.tokenizers.prompts import PromptTokenizer
from arra.tokenizers.text import TextTokenizer
from arra.train.alignment import Alignments, build_alignment
from arra.train.checkpoints import read_tensors, saved_step
from arra.train.watch import Measured, count_layers

RESULT_FILE = "probe.json"
SHARE = 0.125
"""What the proposed weight makes of the alignment's gradient: this share of the next-token gradient's norm, where both
enter the states of the layer. Below 1 the next token keeps the lead; a half cost likelihood where it was tried."""
NEAR_BEST = 0.9
"""A layer counts as good as the best one where it is read this well beside it, or is within a standard error."""


@dataclass(frozen=True)
class Suggestion:
    """A layer and a weight to begin with, and why."""

    encoder: str
    layer: int
    weight: float
    share: float
    is_clear: bool
    """Whether something can be read from the states at all, so that the layer is more than the paper's default."""
    reasons: tuple[str, ...]
    recipe: str
    """Lines to paste into a recipe."""
    evidence: tuple[dict[str, Any], ...]
    """For every layer: readable, its standard error, room, the two gradient norms, and the weight there."""


@dataclass(frozen=True)
class Probed:
    """What `arra probe` found, and where it is written."""

    facts: dict[str, Any]
    """Which run, step, pictures and encoders."""
    measured: Measured
    suggestion: Suggestion | None
    notes: tuple[str, ...]
    out: Path


def probe(
    folder: Path,
    *,
    encoder: str | None = None,
    images: int = 256,
    split: str = "validation",
    layers: str | None = None,
    checkpoint: int | None = None,
    suggest: bool = False,
    share: float = SHARE,
    out: Path | None = None,
    tokenizer_weights: Path | None = None,
    threads: int | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Probed:
    """The measures of a run, written to `out` (the run's folder `probe` unless given).

    `encoder` is a name of the recipe's encoders or of `arra list encoders`; None takes those that the run was aligned
    with, else the teacher. The store's features are used where they are there, others are made from the pictures.

    Raises:
        ArraError: no finished run, no store, no such checkpoint, layer or encoder, or too few pictures.
    """
    set_threads(threads)
    chosen_layers = None if layers is None else parse_layers(layers)
    loaded = load_run(folder, tokenizer_weights=tokenizer_weights)
    recipe, store = loaded.recipe, store_of(loaded)
    model, tensors, step = model_at(loaded, checkpoint)
    highest = count_layers(model)
    if odd := [layer for layer in chosen_layers or () if layer > highest]:
        raise ArraError(f"--layers {layers}: layer {odd[0]} is outside 0..{highest} of {folder}")
    choices = chosen_encoders(recipe, encoder)
    place = choose_device(device)
    loaded.on(device)
    model.to(place)
    watcher = open_watcher(
        recipe,
        store,
        loaded.tokenizer,
        choices,
        hidden_size=model.hidden_size,
        text=None if isinstance(model, CausalLM) else cast(TextTokenizer | None, model.text_tokenizer),
        card=card_of(model),
        split=split,
        images=images,
        layers=chosen_layers,
        device=place,
        progress=progress,
    )
    alignment, notes = alignment_at(loaded, store, model, tensors, device=place)
    progress("looking at the states", 0, 1)
    measured = watcher.measure(model, alignment)
    count = sum(len(batch.tokens) for side in (watcher.fit, watcher.score) for batch in side)
    first = encoder if encoder is not None else next(iter(choices))
    facts = {
        "run": str(folder),
        "row": recipe.row,
        "step": step,
        "steps": recipe.train.steps,
        "seed": recipe.train.seed,
        "aligned": recipe.align is not None,
        "split": split,
        "images": count,
        "encoders": {name: choice.model_dump(mode="json", exclude_none=True) for name, choice in choices.items()},
        "layers": highest,
        "grid": list(model.settings.grid),
        "neighbours": min(watcher.neighbours, count - 1),
        "gradient_images": min(watcher.gradient_images, count // 2),
    }
    suggestion = suggested(measured, first, choices[first], recipe, highest, share) if suggest else None
    if recipe.align is not None and recipe.align.shuffle_targets:
        notes.append("Trained towards other pictures' features (align.shuffle_targets), measured with each one's own.")
    if suggestion is not None and recipe.align is not None:
        notes.append(
            "The run was aligned already: what is proposed is measured on states that the alignment has moved."
        )
    found = Probed(facts, measured, suggestion, tuple(notes), out or folder / "probe")
    write(found)
    return found


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers from a text such as 0-3 or 1,5,9, each once, in order.

    Raises:
        ArraError: it is no such text.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ArraError(f"--layers {text}: expected numbers as in 0-3 or 1,5,9")
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))


def store_of(loaded: LoadedRun) -> Store:
    """The store that the run was trained on.

    Raises:
        ArraError: it is gone or has changed.
    """
    if loaded.store is not None:
        return loaded.store
    place = noted(loaded.run.path).get("at_first", "STORE")
    raise ArraError(
        f"{loaded.run.path}: the store it was trained on is gone or has changed, it was {place}; make it again: "
        f"arra prepare {loaded.run.recipe_path} --store {place}"
    )


def chosen_encoders(recipe: Recipe, encoder: str | None) -> dict[str, EncoderChoice]:
    """The encoders to compare with: those of the run's alignment, else its teacher; and the named one beside them."""
    found = used_choices(recipe)
    if encoder is None:
        return found or {"teacher": recipe.encoder.choice("teacher")}
    known = {*recipe.encoder.choices(), "judge"}
    named = recipe.encoder.choice(encoder) if encoder in known else EncoderChoice(name=encoder)
    return {encoder: named, **found}


def card_of(model: Painter) -> LanguageCard | None:
    """What a language model's folder would say of it."""
    if not isinstance(model, CausalLM):
        return None
    assert model.text_tokenizer is not None
    return LanguageCard(model.settings, cast(PromptTokenizer, model.text_tokenizer), model.about)


def model_at(loaded: LoadedRun, checkpoint: int | None) -> tuple[Painter, dict[str, Tensor] | None, int]:
    """The run's model, final or as it was at a checkpoint; that checkpoint's tensors (None if gone); the step.

    Raises:
        ArraError: there is no such checkpoint, or it is damaged.
    """
    folder, last = loaded.run.path, loaded.recipe.train.steps
    tensors = checkpoint_tensors(folder, last if checkpoint is None else checkpoint, must=checkpoint is not None)
    if checkpoint is None:
        return loaded.model, tensors, last
    assert tensors is not None
    model, section = loaded.model, loaded.recipe.model.llm
    if section is not None and section.train != "all":  # the final model has its adapters melted in
        model = first_language_model(loaded.recipe, language_card(loaded.recipe, loaded.tokenizer))
    prefix = "average" if any(name.startswith("average.") for name in tensors) else "model"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key = f"{prefix}.{name}" if f"{prefix}.{name}" in tensors else f"model.{name}"
            value = tensors.get(key)
            if value is not None and value.shape == parameter.shape:
                parameter.copy_(value)
            elif value is not None or section is None:
                raise ArraError(
                    f"{folder / 'checkpoints'}: step {checkpoint} does not hold '{name}' as the model has it; delete "
                    "the checkpoints and train again"
                )
    return model.eval(), tensors, checkpoint


def checkpoint_tensors(folder: Path, step: int, *, must: bool) -> dict[str, Tensor] | None:
    """Weights and projectors of a checkpoint, by dotted name; without `must` None where it is gone or damaged.

    Raises:
        ArraError: with `must`, it is gone or damaged; those that are there are named.
    """
    try:
        saved = saved_step(folder / "checkpoints", step)
        return read_tensors(saved, [name for name in saved.tensors if not name.startswith("optimizer.")])
    except ArraError:
        if must:
            raise
    return None


def alignment_at(
    loaded: LoadedRun, store: Store, model: Painter, tensors: Mapping[str, Tensor] | None, *, device: torch.device
) -> tuple[Alignments | None, list[str]]:
    """The trained alignment terms of a checkpoint, and what is to be said where there are none."""
    recipe = loaded.recipe
    if recipe.align is None:
        return None, []
    names = [name for name in tensors or {} if name.startswith("align.")]
    if tensors is None:
        return None, ["The checkpoint with the projector is gone, so the trained terms' own cosine is left out."]
    rows = training_rows(recipe, store)
    pictures = open_pictures(recipe, store, loaded.tokenizer, rows, workers=default_workers(), device=device)
    try:
        sample = feature_sample(pictures, center_variant(recipe), crop_of(recipe).num_variants)
    finally:
        pictures.close()
    alignment = build_alignment(recipe.align, sample, hidden_size=model.hidden_size, seed=recipe.train.seed)
    wanted = {f"align.{name}": parameter for name, parameter in alignment.named_parameters()}
    if wanted.keys() != set(names) or any(tensors[name].shape != wanted[name].shape for name in names):
        return None, ["The checkpoint's projector is of another form, so the trained terms' own cosine is left out."]
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return alignment.to(device).eval(), []


def suggested(
    measured: Measured, encoder: str, choice: EncoderChoice, recipe: Recipe, num_layers: int, share: float
) -> Suggestion:
    """Layer and weight to begin with. A heuristic; its rule is written out in docs/probe.md.

    Raises:
        ArraError: layers between the embeddings and the last were not measured.
    """
    rows = {row["layer"]: row for row in measured.rows if "term" not in row and row["encoder"] == encoder}
    evidence = []
    for layer, row in rows.items():
        each = measured.each[encoder, layer].double()
        evidence.append(
            {
                "layer": layer,
                "readable": float(each.mean()),
                "error": float(each.std() / len(each) ** 0.5),
                "room": 1 - float(each.mean()),
                "ntp_norm": row["ntp_norm"],
                "gva_norm": row["gva_norm"],
                "gradient_cosine": row["gradient_cosine"],
                "weight": weight_at(row, share),
            }
        )
    # the last layer is what the head reads: an alignment there asks of one state to be two things
    candidates = [layer for layer in rows if 1 <= layer <= max(1, num_layers - 1)]
    if not candidates:
        raise ArraError(f"--suggest: chooses among layers 1..{max(1, num_layers - 1)}; measure them (--layers)")
    best = max(candidates, key=lambda layer: float(measured.each[encoder, layer].mean()))
    top = measured.each[encoder, best].double()
    is_clear = bool(top.mean() > 2 * top.std() / len(top) ** 0.5)
    layer = candidates[0]
    if is_clear:
        layer = next(each for each in candidates if _as_good(measured.each[encoder, each], top))
    weight = weight_at(rows[layer], share)
    own = next(each for each in evidence if each["layer"] == layer)
    reasons = [
        f"Layer {best} is read best: cosine {float(top.mean()):.3f} on pictures that the map was not fitted on."
        if is_clear
        else f"No layer is read better than by chance (best {float(top.mean()):.3f}); layer {layer} is the lowest.",
        f"Layer {layer} is the lowest within a standard error, or {1 - NEAR_BEST:.0%}, of it ({own['readable']:.3f}): "
        "the layers above stay free for the next token."
        if is_clear
        else "Train a little longer, or probe more pictures, before trusting a layer.",
        f"Room left there: {own['room']:.3f} of 1"
        + (" - little: the model finds this by itself, an alignment has little to add." if own["room"] < 0.1 else "."),
        f"Gradients there: next token {own['ntp_norm']:.3g}, alignment {own['gva_norm']:.3g} (root mean square over "
        f"pictures, fitted linear projector); weight {weight:g} makes the second {share:g} of the first.",
    ]
    if own["gradient_cosine"] < -0.1:
        reasons.append(
            f"The two gradients oppose each other there (cosine {own['gradient_cosine']:.2f}): begin with less weight."
        )
    lines = f"align: {{layer: {layer}, weight: {weight:g}}}"
    if encoder in recipe.encoder.others:
        lines = f"align: {{layer: {layer}, weight: {weight:g}, encoder: {encoder}}}"
    elif encoder != "teacher":
        dumped = choice.model_dump(mode="json", exclude_none=True)
        flow = ", ".join(f"{key}: {json.dumps(value)}" for key, value in dumped.items())
        lines = f"encoder: {{teacher: {{{flow}}}}}\n{lines}"
    return Suggestion(encoder, layer, weight, share, is_clear, tuple(reasons), lines, tuple(evidence))


def _as_good(each: Tensor, best: Tensor) -> bool:
    """Whether a layer is read as well as the best, picture by picture, up to a standard error or a tenth."""
    missing = best - each.double()
    error = float(missing.std() / len(missing) ** 0.5)
    return float(missing.mean()) <= max(error, (1 - NEAR_BEST) * float(best.mean()))


def weight_at(row: Mapping[str, Any], share: float) -> float:
    """The weight with which the alignment's gradient is this share of the next-token gradient, to two digits."""
    if row["gva_norm"] <= 0 or row["ntp_norm"] <= 0:
        return 1.0
    return float(f"{share * row['ntp_norm'] / row['gva_norm']:.2g}")


HOW_TO_CHECK = (
    "This is a heuristic from one model's states, not a result. Check it: write these lines as a row of the recipe and "
    "train it beside the baseline with three seeds at equal compute: arra lab RECIPE --rows baseline,ROW --seeds 3"
)


def write(found: Probed) -> None:
    """Nothing; probe.json and probe.html are in the folder."""
    suggestion = None
    if found.suggestion is not None:
        suggestion = {**asdict(found.suggestion), "check": HOW_TO_CHECK}
    content = {
        **found.facts,
        "rows": found.measured.rows,
        "maps": found.measured.maps,
        "suggestion": suggestion,
        "notes": list(found.notes),
    }
    atomic_write(found.out / RESULT_FILE, json.dumps(content, indent=1) + "\n")
    page = probe_page(found.facts, found.measured.rows, found.measured.maps, suggestion, found.notes)
    atomic_write(found.out / PAGE_FILE, page)


COLUMNS = (
    ("layer", "layer", "d"),
    ("CKA", "cka", ".3f"),
    ("CKNNA", "cknna", ".3f"),
    ("probe", "probe_cosine", ".3f"),
    ("R2", "probe_r2", ".3f"),
    ("linear", "linear_cosine", ".3f"),
    ("class", "class_accuracy", ".3f"),
    ("gva/ntp", "ratio", ".3g"),
    ("angle", "gradient_cosine", ".3f"),
)
"""Of the terminal's table: heading, key of a row, format."""


def table(found: Probed) -> Group:
    """What was found, for a terminal of 80 columns."""
    facts, parts = found.facts, list[Any]()
    for name in facts["encoders"]:
        rows = [row for row in found.measured.rows if "term" not in row and row["encoder"] == name]
        about = f"step {facts['step']}, {facts['images']} pictures of {facts['split']}, beside {name}"
        parts += [Text(f"{facts['run']}: {about}", style="italic"), _table(rows)]
    for row in found.measured.rows:
        if "term" in row and "distance" in row:
            value = f"cosine {row['cosine']:.3f}" if "cosine" in row else f"{row['loss']} {row['distance']:.3f}"
            parts.append(Text(f"term {row['term']} at layer {row['layer']}: {value} on held-out pictures"))
    parts += [Text(note) for note in found.notes]
    if found.suggestion is not None:
        parts.append(Text("\nproposed (a heuristic)", style="bold"))
        parts += [Text(f"  {reason}") for reason in found.suggestion.reasons]
        parts.append(Text("\n" + found.suggestion.recipe + "\n", style="bold"))
        parts.append(Text(HOW_TO_CHECK))
    return Group(*parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0))
    values = [{**row, "ratio": row["gva_norm"] / row["ntp_norm"] if row["ntp_norm"] else 0.0} for row in rows]
    columns = [each for each in COLUMNS if all(each[1] in row for row in values)]
    for heading, _, _ in columns:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in values:
        shown.add_row(*(format(row[key], how) for _, key, how in columns))
    if rows and "class_majority" in rows[0]:
        shown.caption, shown.caption_justify = f"class by the majority guess: {rows[0]['class_majority']:.3f}", "left"
    return shown
