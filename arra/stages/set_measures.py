"""From what was seen of a set to the rows of its card.

Opened, Seen of pictures, reference and training --> MeasuredSet.rows --> card.Result with per-picture values
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.agreement import clip_measures
from arra.evaluate.card import PIXELS, Result, measure_row, row_values, values_key
from arra.evaluate.collecting import Seen
from arra.evaluate.findings import WORDS, findings_auroc, labels_of_prompts, read_labels
from arra.evaluate.measured import Measured
from arra.evaluate.measures import OF_VECTORS, HowMeasured, SetMeasures
from arra.evaluate.neighbours import Copying, copied
from arra.evaluate.protocols import Measure
from arra.evaluate.scores import MS_SSIM_LEAST_SIZE, ms_ssim_within
from arra.evaluate.sets import PictureSet
from arra.evaluate.spaces import INCEPTION, EncoderSpace
from arra.stages.process import Progress
from arra.stages.set_opening import PAIR, Opened
from arra.stages.set_options import OF_PROMPTS, SetOptions, told_measure
from arra.stages.set_subjects import known_teachers

ALL = "all"
"""What a card calls the split of pictures that are of none."""
OWN_LEFT_OUT = "no picture is compared with the real one of its own prompt, which would lower it"
FEWEST_GROUPS = 30
"""Prompts with several pictures each are resampled whole from so many on; of fewer, pictures are resampled."""


@dataclass
class MeasuredSet:
    """From what was seen to rows, with all that a card says beside them."""

    subject: Path | str
    opened: Opened
    seen: Seen
    reference: Seen | None
    training: Seen | None
    options: SetOptions
    copies: dict[str, Copying] = field(default_factory=dict)
    cosines: dict[str, np.ndarray] = field(default_factory=dict)

    def rows(self, progress: Progress) -> tuple[list[Result], dict[str, Tensor]]:
        """The card's rows and the values behind them."""
        opened, rows, values = self.opened, [], dict[str, Tensor]()
        families = known_teachers(self.subject, self.options.teachers) or {}
        whole = self._whole()
        groups = _groups(opened.pictures)
        for number, measure in enumerate(opened.plan.measures):
            progress(f"measuring: {told_measure(measure)}", number, len(opened.plan.measures))
            space = opened.spaces.get(measure.space or "")
            for metric, found, note in self._numbers(measure, whole):
                own_groups = groups if len(found.per_picture) == self.seen.count else None
                row = measure_row(
                    found,
                    metric=metric,
                    split=self.split,
                    space=measure.space or PIXELS,
                    num_images=self.seen.count,
                    groups=own_groups,
                    is_teachers=space is not None and space.family in families.values(),
                    note=note,
                    num_resamples=self.options.num_resamples,
                    seed=self.options.seed,
                )
                row = replace(row, num_images=self.seen.count)
                rows.append(row)
                values |= row_values(row, found)
        if groups is not None:
            values[values_key("groups", split=self.split)] = groups
        return rows, values

    @property
    def split(self) -> str:
        """What rows are told to be of."""
        reference = self.opened.reference
        told = None if reference is None or reference.pictures is None else reference.pictures.about.get("split")
        return str(told or ALL)

    def _whole(self) -> SetMeasures:
        protocol, reference = self.opened.plan.protocol, self.opened.reference
        statistics = {}
        if reference is not None and reference.statistics is not None:
            inception = self.opened.spaces.get(INCEPTION)
            for output, size in ({} if inception is None else inception.sizes).items():
                found = reference.statistics.of(output, size=size)
                if found is not None:
                    statistics[f"{INCEPTION}.{output}"] = found
        how = HowMeasured(
            k=protocol.k, is_split=protocol.is_split, num_reference=protocol.num_reference, seed=self.options.seed
        )
        return SetMeasures(self.seen, self.reference, statistics, how, partners=self.opened.partners)

    def _numbers(self, measure: Measure, whole: SetMeasures) -> list[tuple[str, Measured, str | None]]:
        """Metric, number and note: of most measures one, of some one for every part."""
        metric, note = measure.metric, measure.note
        if metric in OF_VECTORS:
            found = whole.measured(measure)
            if found is None:
                self.opened.not_measured[told_measure(measure)] = "too few pictures to extrapolate from"
                return []
            if metric == "kid_x1000" and whole.partners is not None:
                note = "; ".join(filter(None, (note, OWN_LEFT_OUT)))
            return [(metric, found, note)]
        if metric in OF_PROMPTS:
            cosines = self._cosines(str(measure.space))
            return [(metric, clip_measures(cosines)[metric], note)]
        if metric == "ms_ssim":
            values = np.asarray(self.seen.outputs[PAIR].features[:, 0], dtype=np.float64)
            return [(metric, Measured(value=float(values.mean()), per_picture=values), note)]
        if metric == "ms_ssim_within":
            return self._within(note)
        if metric == "findings_auroc":
            return self._findings(str(measure.space), note)
        if metric == "copied":
            try:
                return [(metric, self._copied(str(measure.space)), note)]
            except ArraError as error:  # held-out pictures that training has seen take no other number away
                self.opened.not_measured[told_measure(measure)] = str(error)
                return []
        raise ArraError(f"metric '{metric}': no set is measured by it")

    def _cosines(self, space: str) -> np.ndarray:
        """Of pictures and prompts, worked out once for both of its metrics."""
        if space not in self.cosines:
            seen, prompts = self.seen.outputs[f"{space}.features"], self.opened.pictures.prompts
            assert prompts is not None
            told = [prompts[row] for row in seen.rows]
            features = torch.from_numpy(np.array(seen.features))
            self.cosines[space] = self.opened.agreements[space].scores_of(features, told).numpy()
        return self.cosines[space]

    def _within(self, note: str | None) -> list[tuple[str, Measured, str | None]]:
        pictures = self.opened.pictures
        sides = {int(side) for shape in self.seen.shapes for side in shape.split(" x ")}
        if len(self.seen.shapes) > 1 or min(sides) < MS_SSIM_LEAST_SIZE:
            self.opened.not_measured["ms_ssim_within"] = (
                f"pictures of {', '.join(self.seen.shapes)} pixels; it takes one size of {MS_SSIM_LEAST_SIZE} or more"
            )
            return []

        found = ms_ssim_within(pictures.read, num_images=len(pictures), seed=self.options.seed)
        return [("ms_ssim_within", found, note)]

    def _findings(self, space: str, note: str | None) -> list[tuple[str, Measured, str | None]]:
        """The mean over findings, then each."""
        network, pictures = self.opened.spaces[space], self.opened.pictures
        names = network.findings if isinstance(network, EncoderSpace) else ()
        if self.options.findings is not None:
            labels = read_labels(self.options.findings, ids=pictures.records or pictures.ids, findings=names)
        else:
            assert pictures.prompts is not None
            labels = labels_of_prompts(pictures.prompts, findings=[name for name in names if name in WORDS])
        scores = self.seen.outputs[f"{space}.findings"].features
        found = findings_auroc(scores[:, [names.index(name) for name in labels.findings]], labels)
        for name, why in found.left_out.items():
            self.opened.not_measured[f"findings_auroc.{name}"] = why
        told = [] if found.macro is None else [("findings_auroc", found.macro, note)]
        return told + [(f"findings_auroc.{name}", one, None) for name, one in found.by_finding.items()]

    def _copied(self, space: str) -> Measured:
        assert self.training is not None
        assert self.reference is not None
        key = f"{space}.features"
        found = copied(
            self.seen.outputs[key].features,
            self.training.outputs[key].features,
            held_out=self.reference.outputs[key].features,
        )
        self.copies[space] = found
        return found.copied


def _groups(pictures: PictureSet) -> Tensor | None:
    """Numbers of the prompts, where enough of them have several pictures; else pictures are alone."""
    asked = pictures.records or pictures.prompts
    if asked is None or not FEWEST_GROUPS <= len(set(asked)) < len(asked):
        return None
    numbers = {name: number for number, name in enumerate(dict.fromkeys(asked))}
    return torch.tensor([numbers[name] for name in asked])
