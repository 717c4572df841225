"""From a finished run to its evaluation card: `arra evaluate`.

Legend: N pictures, F judge features.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from jaxtyping import Int
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from arra.config import Recipe
from arra.data.conditions import ClassConditions
from arra.data.store import Store
from arra.distributed import set_threads
from arra.encoders import SPECS, EncoderChoice
from arra.encoders.dual import DualEncoder, load_dual_encoder, padded_ids, save_dual_encoder
from arra.errors import ArraError
from arra.evaluate.card import Evaluation, ProtocolValue, values_key
from arra.evaluate.evaluation import HeldOutSplit, encode_all, evaluate_model, paint_split
from arra.evaluate.likelihood import Asked
from arra.runs import atomic_write
from arra.stages.captions import Encodes, StoreCaptions, store_text_tokenizer
from arra.stages.conditions import asked_of, class_names, open_conditions
from arra.stages.judging import Judge
from arra.stages.makers import CODES, about_encoder, used_choices
from arra.stages.model import weights_hash
from arra.stages.origin import judged_columns, noted
from arra.stages.painters import LoadedRun, load_run
from arra.stages.pictures import held_out_codes, held_out_pixels, is_imported, require_columns
from arra.stages.process import Progress, silent
from arra.stages.squares import center_pictures
from arra.train.dual import train_dual_encoder

PICTURES_FILE = "samples/evaluation.safetensors"
SAME_FAMILY = "model_judge_is_of_the_teachers_family"
"""What a card says of a model whose teachers are no strangers to its judge; models of other teachers compare."""


def prepare_caption_judge(loaded: LoadedRun, *, progress: Progress = silent) -> tuple[DualEncoder, str] | None:
    """The second judge and its weights' hash, trained into the store if it is not there; None if the recipe has none.

    It reads captions with the store's text tokenizer, which is that of all text models trained on it.
    """
    settings, store, text = loaded.recipe.caption_judge, loaded.store, judge_text(loaded)
    if settings is None or store is None or text is None:
        return None
    about = {
        "train": settings.model_dump(mode="json"),
        "store": store.manifest_hash(*judged_columns(loaded.recipe)),
        "text_vocab_size": loaded.recipe.model.text_vocab_size,
    }
    folder = store.path / "caption_judge"
    found = load_dual_encoder(folder, about=about)
    if found is not None:
        return found
    rows = store.rows("train", columns=judged_columns(loaded.recipe))
    codes = held_out_codes(loaded.recipe, store, loaded.tokenizer, rows)
    encoder = train_dual_encoder(
        held_out_pixels(loaded.recipe, store, rows),
        loaded.tokenizer.decode(codes),
        list(StoreCaptions(store, rows, text)),
        settings,
        text_vocab_size=loaded.recipe.model.text_vocab_size,
        progress=lambda step: progress("training the caption judge", step, settings.steps),
    )
    save_dual_encoder(encoder, folder, about=about)
    return load_dual_encoder(folder)


def judge_text(loaded: LoadedRun) -> Encodes | None:
    """The text tokenizer that the caption judge reads with; None where there are no captions to judge."""
    model = loaded.recipe.model
    if loaded.store is None or loaded.recipe.caption_judge is None or model.condition == "class":
        return None
    if model.condition == "text" and model.weights is None and model.llm is None:
        return loaded.model.text_tokenizer  # the store's own
    return store_text_tokenizer(loaded.recipe, loaded.store)


def held_out_splits(
    loaded: LoadedRun, caption_judge: DualEncoder | None = None, *, progress: Progress = silent
) -> list[HeldOutSplit]:
    """The splits that the recipe evaluates on; what the first judge says of them is kept in the store.

    Raises:
        ArraError: the store is gone or does not fit the run.
    """
    recipe, store = loaded.recipe, loaded.store
    if store is None:
        place = noted(loaded.run.path).get("at_first", "STORE")
        raise ArraError(
            f"{loaded.run.path}: the store it was trained on is gone or has changed, it was {place}; make it again: "
            f"arra prepare {loaded.run.recipe_path} --store {place}"
        )
    if recipe.data.crop.kind == "buckets":
        raise ArraError(
            f"{loaded.run.path}: trained on pictures of many shapes, which are not measured yet; paint with arra "
            "generate, or train with data.crop.kind: center"
        )
    columns, text, splits = judged_columns(recipe), judge_text(loaded), []
    require_columns(recipe, store, loaded.tokenizer, columns)
    for name in recipe.evaluate.splits:
        rows = store.rows(name, columns=columns)
        if recipe.evaluate.max_images is not None and len(rows) > recipe.evaluate.max_images:
            rows = rows[np.linspace(0, len(rows) - 1, recipe.evaluate.max_images).round().astype(int)]
        wanted = wanted_of(recipe, store, rows)
        codes = held_out_codes(recipe, store, loaded.tokenizer, rows)
        reconstructions = loaded.tokenizer.decode(codes)
        features = _judged(recipe, store, rows, reconstructions, split=name, progress=progress)
        captions = None
        if caption_judge is not None and text is not None:
            captions = caption_judge.embed_captions(padded_ids([text.encode(prompt) for prompt in wanted.captions]))
        splits.append(
            HeldOutSplit(
                name=name,
                prompts=wanted.prompts,
                codes=codes,
                groups=wanted.groups,
                reconstructions=reconstructions,
                reconstruction_features=features["reconstructions"],
                raw=held_out_pixels(recipe, store, rows) if "raw" in features else None,
                raw_features=features.get("raw"),
                captions=captions,
                labels=wanted.labels,
                ask=wanted.ask,
            )
        )
    return splits


@dataclass(frozen=True)
class Wanted:
    """What a model is asked for some records, and what is known of them."""

    captions: list[str]
    prompts: list[str]
    """In words: captions, or names of classes."""
    groups: Int[Tensor, " N"]
    labels: Int[Tensor, " N"] | None
    """Classes, for models that are asked for classes."""
    ask: Asked | None
    """None tells the prompts."""


def wanted_of(recipe: Recipe, store: Store, rows: np.ndarray) -> Wanted:
    """What a model of the recipe is asked for some records."""
    table = store.table(["prompt", "group"]).take(pa.array(rows))
    captions, groups = table.column("prompt").to_pylist(), table.column("group").to_pylist()
    numbers = {group: i for i, group in enumerate(sorted(set(groups)))}
    told, labels, ask = captions, None, None
    if recipe.model.condition != "text":
        conditions = open_conditions(recipe, store, rows, None)
        ask = asked_of(conditions, store, rows)
        if isinstance(conditions, ClassConditions):
            labels, names = conditions.labels, class_names(store, conditions.null)
            told = [names[label] for label in labels.tolist()]
    return Wanted(captions, told, torch.tensor([numbers[group] for group in groups]), labels, ask)


def _judged(
    recipe: Recipe, store: Store, rows: np.ndarray, reconstructions: Tensor, *, split: str, progress: Progress
) -> dict[str, Tensor]:
    """What the first judge says of held-out pictures, `raw` (where there are any) and `reconstructions`."""
    choice = recipe.encoder.choice("judge")
    spec, sha256 = about_encoder(choice)
    pixels = recipe.data.encoder_image_size or spec.image_size
    identity = [store.manifest_hash(*judged_columns(recipe)), sha256, str(spec.image_size), split]
    identity += [str(pixels), str(len(rows)), choice.column]
    cache = store.path / "judged" / f"{_short_hash(identity)}.safetensors"
    features = _kept_features(cache)
    if features is None:
        progress(f"judging held-out pictures ({split})", 0, 1)
        encoder, features = Judge(choice), {}
        if not is_imported(store, CODES):  # codes that were imported come without pictures
            raw = center_pictures(recipe, store, rows=rows, pixels=pixels)
            features["raw"] = encode_all(encoder, raw)
        features["reconstructions"] = encode_all(encoder, reconstructions)
        atomic_write(cache, safetensors.torch.save(features))
    return features


def _kept_features(cache: Path) -> dict[str, Tensor] | None:
    """What the judge said before, unless it is not there or damaged."""
    try:
        return safetensors.torch.load_file(cache)
    except (FileNotFoundError, safetensors.SafetensorError):
        return None


def _short_hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def evaluate(
    folder: Path,
    *,
    threads: int | None = None,
    tokenizer_weights: Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Evaluation:
    """The evaluation of a finished run, written beside it with the painted pictures; read back if it is current."""
    set_threads(threads)
    loaded = load_run(folder, tokenizer_weights=tokenizer_weights)
    second = prepare_caption_judge(loaded, progress=progress)
    done = current_evaluation(loaded, second)
    if done is not None:
        return done
    protocol = protocol_of(loaded, second)
    caption_judge = None if second is None else second[0]
    splits = held_out_splits(loaded, caption_judge, progress=progress)
    loaded.on(device)
    evaluation, pictures = evaluate_model(
        loaded.model,
        loaded.tokenizer,
        Judge(loaded.recipe.encoder.choice("judge")),
        splits,
        loaded.recipe.evaluate,
        run=str(folder),
        protocol=protocol,
        caption_judge=caption_judge,
        progress=lambda text: progress(text, 0, 1),
    )
    for split in splits:
        progress(f"{split.name}: pictures for the report", 0, 1)
        pictures |= paint_grid(loaded, split)
    packed = safetensors.torch.save({key: value.contiguous() for key, value in pictures.items()})
    atomic_write(folder / PICTURES_FILE, packed)
    evaluation.save(folder)
    return evaluation


def current_evaluation(loaded: LoadedRun, caption_judge: tuple[DualEncoder, str] | None) -> Evaluation | None:
    """The evaluation that a run has, if it is of this model and measured as it would be now."""
    done = _kept_evaluation(loaded.run.path)
    if done is None or _without_place(done.card.protocol) != _without_place(protocol_of(loaded, caption_judge)):
        return None
    return done


def _kept_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation before this one, unless a part of it is missing or damaged."""
    if not (folder / PICTURES_FILE).is_file():
        return None
    try:
        return Evaluation.load(folder)
    except ArraError:  # it says "evaluate again", which is what happens now
        return None


