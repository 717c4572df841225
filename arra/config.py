"""Recipes: one YAML file in, validated settings out. Composes the rooms' settings; no room imports this.

    recipes/demo.yaml --row--> base with the row's difference --set--> pydantic --> Recipe --> runs/NAME/recipe.yaml

A mistake in a recipe is told in one line: the file, the dotted key, what was expected, what was found.
"""

import difflib
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails

from arra.data.crops import CropSettings
from arra.data.records import Source
from arra.data.sources import EMBEDDED_KINDS, AnySource, SourceKind, expand_sources, source_of
from arra.encoders import SPECS, TEXT_SPECS, EncoderChoice, check_encoder_name
from arra.errors import ArraError
from arra.evaluate.paper import TableRow, TableSection
from arra.evaluate.settings import EvaluateSettings
from arra.models.adapters import LoraSettings
from arra.models.llamagen import SIZES
from arra.runs import atomic_write
from arra.sample.logits import SamplingSettings
from arra.settings import Settings
from arra.tokenizers import EMBEDDED
from arra.tokenizers.vq import VQSettings
from arra.train.durations import needs_records, written_durations
from arra.train.settings import AlignSettings, AlignTerm, DualTrainSettings, TokenizerTrainSettings, TrainSettings

S = TypeVar("S", bound=Settings)
Tree = dict[str, Any]
Path_ = tuple[str | int, ...]


class DataSection(Settings):
    """Where the pictures come from, and how they are cropped."""

    source: SourceKind = "openmoji"
    """openmoji, shapes: the embedded sets; auto: what `path` looks like; or a kind, as `arra list sources` has them."""
    path: str | None = None
    """File or folder of the source."""
    sources: tuple[AnySource, ...] | None = None
    """Several sources, or one with options of its own, in place of `source` and `path`."""
    image_size: int = Field(32, gt=0)
    """Pixels per side that the tokenizer sees and the model paints."""
    encoder_image_size: int | None = Field(None, gt=0)
    """Pixels per side of the same crop that is made for the encoders; null: each one's own input size, so that nothing
    is resized twice."""
    crop: CropSettings = CropSettings()
    """The crop that tokenizer and encoder share."""
    mode: Literal["cached", "online"] = "cached"
    """cached: codes and features are read from the store; online: made anew from the pictures while training."""
    store_pixels: bool | None = None
    """Whether the store keeps the centre squares as pixels, for the second judge; null: up to 64 pixels a side."""
    features_dtype: Literal["float32", "float16"] = "float32"
    """Type that features are stored in."""
    shard_records: int | None = Field(None, gt=0)
    """Records per file of the store; null: a power of two that gives at most 256 files a column."""
    max_failed_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the items that may fail; with more the store is not finished and the command ends with code 1."""
    max_train_records: int | None = Field(None, gt=0)
    """Train on at most so many records: those with the smallest hashes of their ids, whatever the store and its
    order. The store holds them all."""
    expected_records: int | None = Field(None, gt=0)
    """Training records that the data has, for `arra plan` before they are there; nothing else reads it."""

    @model_validator(mode="after")
    def _one_way_to_name_it(self) -> "DataSection":
        if self.sources is not None:
            if self.path is not None or self.source != "openmoji":
                raise ValueError("'sources' stands in place of 'source' and 'path'; give one or the other")
            if not self.sources:
                raise ValueError("'sources' is empty; name at least one")
        elif (self.source in EMBEDDED_KINDS) == (self.path is not None):
            raise ValueError(f"'source: {self.source}' and 'path' go together; give both or neither")
        if self.crop.kind == "random" and self.mode == "cached":
            raise ValueError("'crop: random' is drawn anew every time; it needs 'mode: online'")
        return self

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """The sources, however they are named.

        Raises:
            ArraError: `auto` cannot tell what the path is.
        """
        if self.sources is not None:
            return expand_sources(self.sources)
        return expand_sources([source_of(self.source, self.path)])

    @property
    def keeps_pixels(self) -> bool:
        """Whether the store keeps the centre squares as pixels."""
        return self.image_size <= 64 if self.store_pixels is None else self.store_pixels


class TokenizerSection(Settings):
    """Which image tokenizer, and whether it is trained first."""

    name: str = EMBEDDED
    """A known name or a tokenizer folder; the weights training starts from, unless `network` is given."""
    weights: str | None = None
    """Checkpoint file of a published tokenizer (`name: llamagen-vq16`)."""
    entry: Literal["model", "ema"] = "model"
    """Which weights of that file; LlamaGen's own tools take `model` for codes."""
    network: VQSettings | None = None
    """A fresh network of this shape in place of known weights; needs `train`."""
    train: TokenizerTrainSettings | None = None
    """How to train it on the training split; null uses it as it is."""

    @model_validator(mode="after")
    def _fresh_needs_training(self) -> "TokenizerSection":
        if self.network is not None and self.train is None:
            raise ValueError("a fresh network makes no codes; add a 'train' section")
        if self.network is not None and self.train is not None and self.train.part == "decoder":
            raise ValueError("train.part: decoder keeps the codes of a tokenizer; name one, and remove 'network'")
        return self


