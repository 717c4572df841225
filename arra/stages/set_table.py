"""The card of a set of pictures in the terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from arra.evaluate.card import Evaluation, warnings_of
from arra.report.card_page import NOT_MEASURED, grouped_lines, interval_text, mark_lines, measure_name, value_text


def set_table(evaluation: Evaluation) -> RenderableType:
    """Warnings, numbers with intervals by space, marks, and what was not measured, 80 columns wide."""
    card = evaluation.card
    count = max((row.num_images for row in card.results), default=0)
    title = Text(f"{card.run}, {count:,} pictures", style="italic")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "value", "95 % interval"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    last = None
    for row in card.results:
        if row.space != last:
            table.add_row(Text(row.space or "", style="bold"))
            last = row.space
        interval = interval_text(row.low, row.high, unit=row.unit, scale=abs(row.value))
        table.add_row(measure_name(row.metric), value_text(row.value, unit=row.unit), interval)
    told: list[RenderableType] = [Text(f"! {line}", style="yellow") for line in warnings_of(card)]
    marked = [(f"{row.metric} in {row.space}", row.marks) for row in card.results]
    below = [Text(line, style="dim") for line in mark_lines(marked)]
    missing = grouped_lines(card.about.get(NOT_MEASURED) or {})
    return Group(*told, title, table, *below, *(Text(f"not measured: {line}", style="dim") for line in missing))
