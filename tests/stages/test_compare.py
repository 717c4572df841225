"""`arra compare` on what lies on disk: any way to name a card, a table, a page, JSON, and refusals of one line."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from arra.cli import app
from arra.errors import ArraError
from arra.evaluate.card import ASKED, Card, Evaluation, measure_row, row_values
from arra.evaluate.measured import Measured
from arra.stages.compare import compare_places, comparison_table, open_evaluation


def evaluation(name: str, *, shift: float) -> Evaluation:
    values = np.random.default_rng(0).normal(20 + shift, 1, size=100)
    one = Measured(value=float(values.mean()), per_picture=values)
    row = measure_row(one, metric="fid", space="inception", split="test", num_resamples=20)
    card = Card(run=name, protocol={"reference_sha256": "abc"}, results=(row,), about={ASKED: "x", "cfg_scale": shift})
    return Evaluation(card=card, values=row_values(row, one))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, shift in (("a", 0.0), ("b", -1.0)):
        evaluation(name, shift=shift).save(tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def test_folders_and_card_files_are_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare_places(folders[0], folders[1] / "metrics.json", out=tmp_path / "pages")
    assert found.page == tmp_path / "pages" / "comparison.html"
    assert "B is better in 1 and worse in 0" in found.page.read_text(encoding="utf-8")
    assert compare_places(*folders, out=tmp_path / "x.html").page == tmp_path / "x.html"
    assert compare_places(*folders).page is None
    content = json.loads(found.to_json())
    assert (content["baseline"], content["candidate"]) == ("a", "b")
    assert content["differences"][0]["difference"] == pytest.approx(-1)
    assert 0 < content["differences"][0]["p"] < 0.001


def test_the_table_says_it_all_in_80_columns(folders: tuple[Path, Path]) -> None:
    written = io.StringIO()
    console = Console(width=80, file=written)
    console.print(comparison_table(compare_places(*folders)))
    text = written.getvalue()
    for words in ("FID", "inception, test", "−1.00", "better", "cfg scale: 0 (A), -1 (B)", "biased upwards", "A: a"):
        assert words in text, words
    assert max(map(len, text.splitlines())) <= 80


def test_what_is_no_card_or_of_another_protocol_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ArraError, match=r"notes\.txt: not a card; expected a folder that arra evaluate wrote"):
        open_evaluation(tmp_path / "notes.txt")
    with pytest.raises(ArraError, match=r"metrics\.json: missing; run `arra evaluate"):
        compare_places(folders[0], tmp_path / "nowhere")
    other = evaluation("c", shift=0.0)
    moved = dataclasses.replace(other, card=dataclasses.replace(other.card, protocol={"reference_sha256": "def"}))
    moved.save(tmp_path / "c")
    with pytest.raises(ArraError, match=r"reference_sha256 \('abc' and 'def'\)"):
        compare_places(folders[0], tmp_path / "c")


def test_the_command_prints_a_table_or_json(folders: tuple[Path, Path], tmp_path: Path) -> None:
    runner = CliRunner()
    places = [str(folder) for folder in folders]
    shown = runner.invoke(app, ["compare", *places, "--out", str(tmp_path / "page.html")])
    assert (shown.exit_code, "B is better in 1" in shown.stdout) == (0, True)
    assert (tmp_path / "page.html").is_file()
    told = runner.invoke(app, ["compare", *places, "--json", "--out", str(tmp_path / "page.html")])
    assert json.loads(told.stdout)["differences"][0]["metric"] == "fid"
