"""All that an evaluation of a set needs, opened: pictures, reference, networks, and what looks at each picture.

    SetOptions --make_plan--> Plan --open_for_measures--> Opened --looks_at--> one pass of arra.evaluate.collecting

What cannot be measured of these sets is found here, before anything is looked at, with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.agreement import Agreement, open_agreement
from arra.evaluate.collecting import Look, look_of
from arra.evaluate.measures import NEIGHBOURS, OF_VECTORS, outputs_of
from arra.evaluate.neighbours import COPY_LEVEL
from arra.evaluate.protocols import Measure
from arra.evaluate.scores import ms_ssim
from arra.evaluate.sets import PictureSet, SomePictures, Space
from arra.evaluate.spaces import INCEPTION, open_space
from arra.report.card_page import grouped_lines
from arra.stages.picture_sets import Reference, open_reference, open_set
from arra.stages.process import Progress
from arra.stages.set_options import OF_PROMPTS, Plan, SetOptions, has_splits, sized, told_measure

PAIR = "pair.ms_ssim"
"""The output of what looks at pairs."""


@dataclass(frozen=True)
class Opened:
    """All that is needed for the passes."""

    plan: Plan
    pictures: PictureSet
    reference: Reference | None
    training: PictureSet | None
    spaces: Mapping[str, Space]
    agreements: Mapping[str, Agreement]
    partners: Sequence[int] | None
    """For each picture the row of the reference that shows the same prompt; None where they are no pairs."""
    not_measured: dict[str, str] = field(default_factory=dict)

    @property
    def real(self) -> PictureSet | None:
        """The reference's pictures, where it has some."""
        return None if self.reference is None else self.reference.pictures


def open_for_measures(
    subject: Path | str, plan: Plan, options: SetOptions, *, device: torch.device, progress: Progress
) -> Opened:
    """Sets and networks, opened; what cannot be measured is in `not_measured`, with the reason.

    Raises:
        ArraError: no such set, weights that are missing, or nothing that can be measured.
    """
    size, filter = sized(plan, options)
    progress("opening pictures", 0, 1)
    split = options.split or plan.protocol.split
    own_split = split if has_splits(str(subject)) else None
    pictures = open_set(subject, image_size=size, filter=filter, max_images=options.max_images, split=own_split)
    reference = training = None
    if options.reference is not None:
        reference = open_reference(
            options.reference, image_size=size, filter=filter, split=split if has_splits(options.reference) else None
        )
    if options.training is not None:
        training_split = options.training_split if has_splits(options.training) else None
        training = open_set(options.training, image_size=size, filter=filter, split=training_split)
    partners = _partners(pictures, reference)
    if options.partners_alone and partners is not None and reference is not None and reference.pictures is not None:
        rows = list(dict.fromkeys(partners))
        reference = replace(reference, pictures=SomePictures(reference.pictures, rows))
        partners = _partners(pictures, reference)
    opened = Opened(plan, pictures, reference, training, {}, {}, partners)
    for each in plan.measures:
        if why := _why_not(each, opened):
            opened.not_measured[told_measure(each)] = why
    wanted = [each for each in plan.measures if told_measure(each) not in opened.not_measured]
    if not wanted:
        raise nothing_to_measure(opened)
    plan = replace(plan, measures=tuple(wanted))
    spaces, agreements = open_networks(plan, options, device=device, progress=progress)
    return replace(opened, plan=plan, spaces=spaces, agreements=agreements)


def open_networks(
    plan: Plan, options: SetOptions, *, device: torch.device, progress: Progress
) -> tuple[dict[str, Space], dict[str, Agreement]]:
    """The plan's networks by name, and those of them that have a text half too.

    Raises:
        ArraError: weights or a package are missing.
    """
    spaces: dict[str, Space] = {}
    agreements: dict[str, Agreement] = {}
    for name in plan.spaces:
        progress(f"opening {name}", 0, 1)
        weights = options.weights.get(name)
        try:
            if name in plan.agreements:
                prefix = plan.protocol.prefix
                agreements[name] = open_agreement(name, weights=weights, prefix=prefix, device=device)
                spaces[name] = agreements[name].space
            else:
                spaces[name] = open_space(name, weights=weights, device=device)
        except ArraError as error:
            raise ArraError(f"{error}; or measure without it: --without {name}") from error
    return spaces, agreements


