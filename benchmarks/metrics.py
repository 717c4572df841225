"""Measures of sets of pictures: the Frechet distance beside other libraries', memory, and whether intervals hold.

python benchmarks/metrics.py [--only frechet memory coverage] [--threads 2] [--draws 100] [--pairs 10000] [--json FILE]

frechet   2,048 features: `arra.evaluate.moments.frechet` beside `scipy.linalg.sqrtm` and what torchmetrics and
          torch-fidelity do: seconds (asked a fifth of scipy's), relative error against the closed form of covariances
          with common axes, and against the samples' own where fewer pictures than features make covariances singular
memory    50,000 vectors of 2,048 numbers in a mapped file, 10,000 of a reference: what each measure takes at most above
          the imports, each in a process of its own, asked under 1 GB. `private` is without mapped pages, which the
          system may take back. KID and the neighbours see the first --pairs vectors, since they take their square
coverage  how often nominal 95 % intervals hold what they are about, over repeated draws of generated features against
          one reference of 1,000. FID, IS, precision and the like: their mean over all draws at this N; FID-infinity:
          the distance of the distribution from the reference, known exactly; KID: its mean against this reference, and
          against fresh references the true value 0 of equal distributions. After the coverage its standard error, and
          the width of the intervals over 3.92 standard deviations of the values
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arra.evaluate.distances import NUM_RESAMPLES, FrechetStatistic, draw_counts, percentile_interval
from arra.evaluate.kernels import kid
from arra.evaluate.measured import Measured
from arra.evaluate.moments import FrechetTo, Moments, MomentSums, frechet, frechet_infinity
from arra.evaluate.neighbours import prdc
from arra.evaluate.scores import inception_score

sys.path.insert(0, str(Path(__file__).parent))
from decoder import found_by

SIZE, NUM_IMAGES, NUM_REFERENCE = 2048, 50_000, 10_000
ASKED_RATIO, ASKED_BYTES = 5, 1e9
BLOCK_IMAGES = 1000


def moments_of(features: np.ndarray) -> Moments:
    """Mean and covariance, a block at a time."""
    sums = MomentSums(features.shape[1])
    for start in range(0, len(features), BLOCK_IMAGES):
        sums.add(features[start : start + BLOCK_IMAGES])
    return sums.finish()


def spread(shift: np.ndarray, a: np.ndarray, b: np.ndarray, trace_root: float) -> float:
    """The distance once tr (A B)^(1/2) is known."""
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * trace_root)


def by_scipy(a: Moments, b: Moments) -> float:
    """The way of the reference code."""
    from scipy.linalg import sqrtm

    root = np.asarray(sqrtm(a.covariance @ b.covariance))
    return spread(a.mean - b.mean, a.covariance, b.covariance, float(np.trace(root).real))


def by_torchmetrics(a: Moments, b: Moments) -> float:
    """Eigenvalues of the product, which is not symmetric."""
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(*(torch.from_numpy(each) for each in (a.mean, a.covariance, b.mean, b.covariance))))


def by_fidelity(a: Moments, b: Moments) -> float:
    """The same in NumPy."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    told = [{"mu": each.mean, "sigma": each.covariance} for each in (a, b)]
    return float(fid_statistics_to_metric(*told, verbose=False)[KEY_METRIC_FID])


WAYS = {"ours": frechet, "scipy": by_scipy, "torchmetrics": by_torchmetrics, "torch-fidelity": by_fidelity}


