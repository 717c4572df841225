"""Wall time and peak memory of the demo and of painting 8 pictures with its result: the numbers the README promises.

python benchmarks/demo.py [--out runs/benchmark] [arguments of arra demo]
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path


def tree_memory_gib(root: int) -> float:
    """Proportional memory of a process and all its descendants (shared pages counted once), from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 2**20


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak GiB of a command, its descendants included."""
    started, peak, done = time.monotonic(), 0.0, threading.Event()
    process = subprocess.Popen(command, env=os.environ)

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, tree_memory_gib(process.pid))
            done.wait(1.0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        sys.exit(code)
    return time.monotonic() - started, peak


def main() -> None:
    """Runs the demo, then paints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    arguments, rest = parser.parse_known_args()
    arra = [sys.executable, "-m", "arra"]
    seconds, peak = measured([*arra, "demo", "--out", str(arguments.out), *rest])
    stages = json.loads((arguments.out / "timings.json").read_text())
    print("stages: " + ", ".join(f"{stage} {value:.0f} s" for stage, value in stages.items()))
    print(f"demo: {seconds / 60:.1f} min, peak memory {peak:.2f} GiB over all its processes")
    command = ["generate", str(arguments.out / "aligned"), "--prompt", "a red heart on fire", "--seeds", "0-7"]
    seconds, peak = measured([*arra, *command])
    print(f"8 pictures of a new prompt: {seconds:.1f} s, program start included, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
