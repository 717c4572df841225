"""The report: one HTML file that says in plain words what was measured, and works without a network.

Place in the pipeline: the last stage. It reads what the others left (metrics rows, evaluation cards, comparisons,
pictures) and computes every sentence from these numbers; nothing here knows which model is expected to win. Prompts,
file names and recipes are other people's text: the template escapes everything, and the page forbids scripts and loads
by its own policy.

Letters: R prompts, S seeds, H height, W width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from markupsafe import Markup

from arra.errors import ArraError
from arra.evaluate.card import Card, Result
from arra.evaluate.compare import Difference, SeedDifference
from arra.report import grids, plots
from arra.report.bands import BAND_MEANING, SeedRun, band_drawings
from arra.report.comparison_export import comparisons_csv, comparisons_latex, comparisons_markdown
from arra.report.differences import recipe_differences
from arra.report.drawing import draw
from arra.report.measure_words import MEASURES, measure_name
from arra.report.run_page import WATCHED, last_watched
from arra.report.style import ACCENTS, format_seconds, interval_bar, template
from arra.runs import atomic_write

REPORT_FILE, MARKDOWN_FILE, LATEX_FILE, CSV_FILE = "report.html", "report.md", "report.tex", "report.csv"

NOTE_SAME_FAMILY = (
    "The judge whose features the distances and the retrieval use is of one family with the teacher: the same kind of "
    "network, trained on the same photographs. Part of a gain there may be shared taste. NLL and caption gain use no "
    "such network."
)
"""For callers whose judge and teacher are relatives."""

_SPLITS = {
    "composed": "Every word was seen in training, this combination was not.",
    "novel": "The concept itself was not seen in training.",
}
_IN_ORDER = "position, in runs of raster order"
_HEADLINE_METRICS = (
    "caption_gain", "class_gain", "caption_retrieval_at_1", "class_retrieval_at_1", "retrieval_at_10", "frechet",
    "kid_x1000",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Pictures a run made: image [r, s] is of prompt r with seed s."""

    split: str
    cfg_scale: float
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images: UInt8[np.ndarray, "R S H W 3"] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out pictures of prompts, shown beside the samples: passed through the tokenizer, and raw if given."""

    split: str
    prompts: tuple[str, ...]
    reconstructions: UInt8[np.ndarray, "R H W 3"] = field(repr=False)
    raw: UInt8[np.ndarray, "R H2 W2 3"] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What the report shows of a run. Runs of one label (training seeds of one recipe) share a colour."""

    label: str
    rows: Sequence[Mapping[str, Any]] = ()
    """Of metrics.jsonl."""
    card: Card | None = None
    samples: tuple[Samples, ...] = ()
    seed: int = 0
    """Of the training."""
    recipe: str = ""
    """The resolved recipe as text."""
    manifest: Mapping[str, str] = field(default_factory=dict)
    """Hashes, versions, device: anything worth a line."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two labels and what differs between them; with several training seeds `over_seeds` is what the page judges by."""

    baseline: str
    candidate: str
    differences: tuple[Difference, ...]
    over_seeds: tuple[SeedDifference, ...] = ()

    @property
    def judged(self) -> tuple[Difference | SeedDifference, ...]:
        """The rows that verdicts come from."""
        return self.over_seeds or self.differences


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A sentence on the NLL of a split (empty if not measured), and one on each further measure."""

    split: str
    lead: str
    others: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Validation NLL of every label where all of them had spent the same."""

    what: str
    at: str
    values: Mapping[str, float]