def with_common_axes(size: int) -> tuple[Moments, Moments, float]:
    """Two Gaussians with spectra that fall as those of Inception's features, and their distance."""
    generator = np.random.default_rng(0)
    axes = np.linalg.qr(generator.normal(size=(size, size)))[0]
    a = 10 * np.arange(1, size + 1.0) ** -1.5
    b = a * generator.uniform(0.5, 2, size)
    shift = generator.normal(size=size) * 0.05
    pair = [Moments(mean=mean, covariance=axes * each @ axes.T, count=None) for mean, each in ((shift, a), (0 * a, b))]
    return pair[0], pair[1], float(shift @ shift + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


def of_few_pictures(size: int) -> tuple[Moments, Moments, float]:
    """Gaussians fitted to half as many pictures as features, and their distance by singular values of the samples."""
    generator = np.random.default_rng(1)
    x, y = (generator.normal(size=(size // 2, size)) * np.arange(1, size + 1.0) ** -0.5 for _ in range(2))
    exact = FrechetStatistic(torch.from_numpy(x), torch.from_numpy(y), num_components=None)
    return moments_of(x), moments_of(y), exact(np.ones(len(x)), np.ones(len(y)))


def measured_frechet(way: str, case: str) -> dict[str, Any]:
    """Seconds and relative error of one way."""
    a, b, truth = (with_common_axes if case == "full" else of_few_pictures)(SIZE)
    small = with_common_axes(64)
    WAYS[way](small[0], small[1])  # imports
    started = time.perf_counter()
    found = WAYS[way](a, b)
    seconds = time.perf_counter() - started
    if way == "ours":
        factored = FrechetTo(b)
        started = time.perf_counter()
        factored.value(a)
        return {"seconds": seconds, "factored": time.perf_counter() - started, "error": abs(found / truth - 1)}
    return {"seconds": seconds, "error": abs(found / truth - 1)}


def show_frechet(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns ours beside the others."""
    found: dict[str, Any] = {}
    for case, ways in (("full", list(WAYS)), ("singular", ["ours", "scipy"])):
        for way in ways:
            row = found_by(__file__, "frechet", way, case, threads=options.threads)
            found[f"{case} {way}"] = row
            print(f"  {case:9}{way:15}" + "  ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    ratio = found["full scipy"]["seconds"] / found["full ours"]["seconds"]
    print(f"  scipy takes {ratio:.1f} times as long (asked {ASKED_RATIO})")
    return found | {"ratio": ratio}


def status(field: str) -> int:
    """Bytes that Linux counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Peaks above what is there at the start, `resident` and `private`, filled in at the end."""
    peak, done = {"resident": 0.0, "private": 0.0}, threading.Event()
    before = {"resident": status("VmRSS"), "private": status("RssAnon")}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def watch() -> None:
        while not done.wait(0.01):
            peak["private"] = max(peak["private"], status("RssAnon") - before["private"])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak["resident"] = float(status("VmHWM") - before["resident"])


def write_features(path: Path, count: int, *, seed: int) -> None:
    """Nothing; features as rectified as Inception's, in an .npy of their own."""
    generator = np.random.default_rng(seed)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, SIZE))
    scales = (np.arange(1, SIZE + 1.0) ** -0.25).astype(np.float32)
    for start in range(0, count, BLOCK_IMAGES):
        drawn = generator.standard_normal((min(BLOCK_IMAGES, count - start), SIZE), dtype=np.float32)
        file[start : start + BLOCK_IMAGES] = np.maximum(drawn + 0.1 * (seed + 1), 0) * scales
    file.flush()


MEMORY: dict[str, Callable[[np.ndarray, np.ndarray, int], Any]] = {
    "moments": lambda x, y, pairs: moments_of(x),
    "FID and each picture's part": lambda x, y, pairs: FrechetTo(moments_of(y)).measured(moments_of(x), x),
    "FID-infinity": lambda x, y, pairs: frechet_infinity(FrechetTo(moments_of(y)), x),
    "KID": lambda x, y, pairs: kid(x[:pairs], y),
    "neighbours": lambda x, y, pairs: prdc(x[:pairs], y, k=3),
}


def measured_memory(name: str, folder: str, pairs: int) -> dict[str, Any]:
    """Peaks and seconds of one measure."""
    x, y = (np.load(Path(folder) / f"{each}.npy", mmap_mode="r") for each in ("generated", "reference"))
    np.linalg.eigvalsh(np.eye(300))  # the threads of the library and their buffers
    started = time.perf_counter()
    with watched() as peak:
        MEMORY[name](x, y, pairs)
    return peak | {"seconds": time.perf_counter() - started}


def show_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the peaks of all measures."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="arra-metrics-") as folder:
        for seed, (name, count) in enumerate((("generated", NUM_IMAGES), ("reference", NUM_REFERENCE))):
            write_features(Path(folder) / f"{name}.npy", count, seed=seed)
        for name in MEMORY:
            row = found[name] = found_by(__file__, "memory", name, folder, options.pairs, threads=options.threads)
            verdict = "" if row["resident"] < ASKED_BYTES else "  MORE THAN ASKED"
            print(
                f"  {name:28} resident {row['resident'] / 1e6:5.0f} MB, private {row['private'] / 1e6:5.0f} MB, "
                f"{row['seconds']:.0f} s{verdict}",
                flush=True,
            )
    return found


@dataclass(frozen=True)
class World:
    """Where generated features and those of the reference come from."""

    name: str
    num_features: int
    num_images: int
    falls: float
    """Variances fall as rank to the minus this: 0 is as many directions as there can be, 1 as pictures have."""
    ratio: float
    """Standard deviations of generated features are up to so many times those of the reference, or less."""
    shift: float
    """Of the mean, in standard deviations all told."""
    tails: bool = False
    """Skewed, heavy-tailed features in place of Gaussian ones."""
    num_reference: int = 1000

    @property
    def scales(self) -> tuple[np.ndarray, np.ndarray]:
        """Standard deviations of generated features and of the reference."""
        reference = np.arange(1, self.num_features + 1.0) ** (-self.falls / 2)
        return reference * self.ratio ** np.cos(np.arange(self.num_features)), reference

    @property
    def mean(self) -> np.ndarray:
        """Of generated features; the reference has zero."""
        return self.shift * self.scales[1] / np.sqrt(self.num_features)

    def generated(self, generator: np.random.Generator) -> np.ndarray:
        """(N, F)."""
        return (self._noise(generator, self.num_images) * self.scales[0] + self.mean).astype(np.float32)

    def reference(self, generator: np.random.Generator) -> np.ndarray:
        """(M, F)."""
        return (self._noise(generator, self.num_reference) * self.scales[1]).astype(np.float32)

    def moments(self) -> Moments:
        """Of all pictures that could be generated."""
        return Moments(mean=self.mean, covariance=np.diag(self.scales[0] ** 2), count=None)

    def _noise(self, generator: np.random.Generator, count: int) -> np.ndarray:
        shape = (count, self.num_features)
        return generator.exponential(size=shape) - 1 if self.tails else generator.normal(size=shape)


WORLDS = (
    World("far, level", 16, 200, 0, 1.5, 1),
    World("equal, level", 16, 200, 0, 1, 0),
    World("far, falling", 64, 200, 1, 1.5, 1),
    World("far, level", 64, 512, 0, 1.5, 1),
    World("equal, level", 64, 512, 0, 1, 0),
    World("far, heavy tails", 64, 1000, 1, 1.5, 1, tails=True),
    World("equal, heavy tails", 64, 1000, 1, 1, 0, tails=True),
    World("far, falling", 256, 200, 1, 1.5, 1),
    World("far, level", 256, 200, 0, 1.5, 1),
    World("equal, level", 256, 200, 0, 1, 0),
    World("far, falling", 256, 2048, 1, 1.5, 1),
    World("equal, level", 256, 2048, 0, 1, 0),
    World("far, falling", 64, 5000, 1, 1.5, 1),
)
EXACT_AT_MOST = 200
"""Pictures up to which the exact bootstrap is tried beside: it takes a singular value decomposition per resample."""
EXACT_RESAMPLES = 100


@dataclass
class Draws:
    """Values and ends of intervals of a measure over the draws."""

    values: list[float]
    lows: list[float]
    highs: list[float]

    def coverage(self, target: float | None = None) -> dict[str, float]:
        """How often the intervals hold the target, the mean of the values unless told."""
        aim = float(np.mean(self.values)) if target is None else target
        held = float(np.mean((np.array(self.lows) <= aim) & (aim <= np.array(self.highs))))
        width = float(np.mean(self.highs) - np.mean(self.lows))
        spread_of = float(np.std(self.values))
        error = float(np.sqrt(max(held * (1 - held), 0.5 / len(self.values)) / len(self.values)))
        return {"coverage": held, "error": error, "width": width / (3.92 * spread_of) if spread_of else float("nan")}


class Tally:
    """Draws by measure, with the intervals that `bootstrap` gives per-picture values."""

    def __init__(self, world: World) -> None:
        self.counts = np.stack(list(draw_counts(world.num_images, num_resamples=NUM_RESAMPLES)))
        self.draws: dict[str, Draws] = {}

    def note(self, name: str, value: float, resampled: np.ndarray, *, center: bool = False) -> None:
        """Nothing; one draw."""
        interval = percentile_interval(value, resampled, center=center)
        row = self.draws.setdefault(name, Draws([], [], []))
        row.values.append(value)
        row.lows.append(interval.low)
        row.highs.append(interval.high)

    def measured(self, name: str, found: Measured) -> None:
        """Nothing; one draw of a measure of generated pictures."""
        self.note(name, found.value, self.counts @ found.per_picture / len(found.per_picture))


def covered(world: World, num_draws: int) -> dict[str, dict[str, float]]:
    """Coverage of all measures in a world."""
    generator, tally = np.random.default_rng(0), Tally(world)
    y = world.reference(generator)
    to = FrechetTo(moments_of(y))
    truth = to.value(world.moments())
    classes = generator.normal(size=(world.num_features, 20)) * 2 / np.sqrt(world.num_features)
    ones = np.ones(len(y))
    for draw in range(num_draws):
        x = world.generated(generator)
        tally.measured("FID", to.measured(moments_of(x), x))
        extrapolated = frechet_infinity(to, x, seed=draw)
        if extrapolated is not None:
            tally.measured("FID-infinity", extrapolated)
        if world.num_images <= EXACT_AT_MOST and draw < num_draws // 4:
            statistic = FrechetStatistic(torch.from_numpy(x), torch.from_numpy(y), num_components=None)
            some = [statistic(counts, ones) for counts in tally.counts[:EXACT_RESAMPLES]]
            tally.note("FID, exact bootstrap", statistic(np.ones(len(x)), ones), np.asarray(some), center=True)
        if world.num_images > 1000:  # the pairs would take minutes, and tell nothing else
            continue
        tally.measured("KID", kid(x, y).generated)
        if world.ratio == 1:
            fresh = kid(x, world.reference(generator))
            tally.measured("KID, fresh reference", fresh.generated)
            parts = [
                each.per_picture.std() / np.sqrt(len(each.per_picture)) for each in (fresh.generated, fresh.reference)
            ]
            both = fresh.generated.value + np.hypot(*parts) * np.random.default_rng(draw).normal(size=NUM_RESAMPLES)
            tally.note("KID, fresh reference, both sides", fresh.generated.value, both)
        tally.measured("IS", inception_score((x @ classes).astype(np.float32)))
        tally.measured(
            "mean score",
            Measured(value=float((x[:, 0] ** 2).mean(dtype=np.float64)), per_picture=x[:, 0].astype(np.float64) ** 2),
        )
        if world.num_features == 16:
            near = prdc(x, y, k=5)
            tally.measured("precision", near.precision)
            tally.measured("density", near.density)
    exactly = {"FID-infinity": truth, "KID, fresh reference": 0.0, "KID, fresh reference, both sides": 0.0}
    return {name: draws.coverage(exactly.get(name)) for name, draws in tally.draws.items()}


def show_coverage(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the coverage of all measures in all worlds."""
    found = {}
    for number, world in enumerate(WORLDS):
        title = f"F {world.num_features}, N {world.num_images}, {world.name}"
        print(f"  {title}", flush=True)
        found[title] = found_by(__file__, "coverage", number, options.draws, threads=options.threads)
        for name, row in found[title].items():
            off = abs(row["coverage"] - 0.95) > 2.5 * row["error"]
            print(
                f"    {name:34} {100 * row['coverage']:5.1f} % +- {100 * row['error']:.1f}, width "
                f"{row['width']:.2f}{'  OFF' if off else ''}",
                flush=True,
            )
    return found


SHOWN: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "frechet": show_frechet,
    "memory": show_memory,
    "coverage": show_coverage,
}


def job(told: Sequence[str]) -> dict[str, Any]:
    """What one process is for."""
    if told[0] == "frechet":
        return measured_frechet(told[1], told[2])
    if told[0] == "memory":
        return measured_memory(told[1], told[2], int(told[3]))
    return covered(WORLDS[int(told[1])], int(told[2]))


def main() -> None:
    """Prints what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=list(SHOWN), default=list(SHOWN))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draws", type=int, default=100, help="of generated features, for the coverage")
    parser.add_argument("--pairs", type=int, default=10_000, help="generated vectors that KID and the neighbours see")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all numbers are written")
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(job(options.job)))
        return
    found = {}
    for name in options.only:
        print(name, flush=True)
        found[name] = SHOWN[name](options)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
