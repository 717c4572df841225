"""What our rows reached, held against what a paper says they reach.

Place in the pipeline: `arra reproduce` hands over evaluation cards (`arra.evaluate.lab` has the statistics of rows and
seeds); `arra.report` prints what comes back.

    Reached of every row --table_rows--> RowResult of cells, each a measure beside the paper's column --tally--> counts

A paper's table makes two statements for a row: a number, and a difference to another row. The number is comparable
only where data, encoders, pictures and protocol are the paper's; the difference may be looked for anywhere. A paper
prints single numbers, without what other seeds and other pictures would have given. So its number is held against the
interval of one more run, which is wider than that of our mean; of its differences the direction alone is looked for,
and some of them may be noise: that ours is unclear is then what one should expect.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from arra.errors import ArraError
from arra.evaluate.card import METRICS, NEEDS_EQUAL_NUMBERS, PIXELS, Evaluation
from arra.evaluate.compare import holm, require_same_protocol
from arra.evaluate.distances import LEVEL
from arra.evaluate.lab import Estimate, Measure, Resampled, RowEstimate, half_width, measure_tables
from arra.evaluate.paper import TableRow
from arra.evaluate.protocols import PROTOCOLS, Protocol
from arra.evaluate.spread import SeedSpread

Scale = Literal["embedded", "full"]
Statement = Literal["number", "effect"]
Verdict = Literal["reproduced", "not reproduced", "unclear", "not comparable"]
"""reproduced: the paper's number lies where one more run of ours would, or our difference is clear and has the paper's
sign. not reproduced: it lies outside; or our difference is clear and has the other sign. unclear: there is too little
of ours to say, as with one seed, or our difference is not clear. not comparable: `why` says what is different."""
VERDICTS: tuple[Verdict, ...] = ("reproduced", "not reproduced", "unclear", "not comparable")

STAND_INS: Mapping[Scale, Mapping[str, tuple[str, ...]]] = {
    "embedded": {
        "fid": ("caption_frechet", "frechet"),
        "fd": ("caption_frechet", "frechet"),
        "clip_score": ("caption_retrieval_at_10", "accuracy.all"),
    },
    "full": {
        "fid": ("fid", "fd", "kid_x1000"),
        "fd": ("fd", "fid", "kid_x1000"),
        "clip_score": ("clip_score",),
        "ms_ssim": ("ms_ssim",),
        "inception_score": ("inception_score",),
    },
}
"""By the paper's column: what of ours is it or stands for it, the one that speaks for it first. Embedded data have no
space of the paper's; their first measures are of the caption judge, which has nothing of the teacher, and the caption
that `accuracy.all` reads back from pixels needs no judge. At full scale a distance in another network's space, and the
unbiased one beside it, are looked at for the difference. Nothing small stands for MS-SSIM or the Inception Score."""


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
    """Ours to the same row, paired by seed and picture; None where the row is held against none, or cannot be."""
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
    """Of all our measures, those of the paper's columns first; empty for external rows and for rows that are not
    trained yet."""
    seeds: tuple[int, ...]
    steps: int | None
    train_seconds: float | None
    """Mean over seeds."""
    teacher_seconds: float | None
    """What its teachers' pass over the training pictures took, where the store says so."""
    missing: str | None = None
    """Why there is nothing of ours, where there is not."""

    def speaking(self, column: str) -> Cell | None:
        """The cell that speaks for a column of the paper: the paper's own measure, else the first that stands for it,
        in the first split and at the first guidance that the recipe evaluates; None where nothing does.
        """
        return next((cell for cell in self.cells if cell.column == column), None)


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """One table of the paper, and ours."""

    recipe: str
    """Name of the recipe, as commands take it."""
    title: str
    about: str
    scale: Scale
    columns: Mapping[str, str]
    """The paper's headings by column."""
    notes: tuple[str, ...]
    rows: tuple[RowResult, ...]


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What is known of a row when its table is judged."""

    facts: TableRow
    evaluations: Mapping[int, Evaluation] = field(default_factory=dict)
    """By training seed."""
    validation: Mapping[int, float] = field(default_factory=dict)
    """Next-token loss on the validation split after training, by training seed, nats a token."""
    spread: SeedSpread | None = None
    """Over the seeds of all rows that are trained like this one but for what tables vary; None takes the row's own."""
    not_comparable: Mapping[str, str] = field(default_factory=dict)
    """By column why the paper's number is not for this row, in a few words: other data, another encoder."""
    steps: int | None = None
    train_seconds: float | None = None
    teacher_seconds: float | None = None
    missing: str | None = None
    """Why there is nothing of ours, where there is not."""


