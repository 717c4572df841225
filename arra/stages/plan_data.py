"""What a planned training's data take: how many pictures there are, hours of preparing them, bytes on the disk.

    recipe, store --> records; tokenizer and teachers on the meta device --> operations of a picture; columns --> bytes

Letters: T positions of an encoder, L its layers, D its width, K codes of the vocabulary.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from arra.config import DataSection, Recipe
from arra.data.openmoji import OpenMojiSource
from arra.data.records import Record, Source
from arra.data.shapes import ShapesSource
from arra.data.sources import source_of
from arra.data.store import Store
from arra.encoders import SPECS, EncoderChoice, EncoderSpec
from arra.encoders.base import at_size
from arra.stages.makers import crop_of, feature_sizes, smallest_unsigned, used_choices
from arra.stages.model import tokenizer_network
from arra.stages.planned_model import FEATURE_SIZE, PlannedModel
from arra.stages.training_data import epoch_length
from arra.tokenizers.vq import VQModel, VQSettings
from arra.train.flops import count_flops
from arra.train.memory import WIDE, Sharing, state_memory

LITE_MACS = {0: (407e6, 224), 1: (631e6, 240), 2: (899e6, 260), 3: (1440e6, 280), 4: (2640e6, 300)}
"""Products of EfficientNet-Lite at its own input size. Source: tensorflow/tpu, efficientnet/lite/README.md."""
DENSENET_FLOPS = 5.7e9
"""Of DenseNet-121 at 224 pixels (2.87e9 products; Huang et al. 2017, torchvision)."""
TOWER_WIDTHS = {12: 768, 24: 1024, 32: 1280}
"""By layers, of towers whose features are projected to another width."""
PROJECTED = ("clip-", "biomedclip", "sam-", "medsam")
"""Names of such encoders begin so."""


@dataclass(frozen=True)
class DataPlan:
    """What is known of the data before they are there."""

    records: int | None
    """Training pictures of an epoch; None where nothing tells."""
    told_by: str
    """Where the number comes from, or what to give."""
    variants: int
    """Crops of a picture."""
    flops: float | None
    """Operations of preparing a picture, all crops: tokenizer and teachers; None where an encoder is unknown."""
    store_bytes: int
    """Of a picture in the store, all crops, before compression."""
    checkpoint_bytes: int
    """Of one checkpoint, all ranks' shards together."""
    checkpoints: int
    """That are kept."""
    model_bytes: int
    """Of the trained model, further averages included."""


def data_plan(recipe: Recipe, planned: PlannedModel, *, store: Store | None = None) -> DataPlan:
    """What the recipe's data take.

    Raises:
        ArraError: the recipe weighs other sources than the store was made from.
    """
    records, told_by = training_records(recipe, store)
    settings = recipe.train
    state = state_memory(planned.parts, settings, sharing=Sharing(), projectors=planned.projectors)
    frozen = sum(
        int(held.bytes_each * torch.Size(held.shape).numel()) for held in planned.parts.all if not held.trained
    )
    saved = (
        state.state - state.gradients - state.projector // WIDE - frozen
    )  # a quarter of the projector's are gradients
    return DataPlan(
        records=records,
        told_by=told_by,
        variants=crop_of(recipe).num_variants,
        flops=preparing_flops(recipe),
        store_bytes=record_bytes(recipe, planned),
        checkpoint_bytes=saved,
        checkpoints=settings.keep_checkpoints + settings.keep_best,
        model_bytes=state.weights * max(1, len(settings.ema_decays)),
    )


def training_records(recipe: Recipe, store: Store | None) -> tuple[int | None, str]:
    """Training pictures of an epoch, and where the number comes from."""
    data = recipe.data
    if store is not None:
        return epoch_length(recipe, store), str(store.path)
    embedded = _embedded_sources(data)
    if embedded:
        found = sum(embedded_records(source) for source in embedded)
        told_by = f"the embedded set {' and '.join(source.name for source in embedded)}"
    elif data.expected_records is not None:
        found, told_by = data.expected_records, "data.expected_records"
    else:
        return None, "give --store, or data.expected_records"
    return min(found, data.max_train_records or found), told_by


