"""What our rows reached, held against what a paper says they reach.

Place in the pipeline: `arra reproduce` fills these from evaluation cards (`arra.evaluate.lab` has the statistics of
rows and seeds); `arra.report` prints them.

A paper's table makes two statements for a row: a number, and a difference to another row. The number is comparable
only where data, encoders, pictures and protocol are the paper's; the difference may be looked for anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from arra.evaluate.lab import Estimate, Measure

Verdict = Literal["reproduced", "not reproduced", "unclear", "not comparable"]
"""reproduced: the paper's number lies in our interval, or our difference is clear and has the paper's sign. not
reproduced: it lies outside; or our difference is clear and has the other sign. unclear: our interval of the difference
holds zero. not comparable: `why` says what is different."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One statement of the paper and what came of it."""

    verdict: Verdict
    why: str
    """A few words, for every verdict."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One of our measures of one row, beside the paper's column that it stands for."""

    column: str | None
    """Measure of the paper that ours is, or stands for; None for one that the paper has not."""
    measure: Measure
    paper: float | None
    """The paper's number of this row."""
    paper_difference: float | None
    """To the row that it is held against, paper's minus paper's."""
    ours: Estimate
    difference: Estimate | None
    """Ours to the same row, paired by seed and picture; None where the row is held against none."""
    p_corrected: float | None
    """Of our difference, after Holm over the rows of the table in this measure."""
    number: Judged | None
    """Of the paper's number; None where the paper has none."""
    effect: Judged | None
    """Of the paper's difference; None where the paper has none."""


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """One row of a table."""

    name: str
    label: str
    group: str | None
    against: str | None
    external: bool
    note: str | None
    expect: Mapping[str, float]
    """The paper's numbers by column, also those that nothing of ours stands for."""
    cells: tuple[Cell, ...]
    """Of all our measures; empty for external rows and for rows that are not trained yet."""
    seeds: tuple[int, ...]
    steps: int | None
    train_seconds: float | None
    """Mean over seeds."""
    teacher_seconds: float | None
    """What its teachers' pass over the training pictures took, where the store says so."""
    missing: str | None = None
    """Why there is nothing of ours, where there is not."""


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """One table of the paper, and ours."""

    recipe: str
    """Name of the recipe, as commands take it."""
    title: str
    about: str
    scale: Literal["embedded", "full"]
    columns: Mapping[str, str]
    """The paper's headings by column."""
    notes: tuple[str, ...]
    rows: tuple[RowResult, ...]
