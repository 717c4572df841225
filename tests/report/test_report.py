"""The report says what the numbers say, loads nothing, and trusts no text."""

import base64
import csv
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from arra.errors import ArraError
from arra.evaluate.card import Better, Card, Result
from arra.evaluate.compare import Difference, SeedDifference, Verdict, decide
from arra.evaluate.distances import Interval
from arra.report.page import (
    Comparison,
    HeldOut,
    RunView,
    Samples,
    build_report,
    equal_budgets,
    headline,
    tally,
)
from arra.report.style import format_seconds

EVIL = "<script>alert('x')</script> \"quoted\" & <img src=https://example.org/x.png>"
PROMPTS = (EVIL, "red heart on fire")


def difference(metric: str, baseline: float, candidate: float, *, half: float, better: Better = "lower") -> Difference:
    gap = candidate - baseline
    units = {"nll": "nats/token", "retrieval_at_10": "fraction"}
    with_pictures = metric not in ("nll", "caption_gain")
    return Difference(
        metric=metric,
        split="composed",
        cfg_scale=1.0 if with_pictures else None,
        reference="reconstructions" if with_pictures else None,
        baseline=baseline,
        candidate=candidate,
        difference=gap,
        low=gap - half,
        high=gap + half,
        better=better,
        verdict=decide(Interval(value=gap, low=gap - half, high=gap + half), better=better),
        unit=units.get(metric, "feature units"),
        num_images=40,
    )


def comparison(nll: tuple[float, float] = (1.81, 1.75)) -> Comparison:
    rows = (
        difference("nll", *nll, half=0.02),
        difference("retrieval_at_10", 0.5, 0.51, half=0.05, better="higher"),
        difference("frechet", 60.0, 50.0, half=3.0),
    )
    return Comparison(baseline="baseline", candidate="aligned", differences=rows)


def samples(*, value: int, cfg_scale: float = 1.0) -> Samples:
    images = np.full((2, 3, 8, 8, 3), value, dtype=np.uint8)
    return Samples(split="composed", cfg_scale=cfg_scale, prompts=PROMPTS, seeds=(0, 1, 2), images=images)


def run_view(label: str, *, speed: float = 1.0, offset: float = 0.0, value: int = 100) -> RunView:
    rows = [
        {"kind": "train", "step": step, "seconds": step * speed, "ntp_loss": 3 - step / 100 + offset, "gva_loss": None}
        for step in range(10, 101, 10)
    ] + [
        {"kind": "validation", "step": step, "seconds": step * speed, "ntp_loss": 3 - step / 100 + offset}
        for step in (0, 50, 100)
    ]
    ceiling = Result(
        metric="psnr_db", split="composed", value=25.34, num_images=40, better="higher", unit="dB", subject="tokenizer"
    )
    card = Card(run=f"runs/{label}", protocol={"judge": EVIL}, results=(ceiling,))
    return RunView(
        label=label,
        rows=rows,
        card=card,
        samples=(samples(value=value), samples(value=value, cfg_scale=2.0)),
        recipe=f"name: {EVIL}",
        manifest={"hash": EVIL},
    )


def held_out() -> HeldOut:
    raw = np.zeros((2, 24, 24, 3), dtype=np.uint8)
    return HeldOut(split="composed", prompts=PROMPTS, reconstructions=np.zeros((2, 8, 8, 3), dtype=np.uint8), raw=raw)


