"""The card of a set of pictures in the terminal."""

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from arra.evaluate.card import Evaluation, warnings_of
from arra.report.card_page import measure_name, value_text


def set_table(evaluation: Evaluation) -> RenderableType:
    """Warnings, numbers with intervals by space, and what was not measured, 80 columns wide."""
    card = evaluation.card
    count = max((row.num_images for row in card.results), default=0)
    table = Table(title=escape(f"{card.run}, {count:,} pictures"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("", "value", "95 % interval"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    table.add_column("")
    last = None
    for row in card.results:
        if row.space != last:
            table.add_row(Text(f"{row.space}, {row.num_images:,} pictures", style="bold"))
            last = row.space
        interval = ""
        if row.low is not None and row.high is not None:
            interval = f"{value_text(row.low, unit=row.unit)} to {value_text(row.high, unit=row.unit)}"
        marks = "; ".join(row.marks)
        table.add_row(
            measure_name(row.metric), value_text(row.value, unit=row.unit), interval, Text(marks, style="dim")
        )
    told: list[RenderableType] = [Text(f"! {line}", style="yellow") for line in warnings_of(card)]
    missing = card.about.get("not_measured") or {}
    below = [Text(f"not measured: {name}: {why}", style="dim") for name, why in missing.items()]
    return Group(*told, table, *below)
