"""A training so small that a step takes milliseconds: a decoder of two blocks, fourteen records in memory.

Run as a script, under torchrun, it trains named cases one after another: toy_training.py FOLDER {NAME: OPTIONS}.
"""

import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from arra.data.batches import Batches, InMemory, TrainBatch, text_batch
from arra.data.conditions import TextConditions
from arra.distributed import ALONE, Ranks, joined_ranks
from arra.errors import ArraError
from arra.models import Decoder, DecoderSettings, Painter
from arra.runs import Run
from arra.train.alignment import build_alignment
from arra.train.interrupt import TrainingInterrupted
from arra.train.loop import Trainer
from arra.train.meters import peak_flops
from arra.train.parallel import gathered
from arra.train.passes import Steps
from arra.train.settings import AlignSettings, TrainSettings

ALIGN = AlignSettings(layer=1, components=4)
STEPS = 12
TIMES = (
    "seconds",
    "images_per_second",
    "tokens_per_second",
    "mfu",
    "peak_memory_gib",
    "waiting_share",
)
"""Columns of the metrics that no two runs share."""
RECORDS = 14


class Letters:
    """A text tokenizer for tests: one id for each letter."""

    def encode(self, prompt: str) -> list[int]:
        return [2 + ord(letter) % 18 for letter in prompt]

    def save(self, path: Path) -> None:
        raise NotImplementedError


def make_model(dropout: float) -> Decoder:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "num_codes": 16, "grid": (2, 3)}
    fields |= {"condition": "text", "prefix_length": 5, "text_vocab_size": 20, "multiple_of": 8}
    fields |= {"token_dropout": dropout, "resid_dropout": dropout, "ffn_dropout": dropout}
    model = Decoder(DecoderSettings(**fields))
    model.text_tokenizer = Letters()
    return model


def make_batches(batch_size: int = 6, features: Tensor | None = None) -> Batches:
    generator = torch.Generator().manual_seed(7)
    if features is None:
        features = torch.randn(RECORDS, 8, generator=generator)
    captions = [[[2 + row], [3, 2 + row]] for row in range(RECORDS)]
    return Batches(
        conditions=TextConditions(captions, 5, dropout=0.2, alternative_share=0.3),
        pictures=InMemory(torch.randint(0, 16, (RECORDS, 6), generator=generator), {"teacher": features}),
        batch_size=batch_size,
        seed=1,
    )


def held(batches: Steps) -> InMemory:
    assert isinstance(batches, Batches)
    assert isinstance(batches.pictures, InMemory)
    return batches.pictures


def make_trainer(
    path: Path,
    *,
    align: AlignSettings | None = ALIGN,
    preview: Callable[[Painter, int], None] | None = None,
    validate: bool = True,
    dropout: float = 0.1,
    features: Tensor | None = None,
    ranks: Ranks = ALONE,
    empty: bool = False,
    damaged_at: int | None = None,
    **changes: Any,
) -> Trainer:
    """A training in a folder; `empty` leaves the model to be filled by rank zero."""
    fields: dict[str, Any] = {"steps": STEPS, "batch_size": 6, "warmup_steps": 3, "log_every_steps": 2, "seed": 1}
    fields |= {"validate_every_steps": 4, "checkpoint_every_steps": 5, "preview_every_steps": 1 if preview else None}
    train_settings = TrainSettings(**{**fields, **changes})
    batches = make_batches(train_settings.batch_size, features)
    pictures = held(batches)
    assert pictures.features is not None
    held_out = text_batch([[2], [3, 4], []], pictures.codes[:3], prefix_length=5)
    alignment = None
    if align is not None:  # rank zero's counts: where others begin, and what they would align with, is of no account
        own = {name: each.roll(ranks.rank, 1) for name, each in pictures.features.items()}
        alignment = build_alignment(align, own, hidden_size=32, seed=1 + ranks.rank)
    model = make_model(dropout)
    trainer = Trainer(
        model=model.to("meta") if empty else model,
        alignment=alignment,
        batches=batches,
        validation=[held_out] if validate else [],
        settings=train_settings,
        run=Run.create(path, "name: tiny\n", {"seed": 1}),
        preview=preview,
        ranks=ranks,
        device=torch.device("cpu"),
    )
    if damaged_at is not None:
        trainer.ahead.batches = Damaged(batches, damaged_at)
    return trainer


def trained(path: Path, **options: Any) -> Trainer:
    trainer = make_trainer(path, **options)
    trainer.train()
    return trainer


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that the next step depends on."""
    return {name: gathered(value, trainer.place).clone() for name, value in trainer.tensors().items()}


def model_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and optimiser of the model, without what the alignment has of its own."""
    apart = ("align.", "optimizer.align.", "balance.", "losses")
    return {name: value for name, value in state_of(trainer).items() if not name.startswith(apart)}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert set(one) == set(other)
    return [name for name in one if not torch.allclose(one[name], other[name], rtol=0, atol=0, equal_nan=True)]


