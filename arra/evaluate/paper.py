"""What a paper's table says of the rows of a recipe, as the recipe's file has it beside the settings.

Place in the pipeline: `arra.config` reads it with the rows, `arra reproduce` trains them and holds what they reach
against it (`arra.evaluate.verdicts`). Nothing here changes a training.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, FiniteFloat, field_validator, model_validator

from arra.errors import ArraError
from arra.evaluate.card import METRICS
from arra.evaluate.protocols import find_protocol
from arra.settings import Settings


def _known(protocol: str) -> str:
    try:
        find_protocol(protocol)
    except ArraError as error:
        raise ValueError(str(error)) from None
    return protocol


ProtocolName = Annotated[str, AfterValidator(_known)]


class TableSection(Settings):
    """A paper's table: `table:` in a recipe's file."""

    title: str
    """As the paper numbers it: "Table 1", "Appendix, table 3"."""
    about: str
    """The paper's caption, or what the rows ask."""
    columns: dict[str, str] = Field(min_length=1)
    """The paper's headings by the measures of `protocol` (`fd`, `fid`, `inception_score`, `ms_ssim`, `clip_score`)."""
    protocol: ProtocolName
    """Of `arra list protocols`: how rows are measured at `--scale full`, where they do not name another one."""
    embedded: str = "embedded"
    """Recipe whose rows stand in at `--scale embedded`."""
    notes: tuple[str, ...] = ()
    """Where the paper contradicts itself, or does not say what must be known; told beside the table."""
    source: str | None = None
    """Who published it, where that is not the ARRA paper."""

    @field_validator("columns")
    @classmethod
    def _of_measures(cls, columns: dict[str, str]) -> dict[str, str]:
        for column in columns:
            if column not in METRICS:
                raise ValueError(f"'{column}' is no measure; known are {', '.join(METRICS)}")
        return columns


class TableRow(Settings):
    """What the table has for a row: keys of a row beside the settings that it changes."""

    label: str | None = None
    """As the table calls the row; null: the row's name."""
    group: str | None = None
    """Part of the table that the row stands in, where it has several."""
    expect: dict[str, FiniteFloat] = {}
    """The paper's numbers, by measure."""
    against: str | None = None
    """Row that this one is held against: the paper's claim is the difference; null for rows without a claim."""
    protocol: ProtocolName | None = None
    """In place of the table's."""
    external: bool = False
    """Another system's row: its numbers are told, nothing is trained."""
    note: str | None = None
    """What a reader of the row must know."""
    embedded: dict[str, Any] = {}
    """`row`: the row of the table's `embedded` recipe that stands in; all else changes its settings. The row's own
    `align` is carried over unasked, but for `layer`, `encoder` and `components`, which are of another model there."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TableRow":
        if not isinstance(self.embedded.get("row", ""), str):
            raise ValueError(f"embedded.row: expected the name of a row, found {self.embedded['row']!r}")
        if self.external and (self.embedded or self.against):
            raise ValueError("external: of another system's row nothing is trained; leave out embedded and against")
        return self