def _without_place(protocol: Mapping[str, ProtocolValue]) -> dict[str, ProtocolValue]:
    """A protocol without the name of the run folder, which may be moved."""
    return {key: value for key, value in protocol.items() if key != "model"}


def protocol_of(
    loaded: LoadedRun, caption_judge: tuple[DualEncoder, str] | None
) -> dict[str, str | int | float | bool | None]:
    """What a card says of how it was measured; keys that begin with `model` name the model itself."""
    recipe, settings, store = loaded.recipe, loaded.recipe.evaluate, loaded.store
    choice, used = recipe.encoder.choice("judge"), used_choices(recipe)
    judge, sha256 = about_encoder(choice)
    layers = "" if choice.layers is None else f" of layers {', '.join(map(str, choice.layers))}"
    return {
        "model": str(loaded.run.path),
        "model_sha256": weights_hash(str(loaded.run.path)),
        "model_steps": recipe.train.steps,
        "model_seed": recipe.train.seed,
        "model_row": recipe.row,
        "judge": judge.name,
        "judge_sha256": sha256,
        "judge_output": (choice.output or judge.output) + layers,
        "judge_input": f"{judge.image_size} px, {judge.interpolation}, antialiased",
        "caption_judge_sha256": None if caption_judge is None else caption_judge[1],
        "caption_judge_space": None if caption_judge is None else "picture embeddings of root mean square 1",
        "model_teachers": ", ".join(dict.fromkeys(each.name for each in used.values())) or None,
        SAME_FAMILY: any(family(each) == family(choice) for each in used.values()),
        "tokenizer": loaded.tokenizer.name,
        "tokenizer_sha256": loaded.tokenizer.weights_hash,
        "store_sha256": None if store is None else store.manifest_hash(*judged_columns(recipe)),
        "splits": ",".join(settings.splits),
        "cfg_scales": ",".join(f"{scale:g}" for scale in settings.cfg_scales),
        "temperature": settings.temperature,
        "max_images": settings.max_images,
        "frechet_components": settings.frechet_components,
        "num_resamples": settings.num_resamples,
        "seed": settings.seed,
        "image_size": recipe.data.image_size,
        **_of_other_models(loaded),
    }


