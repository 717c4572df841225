"""Preparation: the same store whatever makes it and however often it dies; every item is in the store or told of."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from arra.config import Recipe, load_recipe
from arra.data.batches import Batches
from arra.data.store import Store
from arra.errors import ArraError
from arra.stages.prepare import PrepareOptions, prepare
from arra.stages.train import training_data
from arra.tokenizers import load_tokenizer
from tests.data.hostile import HostileFolder, fates, make_hostile_conversations, make_hostile_folder

INLINE = PrepareOptions(workers=0, batch_size=8, threads=1)


def tree(path: Path) -> dict[str, str]:
    """The bytes of every file below a folder, locks apart."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.endswith(".lock")]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, draw_pictures: Callable[[Path], Path]) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("prepare") / "pictures")


@pytest.fixture(scope="module")
def recipe_for(toy_settings: tuple[str, ...]) -> Callable[..., Recipe]:
    def recipe(path: Path | str, *more: str, source: str = "folder", row: str = "aligned") -> Recipe:
        own = [f"data.source={source}", f"data.path={path}", "data.shard_records=16"]
        chosen = [text for text in toy_settings if row == "aligned" or not text.startswith("align.")]
        return load_recipe("demo", row=row, overrides=[*own, *chosen, *more])

    return recipe


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, pictures: Path, recipe_for: Callable[..., Recipe]
) -> tuple[Path, dict[str, str]]:
    """A store made in one go, and its bytes."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    found = prepare(recipe_for(pictures), folder, options=INLINE)
    assert (found.items, found.done, found.already, found.failed, found.pending) == (60, 60, 0, 0, 0)
    return folder, tree(folder)


def test_loader_processes_change_nothing(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]]
) -> None:
    options = PrepareOptions(workers=2, batch_size=8, threads=1)
    prepare(recipe_for(pictures), tmp_path / "store", options=options)
    assert tree(tmp_path / "store") == whole[1]


def test_parts_of_a_job_array_make_the_store_of_one(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = tmp_path / "store"
    first = prepare(
        recipe_for(pictures), store, options=PrepareOptions(workers=0, batch_size=8, threads=1, shard=(1, 3))
    )
    assert first.ok
    assert first.pending == 60 - first.done
    assert not (store / "codes").exists()
    with pytest.raises(ArraError, match="column 'codes' is missing"):
        Store.open(store).column("codes")
    monkeypatch.setenv("WORLD_SIZE", "3")  # as torchrun says it
    for rank, pending in (("0", True), ("2", False)):
        monkeypatch.setenv("RANK", rank)
        found = prepare(recipe_for(pictures), store, options=INLINE)
        assert bool(found.pending) == pending
    assert tree(store) == whole[1]


@pytest.mark.slow
def test_ray_makes_the_same_store(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]]
) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    recipe = recipe_for(pictures)
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from arra.config import load_recipe\n"
        "from arra.stages.prepare import PrepareOptions, prepare\n"
        "import ray\n"
        "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        "recipe = load_recipe(sys.argv[1])\n"
        "options = PrepareOptions(engine='ray', workers=2, batch_size=8, threads=1)\n"
        "found = prepare(recipe, Path(sys.argv[2]), options=options)\n"
        "assert (found.done, found.failed) == (60, 0), found\n"
    )
    from arra.config import dump_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "recipe.yaml"), str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert tree(tmp_path / "store") == whole[1]


def num_shard_files(store: Path) -> int:
    """Files of shards in the making, while another process writes and renames."""
    names = os.listdir(store) if store.is_dir() else []
    parts = [name for name in names if name.endswith(".part") and not name.startswith(".records.")]
    count = 0
    for part in parts:
        with suppress(FileNotFoundError):
            count += sum(name.endswith(".arrow") for name in os.listdir(store / part))
    return count


@pytest.mark.slow
def test_killed_and_resumed_is_the_undisturbed_store(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]]
) -> None:
    """kill -9 with a column half done and others published; wherever it falls is told of in tests/data/test_columns."""
    from arra.config import dump_recipe

    recipe = recipe_for(pictures)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    store = tmp_path / "store"
    command = [sys.executable, "-m", "arra", "prepare", str(tmp_path / "recipe.yaml"), "--store", str(store)]
    command += ["--workers", "1", "--batch-size", "8", "--threads", "1"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while num_shard_files(store) < 7 and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (store / "codes").exists()
    found = prepare(recipe, store, options=INLINE)
    assert 0 < found.already < 60
    assert tree(store) == whole[1]


def test_interrupted_at_any_shard_it_continues(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]],
    interrupt_writing: Callable[[int], AbstractContextManager[None]],
) -> None:  # fmt: skip
    store = tmp_path / "store"
    for survive in (0, 3, 7):
        with interrupt_writing(survive):
            prepare(recipe_for(pictures), store, options=INLINE)
    found = prepare(recipe_for(pictures), store, options=INLINE)
    assert found.already > 0
    assert found.already + found.done == 60
    assert tree(store) == whole[1]
    again = prepare(recipe_for(pictures), store, options=INLINE)
    assert (again.done, again.already) == (0, 60)
    assert tree(store) == whole[1]


def test_another_encoder_adds_a_column_and_touches_nothing(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]], run_arra
) -> None:
    store = tmp_path / "store"
    shutil.copytree(whole[0], store)
    recipe = recipe_for(pictures, "encoder.teacher=efficientnet-lite1")
    prepare(recipe, store, options=INLINE, only=("features",))
    after = tree(store)
    assert {name: after[name] for name in whole[1]} == whole[1]
    assert {name.split("/")[0] for name in after.keys() - whole[1].keys()} == {"features.efficientnet-lite1"}
    assert Store.open(store).column("features.efficientnet-lite1").shape == (60, 1280)


def test_a_picture_that_changed_is_not_taken_for_the_old_one(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]]
) -> None:
    store, moved = tmp_path / "store", tmp_path / "pictures"
    shutil.copytree(whole[0], store)
    shutil.copytree(pictures, moved)
    shutil.copy(moved / "001.png", moved / "000.png")
    recipe = recipe_for(moved, "encoder.teacher=efficientnet-lite1")
    found = prepare(recipe, store, options=INLINE)
    assert found.failed == 1
    assert not found.ok
    (line,) = (store / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "000.png"
    assert "not the one that the store was made from" in json.loads(line)["reason"]
    shutil.copy(pictures / "000.png", moved / "000.png")
    assert prepare(recipe, store, options=INLINE).failed == 0


def test_failures_over_the_limit_end_with_code_1_and_are_mended(
    tmp_path: Path, pictures: Path, toy_settings: tuple[str, ...], run_arra, whole: tuple[Path, dict[str, str]]
) -> None:
    folder, store = tmp_path / "pictures", tmp_path / "store"
    shutil.copytree(pictures, folder)
    (folder / "007.png").write_bytes(b"no picture")
    (folder / "031.png").write_bytes((folder / "031.png").read_bytes()[:100])
    sets = [part for each in toy_settings for part in ("--set", each)]
    sets += ["--set", "data.source=folder", "--set", f"data.path={folder}", "--set", "data.shard_records=16"]
    command = [
        "prepare",
        "demo",
        "--row",
        "aligned",
        "--store",
        store,
        "--workers",
        0,
        "--batch-size",
        8,
        "--threads",
        1,
    ]
    answer = run_arra(*command, *sets)
    assert answer.code == 1
    assert "2 of 60 items failed, more than data.max_failed_fraction 0 allows" in answer.err
    listed = [json.loads(line) for line in (store / "failures.jsonl").read_text().splitlines()]
    assert [each["id"] for each in listed] == ["007.png", "031.png"]
    assert all(each["reason"].startswith("not a readable image") for each in listed)
    assert not (store / "codes").exists()

    tolerant = run_arra(*command, *sets, "--set", "data.max_failed_fraction=0.05")
    assert tolerant.code == 0
    opened = Store.open(store)
    assert opened.reader("codes").valid().sum() == 58
    assert not set(np.nonzero(~opened.reader("codes").valid())[0]) & set(opened.rows("train", columns=["codes"]))

    for name in ("007.png", "031.png"):
        shutil.copy(pictures / name, folder / name)
    assert run_arra(*command, *sets).code == 1  # what failed stays failed until it is tried again
    mended = run_arra(*command, *sets, "--retry-failed")
    assert mended.code == 0
    assert not (store / "failures.jsonl").exists()
    assert Store.open(store).reader("codes").valid().all()
    expected = {name: value for name, value in whole[1].items() if not name.startswith("records")}
    after = tree(store)
    assert {name: after[name] for name in expected} == expected  # as if nothing had ever failed


def check_fates(made: HostileFolder, store: Store) -> None:
    good, failed = fates(made, store)
    assert made.expected_good <= good
    assert made.expected_bad <= failed
    assert not good & failed
    assert {item.id for item in made.items} == good | failed
    assert store.reader("codes").valid().sum() == len(good)


def test_no_hostile_input_crashes_or_is_lost(tmp_path: Path, recipe_for: Callable[..., Recipe]) -> None:
    """2,000 hostile inputs: each is either in the store with codes or in failures.jsonl, by its own name."""
    made = make_hostile_folder(tmp_path / "hostile", count=2000)
    recipe = recipe_for(tmp_path / "hostile", "data.max_failed_fraction=1", "data.shard_records=256")
    store = prepare(recipe, tmp_path / "store", options=PrepareOptions(workers=1, threads=1)).checked()
    check_fates(made, store)
    valid, features = store.reader("codes").valid(), store.column("features.efficientnet-lite0")
    assert (np.abs(features[valid]).sum(1) > 0).all()
    assert not features[~valid].any()


def test_hostile_conversations(tmp_path: Path, recipe_for: Callable[..., Recipe]) -> None:
    made = make_hostile_conversations(tmp_path / "hostile" / "points.json")
    recipe = recipe_for(made.path, "data.max_failed_fraction=1", source="conversations")
    check_fates(made, prepare(recipe, tmp_path / "store", options=INLINE).checked())


@pytest.mark.parametrize("crop", ["{kind: center}", "{kind: ten_crop, range: [1.25, 1.1]}"])
def test_online_gives_the_numbers_of_the_store(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], crop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fixed crops: the same codes, and features up to the rounding of another batch size."""
    if "center" not in crop:  # loader processes, which import torch, once
        monkeypatch.setattr("arra.stages.training_data.default_workers", lambda: 0)
    few = shutil.copytree(pictures, tmp_path / "few")
    lines = (few / "metadata.jsonl").read_text().splitlines(keepends=True)
    (few / "metadata.jsonl").write_text("".join(lines[:12]))
    for line in lines[12:]:  # each costs twenty crops through the encoder, twice
        (few / json.loads(line)["file_name"]).unlink()
    cached, online = (recipe_for(few, f"data.crop={crop}", f"data.mode={mode}") for mode in ("cached", "online"))
    tokenizer = load_tokenizer(cached.tokenizer.name)
    stored = training_data(cached, prepare(cached, tmp_path / "cached", options=INLINE).checked(), tokenizer)
    made = training_data(online, prepare(online, tmp_path / "online", options=INLINE).checked(), tokenizer)
    try:
        assert not (tmp_path / "online" / "codes").exists()
        assert stored.features is not None
        assert made.features is not None
        torch.testing.assert_close(dict(made.features), dict(stored.features), rtol=1e-4, atol=1e-5)
        for step in (0, 1, 5):
            one, other = stored.batches.batch(step), made.batches.batch(step)
            assert torch.equal(one.tokens, other.tokens)
            assert one.features is not None
            assert other.features is not None
            torch.testing.assert_close(dict(one.features), dict(other.features), rtol=1e-4, atol=1e-5)
        held_out = list(zip(stored.validation, made.validation, strict=True))
        assert held_out
        assert all(torch.equal(one.tokens, other.tokens) for one, other in held_out)
    finally:
        made.pictures.close()


