"""A small table of a paper with ours beside it, for the tests of its page and its exports."""

from typing import Any

import numpy as np

from arra.evaluate.lab import Estimate, Measure
from arra.evaluate.verdicts import Cell, Judged, RowResult, TableResult, Verdict
from arra.report.grids import GridColumn
from arra.report.tables_page import TablePictures, TableRun, TablesPage

EVIL = "<script>alert('x')</script> \"q\" & a|b_c$ 100% \\end{tabular} [x] <img src=https://example.org/x.png>"
EMBEDDED = "embedded data and a small model"


def measure(metric: str, **changes: Any) -> Measure:
    fields: dict[str, Any] = {
        "metric": metric, "split": "composed", "cfg_scale": 1.0, "reference": "reconstructions", "better": "lower",
        "unit": "feature units", "space": "independent", "num_images": 40,
    }  # fmt: skip
    return Measure(**{**fields, **changes})


JUDGED = measure("caption_frechet")
FAMILY = measure("frechet", space="teacher's family")
FAMILY_NOVEL = measure("frechet", space="teacher's family", split="novel")
RETRIEVAL = measure("caption_retrieval_at_10", better="higher", unit="fraction", reference=None)
NLL = measure("nll", unit="nats/token", cfg_scale=None, reference=None, space="no judge")


def estimate(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, seed_error=half / 4, picture_error=None)


def cell(
    of: Measure,
    ours: float,
    *,
    column: str | None = None,
    paper: float | None = None,
    difference: float | None = None,
    effect: tuple[Verdict, str] | None = None,
) -> Cell:
    return Cell(
        column=column,
        measure=of,
        paper=paper,
        paper_difference=None if effect is None else -0.35,
        ours=estimate(ours, 1 / 3),
        difference=None if difference is None else estimate(difference, 0.5),
        p_corrected=None if difference is None else 0.0123,
        number=None if paper is None else Judged(verdict="not comparable", why=EMBEDDED),
        effect=None if effect is None else Judged(verdict=effect[0], why=effect[1]),
    )


def row(name: str, **changes: Any) -> RowResult:
    fields: dict[str, Any] = {
        "name": name, "label": name, "group": None, "against": None, "external": False, "note": None, "expect": {},
        "cells": (), "seeds": (0, 1), "steps": 600, "train_seconds": 125.0, "teacher_seconds": None,
    }  # fmt: skip
    return RowResult(**{**fields, **changes})


def table(**changes: Any) -> TableResult:
    """Two rows of ours in one group, one that is not trained, another system's in a second group."""
    plain = row(
        "plain",
        group="ARRA",
        expect={"fd": 5.2, "ms_ssim": 0.41, "clip_score": 0.43},
        cells=(
            cell(JUDGED, 42.0, column="fd", paper=5.2),
            cell(FAMILY, 60.0, column="fd", paper=5.2),
            cell(FAMILY_NOVEL, 70.0, column="fd", paper=5.2),
            cell(RETRIEVAL, 0.4, column="clip_score", paper=0.43),
            cell(NLL, 1.8),
        ),
    )
    aligned = row(
        "aligned",
        label="<REP>",
        group="ARRA",
        against="plain",
        note="Layer 30 of 32.",
        expect={"fd": 4.85, "ms_ssim": 0.4, "clip_score": 0.4527},
        teacher_seconds=12.0,
        cells=(
            cell(JUDGED, 40.0, column="fd", paper=4.85, difference=-2.0, effect=("reproduced", "better, p = 0.012")),
            cell(FAMILY, 61.0, column="fd", paper=4.85, difference=1.0, effect=("not reproduced", "worse, p = 0.012")),
            cell(FAMILY_NOVEL, 70.1, column="fd", paper=4.85, difference=0.1, effect=("unclear", "no difference")),
            cell(RETRIEVAL, 0.4, column="clip_score", paper=0.4527, difference=0.0, effect=("unclear", "p = 1")),
            cell(NLL, 1.75, difference=-0.05),
        ),
    )
    missing = row(
        "later", group="ARRA", against="plain", expect={"fd": 4.15}, seeds=(), steps=None, train_seconds=None,
        missing="not trained yet",
    )  # fmt: skip
    other = row("other", label=EVIL, group="Others", external=True, expect={"fd": 9.1}, seeds=(), steps=None)
    fields: dict[str, Any] = {
        "recipe": "table1", "title": "Table 1", "about": "What alignment does", "scale": "embedded",
        "columns": {"fd": "FID", "ms_ssim": "MS-SSIM", "clip_score": "CLIP-Score"}, "notes": ("It says so twice.",),
        "rows": (plain, aligned, missing, other),
    }  # fmt: skip
    return TableResult(**{**fields, **changes})


def metrics(seed: int) -> tuple[dict[str, Any], ...]:
    rows: list[dict[str, Any]] = []
    for step in (0, 10, 20, 30):
        rows.append({"kind": "validation", "step": step, "seconds": 2.0 * step + seed, "ntp_loss": 3 - step / 30})
    rows.append({"kind": "quality", "step": 20, "frechet": 60.0 + seed, "kid_x1000": 1.0, "retrieval_at_10": 0.5})
    return tuple(rows)


def page(**changes: Any) -> TablesPage:
    def run(name: str, seed: int) -> TableRun:
        align = "align: null" if name == "plain" else "align: {target: rep, layer: 2}"
        recipe = f"name: {name}\n{align}\ntrain: {{seed: {seed}, steps: 30}}\n"
        seconds = None if name == "plain" else 100.0
        return TableRun(
            table="table1", row=name, seed=seed, metrics=metrics(seed), teacher_seconds=seconds, recipe=recipe
        )

    images = np.zeros((1, 2, 16, 16, 3), dtype=np.uint8)
    fields: dict[str, Any] = {
        "command": "arra reproduce table1", "versions": {"torch": "2.14"}, "tables": (table(),), "seeds": (0, 1),
        "runs": tuple(run(name, seed) for name in ("plain", "aligned") for seed in (0, 1)),
        "pictures": (
            TablePictures(
                table="table1", title="composed", prompts=(EVIL,),
                columns=(GridColumn("tokenizer", images[:, :1]), GridColumn("aligned", images)),
            ),
        ),
        "failures": (), "protocol": {"judge": "lite1"},
    }  # fmt: skip
    return TablesPage(**{**fields, **changes})
