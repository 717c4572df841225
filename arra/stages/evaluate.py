"""From a finished run to its evaluation card: `arra evaluate`.

Legend: N pictures, F judge features.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from rich.table import Table
from torch import Tensor

from arra.data.images import center_crop
from arra.data.records import RecordSet, load_image
from arra.distributed import set_threads
from arra.encoders import encoder_spec, load_encoder
from arra.errors import ArraError
from arra.evaluate.card import CARD_FILE, VALUES_FILE, Evaluation, values_key
from arra.evaluate.evaluation import HeldOutSplit, encode_all, evaluate_model
from arra.runs import atomic_write, file_hash
from arra.sample.generate import generate
from arra.stages.paint import LoadedRun, load_run
from arra.stages.prepare import codes_made_by, load_records
from arra.stages.process import Progress, silent

PICTURES_FILE = "samples/evaluation.safetensors"


def held_out_splits(loaded: LoadedRun, *, progress: Progress = silent) -> list[HeldOutSplit]:
    """The splits that the recipe evaluates on; what the judge says of them is kept in the store.

    Raises:
        ArraError: the store is gone or does not fit the run.
    """
    recipe, store = loaded.recipe, loaded.store
    if store is None:
        raise ArraError(
            f"{loaded.run.path}: its store {loaded.run.manifest()['store']} is gone; make it again with arra prepare"
        )
    store.require("codes", codes_made_by(recipe, loaded.tokenizer))
    codes, pixels = torch.from_numpy(store.column("codes")).long(), torch.from_numpy(store.column("pixels"))
    table = store.table()
    prompts, groups = table.column("prompt").to_pylist(), table.column("group").to_pylist()
    numbers = {group: i for i, group in enumerate(sorted(set(groups)))}
    records: RecordSet | None = None
    splits = []
    for name in recipe.evaluate.splits:
        rows = store.rows(name)
        if recipe.evaluate.max_images is not None and len(rows) > recipe.evaluate.max_images:
            rows = rows[np.linspace(0, len(rows) - 1, recipe.evaluate.max_images).round().astype(int)]
        index = torch.from_numpy(rows)
        reconstructions = loaded.tokenizer.decode(codes[index])
        judge = encoder_spec(recipe.encoder.judge)
        identity = [store.manifest_hash("codes", "pixels"), judge.weights_sha256, str(judge.image_size), name]
        identity += [str(recipe.data.encoder_image_size), str(len(rows))]
        cache = store.path / "judged" / f"{_short_hash(identity)}.safetensors"
        if not cache.is_file():
            progress(f"judging held-out pictures ({name})", 0, 1)
            records = records or load_records(recipe)
            large = recipe.data.encoder_image_size
            raw = torch.from_numpy(np.stack([center_crop(load_image(records.records[row]), large) for row in rows]))
            encoder = load_encoder(recipe.encoder.judge)
            features = {"raw": encode_all(encoder, raw), "reconstructions": encode_all(encoder, reconstructions)}
            atomic_write(cache, safetensors.torch.save(features))
        features = safetensors.torch.load_file(cache)
        splits.append(
            HeldOutSplit(
                name=name,
                prompts=[prompts[row] for row in rows],
                codes=codes[index],
                groups=torch.tensor([numbers[groups[row]] for row in rows]),
                reconstructions=reconstructions,
                reconstruction_features=features["reconstructions"],
                raw=pixels[index],
                raw_features=features["raw"],
            )
        )
    return splits


def _short_hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def evaluate(folder: Path, *, threads: int | None = None, progress: Progress = silent) -> Evaluation:
    """The evaluation of a finished run, written beside it with the painted pictures; read back if it is current."""
    set_threads(threads)
    loaded = load_run(folder)
    protocol = protocol_of(loaded)
    if all((folder / name).is_file() for name in (CARD_FILE, VALUES_FILE, PICTURES_FILE)):
        done = Evaluation.load(folder)
        if dict(done.card.protocol) == protocol:
            return done
    splits = held_out_splits(loaded, progress=progress)
    evaluation, pictures = evaluate_model(
        loaded.model,
        loaded.tokenizer,
        load_encoder(loaded.recipe.encoder.judge),
        splits,
        loaded.recipe.evaluate,
        run=str(folder),
        protocol=protocol,
        progress=lambda text: progress(text, 0, 1),
    )
    for split in splits:
        progress(f"{split.name}: pictures for the report", 0, 1)
        pictures |= paint_grid(loaded, split)
    packed = safetensors.torch.save({key: value.contiguous() for key, value in pictures.items()})
    atomic_write(folder / PICTURES_FILE, packed)
    evaluation.save(folder)
    return evaluation


def protocol_of(loaded: LoadedRun) -> dict[str, str | int | float | bool | None]:
    """What a card says of how it was measured; keys that begin with `model` name the model itself."""
    recipe, settings, store = loaded.recipe, loaded.recipe.evaluate, loaded.store
    judge, teacher = encoder_spec(recipe.encoder.judge), encoder_spec(recipe.encoder.teacher)
    return {
        "model": str(loaded.run.path),
        "model_sha256": file_hash(loaded.run.path / "model.safetensors"),
        "model_steps": recipe.train.steps,
        "model_seed": recipe.train.seed,
        "model_row": recipe.row,
        "judge": judge.name,
        "judge_sha256": judge.weights_sha256,
        "judge_is_of_the_teachers_family": judge.family == teacher.family,
        "judge_input": f"{judge.image_size} px, bicubic, antialiased",
        "teacher": teacher.name,
        "tokenizer": loaded.tokenizer.name,
        "tokenizer_sha256": loaded.tokenizer.weights_hash,
        "store_sha256": None if store is None else store.manifest_hash("codes", "pixels"),
        "splits": ",".join(settings.splits),
        "cfg_scales": ",".join(f"{scale:g}" for scale in settings.cfg_scales),
        "temperature": 1.0,
        "max_images": settings.max_images,
        "frechet_components": settings.frechet_components,
        "num_resamples": settings.num_resamples,
        "seed": settings.seed,
        "image_size": recipe.data.image_size,
    }


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
        f"{split.name}/grid_raw": split.raw[rows],
    }
    for scale in settings.cfg_scales:
        result = generate(
            loaded.model,
            loaded.tokenizer,
            prompts=[prompt for prompt in prompts for _ in seeds],
            seeds=seeds * len(prompts),
            cfg_scale=scale,
            batch_size=settings.batch_size,
        )
        assert result.images is not None
        images = result.images.unflatten(0, (len(prompts), len(seeds)))
        found[values_key("grid", split=split.name, cfg_scale=scale)] = images
    return found


def results_table(evaluation: Evaluation) -> Table:
    """A card as a table for the terminal."""
    table = Table(title=evaluation.card.run, title_justify="left")
    for column in ("measure", "split", "guidance", "value", "95 % interval", "pictures", "of"):
        table.add_column(column)
    for row in evaluation.card.results:
        interval = "" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
        guidance = "" if row.cfg_scale is None else "off" if row.cfg_scale == 1 else f"{row.cfg_scale:g}"
        name = row.metric + (f" ({row.reference})" if row.reference else "")
        table.add_row(name, row.split, guidance, f"{row.value:.3f}", interval, str(row.num_images), row.subject)
    return table
