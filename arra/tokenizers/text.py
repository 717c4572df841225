"""Text tokenizers: a prompt becomes ids of the prefix. Byte-pair encoding through Hugging Face `tokenizers`.

Prompts are lower-cased, punctuation counts as space and English articles are dropped ("a red heart" is "red heart");
what training never saw falls into smaller pieces, so every word of any language has ids, and no prompt can become a
special token. Emoji and other signs are no words: a prompt of these alone has no ids.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from arra.data.layout import BOI, PAD
from arra.errors import ArraError
from arra.runs import atomic_write

SPECIAL = ("<pad>", "<image>")
"""Ids 0 and 1, by `arra.data.layout`; no prompt is ever mapped to them."""


class TextTokenizer:
    """Prompts to ids 2..vocab_size-1."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, the two special ones included."""
        return int(self.tokenizer.get_vocab_size())

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt; may be empty."""
        # a prompt typed in another encoding than the terminal's arrives with lone surrogates, which are no text
        text = prompt.encode("utf-8", "replace").decode("utf-8")
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The normalised text of ids."""
        return str(self.tokenizer.decode(list(ids))).strip()

    def save(self, path: Path) -> None:
        """Nothing; the file holds the tokenizer as JSON, the format of `tokenizers`."""
        atomic_write(path, self.tokenizer.to_str(pretty=True))


def train_text_tokenizer(prompts: Iterable[str], *, vocab_size: int = 4096) -> TextTokenizer:
    """A tokenizer with whole words for frequent words and pieces for rare ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[\x{FE00}-\x{FE0F}\x{20E3}]"), " "),  # marks that choose an emoji's looks
            normalizers.Replace(Regex(r"[^\p{L}\p{M}\p{N}\-']+"), " "),  # \p{M}: vowel signs of Hindi, Thai, ...
            normalizers.Replace(Regex(r"(?<![-'])\b(a|an|the)\b(?![-'])"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(prompts), trainer)  # sorted: the same set gives the same ids
    return TextTokenizer(_without_specials(tokenizer))


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """The tokenizer of a JSON file.

    Raises:
        ArraError: the file is missing or no tokenizer.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArraError(f"{path}: cannot be read ({error}); expected a tokenizer.json") from error
    return TextTokenizer(tokenizer_from_json(text, source=str(path)))


def tokenizer_from_json(text: str, *, source: str) -> Tokenizer:
    """The tokenizer that a JSON text describes.

    Raises:
        ArraError: it describes none, or one whose first ids are not our special tokens.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:
        raise ArraError(f"{source}: not a tokenizer ({error}); save the model again") from error
    if tokenizer.get_added_tokens_decoder():
        raise ArraError(f"{source}: has added tokens, which a prompt could name; made by another program")
    if [tokenizer.id_to_token(i) for i in (PAD, BOI)] != list(SPECIAL):
        raise ArraError(f"{source}: ids {PAD} and {BOI} are not {SPECIAL[0]} and {SPECIAL[1]}; made by another program")
    return tokenizer


def _without_specials(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary in which "<pad>" typed by a user is plain text: no added token is matched in prompts."""
    import json

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []
    return tokenizer_from_json(json.dumps(content), source="trained tokenizer")
