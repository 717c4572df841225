"""`arra plan` of a paper's table: every row, and what all of them take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.plan_machines import parse_machine
from arra.stages.plan_table import plan_table

WRITTEN = """\
base: llamagen_c2i
name: paper
data: {expected_records: 640}
table: {title: Table 0, about: Weights, columns: {fd: FID}, protocol: imagenet-256}
rows:
  none: {align: null, label: None, model: &small {size: null, num_layers: 2, num_heads: 2, hidden_size: 64}}
  aligned: {model: *small, label: Ours, against: none, expect: {fd: 1.0}}
  theirs: {external: true, expect: {fd: 2.0}}
"""


@pytest.fixture
def table(tmp_path: Any) -> str:
    path = tmp_path / "paper.yaml"
    path.write_text(WRITTEN)
    return str(path)


def test_all_rows_that_are_trained(table: str) -> None:
    """300 epochs of 640 pictures are 750 steps of 256; the sum is over rows, devices and seeds."""
    found = plan_table(table, machine=parse_machine("2xl4"), seeds=3)
    assert [row.name for row in found.rows] == ["none", "aligned"]
    assert found.fits
    assert [row.found.steps for row in found.rows] == [750, 750]
    hours = [row.found.hours for row in found.rows]
    assert None not in hours
    assert hours[0] < hours[1]  # type: ignore[operator]  # the projector costs something
    assert found.device_hours == pytest.approx(3 * 2 * sum(hours))  # type: ignore[arg-type]


def test_on_the_screen(table: str, run_arra: Callable[..., Any]) -> None:
    answer = run_arra("plan", table, "--gpu", "2xl4", "--seeds", "2")
    assert answer.code == 0, answer
    assert "Table 0: Weights" in answer.out
    assert "2 rows, 2 seeds: " in answer.out
    assert run_arra("plan", table, "--gpu", "1x1").code == 1


def test_one_store_is_of_no_rows_with_other_pictures(table: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    other = tmp_path / "other.yaml"
    other.write_text(WRITTEN.replace("aligned: {", "aligned: {data: {path: elsewhere}, "))
    with pytest.raises(ArraError, match=r"^--store .*store: rows of .*other.yaml have different pictures; name one"):
        plan_table(str(other), machine=parse_machine("2xl4"), store=store)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--probe"], "--probe: is of one training; name a row of the table with --row"),
        (["--scale", "huge"], "--scale huge: expected full or embedded"),
        (["--row", "none", "--scale", "full"], "--scale: is of the rows of a table"),
        (["--row", "none", "--seeds", "2"], "--seeds: is of the rows of a table; leave it out"),
        (["--row", "theirs"], "{table}: row 'theirs' is another system's"),
    ],
)
def test_what_is_not_of_a_table(table: str, arguments: list[str], told: str, run_arra: Callable[..., Any]) -> None:
    answer = run_arra("plan", table, "--gpu", "2xl4", *arguments)
    assert answer.code == 2
    assert answer.error.startswith(told.format(table=table))
