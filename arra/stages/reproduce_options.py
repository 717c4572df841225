"""What `arra reproduce` is asked for, checked before anything starts, and how its rows are measured.

command line --parse_options--> ReproduceOptions --measured_by a table's protocol--> SetOptions --> a card's folder
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch

from arra.errors import ArraError
from arra.evaluate.card import Evaluation
from arra.evaluate.protocols import find_protocol
from arra.stages.prepare import parse_part
from arra.stages.process import silent
from arra.stages.set_opening import open_networks
from arra.stages.set_options import SetOptions, make_plan, parse_set_options
from arra.stages.tables import PaperTable, Scale
from arra.stages.tasks import Places, words_of

PROTOCOLS = "protocols"
"""Folder of a run with its cards at full scale."""


@dataclass(frozen=True)
class ReproduceOptions:
    """What is asked for."""

    tables: tuple[str, ...]
    rows: tuple[str, ...] | None = None
    """None takes all."""
    scale: Scale = "embedded"
    seeds: int = 3
    equal_compute: bool | None = None
    """Whether a row trains for as many operations as its recipe without alignment would; None: at embedded scale."""
    places: Places = field(default_factory=Places)
    shard: tuple[int, int] | None = None
    """(i, n): the i-th of n parts of the runs, for job arrays."""
    overrides: tuple[str, ...] = ()
    measuring: SetOptions = field(default_factory=SetOptions)
    """At full scale: the weights of protocols' networks, and what is left out."""
    references: Mapping[str, str] = field(default_factory=dict)
    """At full scale: what pictures are compared with, by protocol; the run's own split where none is named."""

    @property
    def is_equal(self) -> bool:
        """Whether rows get equal training compute."""
        return self.scale == "embedded" if self.equal_compute is None else self.equal_compute


def parse_options(
    *,
    tables: Sequence[str],
    rows: str | None,
    scale: str,
    seeds: int,
    processes: int | None,
    devices: str | None,
    ranks: int,
    shard: str | None,
    equal_compute: bool | None,
    overrides: Sequence[str],
    weights: Sequence[str] = (),
    without: Sequence[str] = (),
    references: Sequence[str] = (),
) -> ReproduceOptions:
    """The options as the command line gives them.

    Raises:
        ArraError: an unknown scale, or numbers and parts that are none.
    """
    if scale not in get_args(Scale):
        raise ArraError(f"--scale {scale}: expected {' or '.join(get_args(Scale))}")
    measuring = parse_set_options(weights=weights, inception=None, without=tuple(without))
    if scale != "full" and (measuring != SetOptions() or references):
        raise ArraError("--weights, --without, --reference: of the protocols of --scale full; leave them out")
    return ReproduceOptions(
        tables=tuple(name.removesuffix("/") for name in tables),
        rows=None if rows is None else _names_in(rows),
        scale=scale,  # type: ignore[arg-type]
        seeds=seeds,
        equal_compute=equal_compute,
        places=Places(processes, () if devices is None else _names_in(devices), ranks),
        shard=None if shard is None else parse_part(shard, "--shard"),
        overrides=tuple(overrides),
        measuring=measuring,
        references=_by_protocol(references),
    )


def _by_protocol(references: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in references:
        name, equals, place = text.partition("=")
        if not equals or not place or name in found:
            again = " once" if name in found else ""
            raise ArraError(
                f"--reference {text}: expected PROTOCOL=PATH{again}, as in --reference imagenet-256=VIRTUAL.npz; arra "
                "list protocols has their names"
            )
        found[name] = place
    return found


def _names_in(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def require_measures(tables: Sequence[PaperTable], options: ReproduceOptions) -> None:
    """Nothing; at full scale the networks of the tables' protocols open: better now than after days of training.

    Raises:
        ArraError: weights or a package are missing, pictures to compare with are not named, or an option that means
            nothing for any of the protocols.
    """
    if options.scale != "full":
        return
    protocols = dict[str, bool]()
    for table in tables:
        for row in table.rows:
            if row.recipe is not None:
                name, of_classes = table.protocol_of(row), row.recipe.model.condition == "class"
                protocols[name] = protocols.get(name, False) or of_classes
    known = {each for name in protocols for part in find_protocol(name).measures for each in (part.metric, part.space)}
    for option, names in (("--without", options.measuring.without), ("--weights", options.measuring.weights)):
        if odd := [name for name in names if name not in known]:
            raise ArraError(f"{option} {odd[0]}: nothing of {', '.join(protocols)}; leave it out")
    for name, place in options.references.items():
        if name not in protocols:
            raise ArraError(f"--reference {name}={place}: these rows are measured by {', '.join(protocols)} alone")
        if not Path(place).exists():
            raise ArraError(f"--reference {name}={place}: no such file or folder; check the path")
    for name, of_classes in protocols.items():
        protocol, own = find_protocol(name), measured_by(name, options)
        if of_classes and protocol.per_class is not None and own.reference is None:
            raise ArraError(
                f"{name}: compares with {protocol.reference}; say where that is with --reference {name}=PATH"
            )
        open_networks(make_plan(own), own, device=torch.device("cpu"), progress=silent)


def measured_by(protocol: str, options: ReproduceOptions) -> SetOptions:
    """How pictures are measured by a protocol: of all that was given what it knows."""
    given, measures = options.measuring, find_protocol(protocol).measures
    known = {name for each in measures for name in (each.metric, each.space)}
    own = replace(
        given,
        protocol=protocol,
        reference=options.references.get(protocol),
        without=tuple(name for name in given.without if name in known),
        weights={},
    )
    spaces = make_plan(own).spaces
    return replace(own, weights={space: place for space, place in given.weights.items() if space in spaces})


def card_folder(run: Path, measured: SetOptions | None) -> Path:
    """Where a run's card lies: beside its weights, else by protocol and by all else that says how it is measured."""
    if measured is None:
        return run
    assert measured.protocol is not None
    words = words_of(replace(measured, out=None))
    usual = words == words_of(SetOptions(protocol=measured.protocol))
    made = "" if usual else "-" + hashlib.sha256(json.dumps(words).encode()).hexdigest()[:6]
    return run / PROTOCOLS / (measured.protocol + made)


def card_in(folder: Path) -> Evaluation | None:
    """The card in a folder; None where there is none, or a damaged one, which is made again."""
    try:
        return Evaluation.load(folder)
    except ArraError:
        return None