def nothing_to_measure(opened: Opened) -> ArraError:
    """What is raised where no measure is left, with every reason."""
    reasons = "; ".join(grouped_lines(opened.not_measured))
    return ArraError(f"{opened.pictures.name}: nothing to measure ({reasons})")


def _partners(pictures: PictureSet, reference: Reference | None) -> Sequence[int] | None:
    """Rows of the reference, by records that both name, else by names that are more than numbers."""
    if reference is None or reference.pictures is None:
        return None
    ours, theirs = _names(pictures), _names(reference.pictures)
    places = {name: row for row, name in enumerate(theirs)}
    if not ours or len(places) < len(theirs) or any(name not in places for name in ours):
        return None
    return [places[name] for name in ours]


def _names(pictures: PictureSet) -> Sequence[str]:
    """What tells each picture from those of other sets; nothing where they are numbered, as everybody's are."""
    if pictures.records is not None:
        return pictures.records
    is_numbered = all(PurePosixPath(name).stem.isdecimal() for name in pictures.ids)
    return () if is_numbered else pictures.ids


def _why_not(measure: Measure, opened: Opened) -> str | None:
    """Why a measure cannot be taken of these sets; None where it can."""
    metric, reference, pictures = measure.metric, opened.reference, opened.pictures
    if metric in (*OF_PROMPTS, "findings_auroc"):
        return "nobody says what the pictures should show" if pictures.prompts is None else None
    if metric == "ms_ssim":
        if opened.partners is None:
            return "no pairs: the reference names other pictures"
        return None
    if metric == "copied":
        if opened.training is None:
            return "no training pictures; name them, as in --training STORE"
        if opened.real is None:
            return "no held-out pictures to compare with"
        least = round(1 / COPY_LEVEL) - 1
        return None if len(opened.real) >= least else f"{len(opened.real)} held-out pictures; it takes {least}"
    if metric == "inception_score" or metric not in OF_VECTORS:
        return None
    if reference is None:
        return "no reference; name one, as in --reference FOLDER"
    if opened.real is not None:
        least, fewest = opened.plan.protocol.k + 1, min(len(pictures), len(opened.real))
        return f"{fewest} pictures; it takes {least}" if metric in NEIGHBOURS and fewest < least else None
    statistics = reference.statistics
    output = "spatial" if metric == "sfid" else "features"
    if measure.space == INCEPTION and metric in ("fid", "sfid", "fid_infinity") and statistics is not None:
        return None if output in statistics.moments else f"{statistics.name} has no statistics of it"
    return f"{reference.name} has statistics and no pictures"


def looks_at(opened: Opened, device: torch.device) -> list[Look]:
    """All that looks at the generated pictures."""
    looks = []
    for name, space in opened.spaces.items():
        outputs, distributions = outputs_of(opened.plan.measures, name, of_reference=False)
        if outputs:
            looks.append(look_of(space, outputs, name=name, distributions=sorted(distributions)))
    if opened.plan.wants("ms_ssim"):
        assert opened.partners is not None
        assert opened.reference is not None
        assert opened.reference.pictures is not None
        looks.append(_pair_look(opened.reference.pictures, opened.partners, device))
    return looks


def _pair_look(others: PictureSet, partners: Sequence[int], device: torch.device) -> Look:
    def note(rows: Sequence[int], images: Tensor) -> dict[str, Tensor]:
        read = others.read([partners[row] for row in rows])
        shapes = {image.shape for image in read}
        if shapes != {tuple(images.shape[1:])}:
            sides = " x ".join(map(str, sorted(shapes - {tuple(images.shape[1:])})[0][:2]))
            raise ArraError(
                f"MS-SSIM: pictures of {images.shape[1]} x {images.shape[2]} pixels and partners of {sides}; bring "
                "both to one size with --image-size"
            )
        pairs = torch.from_numpy(np.stack(read)).to(device)
        return {"ms_ssim": torch.from_numpy(ms_ssim(images, pairs))[:, None].float()}

    name, output = PAIR.split(".")
    return Look(name, {output: 1}, note)
