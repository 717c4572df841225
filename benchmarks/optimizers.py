"""Held-out loss after equal steps with AdamW and with Muon, on the demo's data and model, one after the other.

python benchmarks/optimizers.py --store runs/demo/store [--steps 400]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from arra.config import load_recipe
from arra.data.store import Store
from arra.stages.train import train

CHOICES = {"adamw": (1e-3, 2e-3, 4e-3), "muon": (2e-3, 4e-3, 8e-3)}


def main() -> None:
    """Prints validation loss and seconds per step for every choice."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    for optimizer, rates in CHOICES.items():
        for rate in rates:
            changes = (f"train.optimizer={optimizer}", f"train.learning_rate={rate}", f"train.steps={arguments.steps}")
            recipe = load_recipe("demo", row="baseline", overrides=changes)
            folder = Path(tempfile.mkdtemp())
            rows = train(recipe, Store.open(arguments.store), folder / "run", previews=False).read_metrics()
            last = [row for row in rows if row["kind"] == "validation"][-1]
            per_step = last["seconds"] / arguments.steps
            print(f"{optimizer:6} rate {rate:g}: validation {last['ntp_loss']:.4f} nats, {per_step:.3f} s per step")
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
