"""A recipe in words: what follows from it before anything is read or trained."""

from pathlib import Path

import torch

from arra.config import Recipe, dump_recipe
from arra.models import Decoder
from arra.models.language_folder import CARD_FILE as LANGUAGE_CARD
from arra.stages.language import language_card
from arra.stages.makers import feature_sizes
from arra.stages.model import decoder_settings, tokenizer_network
from arra.train.alignment import empty_projectors


def describe_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with the numbers that follow from it as comments."""
    if recipe.model.llm is not None:
        return dump_recipe(recipe) + "".join(f"# {line}\n" for line in describe_language_model(recipe))
    network, model = tokenizer_network(recipe), recipe.model
    settings = decoder_settings(recipe, num_codes=network.num_codes, downsampling=network.downsampling)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(settings).parameters())
    length = settings.prefix_length + settings.num_positions
    before = {
        "text": f"{settings.condition_length} text positions",
        "class": "1 class",
        "caption": f"{settings.condition_length} vectors of a caption",
    }
    rep = " + the REP token" if settings.rep_token else ""
    lines = [
        f"image: {settings.num_positions} codes ({settings.grid[0]} x {settings.grid[1]}) of {settings.num_codes}",
        f"sequence: {before[model.condition]}{rep} + {settings.num_positions} codes",
        f"decoder: {parameters:,} parameters",
        describe_length(recipe, tokens=length),
    ]
    if model.condition == "class" and model.num_classes is None:
        lines.insert(2, f"classes: the store's; {settings.num_classes} assumed here")
    if model.weights is not None:
        lines.append(f"first weights: {model.weights}")
    if recipe.align is not None:
        lines += describe_projectors(recipe)
    return dump_recipe(recipe) + "".join(f"# {line}\n" for line in lines)


def describe_length(recipe: Recipe, *, tokens: int | None = None) -> str:
    """How much is trained on, in a line; `tokens` are those of a picture, None where they differ."""
    written: int | str = recipe.train.steps
    if isinstance(written, str):  # the store will say how many steps that is
        return f"training: {written}"
    images = written * recipe.train.batch_size
    return f"training: {images:,} images" + ("" if tokens is None else f", {images * tokens:,} tokens")


def describe_projectors(recipe: Recipe) -> list[str]:
    """How many parameters the projectors have, in a line; nothing where a teacher's features are not known yet."""
    assert recipe.align is not None
    sizes = {name: size for name, size in feature_sizes(recipe).items() if size is not None}
    if sizes.keys() < feature_sizes(recipe).keys():
        return []
    projectors = empty_projectors(recipe.align, sizes, hidden_size=recipe.model.hidden_size)
    count = sum(parameter.numel() for projector in projectors for parameter in projector.parameters())
    return [f"projector: {count:,} parameters, thrown away after training"]


def describe_language_model(recipe: Recipe) -> list[str]:
    """What follows from a recipe of a language model, in lines; nothing where its folder is not made yet."""
    llm = recipe.model.llm
    if llm is None or not (Path(llm.folder) / LANGUAGE_CARD).is_file():
        return [] if llm is None else [f"model: {llm.folder} is not there yet; arra init or arra import makes it"]
    settings = language_card(recipe).settings
    layout, grid = settings.layout, settings.grid
    lines = [
        f"layout: {layout.family}, read as {layout.template!r}",
        f"image: {settings.num_positions} codes ({grid[0]} x {grid[1]}) of {settings.num_codes}",
        f"sequence: the prompt + {layout.length(0, grid)} tokens",
        describe_length(recipe),
    ]
    if llm.text is not None:
        lines.append(
            f"text: {llm.text.rows} rows of {llm.text.length} tokens beside every {recipe.train.batch_size} images"
        )
    return lines
