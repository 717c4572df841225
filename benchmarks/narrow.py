"""What fewer bits cost a model that paints: bytes, held-out NLL, greedy codes, time of a decoding step.

python benchmarks/narrow.py RUN [--kinds float32 int8 ...] [--device cpu] [--split validation] [--pictures 0]
python benchmarks/narrow.py --model llamagen-b      sizes and times alone: its weights are random

NLL is teacher-forced, in nats per code, over the run's held-out pictures; its difference to float32 is paired by
picture, with the standard error of its mean. "same" is the share of positions whose most likely code, after the true
ones before it, is float32's. A step is one code of all rows with guidance (twice as many rows as pictures): the median
of the last 32 codes of a picture, in the fastest of some paintings.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arra.errors import ArraError
from arra.evaluate.likelihood import Asked, nll_per_picture
from arra.models import Painter, load_model
from arra.models.narrow import WeightKind, narrow_weights, stored_bytes
from arra.sample.decoding import FREE
from arra.sample.generate import Engine
from arra.sample.logits import SamplingSettings
from arra.stages.evaluate import wanted_of
from arra.stages.painters import load_run
from arra.stages.pictures import held_out_codes

KINDS: tuple[WeightKind, ...] = ("float32", "bfloat16", "float16", "int8", "int4")
BATCH = 16
"""Pictures whose likelihood is taken together."""
STEPS = 32
"""Codes that are painted to take the time of one."""


@dataclass(frozen=True)
class HeldOut:
    """Pictures as codes, and what a model is asked for some of them."""

    codes: Tensor
    """(N, P)"""
    ask: Asked


@dataclass(frozen=True)
class Measured:
    """Of one kind of weights."""

    megabytes: float
    nll: Tensor | None
    """(N,)"""
    greedy: Tensor | None
    """(N, P)"""
    step_ms: dict[int, float]
    """By pictures painted together."""


def held_out(folder: Path, split: str, most: int) -> HeldOut:
    """The pictures of a run's split, all of them or evenly spread ones."""
    loaded = load_run(folder)
    if loaded.store is None:
        raise ArraError(f"{folder}: the store it was trained on is gone; NLL needs it")
    rows = loaded.store.rows(split)
    if most and len(rows) > most:
        rows = rows[:: math.ceil(len(rows) / most)]
    wanted = wanted_of(loaded.recipe, loaded.store, rows)
    codes = held_out_codes(loaded.recipe, loaded.store, loaded.tokenizer, rows).flatten(1)
    prompts = wanted.prompts
    return HeldOut(codes, wanted.ask or (lambda places: {"prompts": [prompts[place] for place in places]}))


@torch.no_grad()
def measure(model: Painter, pictures: HeldOut | None, batches: Sequence[int], times: int) -> Measured:
    """Of the model as it is."""
    nll = greedy = None
    if pictures is not None:
        places = range(len(pictures.codes))
        nll = nll_per_picture(model, pictures.codes, pictures.ask, places=places, batch_size=BATCH)
        greedy = torch.cat([found.argmax(-1).cpu() for found in _logits(model, pictures)])
    ask = _numbered(model) if pictures is None else pictures.ask
    steps = {size: step_ms(model, ask, size, times) for size in batches}
    return Measured(sum(map(stored_bytes, model.parameters())) / 1e6, nll, greedy, steps)


def _logits(model: Painter, pictures: HeldOut) -> Iterator[Tensor]:
    for start in range(0, len(pictures.codes), BATCH):
        codes = pictures.codes[start : start + BATCH]
        yield model.logits(codes.to(model.device), **pictures.ask(range(start, start + len(codes))))


def _numbered(model: Painter) -> Callable[[Sequence[int]], dict[str, Any]]:
    if model.settings.condition != "class":
        raise ArraError("--model: expected a decoder that is asked for classes, as llamagen-b; or give a RUN")
    return lambda places: {"labels": list(places)}


def step_ms(model: Painter, ask: Asked, size: int, times: int) -> float:
    """Milliseconds from code to code of so many pictures with guidance, at the end of the picture."""
    settings, medians = SamplingSettings(cfg_scale=2.0), []
    given = torch.zeros(1, model.settings.num_positions, dtype=torch.int64)
    given[:, -STEPS:] = FREE
    with Engine(model, settings=settings, batch_size=size) as engine:
        for _ in range(times):
            clock: list[float] = []

            def note(first: int, index: int, logits: Tensor, clock: list[float] = clock) -> None:
                if logits.is_cuda:
                    torch.cuda.synchronize()
                clock.append(time.perf_counter())

            engine.generate(seeds=range(size), given_codes=given, watch=note, **ask(range(size)))
            medians.append(statistics.median(after - before for before, after in pairwise(clock)))
    return 1000 * min(medians)


def line(kind: str, own: Measured, base: Measured) -> str:
    """A row of the table."""
    cells = [f"{kind:<9}", f"{own.megabytes:10.2f}"]
    if own.nll is not None and base.nll is not None and own.greedy is not None and base.greedy is not None:
        difference = (own.nll - base.nll).double()
        error = difference.std().item() / math.sqrt(len(difference))
        same = (own.greedy == base.greedy).double().mean().item()
        cells += [f"{own.nll.double().mean().item():9.5f}", f"{difference.mean().item():+10.5f} ± {error:.5f}"]
        cells += [f"{100 * same:7.2f} %"]
    return "  ".join(cells + [f"{found:8.2f}" for found in own.step_ms.values()])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run, its store beside it")
    parser.add_argument("--model", help="instead of a run: a decoder of random weights")
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=KINDS[1:], help="float32 always comes first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--pictures", type=int, default=0, help="of the split at most; 0 takes all")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="pictures that are painted together")
    parser.add_argument("--times", type=int, default=3, help="paintings of which the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if (asked.run is None) == (asked.model is None):
        parser.error("give a RUN, or --model")
    torch.set_num_threads(asked.threads)
    pictures = None if asked.run is None else held_out(asked.run, asked.split, asked.pictures)
    print(f"{asked.run or asked.model}, {asked.device}, threads {asked.threads}")
    nll = [] if pictures is None else [f"{'NLL':>9}", f"{'to float32':>20}", f"{'same':>9}"]
    print("  ".join([f"{'weights':<9}", f"{'10^6 bytes':>10}", *nll, *(f"ms at {size:2d}" for size in asked.batches)]))
    base = None
    for kind in ("float32", *asked.kinds):
        model = load_model(asked.run or asked.model).to(asked.device)
        try:
            narrow_weights(model, kind)
        except ArraError as error:
            print(f"{kind:<9}  {error}")
            continue
        own = measure(model, pictures, asked.batches, asked.times)
        base = base or own
        print(line(kind, own, base), flush=True)


if __name__ == "__main__":
    main()