def family(choice: EncoderChoice) -> str:
    """Architecture and training data of an encoder; of one that no list has, its name."""
    return SPECS[choice.name].family if choice.name in SPECS else choice.name


def _of_other_models(loaded: LoadedRun) -> dict[str, ProtocolValue]:
    """What a card says beside that of models which are not asked in text of their own, or have no pictures."""
    condition = loaded.recipe.model.condition
    found: dict[str, ProtocolValue] = {}
    without = []
    if condition == "class":
        without.append("retrieval of single pictures and of captions (a class names neither)")
    if loaded.store is not None and is_imported(loaded.store, CODES):
        without.append("likeness and distances to raw pictures (the store holds codes without pictures)")
    if condition != "text":
        found["condition"] = condition
    if without:
        found["not_measured"] = "; ".join(without)
    return found


def paint_grid(loaded: LoadedRun, split: HeldOutSplit) -> dict[str, Tensor]:
    """Pictures of a split's first prompts of evenly spaced groups, with the same seeds for every model: unpicked."""
    settings = loaded.recipe.evaluate
    firsts = [int((split.groups == group).nonzero()[0]) for group in split.groups.unique()]
    places = np.linspace(0, len(firsts) - 1, min(settings.grid_prompts, len(firsts))).round().astype(int)
    rows = [firsts[place] for place in places]
    prompts, seeds = [split.prompts[row] for row in rows], list(range(settings.grid_seeds))
    found = {
        f"{split.name}/grid_prompts": torch.tensor(list(json.dumps(prompts).encode()), dtype=torch.uint8),
        f"{split.name}/grid_reconstructions": split.reconstructions[rows],
    }
    if split.raw is not None:
        found[f"{split.name}/grid_raw"] = split.raw[rows]
    asked = [row for row in rows for _ in seeds]
    for scale in settings.cfg_scales:
        images = paint_split(loaded.model, loaded.tokenizer, split, settings, asked, seeds * len(rows), cfg_scale=scale)
        found[values_key("grid", split=split.name, cfg_scale=scale)] = images.unflatten(0, (len(rows), len(seeds)))
    return found


def results_table(evaluation: Evaluation) -> Table:
    """A card as a table for the terminal, 80 columns wide."""
    table = Table(title=escape(evaluation.card.run), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("", "cfg", "value", "95 % interval"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    if without := evaluation.card.protocol.get("not_measured"):
        table.caption, table.caption_justify = f"not measured: {escape(str(without))}", "left"
    last = ""
    for row in evaluation.card.results:
        heading = f"{row.split}, {row.num_images} pictures" + (
            ", the tokenizer alone" if row.subject != "model" else ""
        )
        if heading != last:
            table.add_row(Text(heading, style="bold"))
            last = heading
        interval = "" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
        name = row.metric + (f", {row.reference}" if row.reference else "")
        table.add_row(name, "" if row.cfg_scale is None else f"{row.cfg_scale:g}", f"{row.value:.3f}", interval)
    return table
