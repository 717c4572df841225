"""The page of `arra compare`: two cards side by side, each difference with its interval and how likely it is noise.

Place in the pipeline: `arra.evaluate.compare` works the differences out; here they become HTML that looks like the
report and works without a network. Names of runs and folders are other people's text: the template escapes everything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from arra.evaluate.card import Card, warnings_of
from arra.evaluate.compare import SMALLEST_P, Difference
from arra.evaluate.distances import LEVEL
from arra.report.card_page import fact_text, interval_text, plain, value_text, words
from arra.report.measure_words import measure_name
from arra.report.style import ACCENTS, interval_bar, styled_page

PAGE_FILE = "comparison.html"
BASELINE, CANDIDATE = "A", "B"


def comparison_page(baseline: Card, candidate: Card, differences: Sequence[Difference], *, title: str) -> str:
    """The page as HTML."""
    return styled_page(
        "comparison.html.j2",
        labels=[BASELINE, CANDIDATE],
        colors=dict(zip((BASELINE, CANDIDATE), ACCENTS, strict=False)),
        title=title,
        runs=(baseline.run, candidate.run),
        verdict=tally(differences),
        warnings=[
            f"{label}: {line}"
            for label, card in ((BASELINE, baseline), (CANDIDATE, candidate))
            for line in warnings_of(card)
        ],
        groups=[
            {"name": name, "rows": [comparison_cells(one) for one in differences if place_of(one) == name]}
            for name in dict.fromkeys(place_of(one) for one in differences)
        ],
        apart=any(not one.is_paired for one in differences),
        count=len(differences),
        facts=differing_facts(baseline, candidate),
        protocol=[(words(key), plain(value)) for key, value in baseline.protocol.items() if not _names_model(key)],
    )


def tally(differences: Sequence[Difference]) -> str:
    """In one sentence, in how many measures the candidate is better or worse beyond noise, all rows considered."""
    clear = [one for one in differences if is_clear(one)]
    better = sum((one.difference < 0) == (one.better == "lower") for one in clear)
    worse, unclear = len(clear) - better, len(differences) - len(clear)
    measures = "1 measure" if len(differences) == 1 else f"{len(differences)} measures"
    return (
        f"Of {measures}, corrected for their number, {CANDIDATE} is better in {better} and worse in {worse}; "
        f"{unclear} show{'s' if unclear == 1 else ''} no clear difference."
    )


def is_clear(one: Difference) -> bool:
    """Whether a difference is beyond noise also when all compared rows are considered."""
    return one.p_corrected < 1 - LEVEL


def place_of(one: Difference) -> str:
    """Where a difference was measured: space, split, guidance, reference."""
    parts = [one.space, one.split, None if one.cfg_scale is None else f"guidance {one.cfg_scale:g}"]
    parts.append(None if one.reference is None else f"against {one.reference}")
    return ", ".join(part for part in parts if part)


def comparison_cells(one: Difference) -> dict[str, Any]:
    """What a row of the table says, as text."""
    scale, extent = max(abs(one.baseline), abs(one.candidate)), max(abs(one.low), abs(one.high), abs(one.difference))
    clear = is_clear(one)
    return {
        "name": measure_name(one.metric),
        "better": f"{one.better} is better",
        "baseline": value_text(one.baseline, unit=one.unit, scale=scale),
        "candidate": value_text(one.candidate, unit=one.unit, scale=scale),
        "difference": value_text(one.difference, unit=one.unit, scale=extent),
        "interval": interval_text(one.low, one.high, unit=one.unit, scale=extent),
        "p": p_text(one.p),
        "p_corrected": p_text(one.p_corrected),
        "verdict": one.verdict,
        "is_clear": clear,
        "side": {"better": 1, "worse": 0}.get(one.verdict),
        "bar": interval_bar(one.low, one.difference, one.high, better=one.better),
        "marks": (*one.marks, *(() if one.is_paired else ("different pictures, drawn apart",))),
        "pictures": f"{one.num_images:,} pictures",
    }


def p_text(p: float) -> str:
    """A probability as a person reads it: `0.030`, `0.0004`, `< 1e-06`."""
    if p <= SMALLEST_P:
        return f"< {SMALLEST_P:.0e}"
    return f"{p:.2f}" if p >= 0.095 else f"{p:.3f}" if p >= 0.0095 else f"{p:.2g}" if p >= 1e-4 else f"{p:.1g}"


def differing_facts(baseline: Card, candidate: Card) -> list[tuple[str, str, str]]:
    """What is known of the two and is not the same: name, of the baseline, of the candidate."""
    first, second = (_facts(card) for card in (baseline, candidate))
    return [
        (words(key), fact_text(key, first.get(key)), fact_text(key, second.get(key)))
        for key in dict.fromkeys((*first, *second))
        if first.get(key) != second.get(key)
    ]


def _facts(card: Card) -> Mapping[str, Any]:
    return {**{key: value for key, value in card.protocol.items() if _names_model(key)}, **card.about}


def _names_model(key: str) -> bool:
    return key == "run" or key.startswith("model")
