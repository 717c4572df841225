"""Our training step beside the plain loop: time, peak memory, share of the machine's matrix rate, where the time goes.

python benchmarks/train.py [--only vocabulary rate profile gpu] [--threads 2] [--steps 4] [--rounds 2] [--json FILE]

Ours is a step of `arra.train.loop.Trainer`, reading a store. The plain loop does what the released trainings do, on
`plain_llamagen.py`: codes and features from files of their own, all logits in float32, a cross-entropy over them and a
log-sum-exp of its own for z, clipping and AdamW as torch comes, the loss read in every step. Every measurement is a
process of its own, plain and ours in turn; memory is what it held at most above its imports.

vocabulary  a decoder of 65,536 codes, 2 pictures of 1,024, aligned: asked no slower, at most 0.6 of the memory
rate        LlamaGen-B, 4 pictures of 256, not aligned: asked 75 % of the best matrix product of the same minutes (the
            original: 64 %), counting matrices that multiply positions alone; the count of `arra.train.meters`, which
            adds attention, stands beside it
profile     the step of `rate`, by its parts and by torch's operators
gpu         LlamaGen B, L and XL in bfloat16 on CUDA, plain and compiled, with alignment and without: asked 45 % MFU,
            alignment at most 3 %
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from arra.data.batches import Batches
from arra.data.conditions import ClassConditions
from arra.data.store import Store
from arra.models import Decoder, DecoderSettings, lean
from arra.models.llamagen import SIZES
from arra.runs import Run
from arra.stages.pictures import StoredPictures
from arra.train import loop, objective, parallel, passes
from arra.train.alignment import build_alignment
from arra.train.loop import Trainer
from arra.train.meters import model_flops
from arra.train.settings import AlignSettings, TrainSettings

sys.path.insert(0, str(Path(__file__).parent))
from data import FEATURES, write_synthetic
from decoder import found_by, machine, memory_gb
from plain_llamagen import PlainLlamaGen

VOCABULARY = {"num_layers": 6, "num_heads": 8, "hidden_size": 512, "num_codes": 65536, "grid": (32, 32)}
GPU_BATCHES = {"b": 256, "l": 128, "xl": 64}
"""Pictures that fit 80 GB with room to spare."""
RECORDS = 512
Z_WEIGHT, RATE = 1e-5, 1e-4
ASKED_MEMORY, ASKED_RATE, ORIGINAL_RATE, ASKED_MFU, ASKED_ALIGNMENT = 0.6, 0.75, 0.64, 0.45, 1.03
OPERATORS = 24
"""That a profile lists."""


@dataclass(frozen=True)
class Case:
    """What a process measures."""

    which: str
    """plain or ours."""
    model: dict[str, Any]
    """Fields of `DecoderSettings`."""
    batch: int
    steps: int
    folder: str
    """Holds `store`, and `files` of every record."""
    aligned: bool = True
    device: str = "cpu"
    settings: dict[str, Any] = field(default_factory=dict)
    """Further fields of `TrainSettings`."""
    profiled: bool = False


@dataclass(frozen=True)
class PlainRecords(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Codes and features, a file each."""

    folder: Path

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        names = (self.folder / f"{kind}_{row}.pt" for kind in ("codes", "features"))
        codes, features = (torch.load(name, weights_only=True) for name in names)
        return codes, features


