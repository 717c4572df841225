"""The page of one training as far as it has come: where it is, its curves, what it paints, what went wrong.

Place in the pipeline: `stages/live.py` reads a run's folder and writes what comes back, again and again while the run
is trained; so the page is made in a fraction of a second: its curves are thinned and drawn by a template.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from arra.report.drawing import Drawing, Series, draw, drawn, is_finite, short_number, thinned
from arra.report.style import ACCENTS, format_seconds, styled_page

REFRESH_SECONDS = 30
RECENT_ROWS = 20
"""By which it is told how fast a training is."""
MOST_PREVIEW_BYTES, PREVIEW_WIDTH = 400_000, 1600
"""A larger picture is made smaller, so that the page stays quick to load."""
MOST_TROUBLES = 20
WATCHED = {
    "cka": "CKA of states and '{encoder}', by layer",
    "linear_cosine": "Linear projector to '{encoder}', cosine",
    "probe_cosine": "Probe of '{encoder}', cosine",
    "gradient_cosine": "Angle of the two gradients, '{encoder}'",
}
"""Measures of a watched row that are drawn by layer, and the title."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunSoFar:
    """What the page shows of a run."""

    name: str
    rows: Sequence[Row]
    """Of metrics.jsonl."""
    steps: int | None
    """Of the whole training; None where it is not known yet."""
    is_finished: bool
    written_at: str | None = None
    """When the last row was written, in words."""
    previews: Sequence[tuple[int, bytes]] = ()
    """Step and PNG, oldest first."""
    checkpoints: Sequence[tuple[int, float | None]] = ()
    """Step and validation loss, where one was measured for it, oldest first."""
    troubles: Sequence[Row] = ()
    recipe: str = ""
    """The resolved recipe as text."""
    manifest: Mapping[str, str] = field(default_factory=dict)
    attribution: str | None = None


def run_page(run: RunSoFar) -> str:
    """The page as HTML, which loads itself anew while the run is not finished."""
    return styled_page(
        "run.html.j2",
        labels=ACCENTS,
        colors=dict(zip(ACCENTS, ACCENTS, strict=True)),
        run=run,
        refresh=None if run.is_finished else REFRESH_SECONDS,
        lede=where_it_is(run.rows, run.steps, is_finished=run.is_finished),
        facts=list(_facts(run)),
        troubles=[_told(trouble) for trouble in run.troubles[-MOST_TROUBLES:]][::-1],
        num_troubles=len(run.troubles),
        drawings=list(_drawings(run.rows)),
        watched=list(_watched_drawings(run.rows)),
        watched_step=next((row["step"] for row in last_watched(run.rows)), None),
        previews=[(step, _picture_url(png)) for step, png in reversed(run.previews)],
        draw=draw,
    )


def where_it_is(rows: Sequence[Row], steps: int | None, *, is_finished: bool) -> str:
    """A sentence on how far a training is and how long it will take."""
    done = max((int(row["step"]) for row in rows), default=0)
    trained = of_kind(rows, "train")
    if is_finished:
        spent = f", {format_seconds(float(trained[-1]['seconds']))} of training" if trained else ""
        return f"Finished: {done:,} steps{spent}."
    if not done:
        return "No step is logged yet."
    share = "" if not steps else f" of {steps:,} ({100 * done / steps:.0f} %)"
    left = seconds_left(rows, steps)
    return f"Step {done:,}{share}" + ("." if left is None else f", about {format_seconds(left)} of training left.")


def seconds_left(rows: Sequence[Row], steps: int | None) -> float | None:
    """Training time that is left, as fast as the last rows were; None where too little is known."""
    recent = of_kind(rows, "train")[-RECENT_ROWS:]
    if steps is None or len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    first, last = recent[0], recent[-1]
    pace = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    return max(0.0, float(pace * (steps - last["step"])))


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """The rows of one kind, in their order."""
    return [row for row in rows if row.get("kind") == kind]


def last_watched(rows: Sequence[Row]) -> list[Row]:
    """What was watched at the last step at which something was."""
    watched = of_kind(rows, "watch")
    return [row for row in watched if row["step"] == watched[-1]["step"]]


def _facts(run: RunSoFar) -> Iterator[tuple[str, str]]:
    """What a person asks first, and the answer."""
    row = dict(next(reversed(of_kind(run.rows, "train")), {}))
    validated = [each for each in of_kind(run.rows, "validation") if is_finite(each.get("ntp_loss"))]
    if "ntp_loss" in row:
        yield "Next-token loss", f"{short_number(row['ntp_loss'])} nats per token"
    if validated:
        best = min(validated, key=lambda each: float(each["ntp_loss"]))
        told = f"{short_number(validated[-1]['ntp_loss'])} nats per token"
        yield "Validation", told + f"; lowest {short_number(best['ntp_loss'])} at step {best['step']:,}"
    for key in [key for key in row if key.partition(".")[0] == "gva_loss" and row[key] is not None]:
        yield "Alignment" + _of_term(key), short_number(row[key])
    if "lr" in row:
        yield "Learning rate", f"{row['lr']:.3g}"
    speed = [
        f"{row[key]:,.{digits}f} {name}"
        for key, name, digits in (("tokens_per_second", "tokens/s", 0), ("images_per_second", "pictures/s", 1))
        if key in row
    ]
    if speed:
        yield "Speed", ", ".join(speed)
    shares = (("mfu", "{} of the peak (MFU)"), ("waiting_share", "{} of the time waiting for data"))
    if used := [text.format(f"{100 * row[key]:.1f} %") for key, text in shares if key in row]:
        yield "Use", ", ".join(used)
    if "peak_memory_gib" in row:
        yield "Memory", f"{row['peak_memory_gib']:.2f} GiB at most"
    if "images" in row:
        yield "Seen", f"{row['images']:,} pictures in {format_seconds(float(row['seconds']))}"
    if run.written_at is not None:
        yield "Last news", run.written_at
    if run.checkpoints:
        names = [f"{step:,}" + ("" if loss is None else f" ({short_number(loss)})") for step, loss in run.checkpoints]
        yield "Checkpoints", "step " + ", ".join(names)