def build_report(
    folder: Path,
    *,
    title: str,
    runs: Sequence[RunView],
    comparisons: Sequence[Comparison] = (),
    held_out: Sequence[HeldOut] = (),
    ceiling: Sequence[Result] = (),
    timings: Sequence[tuple[str, float]] = (),
    attribution: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """The path of `folder/report.html`, one file with everything inside.

    With comparisons their tables lie beside it as `report.md`, `report.tex` and `report.csv`. The headline and the
    first table are of the first comparison; further ones (controls) get a table each. `ceiling` defaults to the
    tokenizer rows of the cards; `timings` are (stage, seconds); `attribution` credits the pictures.

    Raises: ArraError when there is no run, when runs show other prompts or seeds, or when the file cannot be written.
    """
    if not runs:
        raise ArraError("a report needs at least one run; name a run folder")
    labels = list(dict.fromkeys(run.label for run in runs))
    colors = {label: ACCENTS[i % len(ACCENTS)] for i, label in enumerate(labels)}
    ceiling = ceiling or _ceiling_of(runs)
    tables = [_comparison_table(one, runs, labels, is_main=i == 0) for i, one in enumerate(comparisons)]
    html = template("page.html.j2").render(
        title=title,
        labels=labels,
        colors=colors,
        headlines=headline(comparisons[0]) if comparisons else [],
        tally=tally(comparisons[0]) if comparisons else "",
        samples=_sample_sections(runs, held_out),
        split_texts=_SPLITS,
        comparisons=tables,
        ceiling=[_ceiling_row(row) for row in ceiling],
        glossary=glossary([one.metric for comparison in comparisons for one in comparison.judged], ceiling),
        drawings=_band_drawings(runs, labels),
        band_notes=_band_notes(runs),
        curves=_curve_images(runs, colors),
        differences=recipe_differences({run.label: run.recipe for run in reversed(runs)}),  # the first of each label
        watched=_watch_images(runs, colors),
        budgets=equal_budgets(runs),
        timings=[(stage, format_seconds(seconds)) for stage, seconds in timings],
        total_time=format_seconds(sum((seconds for _, seconds in timings), start=0.0)),
        runs=runs,
        notes=[*_standard_notes(runs, comparisons), *notes],
        attribution=attribution,
        number=number_text,
    )
    contents = {REPORT_FILE: html}
    if comparisons:
        judged = [(one.baseline, one.candidate, one.judged) for one in comparisons]
        contents[MARKDOWN_FILE] = comparisons_markdown(tables, title=title)
        contents[LATEX_FILE] = comparisons_latex(tables)
        contents[CSV_FILE] = comparisons_csv(judged)
    path = folder / REPORT_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            atomic_write(folder / name, content)
    except OSError as error:
        raise ArraError(f"{path}: cannot write the report ({error}); free space or choose another folder") from error
    return path


def headline(comparison: Comparison) -> list[Headline]:
    """What the numbers say, one `Headline` per split.

    Of the distances and the retrieval it takes the lowest guidance and the reconstructions, where there are any.
    """
    headlines = []
    for split in dict.fromkeys(one.split for one in comparison.judged):
        rows = [one for one in comparison.judged if one.split == split]
        lead = next((_lead(one, comparison) for one in rows if one.metric == "nll"), "")
        others = []
        for metric in _HEADLINE_METRICS:
            found = [one for one in rows if one.metric == metric]
            if found:
                found.sort(key=lambda one: (one.reference not in ("reconstructions", None), one.cfg_scale or 0.0))
                others.append(_short(found[0]))
        if lead or others:
            headlines.append(Headline(split=split, lead=lead, others=tuple(others)))
    return headlines


def tally(comparison: Comparison) -> str:
    """One sentence that counts the verdicts over all measurements."""
    count = {verdict: 0 for verdict in ("better", "worse", "no clear difference")}
    for one in comparison.judged:
        count[one.verdict] += 1
    return (
        f"Of {len(comparison.judged)} measurements the {comparison.candidate} model is better in {count['better']}, "
        f"worse in {count['worse']}, and without a clear difference in {count['no clear difference']}."
    )


def equal_budgets(runs: Sequence[RunView]) -> list[Budget]:
    """Validation NLL of all labels at the last step, and at the last training second, that every run has reached.

    Between two validations the NLL is interpolated over time; runs of one label are averaged. Empty unless at least two
    labels were validated.
    """
    curves = [(run.label, [row for row in run.rows if row.get("kind") == "validation"]) for run in runs]
    curves = [(label, rows) for label, rows in curves if rows]
    if len({label for label, _ in curves}) < 2:
        return []
    budgets = []
    if steps := set.intersection(*({int(row["step"]) for row in rows} for _, rows in curves)):
        step = max(steps)
        at_step = [
            (label, next(float(row["ntp_loss"]) for row in rows if int(row["step"]) == step)) for label, rows in curves
        ]
        budgets.append(Budget(what="Equal steps", at=f"step {step:,}", values=_means(at_step)))
    end = min(float(rows[-1]["seconds"]) for _, rows in curves)
    if end >= max(float(rows[0]["seconds"]) for _, rows in curves):
        at_time = [
            (
                label,
                float(
                    np.interp(end, [float(row["seconds"]) for row in rows], [float(row["ntp_loss"]) for row in rows])
                ),
            )
            for label, rows in curves
        ]
        budgets.append(Budget(what="Equal training time", at=format_seconds(end), values=_means(at_time)))
    return budgets


def _lead(one: Difference | SeedDifference, comparison: Comparison) -> str:
    values = f"{_shown(one.candidate, one)} against {_shown(one.baseline, one)}"
    return (
        f"On {one.split} captions the {comparison.candidate} model's {measure_name(one.metric)} is {values} "
        f"(difference {_shown(one.difference, one)}, {_interval_words(one)}): {one.verdict}."
    )


def _short(one: Difference | SeedDifference) -> str:
    name = f"{measure_name(one.metric)} {_aim(one)}".strip()
    return f"{name}: {_shown(one.candidate, one)} against {_shown(one.baseline, one)}, {one.verdict}."


def _interval_words(one: Difference | SeedDifference) -> str:
    if one.low is None or one.high is None:
        return "one training seed, no interval over seeds"
    over = f" over {len(one.per_seed)} training seeds" if isinstance(one, SeedDifference) else ""
    return f"95 % interval{over} {_range(one.low, one.high, one)}"


def _range(low: float, high: float, one: Difference | SeedDifference) -> str:
    """Both ends, the percent sign said once, with more digits where an end that is not zero would read as zero."""
    scale = max(abs(one.baseline), abs(one.candidate))
    for extra in (0, 1, 2):
        ends = [number_text(end, unit=one.unit, scale=scale, extra=extra) for end in (low, high)]
        if not any(end != 0 and not text.strip("0.% ") for end, text in zip((low, high), ends, strict=True)):
            break
    return f"{ends[0].removesuffix(' %')} to {ends[1]}"


def _aim(one: Difference | SeedDifference | Result) -> str:
    """The reference in words: distances are to it, retrieval is among it."""
    if not one.reference:
        return ""
    return f"among {one.reference}" if "retrieval" in one.metric else f"to {one.reference}"


def _shown(value: float, one: Difference | SeedDifference) -> str:
    return number_text(value, unit=one.unit, scale=max(abs(one.baseline), abs(one.candidate)))


def number_text(value: float, *, unit: str, scale: float | None = None, extra: int = 0) -> str:
    """The number with the digits its unit deserves; shares become percent; `scale` fixes the digits of a table row."""
    if unit == "fraction":
        return _signed(f"{100 * value:.{1 + extra}f}") + " %"
    size = abs(value) if scale is None else scale
    if unit == "dB":
        return _signed(f"{value:.{2 + extra}f}")
    if unit.startswith("nats"):
        return _signed(f"{value:.{3 + extra}f}")
    return _signed(f"{value:,.{extra + (0 if size >= 1000 else 1 if size >= 10 else 2)}f}")


def _signed(text: str) -> str:
    """The number with a true minus sign, and none before a zero."""
    is_zero = not text.strip("-0.")
    return text.lstrip("-") if is_zero else text.replace("-", "−")


def _unit_words(unit: str) -> str:
    """The unit where a reader needs it: the percent sign is at the number, feature units have no name."""
    return {"fraction": "", "nats/token": "nats per token"}.get(unit, "" if "feature" in unit else unit)


def _guidance(cfg_scale: float | None) -> str:
    if cfg_scale is None:
        return ""
    return "no guidance" if cfg_scale == 1 else f"guidance {cfg_scale:g}"


def _means(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    labels = dict.fromkeys(label for label, _ in pairs)
    return {label: float(np.mean([value for name, value in pairs if name == label])) for label in labels}


def _comparison_table(
    comparison: Comparison, runs: Sequence[RunView], labels: Sequence[str], *, is_main: bool
) -> dict[str, Any]:
    """What the template needs of a comparison; the main one also carries the other labels as columns of their own."""
    shown = [comparison.baseline, comparison.candidate]
    if is_main:
        shown += [label for label in labels if label not in shown and any(r.card for r in runs if r.label == label)]
    sections = []
    for split in dict.fromkeys(one.split for one in comparison.judged):
        rows = [_table_row(one, comparison, runs, shown) for one in comparison.judged if one.split == split]
        sections.append({"split": split, "rows": rows})
    return {"baseline": comparison.baseline, "candidate": comparison.candidate, "labels": shown, "sections": sections}


def _table_row(
    one: Difference | SeedDifference, comparison: Comparison, runs: Sequence[RunView], shown: Sequence[str]
) -> dict[str, Any]:
    scale = max(abs(one.baseline), abs(one.candidate))
    cells = []
    for label in shown:
        found = [
            row
            for run in runs
            if run.label == label and run.card is not None
            for row in run.card.results
            if row.key == (one.metric, one.split, one.cfg_scale, one.reference, "model", one.space)
        ]
        mean = float(np.mean([row.value for row in found])) if found else None
        value = {comparison.baseline: one.baseline, comparison.candidate: one.candidate}.get(label, mean)
        interval = ""
        if len(found) == 1 and found[0].low is not None and found[0].high is not None:
            interval = _range(found[0].low, found[0].high, one)
        text = "not measured" if value is None else number_text(value, unit=one.unit, scale=scale)
        cells.append({"label": label, "value": text, "interval": interval})
    over_seeds = f"better in {one.num_better} of {len(one.per_seed)} seeds" if isinstance(one, SeedDifference) else ""
    interval_text = "no interval" if one.low is None or one.high is None else _range(one.low, one.high, one)
    return {
        "name": measure_name(one.metric),
        "aim": _aim(one),
        "guidance": _guidance(one.cfg_scale),
        "unit": _unit_words(one.unit),
        "cells": cells,
        "difference": _shown(one.difference, one),
        "interval": interval_text,
        "over_seeds": over_seeds,
        "verdict": one.verdict,
        "winner": {"better": comparison.candidate, "worse": comparison.baseline}.get(one.verdict),
        "bar": interval_bar(one.low, one.difference, one.high, better=one.better),
    }


def _ceiling_of(runs: Sequence[RunView]) -> list[Result]:
    rows = {row.key: row for run in runs if run.card for row in run.card.results if row.subject == "tokenizer"}
    return list(rows.values())


def _ceiling_row(row: Result) -> dict[str, str]:
    interval = ""
    if row.low is not None and row.high is not None:
        low, high = (number_text(end, unit=row.unit, scale=abs(row.value)) for end in (row.low, row.high))
        interval = f"{low} to {high}"
    return {
        "name": measure_name(row.metric),
        "aim": _aim(row),
        "split": row.split,
        "value": number_text(row.value, unit=row.unit),
        "unit": _unit_words(row.unit),
        "interval": interval,
        "num_images": f"{row.num_images:,}",
    }


def glossary(metrics: Sequence[str], ceiling: Sequence[Result] = ()) -> list[tuple[str, str]]:
    """Names of metrics, each once, and what they mean."""
    names = dict.fromkeys([*metrics, *(row.metric for row in ceiling)])
    return [MEASURES[name] for name in names if name in MEASURES]


def _band_drawings(runs: Sequence[RunView], labels: Sequence[str]) -> list[Markup]:
    """Validation and the quality of painted pictures by step and by time, with bands over the seeds of a label."""
    seeds = [SeedRun(label=run.label, metrics=run.rows) for run in runs]
    return [draw(one) for one in band_drawings(seeds, places={label: place for place, label in enumerate(labels)})]


def _band_notes(runs: Sequence[RunView]) -> str:
    """What must be known of the curves."""
    several = len({run.label for run in runs}) < len(runs)
    return (f"{BAND_MEANING} " if several else "") + (
        "Time is that of training steps: the projector and the loss of an alignment are part of them, what its teacher "
        "took to look at the training pictures beforehand is not."
    )


def _curve_images(runs: Sequence[RunView], colors: Mapping[str, str]) -> list[tuple[str, str]]:
    """(what it shows, image address) of every plot that has data."""
    pairs = [(run.label, run.rows) for run in runs]
    wanted = [
        (
            "Training loss, next token (running mean)",
            plots.training_curves(pairs, colors=colors, y="ntp_loss"),
            "step",
            "nats per token",
        ),
    ]
    logged = sorted({key for run in runs for row in run.rows if row.get("kind") == "train" for key in row})
    for key in [key for key in logged if key.partition(".")[0] == "gva_loss"]:
        title = f"Training loss, alignment{_of_term(key)} (running mean)"
        wanted.append((title, plots.training_curves(pairs, colors=colors, y=key), "step", "distance"))
    drawn = [
        (title, plots.plot(curves, title=title, x_label=x_label, y_label=y_label))
        for title, curves, x_label, y_label in wanted
        if curves
    ]
    for key in [key for key in logged if key.partition(".")[0] == "align_weight"]:
        title = f"Weight of the alignment{_of_term(key)}"
        curves = plots.training_curves(pairs, colors=colors, y=key, smooth_share=0.0)
        drawn.append((title, plots.layer_plot(curves, title=title, x_label="step", y_label="weight")))
    return drawn


def _of_term(key: str) -> str:
    """The term that a column `gva_loss.NAME` or `align_weight.NAME` is of, in words; the main one has no name."""
    term = key.partition(".")[2]
    return f" '{term}'" if term else ""


def _watch_images(runs: Sequence[RunView], colors: Mapping[str, str]) -> list[tuple[str, str]]:
    """(what it shows, image address) of what was watched while training, as it was at each run's end."""
    last = [(run.label, last_watched(run.rows)) for run in runs]
    drawn = []
    for encoder in dict.fromkeys(row["encoder"] for _, rows in last for row in rows if "term" not in row):
        for key, title in WATCHED.items():
            curves = []
            for label, rows in last:
                own = [row for row in rows if "term" not in row and row["encoder"] == encoder and key in row]
                points = [(float(row["layer"]), float(row[key])) for row in own]
                if points:
                    curves.append(_curve_of(label, points, colors))
            if curves:
                told = title.format(encoder=encoder)
                drawn.append((told, plots.layer_plot(curves, title=told, y_label="")))
    terms = [(label, row) for label, rows in last for row in rows if "distance" in row]
    for name in dict.fromkeys(row["term"] for _, row in terms):
        for key in ("cosine", "distance"):
            curves = [
                _curve_of(label, [(float(at), value) for at, value in enumerate(row["positions"][key])], colors)
                for label, row in terms
                if row["term"] == name and key in row["positions"]
            ]
            if curves:
                told = f"Trained term '{name}', {key} by position"
                drawn.append((told, plots.layer_plot(curves, title=told, y_label="", x_label=_IN_ORDER)))
    return drawn


def _curve_of(label: str, points: Sequence[tuple[float, float]], colors: Mapping[str, str]) -> plots.Curve:
    return plots.Curve(label, colors[label], tuple(at for at, _ in points), tuple(value for _, value in points))


def _sample_sections(runs: Sequence[RunView], held_out: Sequence[HeldOut]) -> list[dict[str, Any]]:
    """Per split and guidance: for each prompt the held-out picture and one strip per run, in the order of the runs."""
    sections = []
    keys = dict.fromkeys((one.split, one.cfg_scale) for run in runs for one in run.samples)
    for split, cfg_scale in keys:
        shown = [(run, one) for run in runs for one in run.samples if (one.split, one.cfg_scale) == (split, cfg_scale)]
        prompts, seeds = shown[0][1].prompts, shown[0][1].seeds
        for run, one in shown:
            if (one.prompts, one.seeds) != (prompts, seeds):
                raise ArraError(
                    f"run {run.label!r}: its {split} samples are of other prompts or seeds; generate them again"
                )
            if one.images.shape[:2] != (len(prompts), len(seeds)):
                raise ArraError(
                    f"run {run.label!r}: {split} samples are {one.images.shape[:2]}, expected {len(prompts)} prompts x "
                    f"{len(seeds)} seeds; generate them again"
                )
        several = len({run.seed for run, _ in shown}) > 1
        references = next((one for one in held_out if one.split == split), None)
        if references is not None and references.prompts != prompts:
            raise ArraError(
                f"held-out pictures of {split} are of other prompts than the samples; pass the same prompts"
            )
        figures = []
        for r, prompt in enumerate(prompts):
            groups = []
            if references is not None:
                groups += _reference_groups(references, r)
            groups += [
                {
                    "label": run.label,
                    "who": f"{run.label}, training seed {run.seed}" if several else run.label,
                    "url": grids.data_url(grids.strip(one.images[r])),
                    "width": grids.strip(one.images[r]).width,
                }
                for run, one in shown
            ]
            figures.append({"prompt": prompt, "groups": groups})
        sections.append(
            {"split": split, "guidance": _guidance(cfg_scale), "seeds": ", ".join(map(str, seeds)), "figures": figures}
        )
    return sections


def _reference_groups(references: HeldOut, row: int) -> list[dict[str, Any]]:
    groups = []
    reconstruction = grids.strip(references.reconstructions[row : row + 1])
    if references.raw is not None:
        # Raw pictures may be larger than what the tokenizer sees: shown at the size of their reconstruction.
        scale = max(1, reconstruction.width // references.raw.shape[2])
        url = grids.data_url(grids.strip(references.raw[row : row + 1], scale=scale))
        groups.append({"label": None, "who": "held out", "url": url, "width": reconstruction.width})
    url = grids.data_url(reconstruction)
    groups.append({"label": None, "who": "through tokenizer", "url": url, "width": reconstruction.width})
    return groups


def _standard_notes(runs: Sequence[RunView], comparisons: Sequence[Comparison]) -> list[str]:
    notes = []
    judged = [one for comparison in comparisons for one in comparison.judged]
    if any(one.reference == "raw" for one in judged):
        notes.append(
            "Distances to raw pictures measure the tokenizer as much as the model: every generated picture has passed "
            "through it and no raw one has. Distances to reconstructions leave that out. Both are shown."
        )
    if any(isinstance(one, Difference) for one in judged):
        notes.append(
            "An interval over pictures says what other held-out captions would change. It says nothing about another "
            "training seed, which may move a result by more."
        )
    if any(isinstance(one, SeedDifference) for one in judged):
        notes.append(
            "An interval over training seeds takes the held-out pictures as given; with few seeds it is very wide, and "
            "rightly so."
        )
    if len(judged) > 5:
        notes.append(
            f"Each of the {len(judged)} intervals stands by itself at 95 %: about one in twenty leaves out zero by "
            "chance alone, and the measurements are not independent of each other."
        )
    if any(run.samples for run in runs):
        notes.append("Prompts and seeds of the pictures were fixed beforehand; none was picked for its looks.")
    if equal_budgets(runs):
        notes.append(
            "At equal training time the faster run has made more steps. A run that is read before its end has not "
            "finished its learning-rate schedule, which counts against it."
        )
    return notes
