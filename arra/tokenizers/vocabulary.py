"""From the names of tokens to a layout: which ids of a language model are codes, sides, rows, beginning and end.

A code's id is read off its token's name, never computed, so a vocabulary in any order is right. Chameleon's family
has its names already: code 8191 is `IMGIMGIBJBZ` (letters A..J are digits), other signs are `<reservedNNNNN>`. Models
that `arra init` extends get names of ours.

Source: facebookresearch/chameleon `chameleon/inference/vocab.py` (names of codes); Lumina-mGPT
`lumina_mgpt/data/item_processor.py` (which reserved token means what).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from arra.data.layout import ImageLayout
from arra.errors import ArraError

BOS, SEPARATOR = "<s>", "<reserved08706>"
BEGIN, END, NEW_LINE = "<racm3:break>", "<eoss>", "<reserved08799>"
REP = "<reserved08795>"
"""What ARRA's released code has for its REP token, in lines that are commented out."""
FIRST_SIZE = 8800
"""`<reserved08800>` plus n is the token of a side of n times 32 pixels."""
LUMINA_TEMPLATE = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
"""What Lumina-mGPT was trained on; ARRA's own runs took the bare prompt."""

IMAGE_START, IMAGE_END, IMAGE_ROW, IMAGE_REP = "<|image_start|>", "<|image_end|>", "<|image_row|>", "<|image_rep|>"

_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")
_CHAMELEON_CODE = re.compile("IMGIMG([A-J]+)Z")
_CODE = re.compile(r"<\|image_code_(\d+)\|>", re.ASCII)
_SIDE = re.compile(r"<\|image_side_(\d+)\|>", re.ASCII)
_SPECIAL = re.compile(
    r"<reserved\d{5}>|<racm3:break>|<eoss>|IMGIMG[A-J]+Z|<s>|</s>|<pad>|<unk>|<image>"
    r"|<\|image_(?:start|end|row|rep|side_\d+|code_\d+)\|>",
    re.ASCII,
)


def chameleon_code_name(code: int) -> str:
    """The token of a code in the vocabulary of Chameleon."""
    return f"IMGIMG{str(code).translate(_LETTERS)}Z"


def code_name(code: int) -> str:
    """The token of a code in a vocabulary that `arra init` extended."""
    return f"<|image_code_{code}|>"


def side_name(steps: int) -> str:
    """The token of a side of so many steps in a vocabulary that `arra init` extended."""
    return f"<|image_side_{steps}|>"


def generic_names(num_codes: int, *, num_sizes: int = 0, rows: bool = True, rep_token: bool = False) -> list[str]:
    """The tokens that a language model needs to write images, in the order of their ids; codes come last."""
    marks = [IMAGE_START, IMAGE_END, *([IMAGE_ROW] if rows else []), *([IMAGE_REP] if rep_token else [])]
    sides = [side_name(steps) for steps in range(1, num_sizes + 1)]
    return [*marks, *sides, *(code_name(code) for code in range(num_codes))]


def is_special_name(name: str) -> bool:
    """Whether a vocabulary's entry is a sign of a model and no text, by the names that are known here."""
    return _SPECIAL.fullmatch(name) is not None


def lumina_layout(
    vocabulary: Mapping[str, int],
    *,
    num_codes: int = 8192,
    template: str = "{prompt}",
    max_positions: int | None = None,
    source: str = "vocabulary",
) -> ImageLayout:
    """The layout of Lumina-mGPT, with which ARRA trained Chameleon too: sides, rows, the separator after both turns.

    Raises:
        ArraError: a name is missing, or names and ids do not fit each other.
    """
    first_size, num_sizes = _sides(_reserved_sides(vocabulary), source=source)
    return _layout(
        source,
        family="lumina",
        new_line=_id(vocabulary, NEW_LINE, source=source),
        first_size=first_size,
        size_step=2,
        num_sizes=num_sizes,
        closing=(_id(vocabulary, SEPARATOR, source=source),),
        template=template,
        max_positions=max_positions,
        **_chameleons(vocabulary, num_codes, source=source),
    )


def chameleon_layout(
    vocabulary: Mapping[str, int],
    *,
    num_codes: int = 8192,
    template: str = "{prompt}",
    max_positions: int | None = None,
    source: str = "vocabulary",
) -> ImageLayout:
    """Meta's own layout of Chameleon: one size of image, so neither sides nor rows are written.

    Raises:
        ArraError: as `lumina_layout`.
    """
    return _layout(
        source,
        family="chameleon",
        template=template,
        max_positions=max_positions,
        **_chameleons(vocabulary, num_codes, source=source),
    )


def _chameleons(vocabulary: Mapping[str, int], num_codes: int, *, source: str) -> dict[str, Any]:
    """What both of its layouts have; REP is known and not written."""
    names = {"bos": BOS, "separator": SEPARATOR, "begin_image": BEGIN, "end_image": END}
    marks = {field: _id(vocabulary, name, source=source) for field, name in names.items()}
    return marks | {"rep_id": vocabulary.get(REP)} | _codes(vocabulary, _CHAMELEON_CODE, num_codes, source=source)


