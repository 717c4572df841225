"""What `arra evaluate` measures of a set of pictures, and with which networks: a protocol, spaces, or both.

--protocol, --space, --without, --weights --> SetOptions --> Plan of measures
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arra.errors import ArraError
from arra.evaluate.protocols import Measure, Protocol, find_protocol
from arra.evaluate.spaces import INCEPTION, check_space_name

USUAL_PROTOCOL = "general"
OWN = "spaces"
"""What a card calls the protocol of one who names spaces alone."""
OF_INCEPTION = ("fid", "sfid", "inception_score", "fid_infinity")
OF_ANY = ("fd", "fd_infinity")
OF_PROMPTS = ("clip_score", "clip_score_x100")
"""Metrics that compare pictures with what they should show."""
OF_ALL = ("kid_x1000", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class SetOptions:
    """How a set is measured."""

    reference: str | None = None
    protocol: str | None = None
    spaces: tuple[str, ...] = ()
    """Measured beside what the protocol says; without a protocol these alone."""
    without: tuple[str, ...] = ()
    """Spaces and metrics of the protocol that are left out."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """By space: file, folder or repository."""
    image_size: int | None = None
    filter: str | None = None
    max_images: int | None = None
    split: str | None = None
    """Of a store or run: whose pictures are the reference, and whose prompts a run paints."""
    partners_alone: bool = False
    """Of a reference that shows what the pictures should, only the pictures of the same prompts are compared with."""
    training: str | None = None
    """Pictures that the model was trained on, for the copying check."""
    training_split: str = "train"
    teachers: tuple[str, ...] = ()
    """Encoders that the model was aligned to, where its run does not say."""
    findings: Path | None = None
    """Table of chest X-ray findings, in place of those that prompts tell."""
    cfg_scale: float | None = None
    """That a run paints with; None is its own."""
    num_images: int | None = None
    """That a run paints; None is the protocol's, else one for every record of the split."""
    replace: bool = False
    """Paint anew where a run's folder holds pictures of another model or other settings."""
    tokenizer_weights: Path | None = None
    out: Path | None = None
    batch_size: int = 32
    device: str = "auto"
    threads: int | None = None
    num_resamples: int = 500
    seed: int = 0

    @property
    def are_asked_for(self) -> bool:
        """Whether anything says that sets of pictures are to be compared, and not what a run is trained to do."""
        return any((self.reference, self.protocol, self.spaces))

    @property
    def of_sets_alone(self) -> str:
        """Options that were given and mean nothing where a run is measured as its recipe says."""
        usual = SetOptions()
        names = ["without", "weights", "image_size", "filter", "max_images", "split", "training", "teachers"]
        names += ["findings", "cfg_scale", "num_images", "replace", "out"]
        given = [name for name in names if getattr(self, name) != getattr(usual, name)]
        return ", ".join(_option(name) for name in given)

    @property
    def of_runs_alone(self) -> str:
        """Options that were given and mean nothing where nothing is painted."""
        names = ("num_images", "cfg_scale", "replace", "tokenizer_weights")
        return ", ".join(_option(name) for name in names if getattr(self, name) not in (None, False))


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    protocol: Protocol
    measures: tuple[Measure, ...]
    left_out: tuple[str, ...]
    """What of the protocol is not measured because the user said so."""

    @property
    def spaces(self) -> tuple[str, ...]:
        """Networks that are needed."""
        return tuple(dict.fromkeys(each.space for each in self.measures if each.space is not None))

    @property
    def agreements(self) -> tuple[str, ...]:
        """Those of them whose text half is needed too."""
        return tuple(dict.fromkeys(each.space for each in self.measures if each.space and each.metric in OF_PROMPTS))

    def wants(self, metric: str) -> bool:
        """Whether a metric is measured in any space."""
        return any(each.metric == metric for each in self.measures)