def table_rows(
    reached: Mapping[str, Reached],
    *,
    columns: Mapping[str, str],
    scale: Scale,
    judge_is_related: bool,
    resampled: Resampled,
    level: float = LEVEL,
) -> tuple[RowResult, ...]:
    """The rows of a table in their order, judged; those that others are held against must be among them.

    `columns` are the table's headings by measure of the paper. `judge_is_related` says that the first judge of runs'
    cards is of a teacher's family. One `resampled` for all tables works out every run once.

    Differences are corrected (Holm) for all rows of the table that are held against another in a measure, whatever
    row that is: a table is read as a whole, and whoever looks for the clear ones in it has looked at all of them.

    Raises: ArraError when the seeds of one row were evaluated differently, or values do not give a card's numbers.
    """
    apart = {name: _why_apart(name, reached) for name in reached}
    measured = {
        name: _measured(name, reached, apart[name] is None, judge_is_related, resampled, level)
        for name, row in reached.items()
        if row.evaluations
    }
    corrected = _corrected(measured)
    results = []
    for name, row in reached.items():
        judge = _RowJudge(name, reached, columns=columns, scale=scale, apart=apart[name], level=level)
        cells = [
            judge.cell(measure, own, corrected.get((name, _key(measure)))) for measure, own in measured.get(name, ())
        ]
        results.append(
            RowResult(
                name=name,
                label=row.facts.label or name,
                group=row.facts.group,
                against=row.facts.against,
                external=row.facts.external,
                note=row.facts.note,
                expect=row.facts.expect,
                cells=tuple(sorted(cells, key=judge.rank)),
                seeds=tuple(row.evaluations),
                steps=row.steps,
                train_seconds=row.train_seconds,
                teacher_seconds=row.teacher_seconds,
                missing=row.missing,
            )
        )
    return tuple(results)


def tally(tables: Iterable[TableResult]) -> dict[Statement, dict[Verdict, int]]:
    """How many of the paper's numbers and differences came to which verdict, each told once by the cell that speaks.

    What nothing of ours stands for is not comparable; rows of other systems and rows without results are left out. A
    row that stands in several tables counts in each.
    """
    counts: dict[Statement, dict[Verdict, int]] = {
        "number": dict.fromkeys(VERDICTS, 0),
        "effect": dict.fromkeys(VERDICTS, 0),
    }
    for table in tables:
        expected = {row.name: row.expect for row in table.rows}
        for row in table.rows:
            if not row.cells:
                continue
            others = expected[row.against] if row.against is not None else {}
            for column in row.expect:
                cell = row.speaking(column)
                stated: dict[Statement, Judged | None] = {"number": cell.number if cell else None}
                if column in others:
                    stated["effect"] = cell.effect if cell else None
                for statement, judged in stated.items():
                    counts[statement][judged.verdict if judged else "not comparable"] += 1
    return counts


# Estimates


class _Key(NamedTuple):
    """What makes measures of rows on different data the same one."""

    metric: str
    split: str
    cfg_scale: float | None
    reference: str | None
    network: str | None