def generic_layout(
    vocabulary: Mapping[str, int],
    *,
    num_codes: int,
    bos: int | None = None,
    closing: tuple[int, ...] = (),
    size_step: int = 1,
    template: str = "{prompt}",
    pixels_per_code: int = 16,
    max_positions: int | None = None,
    source: str = "vocabulary",
) -> ImageLayout:
    """The layout of a language model whose vocabulary has the tokens of `generic_names`: rows and sides where it has,
    REP known where it has it, and not written.

    `bos` and `closing` are ids of the model's own. Guidance and condition dropout see an empty prompt.

    Raises:
        ArraError: as `lumina_layout`.
    """
    sides = {int(found[1]): token for name, token in vocabulary.items() if (found := _SIDE.fullmatch(name))}
    first_size, num_sizes = _sides(sides, source=source) if sides else (None, 0)
    return _layout(
        source,
        family="generic",
        bos=bos,
        begin_image=_id(vocabulary, IMAGE_START, source=source),
        end_image=_id(vocabulary, IMAGE_END, source=source),
        new_line=_id(vocabulary, IMAGE_ROW, source=source) if IMAGE_ROW in vocabulary else None,
        first_size=first_size,
        size_step=size_step if sides else 1,
        num_sizes=num_sizes,
        closing=closing,
        rep_id=vocabulary.get(IMAGE_REP),
        template=template,
        pixels_per_code=pixels_per_code,
        unconditional="empty_prompt",
        max_positions=max_positions,
        **_codes(vocabulary, _CODE, num_codes, source=source),
    )


def read_vocabulary(path: str | Path) -> dict[str, int]:
    """Names and ids of all tokens, from a tokenizer's JSON (`tokenizer.json`, `text_tokenizer.json`) or from the
    `vocabulary_map` of a Hugging Face `config.json`.

    Raises:
        ArraError: the file cannot be read, holds no vocabulary, or gives one name two ids.
    """
    content = read_json(path)
    found = content.get("vocabulary_map")
    if found is None:
        model = content.get("model")
        found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list):  # Unigram: [name, score], the place is the id
        found = {str(entry[0]): token for token, entry in enumerate(found) if isinstance(entry, list) and entry}
    if not isinstance(found, dict) or not found:
        raise ArraError(f"{path}: no vocabulary; expected a tokenizer's JSON or a config.json with vocabulary_map")
    vocabulary = dict(found)
    added = content.get("added_tokens") or []
    for entry in added if isinstance(added, list) else [added]:
        name, token = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or vocabulary.setdefault(name, token) != token:
            raise ArraError(f"{path}: added token {str(entry)[:80]} contradicts the vocabulary; fetch the file again")
    for name, token in vocabulary.items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ArraError(f"{path}: {name[:40]!r} has the id {str(token)[:40]!r}; expected a whole number from 0")
    return vocabulary


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ArraError: no such file, no JSON, no object, or a name that stands twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArraError(f"{path}: cannot be read ({error}); expected a tokenizer.json or config.json") from error
    return json_object(text, source=str(path))


def json_object(text: str, *, source: str) -> dict[str, Any]:
    """The object that a JSON text is.

    Raises:
        ArraError: as `read_json`.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ArraError(f"{source}: not JSON ({' '.join(str(error).split())[:120]}); fetch the file again") from error
    if not isinstance(content, dict):
        raise ArraError(f"{source}: holds a {type(content).__name__}, expected an object; fetch the file again")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:40]!r} stands twice in one object")
    return found


def _layout(source: str, **fields: Any) -> ImageLayout:
    try:
        return ImageLayout(**fields)
    except ValidationError as error:
        faults = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
        raise ArraError(f"{source}: {faults}") from error


def _id(vocabulary: Mapping[str, int], name: str, *, source: str) -> int:
    if name not in vocabulary:
        raise ArraError(f"{source}: no token {name}; expected the vocabulary of a model that paints")
    return vocabulary[name]


def _reserved_sides(vocabulary: Mapping[str, int]) -> dict[int, int]:
    """Side tokens by steps, from the first on to where names end."""
    sides: dict[int, int] = {}
    while (name := f"<reserved{FIRST_SIZE + len(sides) + 1:05d}>") in vocabulary:
        sides[len(sides) + 1] = vocabulary[name]
    return sides


def _sides(sides: Mapping[int, int], *, source: str) -> tuple[int, int]:
    """(the id that a side of no steps would have, number of sides)."""
    if 1 not in sides:
        raise ArraError(f"{source}: no token for a side of 1 step; expected the vocabulary of a model that paints")
    base = sides[1] - 1
    for steps in range(1, len(sides) + 1):
        if sides.get(steps) != base + steps:
            raise ArraError(
                f"{source}: the side of {steps} steps has the id {sides.get(steps)}, expected {base + steps}; "
                "side tokens must stand together, in order"
            )
    return base, len(sides)


def _codes(vocabulary: Mapping[str, int], names: re.Pattern[str], num_codes: int, *, source: str) -> dict[str, Any]:
    """The layout's fields about codes, after a look that names are the codes 0..num_codes-1 and ids differ."""
    order: dict[int, int] = {}
    for name, token in vocabulary.items():
        if found := names.fullmatch(name):
            code = int(found[1].translate(_DIGITS))
            if code in order:
                raise ArraError(f"{source}: two tokens name code {code}; expected each code once")
            order[code] = token
    missing = next((code for code in range(num_codes) if code not in order), None)
    if missing is not None or len(order) != num_codes:
        fault = f"code {missing} has none" if missing is not None else f"code {max(order)} is beyond them"
        raise ArraError(f"{source}: {len(order)} tokens name codes, expected one for each of {num_codes}; {fault}")
    ids = tuple(order[code] for code in range(num_codes))
    if len(set(ids)) < num_codes:
        raise ArraError(f"{source}: two codes have the same id; expected one id for each of {num_codes} codes")
    plain = ids == tuple(range(ids[0], ids[0] + num_codes))
    return {"first_code": min(ids), "num_codes": num_codes, "code_order": None if plain else ids}