def plain_step(case: Case) -> Callable[[], float]:
    """A step of the plain loop; it returns the loss."""
    shape = DecoderSettings(**case.model)
    sizes = {"layers": shape.num_layers, "heads": shape.num_heads, "width": shape.hidden_size}
    model = PlainLlamaGen(**sizes, codes=shape.num_codes, grid=shape.grid[0])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=shape.initializer_range)
    projector = nn.Sequential(
        nn.Linear(shape.hidden_size, FEATURES), nn.GELU(), nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES)
    )
    trained = [*model.parameters(), *(projector.parameters() if case.aligned else ())]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.05},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, RATE, (0.9, 0.95))
    seen: list[Tensor] = []
    if case.aligned:
        model.layers[0].register_forward_hook(lambda block, given, states: seen.append(states))
    records = PlainRecords(Path(case.folder) / "files")
    loader = endless(torch.utils.data.DataLoader(records, case.batch, shuffle=True, drop_last=True))

    def step() -> float:
        codes, features = next(loader)
        optimizer.zero_grad()
        labels = torch.randint(shape.num_classes, (len(codes),))
        logits = model(labels, codes)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), codes.view(-1))
        loss = loss + Z_WEIGHT * logits.logsumexp(-1).square().mean()
        if case.aligned:
            projected = projector(seen.pop())
            loss = loss + (1 - F.cosine_similarity(projected, features[:, None], dim=-1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if case.aligned:
            torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def endless(loader: torch.utils.data.DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


def trainer_of(case: Case, run: Path) -> Trainer:
    """Our training of a case, in a folder of its own."""
    torch.manual_seed(0)
    shape, store = DecoderSettings(**case.model), Store.open(Path(case.folder) / "store")
    rows = store.rows("train")
    features = {"teacher": store.reader("features.random")} if case.aligned else {}
    settings = TrainSettings(
        steps=10**6, batch_size=case.batch, learning_rate=RATE, z_weight=Z_WEIGHT, device=case.device, **case.settings
    )
    alignment = None
    if case.aligned:
        fitted = {"teacher": torch.from_numpy(features["teacher"].take(rows))}
        alignment = build_alignment(AlignSettings(), fitted, hidden_size=shape.hidden_size, seed=0)
        alignment = alignment.to(case.device)
    labels = torch.randint(shape.num_classes, (len(rows),))
    return Trainer(
        model=Decoder(shape).to(case.device),
        alignment=alignment,
        batches=Batches(
            conditions=ClassConditions(labels, shape.num_classes, dropout=0.1),
            pictures=StoredPictures(rows, store.reader("codes"), features),
            batch_size=case.batch,
            seed=0,
        ),
        validation=[],
        settings=settings,
        run=Run.create(run, "name: benchmark\n", {}),
    )


def our_step(trainer: Trainer) -> Callable[[], float]:
    """A step of ours; it returns the loss."""

    def step() -> float:
        totals = trainer.train_step()
        assert totals is not None
        return totals.loss

    return step


def measured_case(case: Case) -> dict[str, Any]:
    """What a process finds of a case: seconds of the median step, memory, the last loss; or a profile."""
    before = memory_gb()[0]
    on_cuda = case.device == "cuda"
    with tempfile.TemporaryDirectory() as run:
        trainer = None if case.which == "plain" else trainer_of(case, Path(run))
        step = plain_step(case) if trainer is None else our_step(trainer)
        step()
        if case.profiled:
            return profiled(step)
        seconds, processor, loss = [], [], 0.0
        if trainer is not None:
            trainer.meters.row()  # the first step, and compiling, are left out
        for _ in range(case.steps):
            if on_cuda:
                torch.cuda.synchronize()
            started, busy = time.perf_counter(), time.process_time()
            loss = step()
            if on_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            processor.append(time.process_time() - busy)
        found = {
            "seconds": statistics.median(seconds),
            "processor seconds": statistics.median(processor),
            "memory GB": torch.cuda.max_memory_allocated() * 1e-9 if on_cuda else memory_gb()[1] - before,
            "loss": loss,
        }
        return found | ({} if trainer is None else {"mfu": trainer.meters.row()["mfu"]})


PARTS: tuple[tuple[str, Any, str], ...] = (
    ("reading the batch", passes.Ahead, "take"),
    ("forward, with the head", parallel, "compute_losses"),
    ("  of it the head, with its gradients", objective, "head_loss"),
    ("  of it dropout masks", lean, "keep_mask"),
    ("backward", Tensor, "backward"),
    ("gradient norms", loop, "gradient_norm"),
)
"""What a step is made of, by the names that it is called by; a name that begins with a blank is within another."""
UPDATE = "Optimizer.step#AdamW.step"
"""What torch calls it."""


def profiled(step: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds of a step's parts, and of torch's operators by themselves."""

    def marked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return call(*args, **kwargs)

        return run

    for name, owner, attribute in PARTS:
        setattr(owner, attribute, marked(name, getattr(owner, attribute)))
    with profile(activities=[ProfilerActivity.CPU]) as found, record_function("step"):
        step()
    events = {event.key: event for event in found.key_averages()}
    names = [name for name, _, _ in PARTS] + [UPDATE]
    parts = {name: events[name].cpu_time_total / 1e3 for name in names}
    operators = sorted(
        ((name, event.count, event.self_cpu_time_total / 1e3) for name, event in events.items() if "::" in name),
        key=lambda operator: -operator[2],
    )
    return {"whole": events["step"].cpu_time_total / 1e3, "parts": parts, "operators": operators}


def write_records(folder: Path, shape: DecoderSettings) -> None:
    """Nothing; the folder holds a store of random records, and files with the same for the plain loop."""
    write_synthetic(folder / "store", RECORDS, features=True, grid=shape.grid, num_codes=shape.num_codes)
    store = Store.open(folder / "store")
    codes, features = (store.reader(name).take(np.arange(RECORDS)) for name in ("codes", "features.random"))
    (folder / "files").mkdir()
    for row in range(RECORDS):
        torch.save(torch.from_numpy(codes[row].astype(np.int64)).flatten(), folder / "files" / f"codes_{row}.pt")
        torch.save(torch.from_numpy(features[row].copy()), folder / "files" / f"features_{row}.pt")


def measured(job: str, threads: int, case: Case | None = None) -> dict[str, Any]:
    """What a process of its own found."""
    return found_by(__file__, job, "" if case is None else json.dumps(asdict(case)), threads=threads)


def in_turn(cases: dict[str, Case], threads: int, rounds: int) -> tuple[dict[str, dict[str, Any]], float]:
    """The medians of every case over the rounds, and the best matrix rate before, between and after."""
    rates = [measured("machine", threads)["flops"]]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            rows[name].append(measured("case", threads, case))
            rates.append(measured("machine", threads)["flops"])
    found = {name: {key: statistics.median(row[key] for row in own) for key in own[0]} for name, own in rows.items()}
    return found, max(rates)


def table(found: dict[str, dict[str, Any]]) -> None:
    """Prints a line for each case."""
    keys = list(next(iter(found.values())))
    print(f"  {'':22}" + "".join(f"{key:>20}" for key in keys))
    for name, row in found.items():
        print(f"  {name:22}" + "".join(f"{row[key]:>20.4g}" for key in keys), flush=True)


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours over plain."""
    return {key: found["ours"][key] / found["plain"][key] for key in ("seconds", "processor seconds", "memory GB")}


def vocabulary(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prints and returns the step of a decoder with a large vocabulary beside the plain loop's."""
    print("vocabulary: 6 layers of 512, 65,536 codes, 2 pictures of 1,024, aligned", flush=True)
    write_records(folder, DecoderSettings(**VOCABULARY))
    cases = {name: Case(name, VOCABULARY, 2, options.steps, str(folder)) for name in ("plain", "ours")}
    found, _ = in_turn(cases, options.threads, options.rounds)
    table(found)
    ratio = ratios(found)
    print(
        f"  ours / plain: time {ratio['seconds']:.2f} (of the processor {ratio['processor seconds']:.2f}; asked 1), "
        f"memory {ratio['memory GB']:.2f} (asked {ASKED_MEMORY})"
    )
    return found | {"ours / plain": ratio}


def rate(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prints and returns the share of the matrix rate of LlamaGen-B's step, ours and the plain loop's."""
    print("rate: LlamaGen-B, 4 pictures of 256, not aligned", flush=True)
    shape = DecoderSettings(**SIZES["b"])
    write_records(folder, shape)
    cases = {name: Case(name, SIZES["b"], 4, options.steps, str(folder), aligned=False) for name in ("plain", "ours")}
    found, flops = in_turn(cases, options.threads, options.rounds)
    with torch.device("meta"):
        count = model_flops(Decoder(shape))
    positions = 4 * shape.num_positions
    matrices = positions * (count.per_position + count.per_label)
    whole = count.of(positions=positions, length=shape.num_positions, labelled=positions, images=4)
    for row in found.values():
        row["share of rate"], row["with attention"] = (each / row["seconds"] / flops for each in (matrices, whole))
    table(found)
    ratio = ratios(found)
    print(
        f"  machine {flops / 1e9:.0f} GFLOP/s; ours {found['ours']['share of rate']:.1%} of it (asked "
        f"{ASKED_RATE:.0%}; the original {ORIGINAL_RATE:.0%}); ours / plain: time {ratio['seconds']:.2f}, memory "
        f"{ratio['memory GB']:.2f}"
    )
    return found | {"ours / plain": ratio, "machine FLOP/s": flops}


def show_profile(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prints and returns where the time of LlamaGen-B's step goes."""
    print("profile: LlamaGen-B, 4 pictures of 256, not aligned, one step", flush=True)
    write_records(folder, DecoderSettings(**SIZES["b"]))
    case = Case("ours", SIZES["b"], 4, 1, str(folder), aligned=False, profiled=True)
    found = measured("case", options.threads, case)
    whole = found["whole"]
    apart = [name for name in found["parts"] if not name.startswith(" ")]
    rest = whole - sum(found["parts"][name] for name in apart)
    for name, milliseconds in [*found["parts"].items(), ("the rest", rest), ("whole step", whole)]:
        print(f"  {name:52}{milliseconds:10.1f} ms {milliseconds / whole:7.1%}")
    print("  by operator, each by itself:")
    for name, count, milliseconds in found["operators"][:OPERATORS]:
        print(f"  {name:52}{milliseconds:10.1f} ms {milliseconds / whole:7.1%} {count:6} calls")
    return found


def gpu(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prints and returns MFU and the cost of alignment on a GPU."""
    if not torch.cuda.is_available():
        print("gpu: no CUDA device here")
        return {}
    print(f"gpu: {torch.cuda.get_device_name()}, bfloat16, 256 codes", flush=True)
    write_records(folder, DecoderSettings(**SIZES["b"]))
    return gpu_cases({name: SIZES[name] for name in GPU_BATCHES}, GPU_BATCHES, options, folder, device="cuda")


def gpu_cases(
    models: dict[str, dict[str, int]],
    batches: dict[str, int],
    options: argparse.Namespace,
    folder: Path,
    *,
    device: str,
) -> dict[str, Any]:
    """Prints and returns steps of models in bfloat16 on a device, plain and compiled, without alignment and with."""
    found: dict[str, Any] = {}
    for name, model in models.items():
        for compiled in (False, True):
            settings = {"precision": "bfloat16", "compile": compiled}
            rows = {
                aligned: measured(
                    "case",
                    options.threads,
                    Case("ours", model, batches[name], options.steps, str(folder), aligned, device, settings),
                )
                for aligned in (False, True)
            }
            cost = rows[True]["seconds"] / rows[False]["seconds"]
            label = f"{name}, compiled" if compiled else name
            found[label] = {"baseline": rows[False], "aligned": rows[True], "aligned / baseline": cost}
            table({label: rows[False], f"{label}, aligned": rows[True]})
            print(f"  alignment: {cost:.3f} (asked {ASKED_ALIGNMENT}); asked MFU {ASKED_MFU}", flush=True)
    return found


JOBS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "vocabulary": vocabulary,
    "rate": rate,
    "profile": show_profile,
    "gpu": gpu,
}


def main() -> None:
    """Prints the tables, or as a child one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps measured in each process, after one that is not")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all numbers are written")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        torch.set_num_threads(options.threads)
        job, told = options.job
        print(json.dumps(machine() if job == "machine" else measured_case(Case(**json.loads(told)))))
        return
    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor(), "threads": options.threads}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = JOBS[name](options, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
