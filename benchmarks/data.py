"""What preparing and reading data costs and withstands: stores of millions, batched work, kills, hostile files.

python benchmarks/data.py [stores] [prepare] [kill] [hostile] [--folder FOLDER] [--records 10000000] [--pictures 400]
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from arra.data.columns import write_table
from arra.data.index import default_shard_records
from arra.data.store import FORMAT, SCHEMA, Store
from arra.runs import atomic_write

NUM_CODES, POSITIONS, FEATURES = 16_384, 256, 512
H100_FLOPS, MFU = 989e12, 0.45
"""Dense bfloat16 peak of an H100 SXM (NVIDIA's data sheet) and the share of it that a good training reaches."""


def h100_images_per_second() -> float:
    """Images per second at which one H100 could train the 111M model at 256 codes an image."""
    parameters, layers, width = 111e6, 12, 768
    per_token = 6 * parameters + 12 * layers * width * POSITIONS  # matrices, then attention; forward and backward
    return H100_FLOPS * MFU / (per_token * POSITIONS)


def write_synthetic(
    path: Path, count: int, *, features: bool, grid: tuple[int, int] = (16, 16), num_codes: int = NUM_CODES
) -> None:
    """Nothing; a store of `count` random records lies at `path`."""
    size = default_shard_records(count)
    shards = [min(size, count - start) for start in range(0, count, size)]
    rng = np.random.default_rng(0)
    for number, rows in enumerate(shards):
        first = number * size
        ids = [f"{row:09d}" for row in range(first, first + rows)]
        table = pa.table(
            {
                "id": ids,
                "prompt": [f"picture number {row}" for row in range(first, first + rows)],
                "alternatives": pa.array([[]] * rows, pa.list_(pa.string())),
                "label": pa.nulls(rows, pa.int32()),
                "split": ["validation" if row % 1000 == 0 else "train" for row in range(first, first + rows)],
                "group": ids,
                "source": pa.array(np.zeros(rows, np.int16)),
                "image": [""] * rows,
            },
            schema=SCHEMA,
        )
        write_table(path / "records" / f"{number:05d}.arrow", table)
    held_out = -(-count // 1000)
    about = {
        "name": "synthetic",
        "sha256": "0" * 64,
        "splits": {"validation": held_out, "train": count - held_out},
        "attribution": "",
        "classes": [],
        "sources": [{"name": "synthetic", "kind": "", "records": count}],
        "shards": shards,
    }
    atomic_write(path / "manifest.json", json.dumps({"format": FORMAT, "records": about}))
    store = Store.open(path)
    columns = [("codes", grid, "uint16")] + ([("features.random", (FEATURES,), "float32")] if features else [])
    for name, shape, dtype in columns:
        writer = store.writer(name, made_by={"random": True}, shape=shape, dtype=dtype)
        for shard, rows in enumerate(shards):
            if dtype == "uint16":
                values = rng.integers(0, num_codes, (rows, *shape), dtype=np.uint16)
            else:
                values = rng.standard_normal((rows, *shape), dtype=np.float32)
            ids = store.records_of(shard).column("id").combine_chunks()
            writer.write(shard, ids, values, valid=np.ones(rows, dtype=bool))
        writer.publish()


READER = """
import json, sys, time
from pathlib import Path
if sys.argv[3] == "torch":
    import torch
import numpy, pyarrow.compute
from arra.data.order import Plan
from arra.data.store import Store
def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
before, started = resident("VmRSS"), time.perf_counter()
store = Store.open(Path(sys.argv[1]))
readers = [store.reader(name) for name in store.column_names()]
opened = time.perf_counter() - started
rows = store.rows("train")
listed = time.perf_counter() - started
plan = Plan.build([len(rows)], batch_size=256, seed=0)
def take(step):
    chosen = rows[plan.batch(step)]
    return [reader.take(chosen) for reader in readers]
for step in range(50):
    take(step)
started, batches = time.perf_counter(), int(sys.argv[2])
for step in range(1000, 1000 + batches):
    take(step)
seconds = time.perf_counter() - started
print(json.dumps({"open": opened, "listed": listed, "batches": batches / seconds, "before": before,
                  "resident": resident("VmRSS"), "peak": resident("VmHWM")}))
"""
"""A process of its own that opens a store and reads shuffled batches, as training does."""


def read(path: Path, *, library: str) -> dict[str, float]:
    """What three readers measured, the median of each; of the peak the greatest."""
    command = [sys.executable, "-c", READER, str(path), "2000", library]
    found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    median = {key: statistics.median(each[key] for each in found) for key in found[0]}
    return median | {"peak": max(each["peak"] for each in found)}


def stores(folder: Path, records: int) -> None:
    """Prints how large stores open and read."""
    needed = 20 * h100_images_per_second()
    print(
        f"one H100, 111M model, {POSITIONS} codes an image: {H100_FLOPS / 1e12:.0f} TFLOP/s x {MFU:.0%} / "
        f"((6 x 111e6 + 12 x 12 x 768 x 256) x 256 FLOP) = {needed / 20:,.0f} images/s; 20 times: "
        f"{needed:,.0f} images/s = {needed / 256:.0f} batches of 256 a second"
    )
    for count, features in ((records, False), (records // 5, True)):
        path = folder / f"synthetic-{count}{'-features' if features else ''}"
        if not (path / "codes" / "column.json").is_file() or (features and not (path / "features.random").is_dir()):
            shutil.rmtree(path, ignore_errors=True)
            started = time.perf_counter()
            write_synthetic(path, count, features=features)
            print(f"wrote {count:,} records in {time.perf_counter() - started:.0f} s")
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**30
        found, in_training = read(path, library="numpy"), read(path, library="torch")
        what = f"{POSITIONS} codes" + (f", {FEATURES} features" if features else "")
        rate = found["batches"] * 256
        print(
            f"{count:,} records, {what}, {size:.1f} GiB: opens in {found['open']:.3f} s (training rows listed after "
            f"{found['listed']:.2f} s); random batches of 256: {found['batches']:.0f} a second = {rate:,.0f} images/s, "
            f"{rate / needed * 20:.0f} times the H100; resident memory of the reader {found['resident']:.0f} MB (peak "
            f"{found['peak']:.0f} MB); beside torch it adds {in_training['resident'] - in_training['before']:.0f} MB"
        )

        if not features:
            rate = whole_batches(path)
            print(
                f"the same with captions read and tokenised, whole training batches on one thread: {rate:,.0f} "
                f"images/s, {rate / needed * 20:.1f} times the H100"
            )


def whole_batches(path: Path) -> float:
    """Images per second of complete batches: codes, captions as text ids, layout."""
    import torch

    from arra.data.batches import Batches
    from arra.data.conditions import TextConditions
    from arra.stages.captions import StoreCaptions
    from arra.stages.pictures import StoredPictures
    from arra.tokenizers.text import train_text_tokenizer

    torch.set_num_threads(1)
    store = Store.open(path)
    rows = store.rows("train")
    text = train_text_tokenizer([f"picture number {number}" for number in range(1000)], vocab_size=1000)
    batches = Batches(
        conditions=TextConditions(StoreCaptions(store, rows, text), 14, dropout=0.1, alternative_share=0.3),
        pictures=StoredPictures(rows, store.reader("codes")),
        batch_size=256,
        seed=0,
    )
    for step in range(40):
        batches.batch(step)
    started, count = time.perf_counter(), 100
    for step in range(100, 100 + count):
        batches.batch(step)
    return count * 256 / (time.perf_counter() - started)


def draw_folder(folder: Path, count: int) -> Path:
    """A folder of real pictures: OpenMoji drawings as PNG with captions."""
    import pyarrow.parquet as pq

    from arra.data.openmoji import openmoji_file

    path = folder / f"pictures-{count}"
    if not (path / "metadata.jsonl").is_file():
        path.mkdir(parents=True, exist_ok=True)
        rows = pq.read_table(openmoji_file()).slice(0, count).to_pylist()
        for row in rows:
            (path / f"{row['id']}.png").write_bytes(row["image"])
        lines = [json.dumps({"file_name": f"{row['id']}.png", "text": row["prompt"]}) for row in rows]
        atomic_write(path / "metadata.jsonl", "\n".join(lines) + "\n")
    return path


def recipe_of(pictures: Path, *more: str):  # type: ignore[no-untyped-def]
    """The demo's recipe on a folder of pictures."""
    from arra.config import load_recipe

    return load_recipe("demo", row="aligned", overrides=["data.source=folder", f"data.path={pictures}", *more])


def prepare_speed(folder: Path, count: int) -> None:
    """Prints batched preparation against the same models called one picture at a time in one process."""
    import torch

    from arra.data.images import center_crop
    from arra.data.records import decode_image
    from arra.encoders import open_encoder
    from arra.stages.prepare import PrepareOptions, prepare
    from arra.tokenizers import load_tokenizer

    pictures = draw_folder(folder, count)
    recipe = recipe_of(pictures)
    tokenizer, encoder = load_tokenizer(recipe.tokenizer.name), open_encoder(recipe.encoder.choice("teacher"))
    side = recipe.data.encoder_image_size or encoder.spec.image_size
    names = [json.loads(line)["file_name"] for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    ratios, shares, rates = [], [], []
    for trial in range(3):
        shutil.rmtree(folder / "one-by-one", ignore_errors=True)
        (folder / "one-by-one").mkdir()
        started = time.perf_counter()
        for name in names:
            image = decode_image((pictures / name).read_bytes())
            codes = tokenizer.encode(torch.from_numpy(center_crop(image, recipe.data.image_size).copy())[None])
            large = torch.from_numpy(center_crop(image, side).copy())[None]
            torch.save(codes, folder / "one-by-one" / f"{name}.codes.pt")
            torch.save(encoder.encode(large), folder / "one-by-one" / f"{name}.feature.pt")
        alone = time.perf_counter() - started
        shutil.rmtree(folder / "store", ignore_errors=True)
        found = prepare(recipe, folder / "store", options=PrepareOptions())
        assert found.done == len(names)
        ratios.append(alone / found.seconds_making)
        shares.append(found.waiting_seconds / found.seconds_making)
        rates.append((len(names) / alone, len(names) / found.seconds_making))
        print(
            f"trial {trial}: one by one {rates[-1][0]:.1f} pictures/s, batched with loader processes "
            f"{rates[-1][1]:.1f}, ratio {ratios[-1]:.2f}, waiting for data {shares[-1]:.0%} of the time"
        )
    print(
        f"batched prepare: {statistics.median(ratios):.2f} times one by one (median of {len(ratios)}), waiting for "
        f"data {statistics.median(shares):.0%} of the time"
    )


def tree_hash(path: Path) -> str:
    """One hash over the names and bytes of all files below a folder, locks apart."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.endswith(".lock"):
            digest.update(str(file.relative_to(path)).encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def kill(folder: Path, kills: int) -> None:
    """Prints whether stores whose preparation was killed at random moments are those of undisturbed runs."""
    pictures = draw_folder(folder, 192)
    arra = [sys.executable, "-m", "arra", "prepare", "demo", "--threads", "1"]
    arra += ["--set", "data.source=folder", "--set", f"data.path={pictures}", "--set", "data.shard_records=24"]

    def run(store: Path, after: float | None) -> bool:
        """Whether it came to its end by itself."""
        process = subprocess.Popen([*arra, "--store", str(store)], stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            assert process.wait(timeout=after) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        return True

    shutil.rmtree(folder / "undisturbed", ignore_errors=True)
    started = time.monotonic()
    run(folder / "undisturbed", None)
    whole, expected = time.monotonic() - started, tree_hash(folder / "undisturbed")
    store, done, rounds, same, chance = folder / "killed", 0, 0, 0, random.Random(0)
    while done < kills:
        shutil.rmtree(store, ignore_errors=True)
        rounds += 1
        finished = False
        while not finished:
            # the start of the program is long and writes nothing: most kills fall behind it
            finished = run(store, chance.uniform(0.3, 1.0) * whole) if done < kills else run(store, None)
            done += not finished
        same += tree_hash(store) == expected
    print(
        f"kill -9 at {done} random moments over {rounds} preparations, each resumed to its end: {same} of {rounds} "
        "stores byte for byte the undisturbed one"
    )


def hostile(folder: Path, count: int) -> None:
    """Prints what became of hostile inputs."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from arra.stages.prepare import prepare
    from tests.data.hostile import fates, make_hostile_folder

    for old in ("hostile", "hostile-store"):
        shutil.rmtree(folder / old, ignore_errors=True)
    made = make_hostile_folder(folder / "hostile", count=count)
    started = time.perf_counter()
    found = prepare(recipe_of(folder / "hostile", "data.max_failed_fraction=1"), folder / "hostile-store")
    seconds = time.perf_counter() - started
    good, failed = fates(made, found.checked())
    lost = {item.id for item in made.items} - good - failed
    print(
        f"{count:,} hostile inputs in {seconds:.0f} s: {len(good)} got codes, {len(failed)} are in failures.jsonl, "
        f"lost: {len(lost)}; sound ones refused: {len(made.expected_good - good)} of {len(made.expected_good)}, broken "
        f"ones taken: {len(made.expected_bad & good)} of {len(made.expected_bad)}"
    )


def main() -> None:
    """Runs the named parts, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["stores", "prepare", "kill", "hostile", []], default=[])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "arra-data")
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--hostile", type=int, default=2000)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    parts = arguments.parts or ["stores", "prepare", "kill", "hostile"]
    if "stores" in parts:
        stores(arguments.folder, arguments.records)
    if "prepare" in parts:
        prepare_speed(arguments.folder, arguments.pictures)
    if "kill" in parts:
        kill(arguments.folder, arguments.kills)
    if "hostile" in parts:
        hostile(arguments.folder, arguments.hostile)


if __name__ == "__main__":
    main()
