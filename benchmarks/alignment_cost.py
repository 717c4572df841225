"""Seconds per training step with alignment against without, interleaved in one process on one thread.

python benchmarks/alignment_cost.py [--steps 20]
"""

import argparse
import statistics
import time

import torch

from arra.align import Alignment, TargetSpace
from arra.config import load_recipe
from arra.data.batches import text_batch
from arra.models import Decoder
from arra.stages.model import decoder_settings
from arra.train.objective import compute_losses

FEATURE_SIZE = 1280


def main() -> None:
    """Prints the ratio for several target widths."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    recipe = load_recipe("demo", row="aligned")
    settings = decoder_settings(recipe, num_codes=2048, downsampling=4)
    model = Decoder(settings)
    size = recipe.train.batch_size
    features = torch.randn(size, FEATURE_SIZE)
    batch = text_batch(
        [[5, 6, 7, 8]] * size,
        torch.randint(settings.num_codes, (size, settings.num_positions)),
        prefix_length=settings.prefix_length,
        features={"teacher": features},
    )
    widths: dict[str, int | None] = {"32 components": 32, "128 components": 128, "all 1280 dimensions": None}
    variants: dict[str, Alignment | None] = {"no alignment": None}
    for name, width in widths.items():
        axes = None if width is None else torch.linalg.qr(torch.randn(FEATURE_SIZE, width)).Q
        space = TargetSpace(features.mean(0), axes)
        variants[name] = Alignment(hidden_size=settings.hidden_size, feature_size=FEATURE_SIZE, space=space)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(steps):
        for name, alignment in variants.items():
            started = time.process_time()
            compute_losses(model, batch, alignment).total.backward()
            seconds[name].append(time.process_time() - started)
    plain = statistics.median(seconds["no alignment"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"{name:22} {middle:.3f} CPU s per forward and backward, {middle / plain:.2f} times no alignment")


if __name__ == "__main__":
    main()