def _told(trouble: Row) -> dict[str, str]:
    """An event of trouble in words, whatever of it there is."""
    losses = trouble.get("losses")
    loss = losses.get("loss") if isinstance(losses, Mapping) else None
    parts = [
        f"loss {short_number(loss)}" if loss is not None else "",
        f"gradient norm {short_number(trouble['grad_norm'])}" if "grad_norm" in trouble else "",
        str(trouble.get("began", "")),
    ]
    records = trouble.get("records_with_nonfinite_states") or trouble.get("records")
    if isinstance(records, list) and records:
        more = f" and {len(records) - 8} more" if len(records) > 8 else ""
        parts.append(f"records {', '.join(map(str, records[:8]))}{more}")
    reason = {"nonfinite": "not finite", "spike": "the loss jumped"}.get(str(trouble.get("reason")))
    done = {"stop": "stopped", "skip": "batch left out", "rewind": "went back to a checkpoint"}
    return {
        "step": str(trouble.get("step", "?")),
        "batch": str(trouble.get("position", "?")),
        "reason": reason or str(trouble.get("reason", "unknown")),
        "action": done.get(str(trouble.get("action")), str(trouble.get("action", ""))),
        "more": "; ".join(part for part in parts if part),
    }


def _drawings(rows: Sequence[Row]) -> Iterator[Drawing]:
    """Everything that is worth a curve over steps."""
    trained = of_kind(rows, "train")
    keys = list(dict.fromkeys(key for row in trained for key in row))
    validated = of_kind(rows, "validation")
    nats = "nats per token"
    losses = [("training", trained, "ntp_loss"), ("validation", validated, "ntp_loss")]
    yield from _drawing("Next token", nats, [*losses, ("text", validated, "text_loss")], skips_start=True)
    aligned = [key for key in keys if key.partition(".")[0] == "gva_loss"]
    yield from _drawing("Alignment", "distance", [(_term(key), trained, key) for key in aligned], skips_start=True)
    total = [row for row in trained if row.get("loss") != row.get("ntp_loss")]
    yield from _drawing("Whole loss", "what is minimised", [("loss", total, "loss")], skips_start=True)
    weights = [key for key in keys if key.partition(".")[0] == "align_weight"]
    yield from _drawing("Weight of the alignment", "", [(_term(key), trained, key) for key in weights])
    yield from _drawing("Learning rate", "", [("learning rate", trained, "lr")])
    yield from _drawing("Gradient norm", "before clipping", [("gradient norm", trained, "grad_norm")], skips_start=True)
    speed = "tokens_per_second" if "tokens_per_second" in keys else "images_per_second"
    name = speed.partition("_")[0].replace("images", "pictures")
    yield from _drawing("Speed", f"{name} per second", [(name, trained, speed)])
    shares = [("MFU", trained, "mfu"), ("waiting for data", trained, "waiting_share")]
    yield from _drawing("Use of the device", "%", shares, scale=100.0)
    measured = of_kind(rows, "quality")
    for key in dict.fromkeys(key for row in measured for key in row if key not in ("kind", "step", "seconds")):
        yield from _drawing(quality_name(key), "of pictures painted on the way", [(key, measured, key)])


def _watched_drawings(rows: Sequence[Row]) -> Iterator[Drawing]:
    """What was watched last, by layer."""
    own = [row for row in last_watched(rows) if "term" not in row]
    for encoder in dict.fromkeys(row["encoder"] for row in own):
        for key, title in WATCHED.items():
            points = [(float(row["layer"]), float(row[key])) for row in own if row["encoder"] == encoder and key in row]
            series = [Series(label=encoder, points=points)]
            yield from drawn(title.format(encoder=encoder), series, x_label="layer", says_last=False, floor=0.0)


def _drawing(
    title: str,
    unit: str,
    curves: Sequence[tuple[str, Sequence[Row], str]],
    *,
    scale: float = 1.0,
    skips_start: bool = False,
) -> Iterator[Drawing]:
    """The drawing of some columns over the step, unless none of them has a number."""
    found = []
    for label, rows, key in curves:
        points = [(float(row["step"]), scale * float(row[key])) for row in rows if is_finite(row.get(key))]
        found.append(Series(label=label, points=thinned(points)))
    yield from drawn(title, found, unit=unit, skips_start=skips_start)


def _picture_url(png: bytes) -> str:
    """The picture as an address, made smaller where it is large."""
    if len(png) > MOST_PREVIEW_BYTES:
        picture = Image.open(io.BytesIO(png))
        if picture.mode == "RGBA":
            paper = Image.new("RGB", picture.size, "white")
            paper.paste(picture, mask=picture.getchannel("A"))
            picture = paper  # type: ignore[assignment]
        picture.thumbnail((PREVIEW_WIDTH, PREVIEW_WIDTH))
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, format="JPEG", quality=88)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _term(key: str) -> str:
    return key.partition(".")[2] or "main"


def _of_term(key: str) -> str:
    term = key.partition(".")[2]
    return f" '{term}'" if term else ""


def quality_name(key: str) -> str:
    """What a page calls a column of a quality row."""
    return key.replace("_", " ").capitalize()
