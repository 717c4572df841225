"""Text encoders, frozen: FLAN-T5 turns a caption into one vector per token, which LlamaGen's decoder is conditioned on.

The network and the tokenizer are those of `transformers` (extra `text`); weights are a local folder in Hugging Face
layout, see `arra/encoders/text_weights.py`. Nothing is downloaded.

Legend: B captions, C slots, F feature, n tokens of a caption (its end included).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from arra.encoders.text_weights import load_weights, read_architecture, weights_identity
from arra.errors import ArraError

SLOTS = 120
"""LlamaGen's: longer captions are cut, their end token kept."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAD, END = 0, 1
"""T5's ids."""


@dataclass(frozen=True)
class TextEncoderSpec:
    """What is known of a text encoder without its weights."""

    name: str
    feature_size: int
    num_parameters: int
    """Of the encoder, its embeddings included."""
    num_slots: int = SLOTS
    licence: str = "Apache-2.0"

    @property
    def source(self) -> str:
        """Where its folder is found."""
        return f"huggingface.co/google/{self.name}"


TEXT_SPECS = {
    spec.name: spec
    for spec in (
        TextEncoderSpec("flan-t5-small", 512, 35_332_800),
        TextEncoderSpec("flan-t5-base", 768, 109_628_544),
        TextEncoderSpec("flan-t5-large", 1024, 341_231_104),
        TextEncoderSpec("flan-t5-xl", 2048, 1_223_527_424),
        TextEncoderSpec("flan-t5-xxl", 4096, 4_762_310_656),
    )
}


@dataclass(frozen=True)
class CaptionFeatures:
    """Vectors of captions, each beginning at slot 0."""

    features: Float[Tensor, "B C F"]
    """float32, zeros after a caption's end."""
    mask: Bool[Tensor, "B C"]
    """Which slots hold a token."""
    num_tokens: tuple[int, ...] = field(default=())
    """Of every caption before it was cut, the end token included."""

    @property
    def num_cut(self) -> int:
        """How many captions had more tokens than there are slots."""
        return sum(count > self.mask.shape[1] for count in self.num_tokens)


