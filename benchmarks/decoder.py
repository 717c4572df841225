"""Speed and memory of LlamaGen-B at 256 codes and of VQ-16 at 256 pixels, float32 on a CPU, ours beside the plain way.

python benchmarks/decoder.py [--threads 1 2] [--only machine train align tokenizer] [--steps 6]

Every measurement is a process of its own, ours and the plain way (`plain_llamagen.py`: LlamaGen as its formulas say)
in turn; the machine's matrix-product rate and read bandwidth are measured before and after, and the better ones are
taken. Memory is the process's peak, and what it is above the imports (torch alone takes 0.3 to 0.6 GB).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arra.align import Alignment
from arra.data.batches import TrainBatch, make_batch
from arra.data.conditions import Prefix
from arra.models import load_model
from arra.models.products import product
from arra.tokenizers.vq import VQModel, VQSettings
from arra.train.objective import compute_losses
from arra.train.optimizer import gradient_norm, make_optimizers, scale_gradients
from arra.train.settings import TrainSettings

sys.path.insert(0, str(Path(__file__).parent))
from plain_llamagen import PlainLlamaGen, plain_decode, plain_encode

BATCH, CODES, FEATURE_SIZE = 4, 256, 512
SIZE = {"layers": 12, "heads": 12, "width": 768}
MATRIX_PARAMETERS = 12 * (4 * 768**2 + 3 * 768 * 2048) + 768 * 16384
"""Weights that every position is multiplied by: 2 operations each forward, 4 backward."""


def memory_gb() -> tuple[float, float]:
    """Resident memory now and at its highest, in 10^9 bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) * 1024e-9, int(lines["VmHWM"].split()[0]) * 1024e-9


def seconds(run: Callable[[], object], times: int) -> list[float]:
    """Of each run after an unmeasured one."""
    run()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return found


def machine() -> dict[str, float]:
    """The best matrix-product rate of either library, and the rate of reading memory."""
    rates = []
    for rows, size, width in ((1024, 768, 2048), (2048, 2048, 2048)):
        a, b = torch.randn(rows, size), torch.randn(width, size).T
        for multiply in (torch.mm, product):
            best = min(seconds(lambda a=a, b=b, multiply=multiply: multiply(a, b), 8))  # type: ignore[misc]
            rates.append(2 * rows * size * width / best)
    large = torch.randn(100_000_000)
    return {"flops": max(rates), "read": 4 * large.numel() / min(seconds(large.sum, 8))}


