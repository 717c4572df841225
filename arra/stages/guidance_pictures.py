"""What `arra guidance` paints and what is seen in it, kept in the run so that a search goes on where it was stopped.

    run, split --open_sitting--> Sitting; sitting(settings, N) --> values of the first N pictures, which are painted

RUN/guidance/HASH.safetensors holds what was seen of one of the settings, and its first pictures for the page.
Legend: N pictures of the search, F features, H W pixels.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from arra.encoders.dual import DualEncoder, padded_ids, picture_features
from arra.errors import ArraError
from arra.evaluate.card import values_key
from arra.evaluate.coherence import is_drawn
from arra.evaluate.drawings import attribute_accuracy
from arra.evaluate.evaluation import RECALL_AT, HeldOutSplit, encode_all
from arra.evaluate.guidance import REFERENCE
from arra.evaluate.retrieval import caption_ranks, class_ranks, retrieval_ranks
from arra.evaluate.sets import Space
from arra.evaluate.spaces import open_space
from arra.runs import atomic_write
from arra.sample.generate import Engine
from arra.sample.logits import SamplingSettings
from arra.stages.evaluate import family, judge_text, prepare_caption_judge, wanted_of
from arra.stages.judging import Judge
from arra.stages.makers import used_choices
from arra.stages.model import weights_hash
from arra.stages.origin import judged_columns
from arra.stages.painters import LoadedRun
from arra.stages.pictures import held_out_codes, require_columns
from arra.stages.probe import store_of
from arra.stages.process import Progress, silent

FOLDER = "guidance"
"""In a run."""
SHOWN = 6
"""Pictures of every setting that are kept to be looked at."""
FEWEST_HELD_OUT = 8
MOST_REFERENCES = 1024
"""Held-out pictures that stand for all of them, where more are not painted."""
CAPTION = "caption_"
ACCURACY = "accuracy.all"
"""Of drawn shapes: whether a picture shows all that was asked for and nothing else."""


@dataclass(frozen=True)
class Eye:
    """A space that pictures are looked at in; its measures begin with `prefix`."""

    prefix: str
    name: str
    weights_sha256: str
    is_teachers: bool
    """Of the family of one of the recipe's teachers."""
    encode: Callable[[UInt8[Tensor, "N H W 3"]], Float[Tensor, "N F"]]


@dataclass(frozen=True)
class Kept:
    """What was seen of one of the settings so far."""

    features: Mapping[str, Float[Tensor, "N F"]]
    """By the eyes' prefixes, and whether all is right (N, 1) by `ACCURACY`."""
    pictures: UInt8[Tensor, "S H W 3"] | None = None
    seconds: float = 0.0
    """In which that was painted and looked at."""

    def __len__(self) -> int:
        return len(next(iter(self.features.values()))) if self.features else 0