def parse_set_options(*, weights: Sequence[str], inception: Path | None, **options: Any) -> SetOptions:
    """The options as the command line gives them.

    Raises:
        ArraError: weights that are not SPACE=PATH, or an unknown space.
    """
    told: dict[str, str] = {}
    for text in weights:
        space, equals, place = text.partition("=")
        if not equals or not space or not place:
            raise ArraError(f"--weights {text}: expected SPACE=PATH, as in dinov2-l14=weights/dinov2-large")
        check_space_name(space)
        told[space] = place
    if inception is not None:
        told[INCEPTION] = str(inception)
    return SetOptions(weights=told, **options)


def make_plan(options: SetOptions) -> Plan:
    """The measures that are asked for.

    Raises:
        ArraError: an unknown protocol, space, or name of what to leave out.
    """
    for name in options.spaces:
        check_space_name(name)
    if options.protocol is None and options.spaces:
        protocol = Protocol(
            name=OWN, use="spaces of the user's choice", measures=(), reference="the one named", sources=()
        )
    else:
        protocol = find_protocol(options.protocol or USUAL_PROTOCOL)
    measures = list(protocol.measures)
    for space in options.spaces:
        own = OF_INCEPTION if space == INCEPTION else OF_ANY
        there = {each.metric for each in measures if each.space == space}
        measures += [Measure(metric=metric, space=space) for metric in (*own, *OF_ALL) if metric not in there]
    if options.training is not None and not any(each.metric == "copied" for each in measures):
        judged = [each.space for each in measures if each.metric in ("fd", "fid")]
        measures += [Measure(metric="copied", space=space) for space in dict.fromkeys(judged)][:1]
    known = {name for each in measures for name in (each.space, each.metric) if name is not None}
    if unknown := sorted(set(options.without) - known):
        raise ArraError(
            f"--without {unknown[0]}: not a space or metric of {protocol.name}; it has {', '.join(sorted(known))}"
        )
    kept = [each for each in measures if each.space not in options.without and each.metric not in options.without]
    if not kept:
        raise ArraError(f"--without: nothing of {protocol.name} is left to measure; leave fewer out")
    left = [told_measure(each) for each in measures if each not in kept]
    return Plan(protocol, tuple(kept), tuple(left))


def check_options(subject: Path | str, plan: Plan, options: SetOptions) -> None:
    """Nothing; every option that was given means something for this subject and plan.

    Raises:
        ArraError: one does not, so that what was meant would not be measured.
    """
    is_run = (Path(subject) / "recipe.yaml").is_file()
    if (unused := options.of_runs_alone) and not is_run:
        raise ArraError(f"{unused}: of what a run paints, and {subject} is no run; leave it out")
    places = [place for place in (str(subject), options.reference) if place is not None]
    if options.split is not None and not any(has_splits(place) for place in places):
        raise ArraError(f"--split {options.split}: of stores and runs, {' and '.join(places)} have none; leave it out")
    if options.filter is not None and sized(plan, options)[0] is None:
        raise ArraError(f"--filter {options.filter}: nothing is resized; give --image-size too")
    if options.findings is not None and not plan.wants("findings_auroc"):
        raise ArraError(f"--findings {options.findings}: no findings are measured; name --protocol mimic-cxr")
    for space in options.weights:
        if space not in plan.spaces:
            raise ArraError(f"--weights {space}=...: nothing is measured in it; add --space {space}, or leave this out")


def has_splits(place: str) -> bool:
    """Whether a place is of several splits, of which one must be said: a store, an export, a run."""
    path = Path(place)
    return not (path.suffix == ".npz" or (path / "samples.jsonl").is_file()) and (
        (path / "recipe.yaml").is_file() or (path / "manifest.json").is_file() or not path.exists()
    )


def sized(plan: Plan, options: SetOptions) -> tuple[int | None, str]:
    """Pixels a side that sets are brought to, None where they stay as they are, and the filter."""
    return options.image_size or plan.protocol.image_size, options.filter or plan.protocol.filter


def _option(name: str) -> str:
    """What the command line calls a field of `SetOptions`."""
    return "--" + {"teachers": "teacher"}.get(name, name).replace("_", "-")


def told_measure(measure: Measure) -> str:
    """A measure in a few words: `fd in dinov2-l14`."""
    return measure.metric if measure.space is None else f"{measure.metric} in {measure.space}"