AnyEncoder = Annotated[
    Annotated[str, Tag("name")] | Annotated[EncoderChoice, Tag("choice")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "choice"),
]
"""An encoder's name alone, or with what is taken of it."""


class EncoderSection(Settings):
    """The frozen encoders: some teach, another judges."""

    teacher: AnyEncoder = "efficientnet-lite0"
    """Whose features the alignment trains on: a name of `arra list encoders`, or {name, weights, output, ...}."""
    judge: AnyEncoder = "efficientnet-lite1"
    """In whose features pictures are compared; a stranger to the teacher, where there is one."""
    others: dict[str, AnyEncoder] = {}
    """Further teachers by a name of your own, which `align.encoder` may then say; their features are prepared too."""

    @model_validator(mode="after")
    def _fits_together(self) -> "EncoderSection":
        for name in self.others:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in ("teacher", "judge"):
                raise ValueError(
                    f"others: '{name}' is no name for a teacher; use letters, digits and '_', not teacher or judge"
                )
        columns: dict[str, tuple[str, EncoderChoice]] = {}
        for key, choice in {**self.choices(), "judge": self.choice("judge")}.items():
            try:
                check_encoder_name(choice.name)
            except ArraError as error:
                raise ValueError(str(error)) from None
            if choice.name in SPECS and choice.output not in (None, *SPECS[choice.name].outputs):
                raise ValueError(
                    f"{key}: {choice.name} has no output '{choice.output}'; it has "
                    f"{', '.join(SPECS[choice.name].outputs)}"
                )
            if key == "judge":
                if choice.output == "patches" or choice.bands is not None:
                    raise ValueError(
                        "judge: it says one vector of a picture; choose output: cls, projected, mean or concat, and no "
                        "bands"
                    )
                continue
            first, other = columns.setdefault(choice.column, (key, choice))
            if other != choice:
                raise ValueError(
                    f"others.{key}: would have the column '{choice.column}' of {first}, made otherwise; name one of "
                    "them alone, or choose another output, image_size or layers"
                )
        return self

    def choice(self, name: str) -> EncoderChoice:
        """The encoder named `teacher`, `judge`, or as a key of `others`.

        Raises:
            ArraError: there is none of this name.
        """
        named = {**self.others, "teacher": self.teacher, "judge": self.judge}
        if name not in named:
            raise ArraError(
                f"encoder '{name}': the recipe has none of this name; it has {', '.join(['teacher', *self.others])}"
            )
        found = named[name]
        return EncoderChoice(name=found) if isinstance(found, str) else found

    def choices(self) -> dict[str, EncoderChoice]:
        """Every teacher by its name: `teacher` first, then the others."""
        return {name: self.choice(name) for name in ("teacher", *self.others)}


class TextEncoderSection(Settings):
    """The frozen text encoder whose vectors a model with `condition: caption` is given."""

    name: str = "flan-t5-xl"
    """A name of `arra list encoders`; LlamaGen's is flan-t5-xl."""
    weights: str | None = None
    """Its folder in Hugging Face layout; not needed to train where the store has the features."""
    clean: bool = False
    """Captions in lower case, without addresses, markup, file names and the like, as LlamaGen has them."""
    short: bool = False
    """Also the features of every caption's first sentence, for models that should paint short prompts too."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What it computes in; `data.features_dtype` is what is stored."""

    @model_validator(mode="after")
    def _known(self) -> "TextEncoderSection":
        if self.name not in TEXT_SPECS:
            raise ValueError(f"'{self.name}' is no known text encoder; known are {', '.join(TEXT_SPECS)}")
        return self


class TextSection(Settings):
    """Plain text that a language model goes on reading while it learns to paint, so that it keeps its language."""

    path: str
    """A text file, or .jsonl whose lines have a "text"."""
    rows: int = Field(2, ge=0)
    """Rows of text beside the pictures of every batch; 0 only watches the loss on them."""
    length: int = Field(256, gt=1)
    """Tokens of a row."""
    held_out_share: float = Field(0.05, gt=0, lt=1)
    """Share of the rows, at the end, on which `text_loss` is measured."""


PLACES = ("{prompt}", "{width}", "{height}")
"""What is filled in where a template of a language model names it."""


