"""The page of `arra probe`: measures by layer and by position in one file that works without a network.

Place in the pipeline: `arra.stages.probe` measures; here its rows and maps become tables and plots that look like the
report. Names of runs and encoders are other people's text: the template escapes everything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from arra.report.plots import Curve, layer_plot, position_maps
from arra.report.style import ACCENTS, styled_page

PAGE_FILE = "probe.html"
MAX_MAPS = 12
"""Layers whose maps are shown, evenly spaced."""

MEASURES: tuple[tuple[str, str, str], ...] = (
    ("cka", "CKA", "Unbiased linear CKA of mean state and feature: 1 the same but for turning and scale, 0 unrelated."),
    ("cknna", "CKNNA", "The same on the nearest neighbours that both share; by chance about neighbours / pictures."),
    ("probe_cosine", "Probe, cosine", "Cosine with the centred feature of what a ridge map reads from the mean state."),
    ("probe_r2", "Probe, R2", "Share of the features' variance that it explains on pictures it was not fitted on."),
    ("linear_cosine", "Linear projector", "Cosine of one linear map for all positions, fitted on other pictures: what "
     "an alignment with a linear projector would begin with, 1 minus its loss."),
    ("class_accuracy", "Class", "Share of held-out pictures whose class a linear map tells from the mean state."),
    ("ntp_norm", "Gradient, next token", "Norm of the next-token loss's gradient where it reaches the layer's states."),
    ("gva_norm", "Gradient, alignment", "The same of an alignment with the fitted linear projector."),
    ("gradient_cosine", "Angle", "Cosine between the two: above 0 they pull together, below 0 against each other."),
)  # fmt: skip
"""Key of a row, heading, and what it means."""
PLOTS = (
    ("How alike states and features are", "", ("cka", "cknna")),
    ("What can be read of the feature", "cosine", ("probe_cosine", "linear_cosine")),
    ("Gradient norms at the states", "norm", ("ntp_norm", "gva_norm")),
    ("Angle of the two gradients", "cosine", ("gradient_cosine",)),
)
BY_POSITION = (
    ("probe_cosine", "Read at each run of positions, by layer", "cosine"),
    ("cka", "CKA at each run of positions, by layer", ""),
)


def probe_page(
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    maps: Mapping[str, Sequence[Sequence[float]]],
    suggestion: Mapping[str, Any] | None,
    notes: Sequence[str],
) -> str:
    """The page as HTML."""
    return styled_page(
        "probe.html.j2",
        facts=facts,
        sections=[_section(name, rows, maps) for name in facts["encoders"]],
        terms=[_term(row, rows, maps) for row in rows if "term" in row and "distance" in row],
        suggestion=suggestion,
        notes=notes,
    )


def _section(
    encoder: str, rows: Sequence[Mapping[str, Any]], maps: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, Any]:
    """Table and plots of one encoder."""
    own = [row for row in rows if "term" not in row and row["encoder"] == encoder]
    shown = [each for each in MEASURES if all(each[0] in row for row in own)]
    headings = {key: heading for key, heading, _ in MEASURES}
    urls = [
        layer_plot(
            [_curve(own, key, headings[key], place) for place, key in enumerate(keys)], title=title, y_label=unit
        )
        for title, unit, keys in PLOTS
    ]
    for key, title, unit in BY_POSITION:
        curves = [
            Curve(
                f"layer {row['layer']}", ACCENTS[place % len(ACCENTS)], _places(row, key), tuple(row["positions"][key])
            )
            for place, row in enumerate(_spread(own, len(ACCENTS)))
        ]
        urls.append(layer_plot(curves, title=title, y_label=unit, x_label="position, in runs of raster order"))
    charts = [
        position_maps(
            [(f"layer {row['layer']}", maps[f"{encoder}/{row['layer']}/{key}"]) for row in _spread(own, MAX_MAPS)],
            title=title,
            symmetric=key == "gradient_cosine",
        )
        for key, title in (
            ("linear_cosine", "Where the picture is read: cosine of the linear projector at each position"),
            ("gradient_cosine", "Angle of the two gradients at each position"),
        )
    ]
    return {
        "name": encoder,
        "columns": [(heading, text) for _, heading, text in shown],
        "rows": [(row["layer"], [_number(row[key]) for key, _, _ in shown]) for row in own],
        "majority": own[0].get("class_majority") if own else None,
        "plots": urls,
        "maps": charts,
    }


def _term(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], maps: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, Any]:
    """A trained term: its numbers, the gradient that it sends down, and its map."""
    name, layer = row["term"], row["layer"]
    key = "cosine" if "cosine" in row else "distance"
    reached = [each for each in rows if each.get("term") == name]
    chart = maps.get(f"{name}/{layer}/{key}")
    return {
        "name": name,
        "layer": layer,
        "encoder": row["encoder"],
        "what": "cosine with the target" if key == "cosine" else f"{row['loss']} distance to the target",
        "value": _number(row[key]),
        "gradients": [
            (each["layer"], *(_number(each[part]) for part in ("ntp_norm", "gva_norm", "gradient_cosine")))
            for each in reached
        ],
        "map": None if chart is None else position_maps([(f"layer {layer}", chart)], title=key),
    }


def _curve(rows: Sequence[Mapping[str, Any]], key: str, label: str, place: int) -> Curve:
    return Curve(
        label, ACCENTS[place], tuple(float(row["layer"]) for row in rows), tuple(float(row[key]) for row in rows)
    )


def _places(row: Mapping[str, Any], key: str) -> tuple[float, ...]:
    return tuple(float(place) for place in range(len(row["positions"][key])))


def _spread(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most so many of the rows, evenly spaced, first and last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 or not value else f"{value:.2g}"
