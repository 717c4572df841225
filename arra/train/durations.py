"""Durations of training: steps, or text that becomes steps once it is known how many pictures a training has.

"300 epochs", "10_000_000 images", "3 percent" or "3%" (of the whole training), "500 steps"; an epoch is every training
picture once. Recipes hold what was written; `resolved` settings, which the training reads, hold steps alone.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic_core import CoreSchema, core_schema

S = TypeVar("S", bound=BaseModel)

WRITTEN = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?) ?(steps?|images?|epochs?|percent|%)")
EXAMPLES = ("300 epochs", "10_000_000 images", "3 percent")


@dataclass(frozen=True)
class Written:
    """Mark of a field that holds a duration: what it takes, for pydantic and for the schema."""

    least: int
    """Steps, as a number."""
    whole: bool = False
    """Whether it is the length of the whole training, which cannot be a part of itself."""

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> CoreSchema:
        """One validator for both forms, so that a mistake is one error and not one for each form."""
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, schema: object, handler: object) -> dict[str, Any]:
        """What editors are told."""
        text = {"type": "string", "pattern": f"^(?:{WRITTEN.pattern})$", "examples": list(self._examples)}
        return {"anyOf": [{"type": "integer", "minimum": self.least}, text]}

    @property
    def _examples(self) -> tuple[str, ...]:
        return EXAMPLES[:-1] if self.whole else EXAMPLES

    def read(self, value: object) -> int | str:
        """Steps, or the text as it is.

        Raises:
            ValueError: it is neither, or too little.
        """
        like = f"'{self._examples[0]}' or '{self._examples[-1]}'"
        if isinstance(value, str):
            found = WRITTEN.fullmatch(value)
            if found is None:
                raise ValueError(f"'{value[:60]}' is no duration; write steps as a number, or as in {like}")
            if self.least and not _number(found):
                raise ValueError(f"'{value}' is no time at all; expected more than 0")
            if _unit(found) == "percent" and _number(found) > 100:
                raise ValueError(f"'{value}' is more than the whole training; expected at most 100 percent")
            if self.whole and _unit(found) == "percent":
                raise ValueError(
                    f"'{value}' is a part of the whole training and cannot say how long that is; write it as in {like}"
                )
            return value
        number = int(value) if isinstance(value, float) and value.is_integer() else value  # YAML's 1e6
        if not isinstance(number, int) or isinstance(number, bool) or number < self.least:
            shown = json.dumps(value, default=str)[:60]  # null, true, as recipes have it
            raise ValueError(f"expected steps (an integer >= {self.least}) or text as in {like}, found {shown}")
        return number


if TYPE_CHECKING:  # whoever computes with them has resolved settings
    Duration = int
    Interval = int
    Length = int
else:
    Duration = Annotated[int | str, Written(least=0)]
    """Steps, 0 or more."""
    Interval = Annotated[int | str, Written(least=1)]
    """Steps, 1 or more."""
    Length = Annotated[int | str, Written(least=1, whole=True)]
    """Steps of the whole training, 1 or more."""


def written_durations(settings: BaseModel) -> Iterator[tuple[str, str]]:
    """Name and text of every field that holds a duration and is not in steps yet."""
    for name in _duration_fields(type(settings)):
        value = getattr(settings, name)
        if isinstance(value, str):
            yield name, value


def needs_records(written: str) -> bool:
    """Whether a duration is in epochs."""
    found = WRITTEN.fullmatch(written)
    return found is not None and _unit(found) == "epoch"


def in_steps(settings: S, *, batch_size: int, records: int | None, steps: int | None) -> S:
    """The settings with their durations in steps; `records` and `steps` as in `to_steps`.

    Raises:
        ValueError: as there, with the field's name.
    """
    changes = {}
    for name, written in written_durations(settings):
        try:
            changes[name] = to_steps(written, batch_size=batch_size, records=records, steps=steps)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return settings.model_copy(update=changes) if changes else settings


def to_steps(written: int | str, *, batch_size: int, records: int | None, steps: int | None) -> int:
    """A duration in steps, rounded up; `records` are the pictures of an epoch, `steps` those of the whole training.

    Raises:
        ValueError: it is in epochs or percent, and these are not known.
    """
    if isinstance(written, int):
        return written
    found = WRITTEN.fullmatch(written)
    assert found is not None
    number, unit = _number(found), _unit(found)
    if unit == "epoch":
        if records is None:
            raise ValueError(f"'{written}' needs to know how many pictures there are")
        return math.ceil(number * records / batch_size)
    if unit == "percent":
        if steps is None:
            raise ValueError(f"'{written}' is a part of the whole training, and cannot say how long that is")
        return math.ceil(number * steps / 100)
    return math.ceil(number / batch_size) if unit == "image" else math.ceil(number)


def _number(found: re.Match[str]) -> Fraction:
    """Exact: as floats a tenth of an epoch of 30 pictures is more than 3."""
    return Fraction(found[1].replace("_", ""))


def _unit(found: re.Match[str]) -> str:
    return "percent" if found[2] == "%" else found[2].removesuffix("s")


@lru_cache
def _duration_fields(model: type[BaseModel]) -> tuple[str, ...]:
    def is_marked(annotation: object) -> bool:
        return isinstance(annotation, Written) or any(map(is_marked, get_args(annotation)))

    return tuple(
        name
        for name, field in model.model_fields.items()
        if any(map(is_marked, field.metadata)) or is_marked(field.annotation)
    )