@pytest.fixture
def page(tmp_path: Path) -> str:
    path = build_report(
        tmp_path / "runs",
        title=f"A title {EVIL}",
        runs=[run_view("baseline"), run_view(EVIL), run_view("aligned", speed=1.25, offset=-0.1)],
        comparisons=[comparison(), dataclasses.replace(comparison(), candidate=EVIL)],
        held_out=[held_out()],
        timings=[("prepare", 41.0), ("train", 200.0)],
        attribution="Pictures by somebody, CC BY-SA 4.0",
        notes=["A note of the caller."],
    )
    assert path == tmp_path / "runs" / "report.html"
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects start tags with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    parser = Tags()
    parser.feed(page)
    names = {tag for tag, _ in parser.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in parser.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "poster", "action"):
                assert value is not None
                assert value.startswith("data:image/"), f"{tag} {name}"
    css = "".join(re.findall(r"<style>(.*?)</style>", page, flags=re.S))
    assert "url(" not in css
    assert "@import" not in css
    policy = next(values for tag, values in parser.tags if "http-equiv" in values)
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_plots_load_nothing_either(page: str) -> None:
    drawings = [base64.b64decode(one).decode() for one in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert len(drawings) == 1  # no run has an alignment loss
    for drawing in drawings:
        assert set(re.findall(r'(?:xlink:)?href="([^"]*)"', drawing)) <= {
            m for m in re.findall(r'href="(#[^"]*)"', drawing)
        }
        assert "<script" not in drawing
        assert "url(http" not in drawing
        assert "currentColor" in drawing


def test_text_of_others_is_escaped_everywhere(page: str) -> None:
    assert "<script" not in page
    assert "<img src=https" not in page
    # Title (2), captions and their alternative texts, labels, recipe, manifest, protocol: all of it is there as text.
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") > 20


def test_the_page_shows_what_it_was_given(page: str) -> None:
    for text in ("25.34", "dB", "4 min 1 s", "CC BY-SA 4.0", "A note of the caller.", "guidance 2", "no guidance"):
        assert text in page
    assert page.count("through tokenizer") >= 4
    assert page.count("held out") >= 4


def test_headline_says_the_numbers() -> None:
    assert headline(comparison())[0].lead == (
        "On composed captions the aligned model's NLL is 1.750 against 1.810 "
        "(difference −0.060, 95 % interval −0.080 to −0.040): better."
    )
    assert headline(comparison())[0].others == (
        "Retrieval, top ten among reconstructions: 51.0 % against 50.0 %, no clear difference.",
        "Fréchet distance to reconstructions: 50.0 against 60.0, better.",
    )
    assert tally(comparison()).endswith("is better in 2, worse in 0, and without a clear difference in 1.")


def test_headline_follows_the_numbers_when_swapped() -> None:
    assert headline(comparison((1.75, 1.81)))[0].lead == (
        "On composed captions the aligned model's NLL is 1.810 against 1.750 "
        "(difference 0.060, 95 % interval 0.040 to 0.080): worse."
    )
    assert headline(comparison((1.75, 1.76)))[0].lead.endswith("−0.010 to 0.030): no clear difference.")


@pytest.mark.parametrize(("low", "high", "verdict"), [(-0.1, -0.02, "better"), (None, None, "no clear difference")])
def test_headline_over_seeds_says_so(low: float | None, high: float | None, verdict: Verdict) -> None:
    one, own = comparison().differences[0], ("low", "high", "verdict", "is_paired", "p", "p_corrected", "marks")
    over = SeedDifference(
        **{name: value for name, value in dataclasses.asdict(one).items() if name not in own},
        low=low,
        high=high,
        verdict=verdict,
        per_seed=(one, one, one),
    )
    lead = headline(dataclasses.replace(comparison(), over_seeds=(over,)))[0].lead
    assert ("95 % interval over 3 training seeds −0.100 to −0.020" in lead) == (low is not None)
    assert lead.endswith(f"{verdict}.")


def test_equal_budgets_read_the_same_step_and_the_same_second() -> None:
    steps, seconds = equal_budgets([run_view("baseline"), run_view("aligned", speed=1.25, offset=-0.1)])
    assert steps.values == pytest.approx({"baseline": 2.0, "aligned": 1.9})
    assert steps.at == "step 100"
    # After 100 seconds the slower run has made 80 steps.
    assert seconds.values == pytest.approx({"baseline": 2.0, "aligned": 2.1})
    assert seconds.at == "1 min 40 s"
    assert equal_budgets([run_view("baseline")]) == []


def test_a_report_of_one_run_without_anything_else_works(tmp_path: Path) -> None:
    page = build_report(tmp_path, title="One", runs=[RunView(label="plain")]).read_text(encoding="utf-8")
    assert "Measurements" not in page
    assert "Pictures" not in page


def test_further_terms_their_weights_and_what_was_watched_are_drawn(tmp_path: Path) -> None:
    train = [
        {"kind": "train", "step": step, "ntp_loss": 2.0, "gva_loss": 0.9, "gva_loss.fine": 0.8, "align_weight": 0.1}
        for step in (1, 2)
    ]
    by_layer = {"cka": 0.1, "linear_cosine": 0.2, "probe_cosine": 0.3, "gradient_cosine": -0.1, "positions": {}}
    watch = [
        {"kind": "watch", "step": 2, "encoder": "teacher", "layer": layer, "images": 16, **by_layer}
        for layer in range(3)
    ]
    told = {"kind": "watch", "step": 2, "encoder": "teacher", "distance": 0.9}
    watch += [
        {**told, "term": "main", "layer": 1, "loss": "cosine", "cosine": 0.1, "positions": {"cosine": [0.1, 0.2]}},
        {**told, "term": "fine", "layer": 1, "loss": "mse", "positions": {"distance": [0.9, 0.8]}},
        {**told, "term": "window", "layer": 1, "loss": "mse", "positions": {}},
        {"kind": "watch", "step": 2, "encoder": "teacher", "term": "main", "layer": 0, "gradient_cosine": 0.1},
    ]
    runs = [RunView(label="aligned", rows=[*train, *watch]), RunView(label="baseline", rows=train[:0])]
    parser = Tags()
    parser.feed(build_report(tmp_path, title="One", runs=runs).read_text(encoding="utf-8"))
    drawn = [attributes["alt"] for tag, attributes in parser.tags if tag == "img"]
    assert drawn == [
        "Training loss, next token (running mean)",
        "Training loss, alignment (running mean)",
        "Training loss, alignment 'fine' (running mean)",
        "Weight of the alignment",
        "CKA of states and 'teacher', by layer",
        "Linear projector to 'teacher', cosine",
        "Probe of 'teacher', cosine",
        "Angle of the two gradients, 'teacher'",
        "Trained term 'main', cosine by position",
        "Trained term 'fine', distance by position",
    ]


def test_runs_of_other_prompts_are_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(samples(value=1), prompts=("a", "b"))
    with pytest.raises(ArraError, match="'aligned': its composed samples are of other prompts"):
        build_report(
            tmp_path,
            title="x",
            runs=[run_view("baseline"), dataclasses.replace(run_view("aligned"), samples=(other,))],
        )
    with pytest.raises(ArraError, match="at least one run"):
        build_report(tmp_path, title="x", runs=[])


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArraError, match="cannot write the report"):
        build_report(tmp_path / "file", title="x", runs=[RunView(label="plain")])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.25, "2.2 s"), (42.4, "42 s"), (200.0, "3 min 20 s"), (59.6, "1 min 0 s"), (3900.0, "1 h 5 min")],
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_curves_have_bands_over_the_seeds_of_a_label(tmp_path: Path) -> None:
    views = [dataclasses.replace(run_view("aligned", offset=0.1 * seed), seed=seed, recipe="") for seed in (0, 1)]
    one, two = (build_report(tmp_path, title="x", runs=views[:count]).read_text(encoding="utf-8") for count in (1, 2))
    assert "<polygon" not in one
    assert two.count("<polygon") == 2  # by step and by time
    assert "bands reach from the lowest to the highest seed" in two