def check_template(text: str) -> str:
    """The template.

    Raises:
        ValueError: the prompt has not one place in it, or a place has another name.
    """
    odd = [place for place in re.findall(r"\{[A-Za-z_]*\}", text) if place not in PLACES]
    if odd:
        raise ValueError(f"{odd[0]} in {text!r} is nothing that is filled in; known are {', '.join(PLACES)}")
    if text.count("{prompt}") != 1:
        raise ValueError(f"expected a text with {{prompt}} in it once, found {text!r}")
    return text


Template = Annotated[str, AfterValidator(check_template)]


class LanguageSection(Settings):
    """A language model that learns to paint, in place of the decoder."""

    folder: str
    """Made by `arra init` (of any causal LM) or `arra import` (Chameleon, Lumina-mGPT, ARRA), or a finished run."""
    train: Literal["all", "lora", "head"] = "all"
    """all: every weight; lora: adapters, and the embeddings and head rows of the image's tokens; head: these rows of
    the head alone (Anole)."""
    lora: LoraSettings | None = None
    """With `train: lora`; null takes its defaults."""
    four_bit: bool = False
    """With `train: lora`: the frozen matrices in four bits (QLoRA; extra 'lean')."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of what is not trained; what is trained is float32."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """After the attention and the feed-forward of every block; the released ARRA has 0.05."""
    template: Template | None = None
    """What is read in place of a prompt, with {prompt} in it, and perhaps {width} and {height}; null: the folder's."""
    text: TextSection | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "LanguageSection":
        if self.train != "lora" and (self.lora is not None or self.four_bit):
            raise ValueError(f"'lora' and 'four_bit' go with 'train: lora', it is '{self.train}'; change one of them")
        if self.train == "all" and self.frozen_dtype != "float32":
            raise ValueError("'frozen_dtype' is the type of what is not trained; with 'train: all' that is nothing")
        return self


LLM_KEYS = ("llm", "condition", "text_vocab_size", "seed")
"""What a model section may say beside `llm`; all else comes with the language model's folder."""
MOST_BASES = 4
"""Recipes that stand on each other."""
PREFIX_LENGTHS = {"text": 14, "class": 1, "caption": 120}


class ModelSection(Settings):
    """Shape and dropout of the decoder; codes, grid and vocabulary follow from the data and the tokenizer."""

    condition: Literal["text", "class", "caption"] = "text"
    """text: words of the prompt, which the model learns to read; class: a label; caption: vectors of a text encoder."""
    llm: LanguageSection | None = None
    """A language model in place of the decoder; shape and vocabulary come with it."""
    size: Literal["b", "l", "xl", "xxl", "xxxl", "1b", "3b", "7b"] | None = None
    """One of LlamaGen's published shapes, in place of layers, heads and width."""
    num_layers: int = Field(4, gt=0)
    num_heads: int = Field(4, gt=0)
    hidden_size: int = Field(128, gt=0)
    ffn_hidden_size: int | None = Field(None, gt=0)
    weights: str | None = None
    """Start from these instead of fresh weights: a checkpoint file, a folder of `arra import`, or a run."""
    prefix_length: int = Field(PREFIX_LENGTHS["text"], gt=0)
    """Positions before the codes; text: 14 unless given, the begin-of-image token included, longer prompts are
    refused; class: 1; caption: the text encoder's slots, 120 unless given."""
    text_vocab_size: int = Field(3000, ge=300)
    """Most ids of the text tokenizer, which is trained on the training captions."""
    num_classes: int | None = Field(None, gt=0)
    """Classes without the null class; null takes the store's."""
    token_dropout: float = Field(0.1, ge=0, lt=1)
    """After the embeddings of condition and codes."""
    resid_dropout: float = Field(0.0, ge=0, lt=1)
    """After the output of every attention."""
    ffn_dropout: float = Field(0.0, ge=0, lt=1)
    """After every feed-forward."""
    attn_dropout: float = Field(0.0, ge=0, lt=1)
    """On attention weights; unlike all other dropout it differs with ranks and micro-batches."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Chance that a picture skips the last block; it rises from 0 at the first one."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the first weights."""
    seed: int = Field(0, ge=0)
    """Of the first weights."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        size, condition = filled.get("size"), filled.get("condition", "text")
        if filled.get("llm") is not None:
            defaults = {name: field.default for name, field in cls.model_fields.items()}
            odd = [name for name in filled if name not in LLM_KEYS and filled[name] != defaults.get(name)]
            if odd and odd[0] in defaults:
                raise ValueError(f"'{odd[0]}' is the decoder's, and a language model has its own; leave it out")
            if condition != "text":
                raise ValueError(f"condition: a language model reads text, found '{condition}'; leave it out")
            return filled
        shape = SIZES.get(size, {}) if isinstance(size, str) else {}
        if shape and filled.get("ffn_hidden_size") is not None:
            raise ValueError(f"ffn_hidden_size follows from size '{size}'; leave one of the two out")
        for name, number in shape.items():
            if filled.setdefault(name, number) != number:
                raise ValueError(
                    f"size '{size}' has {name} {number}, found {filled[name]!r}; leave {name} out, or set size: null"
                )
        if isinstance(condition, str) and condition in PREFIX_LENGTHS:
            filled.setdefault("prefix_length", PREFIX_LENGTHS[condition])
        return filled

    @model_validator(mode="after")
    def _fits_the_condition(self) -> "ModelSection":
        if self.condition == "class" and self.prefix_length != 1:
            raise ValueError(f"prefix_length: a class takes one position, found {self.prefix_length}; leave it out")
        if self.condition == "text" and self.prefix_length < 2:
            raise ValueError(f"prefix_length: text and the begin-of-image token need 2, found {self.prefix_length}")
        if self.condition != "class" and self.num_classes is not None:
            raise ValueError(f"num_classes: a model conditioned on {self.condition} has no classes; leave it out")
        return self

    @property
    def multiple_of(self) -> int:
        """What the width of the feed-forward is rounded up to: LlamaGen's own for its sizes, finer for small shapes."""
        return 256 if self.size is not None else 32