def test_random_crops_are_functions_of_seed_and_step(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arra.stages.training_data.default_workers", lambda: 0)
    recipe = recipe_for(pictures, "data.crop={kind: random}", "data.mode=online", row="baseline")
    store = prepare(recipe, tmp_path / "store", options=INLINE).checked()
    tokenizer = load_tokenizer(recipe.tokenizer.name)
    first, second = (training_data(recipe, store, tokenizer) for _ in range(2))
    try:
        in_order = [first.batches.batch(step).tokens for step in range(3)]
        assert torch.equal(second.batches.batch(2).tokens, in_order[2])
        assert torch.equal(second.batches.batch(0).tokens, in_order[0])
        rows = first.batches.batch(0).rows
        assert rows is not None
        other = first.pictures.take(rows, torch.full((len(rows), 4), 0.01))[0]
        assert not torch.equal(other, in_order[0][:, -other.shape[1] :])
    finally:
        first.pictures.close()
        second.pictures.close()


def test_columns_are_never_replaced_by_mistake(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]]
) -> None:
    """A typo in a recipe must not cost what was computed for days."""
    store = tmp_path / "store"
    shutil.copytree(whole[0], store)
    with pytest.raises(
        ArraError, match=r"'codes' was made with crop 'center_crop\(16\)', the recipe says 'fl.*--replace"
    ):
        prepare(recipe_for(pictures, "data.crop={kind: flip}"), store, options=INLINE)
    with pytest.raises(ArraError, match=r"'pixels' was made with crop .*grey16=range"):
        prepare(recipe_for(pictures, "data.crop={grey16: range}"), store, options=INLINE)
    other = recipe_for(pictures, "data.crop={kind: flip}", "encoder.teacher=efficientnet-lite1")
    with pytest.raises(
        ArraError, match=r"'codes' was made with crop .*'features.efficientnet-lite1' would be with 'flip"
    ):
        prepare(other, store, options=INLINE, only=("features",))
    assert tree(store) == whole[1]
    anew = PrepareOptions(workers=0, batch_size=8, threads=1, replace=True)
    replaced = prepare(recipe_for(pictures, "data.crop={kind: flip}"), store, options=anew).checked()
    assert replaced.reader("codes").entry.variants == 2


