"""What a recipe says: the rooms' settings composed, section by section, each checked against the others."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from arra.data.crops import CropSettings
from arra.data.records import Source
from arra.data.sources import EMBEDDED_KINDS, AnySource, SourceKind, expand_sources, source_of
from arra.encoders import SPECS, TEXT_SPECS, EncoderChoice, check_encoder_name
from arra.errors import ArraError
from arra.evaluate.settings import EvaluateSettings
from arra.models.adapters import LoraSettings
from arra.models.llamagen import SIZES
from arra.sample.logits import SamplingSettings
from arra.settings import Settings
from arra.tokenizers import EMBEDDED
from arra.tokenizers.vq import VQSettings
from arra.train.durations import needs_records, written_durations
from arra.train.settings import AlignSettings, AlignTerm, DualTrainSettings, TokenizerTrainSettings, TrainSettings


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
