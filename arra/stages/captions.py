"""A store's captions as text ids: the tokenizer they train, their lengths, their ids when a batch asks for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from arra.config import Recipe
from arra.data.store import Store
from arra.errors import ArraError
from arra.tokenizers.text import TextTokenizer, train_text_tokenizer

CAPTIONS_AT_A_TIME = 4096
MAX_TEXTS = 1_000_000
"""Training pictures whose captions the text tokenizer is trained on, at most."""


@runtime_checkable
class Encodes(Protocol):
    """A text tokenizer, as far as it is needed here."""

    def encode(self, prompt: str) -> list[int]: ...


@dataclass(frozen=True)
class StoreCaptions(Sequence[list[list[int]]]):
    """For each record of a split the ids of its prompt and of its alternatives, made when they are asked for."""

    store: Store
    rows: np.ndarray
    text: Encodes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> list[list[int]]:  # type: ignore[override]
        prompt, alternatives = self.store.fields(int(self.rows[place]), "prompt", "alternatives")
        return [self.text.encode(each) for each in (prompt, *alternatives)]


def check_caption_lengths(store: Store, rows: np.ndarray, text: TextTokenizer, prefix_length: int) -> None:
    """Nothing.

    Raises:
        ArraError: a caption and the begin-of-image token do not fit the prefix; the first such record is named.
    """
    table = store.table(["id", "prompt", "alternatives"])
    for start in range(0, len(rows), CAPTIONS_AT_A_TIME):
        part = table.take(pa.array(rows[start : start + CAPTIONS_AT_A_TIME])).to_pylist()
        for row in part:
            longest = max(len(text.encode(each)) for each in (row["prompt"], *row["alternatives"]))
            if longest + 1 > prefix_length:
                raise ArraError(
                    f"{store.path}: record '{row['id']}': its caption has {longest} tokens, more than "
                    f"model.prefix_length {prefix_length} - 1; raise it with --set model.prefix_length={longest + 1}"
                )


def caption_lengths(recipe: Recipe, store: Store) -> list[int]:
    """The number of text ids of every record's caption, by the text tokenizer that training would make."""
    text = store_text_tokenizer(recipe, store)
    return [len(text.encode(prompt)) for prompt in store.prompts()]


def store_text_tokenizer(recipe: Recipe, store: Store) -> TextTokenizer:
    """The text tokenizer of a store: trained on all names of the training pictures (of at most a million of them)."""
    train = store.rows("train")
    chosen = train[np.linspace(0, len(train) - 1, min(len(train), MAX_TEXTS)).round().astype(np.int64)]
    table = store.table(["prompt", "alternatives"]).take(pa.array(chosen))
    prompts, alternatives = table.column("prompt").to_pylist(), table.column("alternatives").to_pylist()
    texts = [each for own, others in zip(prompts, alternatives, strict=True) for each in (own, *others)]
    return train_text_tokenizer(texts, vocab_size=recipe.model.text_vocab_size)