def _key(measure: Measure) -> _Key:
    return _Key(measure.metric, measure.split, measure.cfg_scale, measure.reference, measure.network)


def _why_apart(name: str, reached: Mapping[str, Reached]) -> str | None:
    """Why our row cannot be held against the one that the paper's is; None where it can, or where there is none."""
    row = reached[name]
    if row.facts.against is None or not row.evaluations:
        return None
    other = reached[row.facts.against]
    label = other.facts.label or row.facts.against
    if other.facts.external:
        return f"{label} is another system's"
    if not other.evaluations:
        return f"{label}: {other.missing or 'not evaluated'}"
    try:
        require_same_protocol(next(iter(other.evaluations.values())), next(iter(row.evaluations.values())))
    except ArraError as error:
        return str(error)
    return None


def _measured(
    name: str,
    reached: Mapping[str, Reached],
    is_compared: bool,
    judge_is_related: bool,
    resampled: Resampled,
    level: float,
) -> list[tuple[Measure, RowEstimate]]:
    """Every measure of a row, with its difference to the row that it is held against."""
    against = reached[name].facts.against
    names = [against, name] if against is not None and is_compared else [name]
    tables = measure_tables(
        {each: reached[each].evaluations for each in names},
        judge_is_related=judge_is_related,
        validation={each: reached[each].validation for each in names if reached[each].validation},
        resampled=resampled,
        level=level,
        spread=reached[name].spread,
    )
    return [(table.measure, row) for table in tables for row in table.rows if row.row == name]


def _corrected(measured: Mapping[str, list[tuple[Measure, RowEstimate]]]) -> dict[tuple[str, _Key], float]:
    """p-values by row and measure, corrected for the rows in that measure."""
    told: dict[_Key, dict[str, float]] = {}
    for name, found in measured.items():
        for measure, own in found:
            if own.p is not None:
                told.setdefault(_key(measure), {})[name] = own.p
    return {
        (name, key): p
        for key, by_row in told.items()
        for name, p in zip(by_row, holm(list(by_row.values())), strict=True)
    }


# Verdicts


