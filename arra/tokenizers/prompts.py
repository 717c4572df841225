"""Prompts of a language model: its own tokenizer, in which no text can become a special token.

Where a model's vocabulary has signs beside text (codes, sides, begin and end of an image, chat marks), a prompt that
spells one must stay text: `</s>` typed by a user is four characters. Two things would turn it into the sign: added
tokens, which are cut out of the text before anything else, and entries of the vocabulary itself, which merges (or
`ignore_merges`, or Unigram's pieces) can reach. So both get a name here that no text has, and no merge. Every id stays
what it was, and text without signs has the model's own ids.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from arra.errors import ArraError
from arra.runs import atomic_write
from arra.tokenizers.vocabulary import is_special_name, json_object

_BYTE = re.compile("<0x[0-9A-F]{2}>")


class PromptTokenizer:
    """Prompts to ids of text."""

    def __init__(
        self, backend: Tokenizer, *, special: frozenset[int], refused: frozenset[int], original_json: str
    ) -> None:
        self.backend = backend
        self.special = special
        """Ids that are no text."""
        self._refused = refused
        self.original_json = original_json
        """The tokenizer as it was read, added tokens and all: what a saved model's folder holds."""

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt, none of them special, no begin-of-text among them; may be empty.

        Raises:
            ArraError: the prompt has a sign that the vocabulary lacks, and the id for such signs means something else.
        """
        # a prompt typed in another encoding than the terminal's arrives with lone surrogates, which are no text
        text = prompt.encode("utf-8", "replace").decode("utf-8")
        try:
            ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # Unigram without an id for signs that it lacks; the class is no finer
            raise ArraError(f"prompt {prompt[:40]!a}: {error}; reword it") from error
        if wrong := self._refused.intersection(ids):
            raise ArraError(
                f"prompt {prompt[:40]!a}: a part of it would become the special token {min(wrong)}; reword it"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens have none."""
        return str(self.backend.decode([token for token in ids if token not in self.special]))

    def save(self, path: Path) -> None:
        """Nothing; the file is the tokenizer as it was read, and opens as the same `PromptTokenizer`."""
        atomic_write(path, self.original_json)


def load_prompt_tokenizer(path: str | Path, *, reserved: Collection[int]) -> PromptTokenizer:
    """The tokenizer of a `tokenizer.json` or `text_tokenizer.json`; `reserved` are the ids of a layout.

    Special are these, the model's own added tokens (but for runs of spaces and the like, which are text), and entries
    with the names that `arra.tokenizers.vocabulary` knows.

    Raises:
        ArraError: the file is missing or no tokenizer of a known kind, or a reserved id is needed for text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArraError(f"{path}: cannot be read ({error}); expected a tokenizer.json") from error
    return prompt_tokenizer(text, reserved=reserved, source=str(path))


def prompt_tokenizer(text: str, *, reserved: Collection[int], source: str) -> PromptTokenizer:
    """The tokenizer that a JSON text describes; see `load_prompt_tokenizer`.

    Raises:
        ArraError: as there.
    """
    content = json_object(text, source=source)
    described = content.get("model")
    if isinstance(described, dict) and "merges" in described and described.get("continuing_subword_prefix"):
        raise ArraError(f"{source}: a BPE tokenizer that marks what continues a word, which no language model's does")
    original = _parse(text, source=source)
    model, added = content["model"], content.get("added_tokens") or []
    names = _names(model, source=source)
    for entry in added:
        if original.token_to_id(entry["content"]) != entry["id"]:
            raise ArraError(f"{source}: {entry['content'][:40]!r} is not token {entry['id']}; fetch the file again")
    special = {entry["id"] for entry in added if not _is_text(entry)} | set(reserved)
    special |= {token for token, name in names.items() if is_special_name(name)}
    for token in sorted(special & names.keys()):
        if _is_letter(names[token], model):
            if token in reserved:
                raise ArraError(f"{source}: the reserved id {token} is {names[token]!r}, which text needs")
            special.remove(token)
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    hidden = {token: f" {mark} {token} " for token in special}
    plain = {"special": False, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    changed = {
        **content,
        "model": _hide(model, names, hidden),
        # not left out: ids of those that follow would move up
        "added_tokens": [
            {**entry, **plain, "content": hidden[entry["id"]]} if entry["id"] in hidden else entry for entry in added
        ],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    # the id of signs that a vocabulary lacks may come out, unless the layout gave it another meaning
    unknown = _unknown(model)
    refused = special if unknown is None or unknown in reserved else special - {unknown}
    return PromptTokenizer(
        _parse(json.dumps(changed), source=source),
        special=frozenset(special),
        refused=frozenset(refused),
        original_json=text,
    )


def _parse(text: str, *, source: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library has no class of its own for what it refuses
        raise ArraError(
            f"{source}: not a tokenizer ({' '.join(str(error).split())[:120]}); fetch the file again"
        ) from error


def _names(model: Mapping[str, Any], *, source: str) -> dict[int, str]:
    """Token names by id."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {token: str(entry[0]) for token, entry in enumerate(vocab)}
    if "merges" not in model:
        raise ArraError(f"{source}: a {model.get('type')} tokenizer; expected BPE or Unigram, as language models have")
    names = {int(token): str(name) for name, token in vocab.items()}
    if len(names) < len(vocab):
        raise ArraError(f"{source}: two tokens have the same id; fetch the file again")
    return names


def _is_text(added: Mapping[str, Any]) -> bool:
    """Whether an added token only stands for text, as runs of blanks do in GPT-NeoX and Gemma (there written `▁`)."""
    content = added["content"]
    return not added["special"] and (content.replace("▁", " ").isspace() or len(content) == 1)


def _is_letter(name: str, model: Mapping[str, Any]) -> bool:
    """Whether an entry is what words are broken down to."""
    return len(name) == 1 or (bool(model.get("byte_fallback")) and _BYTE.fullmatch(name) is not None)


def _unknown(model: Mapping[str, Any]) -> int | None:
    if isinstance(model["vocab"], list):
        return model.get("unk_id")
    return model["vocab"].get(model.get("unk_token"))


def _hide(model: Mapping[str, Any], names: Mapping[int, str], hidden: Mapping[int, str]) -> dict[str, Any]:
    """The model in which no text reaches the hidden ids."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {**model, "vocab": [[hidden.get(token, entry[0]), entry[1]] for token, entry in enumerate(vocab)]}
    gone = {names[token] for token in hidden if token in names}

    def stays(merge: Any) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return not gone.intersection((left, right, left + right))

    unknown = model.get("unk_token")
    return {
        **model,
        "vocab": {hidden.get(token, name): token for name, token in vocab.items()},
        "merges": [merge for merge in model["merges"] if stays(merge)],
        "unk_token": hidden.get(vocab.get(unknown), unknown),
        "dropout": None,
    }