def rows_of(trainer: Trainer, *without: str) -> list[dict[str, Any]]:
    dropped = {*TIMES, *without}
    return [{key: value for key, value in row.items() if key not in dropped} for row in trainer.run.read_metrics()]


class Damaged:
    """Batches at one of which the features of one record are no numbers."""

    def __init__(self, batches: Steps, position: int) -> None:
        self.batches, self.position = batches, position

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> TrainBatch:
        batch = self.batches.batch(step, rank=rank, num_ranks=num_ranks)
        if step != self.position or batch.features is None or batch.rows is None:
            return batch
        whole = self.batches.batch(step).rows
        assert whole is not None
        hit = batch.rows[:, None] == whole[-1]  # of the last rank
        return replace(batch, features={name: each.where(~hit, math.nan) for name, each in batch.features.items()})


class Disturbed:
    """Batches at one of which the last rank gets a signal, once: a file remembers it."""

    def __init__(self, batches: Steps, position: int, number: int, marker: Path) -> None:
        self.batches, self.position, self.number, self.marker = batches, position, number, marker

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> TrainBatch:
        if step == self.position and rank == num_ranks - 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), self.number)
        return self.batches.batch(step, rank=rank, num_ranks=num_ranks)


def disturbed(trainer: Trainer, position: int, number: int) -> Trainer:
    trainer.ahead.batches = Disturbed(trainer.batches, position, number, trainer.run.path / f"signal-{position}")
    return trainer


def run_case(folder: Path, ranks: Ranks, *, signal_at: tuple[int, int] | None = None, **options: Any) -> None:
    """Trains to the end, or to a signal, and writes the whole state to FOLDER/state.safetensors."""
    align = options.pop("align", {})
    options["align"] = None if align is None else AlignSettings(**{**ALIGN.model_dump(), **align})
    empty = options.get("parallel", {}).get("kind", "ddp") != "ddp" and not ranks.is_first
    trainer = make_trainer(folder, ranks=ranks, empty=empty, **options)
    if signal_at is not None:
        disturbed(trainer, *signal_at)
    with suppress(TrainingInterrupted):
        trainer.train()
    state = state_of(trainer)
    if ranks.is_first:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "state.safetensors")


def main(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    with joined_ranks(torch.device("cpu")) as ranks:
        for name, options in cases.items():
            run_case(folder / name, ranks, **options)


TOLD = 3
"""Exit code of a training that told its user in words why it stops; the words are in FOLDER/told."""


def serve() -> None:
    """Does what each line of the input asks for, in a forked process, and prints its exit code; negative: a signal.

    So many trainings can be run and killed without importing everything each time, for a process that should not be
    forked itself: autograd may have threads there. A line holds the arguments of `train_on_ranks` or `train_disturbed`.
    """
    torch.set_num_threads(1)
    peak_flops(torch.device("cpu"), torch.float32)  # measured once for all
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if process == 0:
            code = 1
            try:
                code = (train_on_ranks if "ranks" in asked else train_disturbed)(**asked)
            finally:
                if sys.exception() is not None:
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def train_on_ranks(folder: str, cases: dict[str, dict[str, Any]], ranks: int, restarts: int = 0) -> int:
    """Trains the cases on so many processes, as `torchrun --standalone` starts them, but forked."""
    started = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        max_restarts=restarts,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
    )
    elastic_launch(started, main)(Path(folder), cases)
    return 0


def train_disturbed(
    folder: str, options: dict[str, Any], killed_at: int | None = None, fault: dict[str, Any] | None = None
) -> int:
    """Trains; `killed_at` is a position, `fault` what `disturb_system` takes."""
    trainer = make_trainer(Path(folder), **options)
    if killed_at is not None:
        disturbed(trainer, killed_at, signal.SIGKILL)
    if fault is not None:
        disturb_system(**fault)
    try:
        trainer.train()
    except ArraError as error:
        (Path(folder) / "told").write_text(str(error))
        return TOLD
    return 0


def disturb_system(*, call: str, at: int, error: int | None = None) -> None:
    """From its `at`-th call on, counted from 0, a function of `os` fails, or the process is killed in its place."""
    real, count = getattr(os, call), iter(range(10**6))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(count) >= at:
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            assert error is not None
            raise OSError(error, os.strerror(error), str(args[0]))
        return real(*args, **kwargs)

    setattr(os, call, failing)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(Path(sys.argv[1]), json.loads(sys.argv[2]))
