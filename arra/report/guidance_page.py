"""The page of `arra guidance`: every trial of a search in one file that works without a network.

Place in the pipeline: `arra.stages.guidance` searches; here its record (guidance.json) becomes a table and plots that
look like the report. Names are other people's text: the template escapes everything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from arra.report.plots import Curve, layer_plot
from arra.report.style import ACCENTS, format_seconds, styled_page

PAGE_FILE = "guidance.html"
MOST_LINES, MOST_PLOTS = len(ACCENTS), 4


def guidance_page(record: Mapping[str, Any], *, pictures: str) -> str:
    """The page as HTML; `pictures` is the address of a grid."""
    trials = record["trials"]
    measures = list(record["metrics"]) + [name for name in trials[0]["values"] if name not in record["metrics"]]
    plots = [plot_of(name, trials, record["images"]) for name in measures[:MOST_PLOTS]]
    return styled_page(
        "guidance.html.j2",
        record=record,
        winner=trials[0],
        measures=measures,
        plots=[url for url in plots if url],
        pictures=pictures,
        seconds=format_seconds(record["seconds"]),
        rounds=", then ".join(f"{each['num_settings']} × {each['num_images']}" for each in record["rounds"]),
    )


def plot_of(metric: str, trials: Sequence[Mapping[str, Any]], num_images: int) -> str:
    """A measure against guidance, of the trials on all pictures; empty where no line has two points."""
    lines: dict[str, list[tuple[float, float]]] = {}
    unguided: dict[str, tuple[float, float]] = {}
    for trial in trials:
        if trial["num_images"] != num_images:
            continue
        point = (trial["settings"]["cfg_scale"], trial["values"][metric])
        scale, _, rest = trial["name"].partition(", ")
        if point[0] == 1:
            unguided[rest] = point
        else:
            schedule = scale.split(" ", 2)[2]
            lines.setdefault(f"{schedule}, {rest}", []).append(point)
    curves = []
    for place, (label, points) in enumerate(list(lines.items())[:MOST_LINES]):
        start = unguided.get(label.partition(", ")[2])
        drawn = sorted([*points, *([start] if start else [])])
        curves.append(Curve(label, ACCENTS[place], tuple(x for x, _ in drawn), tuple(y for _, y in drawn)))
    if not any(len(curve.x) > 1 for curve in curves):
        return ""
    return layer_plot(curves, title=f"{metric}, {num_images} pictures", y_label=metric, x_label="cfg_scale")