class _RowJudge:
    """Of one row: which of its measures stand for what of the paper, and what came of it."""

    def __init__(
        self,
        name: str,
        reached: Mapping[str, Reached],
        *,
        columns: Mapping[str, str],
        scale: Scale,
        apart: str | None,
        level: float,
    ) -> None:
        self.row, self.scale, self.apart, self.level = reached[name], scale, apart, level
        facts = self.row.facts
        # A table of several data sets may have a column for each under one heading: the row's own come first.
        self.columns = sorted(columns, key=lambda column: column not in facts.expect)
        self.others = {} if facts.against is None else reached[facts.against].facts.expect
        card = next((each.card for each in self.row.evaluations.values()), None)
        self.protocol: Protocol | None = None if card is None else PROTOCOLS.get(str(card.protocol.get("protocol")))

    def cell(self, measure: Measure, own: RowEstimate, p: float | None) -> Cell:
        """A measure of the row beside the paper's column."""
        column = self._column_of(measure)
        paper = None if column is None else self.row.facts.expect.get(column)
        against = None if column is None else self.others.get(column)
        number = effect = difference = None
        if column is not None and paper is not None:
            number = self._number(column, paper, measure, own)
            if against is not None:
                difference = paper - against
                effect = self._effect(column, difference, measure, own, p)
        return Cell(
            column=column,
            measure=measure,
            paper=paper,
            paper_difference=difference,
            ours=own.mean,
            difference=own.difference,
            p_corrected=p,
            number=number,
            effect=effect,
        )

    def rank(self, cell: Cell) -> tuple[int, bool, int]:
        """Where a cell stands among the row's: what speaks for a column first, then as the card has them."""
        if cell.column is None:
            return len(self.columns), False, 0
        stand_ins = STAND_INS[self.scale][cell.column]
        is_other = cell.measure.network != self._network(cell.column)
        return self.columns.index(cell.column), is_other, stand_ins.index(cell.measure.metric)

    def _column_of(self, measure: Measure) -> str | None:
        asked = STAND_INS[self.scale]
        return next((column for column in self.columns if measure.metric in asked.get(column, ())), None)

    def _network(self, column: str) -> str | None:
        """In whose vectors the paper has its column, as the protocol says it; None where it does not.

        A protocol that is of no paper has none in it: then all of its measures are meant.
        """
        measures = () if self.protocol is None else self.protocol.measures
        of_paper = any(each.in_paper for each in measures)
        found = (each.space or PIXELS for each in measures if each.metric == column and each.in_paper == of_paper)
        return next(found, None)

    def _number(self, column: str, paper: float, measure: Measure, own: RowEstimate) -> Judged:
        if why := self._why_other(column, measure):
            return Judged(verdict="not comparable", why=why)
        ours, num_seeds = own.mean, len(own.per_seed)
        if ours.seed_error is None:
            return Judged(verdict="unclear", why="one seed: what others would give is not known")
        # One more run differs from our mean by its own seed and by ours, and by its pictures and ours.
        half = half_width(
            level=self.level,
            seed_error=ours.seed_error * math.sqrt(num_seeds + 1),
            degrees=ours.degrees,
            picture_error=None if ours.picture_error is None else ours.picture_error * math.sqrt(2),
        )
        low, high = ours.value - half, ours.value + half
        told = f"[{low:.4g}, {high:.4g}]"
        if not low <= paper <= high:
            side = "below" if paper < low else "above"
            return Judged(
                verdict="not reproduced", why=f"{paper:g} is {side} {told}, where one more run of ours would lie"
            )
        if low <= 0:  # the paper's numbers are far above zero, so this holds whatever they are
            return Judged(verdict="unclear", why=f"{num_seeds} seeds: one more run of ours may lie anywhere in {told}")
        return Judged(verdict="reproduced", why=f"{paper:g} lies in {told}, as one more run of ours would")

    def _why_other(self, column: str, measure: Measure) -> str | None:
        """Why the paper's number is of something else than ours; None where it is of the same."""
        if self.scale == "embedded":
            return "embedded data and a small model"
        if why := self.row.not_comparable.get(column):
            return why
        network = self._network(column)
        if network is None:
            return f"not measured by a protocol that has {column}"
        if measure.metric != column or measure.network != network:
            return f"{measure.metric} in {measure.network}, where the paper has {column} in {network}"
        assert self.protocol is not None
        count = self.protocol.num_images
        if column in NEEDS_EQUAL_NUMBERS and count is not None and measure.num_images != count:
            return f"{measure.num_images:,} pictures, the paper's are {count:,}, and {column} depends on their number"
        return None

    def _effect(
        self, column: str, paper_difference: float, measure: Measure, own: RowEstimate, p: float | None
    ) -> Judged:
        """What our difference says of the paper's direction; each measure has its own, of quality."""
        if paper_difference == 0:
            return Judged(verdict="not comparable", why="the paper has no difference here")
        if self.apart is not None or own.difference is None:
            return Judged(verdict="not comparable", why=self.apart or "no training seed in common")
        if p is None:
            return Judged(verdict="unclear", why="one seed of both: what others would give is not known")
        told = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        if p > 1 - self.level:
            return Judged(verdict="unclear", why=f"no clear difference ({told})")
        is_better = _improves(own.difference.value, measure.better)
        papers = _improves(paper_difference, METRICS[column][0])
        word = "better" if is_better else "worse"
        if is_better == papers:
            return Judged(verdict="reproduced", why=f"{word}, as in the paper ({told})")
        return Judged(
            verdict="not reproduced", why=f"{word}, where the paper's is {'better' if papers else 'worse'} ({told})"
        )


def _improves(difference: float, better: str) -> bool:
    return (difference < 0) == (better == "lower")
