"""Memory and time of the objective alone: the loss in slices beside the plain way of computing it.

python benchmarks/objective.py [--positions 4096] [--vocabulary 65536] [--width 1024] [--repeats 1]

Forward and backward from the last states to the gradients of states and head, in float32 on the CPU, each way in a
process of its own. Memory is what the process held at most beyond weights, states and labels; it depends neither on the
machine nor on its load. 65,536 is Chameleon's vocabulary and 4,096 positions its longest sequence; the width is a small
language model's, so that the head's own gradient (256 MiB, which both ways need) does not hide the logits.

reference   logits, float32, a shifted copy for the cross-entropy and another for a log-sum-exp of its own, as the
            released ARRA has it
plainest    logits at the labelled positions, cross-entropy and log-sum-exp on them, no copies made by hand
ours        `arra.models.head.head_loss`
frozen      the same where the head is not trained (LoRA)
"""

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from arra.models.head import Head, head_loss

Z_WEIGHT = 1e-5
ASKED = 8
ROWS = 4
"""Sequences that the positions are of: of one alone, leaving out the last position would make no copy."""


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss over whole sequences, shifted by one."""
    logits = F.linear(hidden, weight).float()
    loss = F.cross_entropy(logits[:, :-1].contiguous().view(-1, logits.shape[-1]), labels)
    return loss + Z_WEIGHT * logits[:, :-1].contiguous().logsumexp(2).square().mean()


def plainest(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss where labels are."""
    logits = F.linear(hidden[:, :-1].flatten(0, 1), weight)
    return F.cross_entropy(logits, labels) + Z_WEIGHT * logits.logsumexp(1).square().mean()


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same, a slice at a time."""
    shares = torch.full((len(labels),), 1 / len(labels))
    return head_loss(hidden[:, :-1].flatten(0, 1), Head(weight), labels, shares=shares, z_weight=Z_WEIGHT)[0]


def frozen(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same for a head without gradients."""
    return ours(hidden, weight.detach(), labels)


WAYS = {"reference": reference, "plainest": plainest, "ours": ours, "frozen": frozen}


def measure(way: str, sizes: argparse.Namespace, answer: Connection) -> None:
    """Sends peak bytes, the best of the times, the loss, and the norm of the states' gradient."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, sizes.positions // ROWS + 1, sizes.width).requires_grad_()
    weight = (torch.randn(sizes.vocabulary, sizes.width) * 0.02).requires_grad_()
    labels = torch.randint(sizes.vocabulary, (sizes.positions // ROWS * ROWS,))
    before, seconds = memory("VmRSS"), []
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(sizes.repeats):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        loss = WAYS[way](hidden, weight, labels)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    assert hidden.grad is not None
    answer.send((memory("VmHWM") - before, min(seconds), loss.item(), hidden.grad.norm().item()))


def memory(field: str) -> int:
    """Bytes that Linux counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    """Prints a line for each way, and the ratios."""
    parser = argparse.ArgumentParser()
    for name, default in (("positions", 4096), ("vocabulary", 65536), ("width", 1024), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    logits = 4 * sizes.positions * sizes.vocabulary / 2**30
    print(f"{sizes.positions} positions x {sizes.vocabulary} tokens (logits {logits:.2f} GiB), width {sizes.width}")
    context, peaks = multiprocessing.get_context("spawn"), {}
    for way in WAYS:
        here, there = context.Pipe()
        process = context.Process(target=measure, args=(way, sizes, there))
        process.start()
        there.close()  # so that a process that dies is noticed
        peak, seconds, loss, slope = here.recv()
        process.join()
        peaks[way] = peak
        print(f"{way:10} {peak / 2**20:8.0f} MiB {seconds:7.2f} s   loss {loss:.6f}, gradient {slope:.6e}")
    both_return = 4 * sizes.width * (sizes.positions + ROWS + sizes.vocabulary)
    for other in ("reference", "plainest"):
        beyond = (peaks[other] - both_return) / (peaks["ours"] - both_return)
        print(
            f"ours / {other}: 1/{peaks[other] / peaks['ours']:.1f} of the memory (asked: 1/{ASKED} of the plain way); "
            f"beyond the gradients that both return 1/{beyond:.1f}"
        )


if __name__ == "__main__":
    main()