def test_what_differs_between_the_recipes_is_shown(tmp_path: Path) -> None:
    views = [
        dataclasses.replace(run_view(label), recipe=f"align: {{layer: {layer}}}\ntrain: {{seed: {layer}, steps: 9}}")
        for label, layer in (("shallow", 1), ("deep", 7))
    ]
    page = build_report(tmp_path, title="x", runs=views).read_text(encoding="utf-8")
    shown = page[page.index("What differs") : page.index("</details>")]
    assert re.findall(r"<th scope=\"row\">(.*?)</th><td>(.*?)</td><td>(.*?)</td>", shown) == [("align.layer", "1", "7")]


def test_tables_lie_beside_the_page_as_text(page: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    lines = list(csv.DictReader((folder / "report.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["candidate_label"] for line in lines] == ["aligned"] * 3 + [EVIL] * 3
    expected = [one for _ in range(2) for one in comparison().differences]
    for line, one in zip(lines, expected, strict=True):
        numbers = [float(line[name]) for name in ("baseline", "candidate", "difference", "low", "high")]
        assert numbers == [one.baseline, one.candidate, one.difference, one.low, one.high]
        assert (line["metric"], line["verdict"], line["interval_over"]) == (one.metric, one.verdict, "pictures")
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "| NLL, nats per token | 1.810 | 1.750 |" in markdown
    assert "−0.060 [−0.080 to −0.040] | better |".replace("[", r"\[").replace("]", r"\]") in markdown
    latex = (folder / "report.tex").read_text(encoding="utf-8")
    assert r"NLL, nats per token & 1.810 & 1.750 &" in latex
    assert latex.count(r"\begin{tabular}") == 2
    assert not re.search(r"(?<!\\)<", markdown)


def test_a_mean_over_seeds_is_followed_by_each_seed(tmp_path: Path) -> None:
    one, own = comparison().differences[0], ("low", "high", "is_paired", "p", "p_corrected", "marks")
    fields = {name: value for name, value in dataclasses.asdict(one).items() if name not in own}
    over = SeedDifference(**fields, low=-0.1, high=-0.02, per_seed=(one, one))
    both = dataclasses.replace(comparison(), over_seeds=(over,))
    build_report(tmp_path, title="x", runs=[run_view("baseline"), run_view("aligned")], comparisons=[both])
    lines = list(csv.DictReader((tmp_path / "report.csv").read_text(encoding="utf-8").splitlines()))
    assert [(line["interval_over"], line["seed"]) for line in lines] == [
        ("seeds", ""),
        ("pictures", "0"),
        ("pictures", "1"),
    ]