@dataclass
class Sitting:
    """The held-out prompts of a search in the order of painting, and all that was painted of them."""

    loaded: LoadedRun
    split: HeldOutSplit
    eyes: tuple[Eye, ...]
    references: Mapping[str, Float[Tensor, "N F"]]
    identity: Mapping[str, Any]
    """What a kept file was made of, beside the settings."""
    seed: int
    batch_size: int
    told: Callable[[int], None] = lambda pictures: None
    """Called with the number of pictures that were painted now."""
    _kept: dict[SamplingSettings, Kept] = field(default_factory=dict)

    def __call__(self, settings: SamplingSettings, num_images: int) -> dict[str, Tensor]:
        """Of the first N pictures of these settings what `PaintsAndJudges` says."""
        features, split = self.painted(settings, num_images).features, self.split
        values = {
            values_key("groups", split=split.name): split.groups[:num_images],
            values_key("reference_groups", split=split.name): split.groups,
        }
        for eye in self.eyes:
            seen, reference = features[eye.prefix][:num_images], self.references[eye.prefix]
            values[values_key(f"{eye.prefix}features", split=split.name)] = seen
            values[values_key(f"reference/{eye.prefix}{REFERENCE}", split=split.name)] = reference
            ranks = self._ranks(eye, seen, reference[:num_images])
            if ranks is not None:
                kind = "class_" if split.labels is not None else eye.prefix
                values[values_key(f"{kind}ranks", split=split.name)] = ranks
        if self._is_drawn:
            values[values_key(ACCURACY, split=split.name)] = features[ACCURACY][:num_images, 0]
        return values

    @cached_property
    def _is_drawn(self) -> bool:
        """Whether what was asked for can be read from the pictures (`arra.evaluate.drawings`)."""
        return self.split.labels is None and is_drawn(self.split.prompts)

    def _ranks(self, eye: Eye, seen: Tensor, reference: Tensor) -> Int[Tensor, " N"] | None:
        split, count = self.split, len(seen)
        if split.labels is not None:
            labels = split.labels[:count]
            return class_ranks(seen, reference, labels) if not eye.prefix and len(labels.unique()) > 1 else None
        if eye.prefix == CAPTION:
            assert split.captions is not None
            return caption_ranks(seen / seen.shape[1] ** 0.5, split.captions[:count])
        return retrieval_ranks(seen, reference)

    def metrics(self) -> list[str]:
        """Every measure there is, distances first."""
        found = [f"{eye.prefix}{kind}" for kind in ("kid_x1000", "frechet") for eye in self.eyes]
        if self.split.labels is not None:
            return found + (["class_retrieval_at_1"] if self.split.has_classes else [])
        found += [f"{eye.prefix}retrieval_at_{k}" for k in RECALL_AT for eye in self.eyes]
        return found + ([ACCURACY] if self._is_drawn else [])

    def painted(self, settings: SamplingSettings, num_images: int) -> Kept:
        """What was seen of at least the first N pictures of these settings; missing ones are painted, and kept."""
        kept = self._kept.get(settings) or self._read(settings)
        if len(kept) < num_images:
            with Engine(
                self.loaded.model, self.loaded.tokenizer, settings=settings, batch_size=self.batch_size
            ) as engine:
                while len(kept) < num_images:
                    places = range(len(kept), min(num_images, len(kept) + self.batch_size))
                    kept = self._more(engine, kept, places)
                    atomic_write(self._file(settings), _packed(kept))
                    self.told(len(places))
        self._kept[settings] = kept
        return kept

    def _more(self, engine: Engine, kept: Kept, places: Sequence[int]) -> Kept:
        started = time.monotonic()
        result = engine.generate(seeds=[self.seed + place for place in places], **self.split.asked(places))
        assert result.images is not None
        images = result.images.cpu()
        seen = {eye.prefix: encode_all_by(eye, images) for eye in self.eyes}
        if self._is_drawn:
            right = attribute_accuracy(list(images.numpy()), [self.split.prompts[place] for place in places])["all"]
            seen[ACCURACY] = torch.from_numpy(right.per_picture)[:, None]
        features = {name: torch.cat([kept.features[name], new]) if len(kept) else new for name, new in seen.items()}
        pictures = images if kept.pictures is None else torch.cat([kept.pictures, images])
        return Kept(features, pictures[:SHOWN], kept.seconds + time.monotonic() - started)

    def _read(self, settings: SamplingSettings) -> Kept:
        """What is kept of these settings; nothing where that is damaged, it is painted again."""
        try:
            tensors = safetensors.torch.load_file(self._file(settings))
            names = [eye.prefix for eye in self.eyes] + ([ACCURACY] if self._is_drawn else [])
            features = {name: tensors[f"{name}features"] for name in names}
            return Kept(features, tensors["pictures"], float(tensors["seconds"]))
        except (FileNotFoundError, KeyError, safetensors.SafetensorError):
            return Kept({})

    def _file(self, settings: SamplingSettings) -> Path:
        return self.loaded.run.path / FOLDER / f"{self.name_of(settings.model_dump(mode='json'))}.safetensors"

    def name_of(self, what: Any) -> str:
        """A short hash of something that belongs to this search: the same model, pictures, seeds and eyes."""
        text = json.dumps([self.identity, what], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_all_by(eye: Eye, images: UInt8[Tensor, "N H W 3"], *, batch_size: int = 32) -> Float[Tensor, "N F"]:
    """What an eye sees of all pictures, on the CPU."""
    return torch.cat([eye.encode(part).cpu() for part in images.split(batch_size)])


def _packed(kept: Kept) -> bytes:
    assert kept.pictures is not None
    tensors = {f"{prefix}features": seen.contiguous() for prefix, seen in kept.features.items()}
    tensors |= {"pictures": kept.pictures.contiguous(), "seconds": torch.tensor(kept.seconds, dtype=torch.float64)}
    return safetensors.torch.save(tensors)


def open_sitting(
    loaded: LoadedRun,
    *,
    split: str,
    images: int,
    spaces: Sequence[str],
    seed: int,
    batch_size: int,
    device: torch.device,
    progress: Progress = silent,
) -> Sitting:
    """The prompts of a split in an order that the seed draws, and the eyes that judge their pictures.

    At least `images` of them, where there are so many, and `MOST_REFERENCES`: more of them stand for the held-out
    pictures than are painted.

    Raises:
        ArraError: the store is gone, has too few pictures of the split, or a space cannot be opened.
    """
    recipe, store = loaded.recipe, store_of(loaded)
    columns = judged_columns(recipe)
    require_columns(recipe, store, loaded.tokenizer, columns)
    rows = store.rows(split, columns=columns)
    if len(rows) < FEWEST_HELD_OUT:
        raise ArraError(
            f"{store.path}: {len(rows)} pictures of split '{split}', a search needs {FEWEST_HELD_OUT} or more; take "
            "more pictures, or another split"
        )
    drawn = np.random.default_rng(seed).permutation(len(rows))[: max(images, MOST_REFERENCES)]
    order = drawn.argsort().argsort()  # rows are read in the store's order, and painted in the drawn one
    rows = rows[np.sort(drawn)]
    second = prepare_caption_judge(loaded, progress=progress)
    progress("judging held-out pictures", 0, 1)
    eyes = open_eyes(loaded, second, spaces, device=device)
    wanted = wanted_of(recipe, store, rows)
    codes = held_out_codes(recipe, store, loaded.tokenizer, rows)
    reconstructions = torch.cat([loaded.tokenizer.decode(part.to(device)).cpu() for part in codes.split(batch_size)])
    references = {eye.prefix: encode_all_by(eye, reconstructions)[order] for eye in eyes}
    captions, ask = None, wanted.ask
    if second is not None and (text := judge_text(loaded)) is not None:
        captions = second[0].embed_captions(padded_ids([text.encode(words) for words in wanted.captions]))[order]
    held_out = HeldOutSplit(
        name=split,
        prompts=[wanted.prompts[place] for place in order],
        codes=codes[order],
        groups=wanted.groups[order],
        reconstructions=reconstructions[order],
        reconstruction_features=references[""],
        raw=None,
        raw_features=None,
        captions=captions,
        labels=None if wanted.labels is None else wanted.labels[order],
        ask=None if ask is None else lambda places: ask([int(order[place]) for place in places]),
    )
    identity = {
        "model_sha256": weights_hash(str(loaded.run.path)),
        "tokenizer_sha256": loaded.tokenizer.weights_hash,
        "store_sha256": store.manifest_hash(*columns),
        "split": split,
        "seed": seed,
        "eyes": [[eye.prefix, eye.name, eye.weights_sha256] for eye in eyes],
    }
    return Sitting(loaded, held_out, eyes, references, identity, seed, batch_size)


def open_eyes(
    loaded: LoadedRun, caption_judge: tuple[DualEncoder, str] | None, spaces: Sequence[str], *, device: torch.device
) -> tuple[Eye, ...]:
    """The recipe's judge, its caption judge where it has one, and the named spaces."""
    recipe = loaded.recipe
    # the recipe's teacher counts in a run without alignment too: rows of a recipe are then decided by the same measure
    teachers = {family(choice) for choice in (*used_choices(recipe).values(), recipe.encoder.choice("teacher"))}
    choice = recipe.encoder.choice("judge")
    judge = Judge(choice, device=device)
    eyes = [Eye("", choice.name, judge.weights_hash, family(choice) in teachers, lambda x: encode_all(judge, x))]
    if caption_judge is not None:
        second, sha256 = caption_judge
        eyes.append(Eye(CAPTION, "the caption judge", sha256, False, lambda x: picture_features(second, x)))
    eyes += [_eye_of(open_space(name, device=device), teachers) for name in spaces]
    return tuple(eyes)


def _eye_of(space: Space, teachers: set[str]) -> Eye:
    return Eye(
        f"{space.name}_",
        space.name,
        space.weights_sha256,
        space.family in teachers,
        lambda images: space.encode(images)["features"],
    )