class Recipe(Settings):
    """All settings of one training run: the rooms' own settings, one section each."""

    name: str
    """What the recipe is called in reports."""
    row: str | None = None
    """The row of the file that these settings are; chosen with --row."""
    data: DataSection = DataSection()
    tokenizer: TokenizerSection = TokenizerSection()
    encoder: EncoderSection = EncoderSection()
    text_encoder: TextEncoderSection | None = None
    """Who reads captions for a model with `condition: caption`; `arra prepare` keeps what it says in the store."""
    model: ModelSection = ModelSection()
    align: AlignSettings | None = None
    train: TrainSettings
    sample: SamplingSettings = SamplingSettings()
    caption_judge: DualTrainSettings | None = DualTrainSettings()
    """Training of the second judge, a dual encoder of captions and pictures; null does without it."""
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        for where, term in self.align_terms():
            if self.model.llm is None and term.layer > self.model.num_layers:
                raise ValueError(
                    f"{where}.layer: {term.layer} is outside 0..{self.model.num_layers} here; the paper uses 1"
                )
            if term.encoder not in self.encoder.choices():
                raise ValueError(
                    f"{where}.encoder: '{term.encoder}' is no teacher of the recipe; it has "
                    f"{', '.join(self.encoder.choices())} (encoder.others adds more)"
                )
            choice = self.encoder.choice(term.encoder)
            if (term.target == "patch") != (choice.output == "patches"):
                raise ValueError(
                    f"{where}.target: '{term.target}' "
                    + ("needs the patches" if term.target == "patch" else "takes one vector of a picture, not patches,")
                    + f" of encoder '{term.encoder}'; name another one, as encoder.others may add"
                )
            if (term.target == "causal") != (choice.bands is not None):
                raise ValueError(f"{where}.target: causal and an encoder with 'bands' go together; change one of them")
            if term.loss == "nt-xent" and term.target != "patch" and self.train.batch_size == 1:
                raise ValueError(f"{where}.loss: nt-xent contrasts the pictures of a batch; train.batch_size is 1")
        if self.model.condition == "caption" and self.text_encoder is None:
            raise ValueError(
                "model.condition: caption needs a 'text_encoder' section, as in text_encoder: {name: flan-t5-xl}"
            )
        if self.train.word_dropout and self.model.llm is not None:
            raise ValueError("train.word_dropout: is the decoder's, a language model's prompts stay whole; use 0")
        if len(self.train.ema_decays) > 1 and self._has_adapters:
            raise ValueError("train.ema_decay: several averages are of models that are trained whole; name one")
        width = self.model.hidden_size
        if width % self.model.num_heads or (width // self.model.num_heads) % 4:
            raise ValueError(
                f"model.hidden_size: {width} over {self.model.num_heads} heads must give a head size divisible by 4"
            )
        return self

    @property
    def _has_adapters(self) -> bool:
        return self.model.llm is not None and self.model.llm.train != "all"

    def align_terms(self) -> list[tuple[str, AlignTerm]]:
        """Every alignment term, with its key in the recipe; none without an alignment."""
        if self.align is None:
            return []
        return [("align", self.align), *((f"align.more.{name}", term) for name, term in self.align.more.items())]

    @property
    def in_epochs(self) -> dict[str, str]:
        """By their keys, the durations that are steps only when it is known how many pictures there are."""
        return {
            f"{where}.{name}": written
            for where, settings in [("train", self.train), *self.align_terms()]
            for name, written in written_durations(settings)
            if needs_records(written)
        }

    def resolved(self, records: int | None) -> "Recipe":
        """The recipe with every duration of the training in steps; `records` are the pictures of an epoch.

        Raises:
            ArraError: a duration is in epochs, and `records` is None.
        """
        if records is None:
            for key, written in self.in_epochs.items():
                raise ArraError(f"{key}: '{written}' needs to know how many pictures there are; write steps or images")
        train = self.train.resolved(records)
        align = self.align
        if align is not None:
            align = align.resolved(batch_size=train.batch_size, records=records, steps=train.steps)
        return self.model_copy(update={"train": train, "align": align})

    @property
    def has_rep(self) -> bool:
        """Whether a token stands before the image for target `rep`; sampling writes it too."""
        return any(term.target == "rep" for _, term in self.align_terms())


@dataclass(frozen=True)
class RecipeFile:
    """A recipe's file as it is written: settings of all rows, what each row changes, what a paper has for it."""

    source: str
    settings: Tree
    """Those of the base, with the file's own laid over them."""
    differences: dict[str, Tree]
    """By row."""
    table: TableSection | None
    facts: dict[str, TableRow]
    """By row; empty ones where the file has no table."""

    @property
    def stand_ins(self) -> "RecipeFile":
        """The recipe whose rows stand in at embedded scale.

        Raises:
            ArraError: the file has no table, or names no recipe there.
        """
        if self.table is None:
            raise ArraError(f"{self.source}: has no 'table' section, so nothing stands in for its rows")
        return read_recipe_file(_named_recipe(self.table.embedded, self.source, "table.embedded"))

    def row(self, name: str | None) -> Tree:
        """What a row changes; nothing without a name.

        Raises:
            ArraError: there is no such row, or it is another system's.
        """
        if name is None:
            return {}
        if name not in self.differences:
            listed = f"rows: {', '.join(self.differences)}" if self.differences else "it has none"
            raise ArraError(f"{self.source}: no row '{name}'{_did_you_mean(name, list(self.differences))}; {listed}")
        if self.facts[name].external:
            raise ArraError(
                f"{self.source}: row '{name}' is another system's, only its numbers are told; choose another"
            )
        return self.differences[name]


def recipe_of_row(
    settings: Tree, differences: Sequence[Tree], *, source: str, overrides: Sequence[str] = ()
) -> "Recipe":
    """Settings with differences laid over them one after another, as a recipe; `source` names them in errors."""
    for difference in differences:
        settings = _merge(settings, difference)
    return _settled(settings, Recipe, source=source, overrides=overrides)


def load_recipe(path: Path | str, *, row: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` (or the built-in one of that name), with a row's differences and `a.b=c` overrides applied.

    Its durations are steps; where one is in epochs all stay as they are written, until `resolved` is told the pictures.

    Raises:
        ArraError: one line that names file, key, what was expected and what was found.
    """
    found = find_recipe(path)
    return parse_recipe(_read(found), Recipe, source=str(path), row=row, overrides=overrides)


def parse_recipe(text: str, model: type[S], *, source: str, row: str | None = None, overrides: Sequence[str] = ()) -> S:
    """Settings of class `model` from the text of a recipe; `source` names it in errors."""
    file = _read_file(text, source)
    difference = file.row(row)
    named = {"row": row} if row is not None and "row" in model.model_fields else {}
    data = _merge(file.settings | named, difference)
    return _settled(data, model, source=source, row=row, difference=difference, overrides=overrides)


def _settled(
    data: Tree,
    model: type[S],
    *,
    source: str,
    row: str | None = None,
    difference: Tree | None = None,
    overrides: Sequence[str] = (),
) -> S:
    """The settings that `data` says, after the overrides; a mistake in what the row changes is told as the row's."""
    data = deepcopy(data)
    assigned = [_assign(data, text) for text in overrides]
    try:
        found = model.model_validate(data)
        return cast(S, found.resolved(None)) if isinstance(found, Recipe) and not found.in_epochs else found
    except ValidationError as error:
        problems = _problems(error)
        key, message = _explain(problems[0], data, model)
        dotted = ".".join(map(str, key))
        if key and any(_is_beside(key, path) for path in assigned):
            where = f"--set {dotted}"
        else:
            in_row = [f"rows.{row}"] if difference and _holds(difference, key) else []
            where = f"{source}: {'.'.join([*in_row, *([dotted] if dotted else [])])}".removesuffix(": ")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArraError(f"{where}: {message}{more}") from None


def row_names(path: Path | str) -> list[str]:
    """The rows of a recipe file that can be trained, in its order; other systems' rows of a table are left out."""
    file = read_recipe_file(path)
    return [name for name in file.differences if not file.facts[name].external]


def read_recipe_file(path: Path | str) -> "RecipeFile":
    """What the file at `path` (or the built-in recipe of that name) says, its base below it, before it is settings.

    Raises:
        ArraError: no such file, no YAML, or a base, a table or facts of a row that are none.
    """
    return _read_file(_read(find_recipe(path)), str(path))


def dump_recipe(recipe: Settings) -> str:
    """YAML without rows that loads back to an equal recipe."""
    return _dump(recipe.model_dump(mode="json"))


def _dump(data: Tree) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def recipes_folder() -> Path:
    """The built-in recipes: `recipes/` of a clone, `arra/recipes/` of an installed wheel."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def built_in_recipes() -> list[Path]:
    """The files of all built-in recipes, in the order of their names."""
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(path: Path | str) -> Path:
    """The file at `path`, else the built-in recipe of that name (`demo`, `demo.yaml`, `recipes/demo.yaml`)."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise ArraError(f"{path}: is a folder, expected a recipe file, as in recipes/demo.yaml")
    built_in = {file.stem: file for file in built_in_recipes()}
    if path.stem in built_in and path.suffix in ("", ".yaml") and str(path.parent) in (".", "recipes"):
        return built_in[path.stem]
    raise ArraError(
        f"{path}: no such file{_did_you_mean(path.stem, list(built_in))}; built-in recipes: {', '.join(built_in)}"
    )


def json_schema(model: type[Settings] = Recipe) -> Tree:
    """The JSON schema of a recipe file, rows included, for editors."""
    schema = model.model_json_schema()
    change = _as_change({key: value for key, value in schema.items() if key != "$defs"})
    definitions = schema.setdefault("$defs", {})
    definitions |= {f"{name}Change": _as_change(part) for name, part in list(definitions.items())}
    definitions["RecipeChange"] = change
    if model is Recipe:  # what a file may say beside settings
        for facts in (TableSection, TableRow):
            of_paper = facts.model_json_schema()
            definitions |= of_paper.pop("$defs", {})
            definitions[facts.__name__] = of_paper
        change["properties"] = {**change["properties"], **definitions["TableRow"]["properties"]}
        schema["properties"]["table"] = {"$ref": "#/$defs/TableSection"}
        schema["properties"]["base"] = {"type": "string", "description": "Recipe whose settings these are laid over."}
        schema["required"] = [name for name in schema.get("required", []) if name != "train"]  # the base may have it
    schema["properties"]["rows"] = {
        "type": "object",
        "description": "Named variants: what differs from the settings above. `null` removes a section.",
        "additionalProperties": {"anyOf": [{"$ref": "#/$defs/RecipeChange"}, {"type": "null"}]},
    }
    return schema


def write_schema(path: Path | str, model: type[Settings] = Recipe) -> None:
    """Nothing; `path` holds the schema that the first line of a recipe points editors to."""
    atomic_write(path, json.dumps(json_schema(model), indent=2) + "\n")


# Reading YAML

# YAML 1.1 wants a dot and a sign in 1e-4; people, JSON and YAML 1.2 do not.
_FLOAT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Strict(yaml.constructor.SafeConstructor):
    """Refuses a key written twice and a key that is no text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise _Refused(f"line {line}: expected a name as key, found {key!r}; put it in quotes")
            if key in seen:
                raise _Refused(f"line {line}: '{key}' is written twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Loader(_Strict, yaml.SafeLoader):
    """Safe YAML, with messages that say what was expected."""


class _FastLoader(_Strict, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, where PyYAML has it."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text that looks like a number is quoted, shared lists are written out."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _class in (_Loader, _FastLoader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _Refused(yaml.YAMLError):
    pass


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ArraError(f"{path}: expected YAML text in UTF-8, found something else") from None
    except PermissionError:
        raise ArraError(f"{path}: not readable for this user; change its permissions") from None


def _load_yaml(text: str, source: str) -> Any:
    with suppress(yaml.YAMLError):
        return yaml.load(text, Loader=_FastLoader)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ArraError(f"{source}: line {line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ArraError(f"{source}: {' '.join(str(error).split())}") from None


def _parse_yaml(text: str, source: str) -> Tree:
    data = _load_yaml(text, source)
    if not isinstance(data, dict):
        raise ArraError(f"{source}: expected sections such as 'train:', found {_show(data)}")
    return data


def _read_file(text: str, source: str, below: tuple[Path, ...] = ()) -> RecipeFile:
    """The file with this text; `below` are files that have it as their base."""
    data = _parse_yaml(text, source)
    base = data.pop("base", None)
    rows = _take_rows(data, source)
    table = _facts(TableSection, data.pop("table", None), f"{source}: table")
    if base is not None:
        data = _merge(_base_settings(base, source, below), data)
    facts: dict[str, TableRow] = {}
    for name, difference in rows.items():
        own: Tree = {fact: difference.pop(fact) for fact in TableRow.model_fields if fact in difference}
        if own and table is None:
            raise ArraError(f"{source}: rows.{name}.{next(iter(own))}: is of a paper's table; add a 'table' section")
        facts[name] = _facts(TableRow, own, f"{source}: rows.{name}") or TableRow()
    _check_table(table, facts, source)
    return RecipeFile(source, data, rows, table, facts)


def _base_settings(base: Any, source: str, below: tuple[Path, ...]) -> Tree:
    """The settings of the recipe that a file names as its base: a built-in one, or a file in the same folder."""
    found = _named_recipe(base, source, "base")
    if found.resolve() in below or len(below) >= MOST_BASES:
        raise ArraError(f"{source}: base: {base} stands on itself, or on more than {MOST_BASES} others; name another")
    return _read_file(_read(found), str(found), (*below, found.resolve())).settings


def _named_recipe(name: Any, source: str, key: str) -> Path:
    """The file of a recipe that the one at `source` names: beside it, else built in; never one elsewhere.

    Raises:
        ArraError: there is none of that name, or it is a path.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+(\.yaml)?", name):
        raise ArraError(
            f"{source}: {key}: expected the name of a recipe, built in or beside this file, found {_show(name)}"
        )
    stem = name.removesuffix(".yaml")
    beside = [Path(source).parent / f"{stem}.yaml"] if Path(source).is_file() else []
    for path in (*beside, recipes_folder() / f"{stem}.yaml"):
        if path.is_file():
            return path
    near = _did_you_mean(stem, [path.stem for path in built_in_recipes()])
    raise ArraError(f"{source}: {key}: no recipe '{name}', built in or beside this file{near}")


def _facts(model: type[S], data: Any, where: str) -> S | None:
    """What a table or a row of it says beside settings."""
    if data is None:
        return None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found, message = _explain(_problems(error)[0], data if isinstance(data, dict) else {}, model)
        raise ArraError(f"{'.'.join([where, *map(str, found)])}: {message}") from None


def _check_table(table: TableSection | None, facts: dict[str, TableRow], source: str) -> None:
    """Nothing, if every fact of a row is of a column and a row that there is."""
    for name, row in facts.items():
        where = f"{source}: rows.{name}"
        for column in row.expect:
            if table is not None and column not in table.columns:
                near = _did_you_mean(column, list(table.columns))
                raise ArraError(
                    f"{where}.expect.{column}: no column of the table{near}; it has {', '.join(table.columns)}"
                )
        if row.against is not None and (row.against not in facts or row.against == name):
            near = _did_you_mean(row.against, list(facts))
            raise ArraError(f"{where}.against: '{row.against}' is no other row of the table{near}")


def _take_rows(base: Tree, source: str) -> dict[str, Tree]:
    rows = base.pop("rows", None)
    rows = {} if rows is None else rows
    if not isinstance(rows, dict):
        raise ArraError(f"{source}: rows: expected names with what differs, found {_show(rows)}")
    for name, difference in rows.items():
        if difference is not None and not isinstance(difference, dict):
            raise ArraError(f"{source}: rows.{name}: expected what differs from the base, found {_show(difference)}")
    return {name: dict(difference or {}) for name, difference in rows.items()}


# Merging


def _merge(base: Tree, difference: Tree) -> Tree:
    """`base` with `difference` laid over it: mappings merge key by key, all else (`null` too) replaces."""
    merged = deepcopy(base)
    for key, value in difference.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else deepcopy(value)  # type: ignore[arg-type]
    return merged


def _assign(data: Tree, override: str) -> Path_:
    """The key of `a.b=c`, after setting it in `data`; validation refuses keys that the settings do not have."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise ArraError(f"--set {override}: expected section.key=value, as in --set train.steps=100")
    if parts[0] == "rows":
        raise ArraError(f"--set {override}: rows are chosen, not set; use --row NAME and set the key itself")
    value = _load_yaml(text, f"--set {dotted}")
    for depth, part in enumerate(parts[:-1]):
        old = data.get(part)
        if not isinstance(old, dict):  # an encoder may be written as its name alone
            data[part] = {"name": old} if isinstance(old, str) and depth and parts[0] == "encoder" else {}
        data = data[part]
    data[parts[-1]] = value
    return tuple(parts)


def _holds(tree: Any, key: Path_) -> bool:
    for part in key:
        if not isinstance(tree, dict):
            return True
        if part not in tree:
            return False
        tree = tree[part]
    return True


def _is_beside(key: Path_, assigned: Path_) -> bool:
    """Whether one of two keys is the other or lies inside it."""
    return all(a == b for a, b in zip(key, assigned, strict=False))


# Explaining


def _problems(error: ValidationError) -> list[ErrorDetails]:
    """What pydantic found; misspelt keys first, which make the right ones missing."""
    return sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")


def _explain(problem: ErrorDetails, data: Tree, model: type[Settings]) -> tuple[Path_, str]:
    """The key in the file and a line in words for one problem that pydantic found."""
    kind, context = problem["type"], problem.get("ctx", {})
    schema = model.model_json_schema()
    key = _key_in_file(problem["loc"], data, keep_last=kind in ("missing", "extra_forbidden"))
    if kind == "extra_forbidden":
        names = list(dict.fromkeys(name for node in _nodes(schema, key[:-1]) for name in node.get("properties", {})))
        near = _did_you_mean(str(key[-1]), names)
        return key, f"unknown key{near or '; expected one of: ' + ', '.join(names)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = (*key, context["discriminator"].strip("'"))
        tags = [tag for node in _nodes(schema, key[:-1]) for tag in node.get("discriminator", {}).get("mapping", {})]
        return key, _expected(_join(f"'{tag}'" for tag in tags), context.get("tag", ...), tags)
    if kind in ("value_error", "assertion_error"):
        return key, " ".join(str(context["error"]).split())
    nodes = _nodes(schema, key)
    words = _join(dict.fromkeys(_describe(node) for node in nodes))
    if not words or "pattern" in kind:
        words = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    choices = [choice for node in nodes for choice in (*node.get("enum", ()), node.get("const")) if choice is not None]
    return key, _expected(words, ... if kind == "missing" else problem["input"], choices)


def _expected(words: str, found: Any, choices: Sequence[object]) -> str:
    if found is ...:
        return f"missing; expected {words}"
    return f"expected {words}, found {_show(found)}{_did_you_mean(found, [str(choice) for choice in choices])}"


def _key_in_file(location: Path_, data: Any, keep_last: bool) -> Path_:
    """`location` without the names of union members, which pydantic puts in and no file has."""
    key: list[str | int] = []
    for index, part in enumerate(location):
        if part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data)):
            data = data[part]
        elif not (keep_last and index == len(location) - 1):
            continue
        key.append(part)
    return tuple(key)


def _nodes(schema: Tree, key: Path_) -> list[Tree]:
    """The parts of a JSON schema that may describe `key`; several where settings are a union."""
    nodes = list(_branches(schema, schema))
    for part in key:
        below: list[Tree] = []
        for node in nodes:
            properties, items = node.get("properties", {}), node.get("prefixItems", [])
            if part in properties:
                below.append(properties[part])
            elif isinstance(part, int) and part < len(items):
                below.append(items[part])
            else:
                rest = node.get("items" if isinstance(part, int) else "additionalProperties")
                below += [rest] if isinstance(rest, dict) else []
        nodes = [branch for node in below for branch in _branches(node, schema)]
    return nodes


def _branches(node: Tree, schema: Tree) -> Iterator[Tree]:
    if "$ref" in node:
        yield from _branches(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
        return
    unions = [part for union in ("anyOf", "oneOf", "allOf") for part in node.get(union, ())]
    if not unions or "discriminator" in node:
        yield node
    for part in unions:
        yield from _branches(part, schema)


_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a section of keys",
}
_LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _describe(node: Tree) -> str:
    """What a JSON schema node accepts, in words: `an integer > 0`."""
    if "enum" in node:
        return _join(_quote(choice) for choice in node["enum"])
    if "const" in node:
        return _quote(node["const"])
    noun = _NOUNS.get(node.get("type", ""), "")
    limits = " and ".join(f"{sign} {node[name]}" for name, sign in _LIMITS.items() if name in node)
    if noun == "a list":
        least, most = node.get("minItems"), node.get("maxItems")
        if least is not None or most is not None:
            limits = f"of {least}" if least == most else f"of {least or 0} to {most}" if most else f"of {least} or more"
    elif noun == "text" and node.get("minLength"):
        limits = "that is not empty" if node["minLength"] == 1 else f"of {node['minLength']} or more characters"
    elif noun == "text" and node.get("examples"):
        limits = f"as in {_quote(node['examples'][0])}"
    return f"{noun} {limits}".strip()


def _quote(choice: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(choice) or (
        f"'{choice}'" if isinstance(choice, str) else str(choice)
    )


def _join(words: Iterable[str]) -> str:
    listed = [word for word in words if word]
    return " or ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _did_you_mean(word: object, names: list[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6) if isinstance(word, str) else []
    return f"; did you mean '{near[0]}'?" if near else ""


def _as_change(node: Any) -> Any:
    """A definition for a row: nothing is required, sections are changes themselves and may be null."""
    if isinstance(node, list):
        return [_as_change(part) for part in node]
    if not isinstance(node, dict):
        return node
    changed: Tree = {}
    for key, value in node.items():
        if key == "$ref":
            changed["anyOf"] = [{"$ref": f"{value}Change"}, {"type": "null"}]
        elif not (key == "discriminator" or (key == "required" and isinstance(value, list))):
            changed[key] = _as_change(value)
    return changed