def test_a_raised_limit_takes_what_is_made(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], whole: tuple[Path, dict[str, str]]
) -> None:
    folder, store = tmp_path / "pictures", tmp_path / "store"
    shutil.copytree(pictures, folder)
    (folder / "007.png").write_bytes(b"no picture")
    first = prepare(recipe_for(folder), store, options=INLINE)
    assert (first.ok, first.done, first.failed) == (False, 59, 1)
    assert "run again" in first.verdict
    raised = prepare(recipe_for(folder, "data.max_failed_fraction=0.1"), store, options=INLINE)
    assert (raised.ok, raised.done, raised.already, raised.failed) == (True, 0, 59, 1)
    strict = prepare(recipe_for(folder), store, options=INLINE)
    assert not strict.ok
    assert "--retry-failed" in strict.verdict


@pytest.mark.parametrize("environment", [("2", "2"), ("x", "2"), ("0", "")])
def test_ranks_that_are_no_parts_are_refused(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], environment: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in zip(("RANK", "WORLD_SIZE"), environment, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ArraError, match=r"RANK/WORLD_SIZE .*: expected i/n with i from 0 to n-1"):
        prepare(recipe_for(pictures), tmp_path / "store", options=INLINE)


def children_of(parent: int) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(entry.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for its processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_loader_process_outlives_its_parent(
    tmp_path: Path, pictures: Path, recipe_for: Callable[..., Recipe], number: signal.Signals
) -> None:
    from arra.config import dump_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_for(pictures)))
    store = tmp_path / "store"
    command = [sys.executable, "-m", "arra", "prepare", str(tmp_path / "recipe.yaml"), "--store", str(store)]
    process = subprocess.Popen([*command, "--workers", "1", "--batch-size", "2"], stdout=subprocess.DEVNULL)
    while num_shard_files(store) < 1 and process.poll() is None:
        time.sleep(0.001)
    children = children_of(process.pid)
    assert len(children) == 1
    process.send_signal(number)
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_sources_of_one_name_mix_and_are_weighed(tmp_path: Path, pictures: Path, toy_settings: tuple[str, ...]) -> None:
    for name in ("one", "two"):
        shutil.copytree(pictures, tmp_path / name / "imgs")
    paths = [tmp_path / name / "imgs" for name in ("one", "two")]
    listed = ", ".join(f"{{kind: folder, path: {path}, weight: {n + 1}}}" for n, path in enumerate(paths))
    recipe = load_recipe(
        "demo", row="baseline", overrides=[*(t for t in toy_settings if t[:6] != "align."), f"data.sources=[{listed}]"]
    )
    store = prepare(recipe, tmp_path / "store", options=INLINE).checked()
    assert [each["name"] for each in store.about["sources"]] == ["imgs", "imgs-2"]
    assert {store.fields(row, "id")[0].split("/")[0] for row in (0, 119)} == {"imgs", "imgs-2"}
    batches = training_data(recipe, store, load_tokenizer(recipe.tokenizer.name)).batches
    assert isinstance(batches, Batches)
    assert batches.weights == (1, 2)
    assert batches.counts is not None
    first = batches.counts[0]
    rows = torch.cat([batches.batch(step).rows for step in range(sum(batches.counts) * 3 // (2 * 8))])  # type: ignore[misc]
    assert int((rows >= first).sum()) == pytest.approx(2 * int((rows < first).sum()), rel=0.15)
    alone = load_recipe(
        "demo",
        row="baseline",
        overrides=[
            *(t for t in toy_settings if t[:6] != "align."),
            f"data.sources=[{{kind: folder, path: {paths[0]}, weight: 2}}]",
        ],
    )
    with pytest.raises(
        ArraError, match="made from the sources imgs, imgs-2, the recipe weighs imgs; name the same ones"
    ):
        training_data(alone, store, load_tokenizer(recipe.tokenizer.name))
