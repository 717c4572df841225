"""A set of pictures measured against another: `arra evaluate` of a folder, an .npz, or what a run paints.

    SUBJECT (a run paints first) --open_set--> pictures --one pass--> Seen --\\
    REFERENCE --open_reference--> pictures, statistics --kept pass--> Seen ---> measures --> metrics.json, card.html
"""

import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from arra.data.openmoji import cache_folder
from arra.distributed import Ranks, joined_ranks, own_device, set_threads
from arra.evaluate.card import Card, Evaluation
from arra.evaluate.collecting import KEPT_VECTORS, Seen, collect, look_of
from arra.evaluate.measures import outputs_of
from arra.evaluate.references import see_reference
from arra.evaluate.sets import PictureSet, chosen_rows
from arra.report.card_page import PAGE_FILE, Nearest, card_page
from arra.runs import atomic_write, remove_unfinished, writing
from arra.stages.process import Progress, silent
from arra.stages.set_facts import about_set, protocol_of_set
from arra.stages.set_measures import MeasuredSet
from arra.stages.set_opening import Opened, looks_at, nothing_to_measure, open_for_measures, open_networks
from arra.stages.set_options import SetOptions, check_options, has_splits, make_plan
from arra.stages.set_subjects import paint_for_set

NUM_SHOWN, NUM_NEAREST = 64, 8
"""Pictures and nearest pairs on the page."""


@dataclass(frozen=True)
class EvaluatedSet:
    """A measured set and where its card lies."""

    evaluation: Evaluation
    folder: Path

    @property
    def page(self) -> Path:
        """The card as a page."""
        return self.folder / PAGE_FILE


def evaluate_set(subject: Path | str, options: SetOptions, *, progress: Progress = silent) -> EvaluatedSet:
    """The measures of a set, written beside it (or to `options.out`); on every rank, written by the first.

    Raises:
        ArraError: no such set, protocol or space, missing weights, sets that do not fit, or too few pictures.
    """
    set_threads(options.threads)
    plan = make_plan(options)
    check_options(subject, plan, options)
    if (Path(subject) / "recipe.yaml").is_file():
        # painting takes hours: what is missing afterwards is better known before
        open_networks(plan, options, device=torch.device("cpu"), progress=progress)
        subject, options = paint_for_set(Path(subject), plan, options, progress=progress)
    device = own_device(options.device)
    with joined_ranks(device) as ranks:
        told = progress if ranks.is_first else silent
        out = _out_of(subject, options)
        opened = open_for_measures(subject, plan, options, device=device, progress=told)

        def prepare() -> str:
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
                remove_unfinished(out)
                mine = f".{platform.node()}-{os.getpid()}.tmp"  # what a kill leaves of it, the next evaluation removes
                return scratch.enter_context(TemporaryDirectory(dir=out, prefix=".seen.", suffix=mine))

        with ExitStack() as scratch:
            folder = Path(ranks.by_first(prepare))
            seen = collect(
                opened.pictures,
                looks_at(opened, device),
                folder=folder,
                ranks=ranks,
                device=device,
                batch_size=options.batch_size,
                progress=lambda done, total: told("looking at pictures", done, total),
            )
            reference = _see(opened, opened.real, "reference", options, ranks, device, told)
            training = _see(opened, opened.training, "training", options, ranks, device, told)
            measured = MeasuredSet(subject, opened, seen, reference, training, options)
            return ranks.by_first(lambda: _written(measured, out, told))


def _out_of(subject: Path | str, options: SetOptions) -> Path:
    if options.out is not None:
        return options.out
    path = Path(subject)
    if path.is_dir() and not has_splits(str(path)):
        return path
    return path.with_name(path.name.removesuffix(".npz") + ".evaluation")


def _see(
    opened: Opened, pictures: PictureSet | None, what: str, options: SetOptions, ranks: Ranks, device: torch.device,
    progress: Progress,
) -> Seen | None:  # fmt: skip
    """What spaces say of the reference's, or of training pictures; kept for the next time."""
    if pictures is None:
        return None
    looks = []
    for name, space in opened.spaces.items():
        measures = [each for each in opened.plan.measures if what == "reference" or each.metric == "copied"]
        outputs, distributions = outputs_of(measures, name, of_reference=True)
        if outputs:
            looks.append(look_of(space, outputs, name=name, distributions=sorted(distributions)))
    if not looks:
        return None
    return see_reference(
        pictures,
        looks,
        cache=cache_folder() / "references",
        ranks=ranks,
        device=device,
        batch_size=options.batch_size,
        keep=KEPT_VECTORS if what == "reference" else len(pictures),  # what was copied may be any of them
        progress=lambda done, total: progress(f"looking at {what} pictures", done, total),
    )


def _written(measured: MeasuredSet, out: Path, progress: Progress) -> EvaluatedSet:
    """The card, beside its values and its page."""
    rows, values = measured.rows(progress)
    if not rows:  # and no card, which would take the place of one that says something
        raise nothing_to_measure(measured.opened)
    card = Card(
        run=str(measured.subject),
        protocol=protocol_of_set(measured),
        results=tuple(rows),
        about=about_set(measured),
    )
    evaluation = Evaluation(card=card, values=values)
    evaluation.save(out)
    pictures = measured.opened.pictures
    shown = chosen_rows(len(pictures), NUM_SHOWN).tolist()
    names = pictures.prompts or pictures.ids
    unpicked = [(names[row], image) for row, image in zip(shown, pictures.read(shown), strict=True)]
    page = card_page(card, title=str(measured.subject), unpicked=unpicked, nearest=_nearest(measured))
    atomic_write(out / PAGE_FILE, page)
    return EvaluatedSet(evaluation, out)


def _nearest(measured: MeasuredSet) -> list[Nearest]:
    """Generated and training pictures that are nearest to each other, in the first space that was asked."""
    pictures, training = measured.opened.pictures, measured.opened.training
    if training is None or not measured.copies or measured.training is None:
        return []
    space, copies = next(iter(measured.copies.items()))
    key, found = f"{space}.features", []
    for place, other in copies.closest(NUM_NEAREST).tolist():
        row = int(measured.seen.outputs[key].rows[place])
        theirs = int(measured.training.outputs[key].rows[other])
        (image,), (source,) = pictures.read([row]), training.read([theirs])
        mark = (
            "nearer than held-out pictures are" if copies.nearest.distances[place] < copies.threshold else "not copied"
        )
        words = f"{pictures.ids[row]} and {training.ids[theirs]}: {copies.nearest.distances[place]:.4f}, {mark}"
        found.append(Nearest(image, source, words))
    return found