class CaptionTokenizer:
    """T5's tokenizer, which here neither cuts nor pads."""

    def __init__(self, backend: Any) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        """The ids of captions, end token last."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(captions))]


class TextEncoder:
    """A T5 encoder with its tokenizer."""

    def __init__(
        self,
        spec: TextEncoderSpec,
        network: torch.nn.Module,
        tokenizer: CaptionTokenizer,
        *,
        weights_hash: str,
        dtype: str,
    ) -> None:
        self.spec, self.network, self.tokenize = spec, network.eval().requires_grad_(False), tokenizer
        self.weights_hash, self.dtype = weights_hash, dtype

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.network.parameters()).device

    def encode(self, captions: Sequence[str], *, batch_size: int = 32) -> CaptionFeatures:
        """Vectors and mask of captions in `spec.num_slots` slots, on the encoder's device.

        Captions go through the network beside others of about their length; who is beside them changes nothing but
        the rounding.

        Raises:
            ArraError: one caption in place of several.
        """
        if isinstance(captions, str):  # a sequence too, of letters
            raise ArraError(f"captions: got one text, expected a sequence of them, as in [{captions[:20]!r}]")
        slots, ids = self.spec.num_slots, self.tokenize(captions)
        features = torch.zeros(len(ids), slots, self.spec.feature_size, device=self.device)
        mask = torch.zeros(len(ids), slots, dtype=torch.bool, device=self.device)
        for place, found in self.encode_ids(ids, batch_size=batch_size):
            features[place, : len(found)] = found
            mask[place, : len(found)] = True
        return CaptionFeatures(features, mask, tuple(len(each) for each in ids))

    @torch.inference_mode()
    def encode_ids(
        self, ids: Sequence[Sequence[int]], *, batch_size: int
    ) -> Iterator[tuple[int, Float[Tensor, "n F"]]]:
        """The place of every caption and its vectors, float32, cut to the slots; the shortest captions first."""
        slots = self.spec.num_slots
        cut = [list(each) if len(each) <= slots else [*each[: slots - 1], END] for each in ids]
        order = sorted(range(len(cut)), key=lambda place: len(cut[place]))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            width = len(cut[places[-1]])
            padded = torch.tensor([cut[place] + [PAD] * (width - len(cut[place])) for place in places])
            lengths = torch.tensor([len(cut[place]) for place in places])
            mask = torch.arange(width) < lengths[:, None]
            said = self.network(input_ids=padded.to(self.device), attention_mask=mask.long().to(self.device))
            hidden: Tensor = said.last_hidden_state.float()
            for place, row in zip(places, hidden, strict=True):
                yield place, row[: len(cut[place])]


def text_encoder_spec(name: str) -> TextEncoderSpec:
    """The spec of a named text encoder.

    Raises:
        ArraError: an unknown name.
    """
    if name not in TEXT_SPECS:
        raise ArraError(f"text encoder '{name}': unknown; known are {', '.join(TEXT_SPECS)}")
    return TEXT_SPECS[name]


def text_encoder_hash(name: str, weights: Path | str | None) -> str:
    """The identity of a text encoder's weights, read off its folder without loading them.

    Raises:
        ArraError: an unknown name, no folder, or one of another encoder.
    """
    return weights_identity(_folder(name, weights))


def load_text_encoder(
    name: str, *, weights: Path | str | None, device: torch.device | str = "cpu", dtype: str = "bfloat16"
) -> TextEncoder:
    """A frozen text encoder by name, from its folder; LlamaGen's is "flan-t5-xl" in bfloat16.

    Raises:
        ArraError: an unknown name or dtype, a missing package, no folder, or one of another encoder.
    """
    if dtype not in DTYPES:
        raise ArraError(f"text encoder {name}: dtype '{dtype}' is unknown; expected {' or '.join(DTYPES)}")
    folder = _folder(name, weights)
    spec, architecture = text_encoder_spec(name), read_architecture(folder)
    tokenizer = load_caption_tokenizer(name, weights=folder)
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        network = T5EncoderModel(T5Config(**architecture, tie_word_embeddings=False))
    load_weights(network, folder, device=torch.device(device), dtype=DTYPES[dtype])
    return TextEncoder(spec, network, tokenizer, weights_hash=weights_identity(folder), dtype=dtype)


def load_caption_tokenizer(name: str, *, weights: Path | str | None) -> CaptionTokenizer:
    """A text encoder's tokenizer alone, from its folder.

    Raises:
        ArraError: an unknown name, a missing package, no folder, or no tokenizer of T5 in it.
    """
    folder = _folder(name, weights)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "spiece.model")):
        raise ArraError(f"{folder}: no tokenizer.json and no spiece.model in it; fetch one of them")
    require_transformers(name)
    from transformers import T5Tokenizer

    try:
        backend = T5Tokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # what the tokenizers library raises of a broken file has no class of its own
        raise ArraError(
            f"{folder}: its tokenizer cannot be read ({' '.join(str(error).split())[:160]}); fetch tokenizer.json again"
        ) from error
    tokenizer, rows = CaptionTokenizer(backend), read_architecture(folder)["vocab_size"]
    ids, (nothing,) = backend.get_vocab().values(), tokenizer([""])
    # of a file that is not T5's, transformers makes a vocabulary of a few signs and says nothing
    if not rows / 2 < len(ids) <= rows or max(ids) >= rows or nothing != [END]:
        raise ArraError(
            f"{folder}: its tokenizer is not T5's ({len(ids)} tokens for {rows} embeddings, the empty caption becomes "
            f"{nothing[:5]}, expected [{END}]); fetch tokenizer.json again"
        )
    return tokenizer


def require_transformers(name: str) -> None:
    """Nothing.

    Raises:
        ArraError: the package is not installed; the line says how to get it.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ArraError(
            f"text encoder {name}: the package 'transformers' is missing; pip install 'arra[text]' -c constraints.txt"
        ) from None


def _folder(name: str, weights: Path | str | None) -> Path:
    """The folder of a text encoder, after a look at its configuration."""
    spec = text_encoder_spec(name)
    fetch = f"hf download google/{name} --local-dir FOLDER"
    if weights is None:
        raise ArraError(
            f"text encoder {name}: no weights; set text_encoder.weights to its folder, fetched with: {fetch}"
        )
    folder = Path(weights)
    if not folder.is_dir():
        raise ArraError(f"{folder}: no such folder; expected {name} in Hugging Face layout, as from: {fetch}")
    width = read_architecture(folder)["d_model"]
    if width != spec.feature_size:
        fits = [other for other, each in TEXT_SPECS.items() if each.feature_size == width]
        advice = f"say {fits[0]}, or name the folder of {name}" if fits else f"name the folder of {name}"
        raise ArraError(
            f"{folder}: its vectors are {width} wide (d_model), those of {name} {spec.feature_size}; {advice}"
        )
    return folder