def training(which: str, steps: int) -> dict[str, Any]:
    """Whole steps: forward, backward, clipping, AdamW."""
    base = memory_gb()[0]
    torch.manual_seed(0)
    labels, codes = torch.randint(1000, (BATCH,)), torch.randint(16384, (BATCH, CODES))
    settings = TrainSettings(steps=1, learning_rate=1e-4)
    loss: Callable[[], Tensor]
    if which == "plain":
        plain = PlainLlamaGen(**SIZE)
        parameters, loss = dict(plain.named_parameters()), lambda: plain.loss(labels, codes)
        groups = [
            {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": 0.05},
            {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, 1e-4, (0.9, 0.95))]
        clip: Callable[..., object] = torch.nn.utils.clip_grad_norm_
    else:
        model = load_model("llamagen-b").train()
        parameters = dict(model.named_parameters())
        batch = class_batch(labels, codes)
        optimizers, clip = make_optimizers(parameters, settings), clip_as_arra
        loss = lambda: compute_losses(model, batch, None).total  # noqa: E731

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss().backward()
        clip(list(parameters.values()), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    took = seconds(step, steps)
    peak = memory_gb()[1]
    return {"tokens/s": BATCH * CODES / statistics.median(took), "peak GB": peak, "above imports GB": peak - base}


def clip_as_arra(parameters: Sequence[torch.nn.Parameter], most: float) -> None:
    """Nothing; gradients are scaled as the training loop does it."""
    scale_gradients(parameters, gradient_norm(parameters), most=most)


def class_batch(labels: Tensor, codes: Tensor, features: Tensor | None = None) -> TrainBatch:
    """A batch of classes and codes."""
    return make_batch(Prefix(labels[:, None]), codes, features=None if features is None else {"teacher": features})


def alignment(steps: int) -> dict[str, float]:
    """Steps with alignment against steps without, in turn in one process, on cached features."""
    torch.manual_seed(0)
    labels, codes = torch.randint(1000, (BATCH,)), torch.randint(16384, (BATCH, CODES))
    model = load_model("llamagen-b").train()
    term = Alignment(hidden_size=768, feature_size=FEATURE_SIZE, layer=1)
    batch = class_batch(labels, codes, torch.randn(BATCH, FEATURE_SIZE))
    both = {f"model.{n}": p for n, p in model.named_parameters()} | {
        f"align.{n}": p for n, p in term.named_parameters()
    }
    optimizers = make_optimizers(both, TrainSettings(steps=1, learning_rate=1e-4))

    def step(aligned: bool) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        compute_losses(model, batch, term if aligned else None).total.backward()
        clip_as_arra(list(model.parameters()), 1.0)
        if aligned:
            clip_as_arra(list(term.parameters()), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    ratios = []
    step(True)
    for _ in range(steps):
        pair = []
        for aligned in (False, True):
            started = time.process_time()  # of all threads: a neighbour's work is not ours
            step(aligned)
            pair.append(time.process_time() - started)
        ratios.append(pair[1] / pair[0])
    return {"with / without": statistics.median(ratios)}


def tokenizer(which: str) -> dict[str, Any]:
    """One picture of 256 x 256 there and back."""
    torch.manual_seed(0)
    model = VQModel(VQSettings()).eval()
    image, codes = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randint(16384, (1, 16, 16))
    with torch.no_grad():
        if which == "plain":
            encode = seconds(lambda: plain_encode(model, image), 3)
            decode = seconds(lambda: plain_decode(model, codes), 3)
        else:
            encode, decode = seconds(lambda: model.encode(image), 3), seconds(lambda: model.decode(codes), 3)
    return {
        "encode images/s": 1 / statistics.median(encode),
        "decode images/s": 1 / statistics.median(decode),
        "peak GB": memory_gb()[1],
    }


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": machine,
    "train": training,
    "align": alignment,
    "tokenizer": tokenizer,
}


def found_by(script: str, *job: str | int, threads: int) -> dict[str, Any]:
    """What one job of a benchmark found in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, script, "--job", *map(str, job), "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(name: str, found: dict[str, Any]) -> None:
    """Prints a measurement."""
    print(f"  {name:24}" + "  ".join(f"{key} {value:.3g}" for key, value in found.items()), flush=True)


def report(threads: int, only: list[str], steps: int) -> None:
    """Prints everything at a number of threads."""
    print(f"{threads} thread{'s' if threads > 1 else ''}", flush=True)
    before = found_by(__file__, "machine", threads=threads)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    jobs: list[tuple[str, str, list[str | int]]] = []
    if "train" in only:
        jobs.append(("training step", "train", [steps]))
    if "tokenizer" in only:
        jobs.append(("VQ-16", "tokenizer", []))
    for name, job, arguments in jobs:
        found[name] = {
            which: found_by(__file__, job, which, *arguments, threads=threads) for which in ("plain", "ours")
        }
    aligned = found_by(__file__, "align", steps, threads=threads) if "align" in only else None
    after = found_by(__file__, "machine", threads=threads)
    flops, read = (max(before[key], after[key]) for key in ("flops", "read"))
    print(f"  machine: {flops / 1e9:.0f} GFLOP/s in matrix products, reads {read / 1e9:.1f} GB/s")
    for name, ways in found.items():
        for which, values in ways.items():
            shares = dict(values)
            if name == "training step":
                shares["share of matrix rate"] = values["tokens/s"] * 6 * MATRIX_PARAMETERS / flops
            line(f"{name}, {which}", shares)
        line("  ours / plain", {key: ways["ours"][key] / ways["plain"][key] for key in ways["ours"]})
    if aligned is not None:
        line("training step, aligned", aligned)


def main() -> None:
    """Prints the tables, or as a child one measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--steps", type=int, default=6, help="training steps measured")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        torch.set_num_threads(asked.threads[0])
        name, *arguments = asked.job
        print(json.dumps(JOBS[name](*(int(each) if each.isdigit() else each for each in arguments))))
        return
    for threads in asked.threads:
        report(threads, asked.only, asked.steps)


if __name__ == "__main__":
    main()