def _embedded_sources(data: DataSection) -> tuple[Source, ...]:
    """The sources, where all of them are embedded and every picture of theirs counts once; else none."""
    if data.path is not None:
        return ()
    named = (source_of(data.source, None),) if data.sources is None else data.sources
    embedded = all(
        isinstance(each, OpenMojiSource | ShapesSource) and each.weight == 1 and each.split is None for each in named
    )
    return named if embedded else ()


@lru_cache
def embedded_records(source: Source) -> int:
    """Training pictures of an embedded set."""
    return sum(record.split == "train" for record in source.scan() if isinstance(record, Record))


def preparing_flops(recipe: Recipe) -> float | None:
    """Operations of a picture, all its crops: its codes and every teacher's features; None for unknown encoders."""
    total = tokenizer_flops(tokenizer_network(recipe), recipe.data.image_size)
    for choice in used_choices(recipe).values():
        found = encoder_flops(choice)
        if found is None:
            return None
        total += found
    return total * crop_of(recipe).num_variants


@lru_cache
def tokenizer_flops(network: VQSettings, size: int) -> float:
    """Operations of making the codes of a square picture."""
    with torch.device("meta"):
        tokenizer = VQModel(network)
        picture = torch.empty(1, 3, size, size)
    return float(count_flops(lambda: tokenizer.encoder(picture)))


def encoder_flops(choice: EncoderChoice) -> float | None:
    """Operations of an encoder on one picture, by its published size; None where no list has it.

    Transformers: 24 L T D^2 + 4 L T^2 D.
    """
    spec = SPECS.get(choice.name)
    if spec is None:
        return None
    spec, bands = at_size(spec, choice.image_size), choice.bands or 1
    if choice.name.startswith("efficientnet-lite"):
        macs, own = LITE_MACS[int(choice.name[-1])]
        return 2 * macs * (spec.image_size / own) ** 2 * bands
    if spec.patch_size is None or spec.num_layers is None:
        return DENSENET_FLOPS * bands if choice.name.startswith("xrv") else None
    return _transformer_flops(choice.name, spec) * bands


def _transformer_flops(name: str, spec: EncoderSpec) -> float:
    assert spec.patch_size is not None
    assert spec.num_layers is not None
    layers, width = spec.num_layers, spec.feature_size
    if name.startswith(PROJECTED):
        width = TOWER_WIDTHS.get(layers, width)
    positions = (spec.image_size // spec.patch_size) ** 2 + 1
    return 24.0 * layers * positions * width**2 + 4.0 * layers * positions**2 * width


def record_bytes(recipe: Recipe, planned: PlannedModel) -> int:
    """Bytes of a picture in the store before compression: codes, features, pixels, captions' features."""
    codes = planned.grid[0] * planned.grid[1] * torch.empty(0, dtype=_unsigned(planned.code_ids[1])).element_size()
    each = {"float32": 4, "float16": 2}[recipe.data.features_dtype]
    features = 0
    for name, choice in used_choices(recipe).items():
        spec, size = SPECS.get(choice.name), feature_sizes(recipe)[name] or FEATURE_SIZE
        count = choice.bands or 1
        if choice.output == "patches" and spec is not None and spec.patch_size:
            count = (at_size(spec, choice.image_size).image_size // spec.patch_size) ** 2
        features += count * size * each
    pixels = 3 * recipe.data.image_size**2 if recipe.data.keeps_pixels else 0
    captions = 0
    if recipe.text_encoder is not None and recipe.model.condition == "caption":
        width = planned.inputs(1)["caption"].shape[-1]
        captions = recipe.model.prefix_length * width * each * (1 + recipe.text_encoder.short)
    return crop_of(recipe).num_variants * (codes + features) + pixels + captions


def _unsigned(num_codes: int) -> torch.dtype:
    found: torch.dtype = getattr(torch, smallest_unsigned(num_codes))
    return found
