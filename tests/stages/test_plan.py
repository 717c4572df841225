"""`arra plan`: what a training takes, against arithmetic by hand, and what it says where it does not fit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arra.config import load_recipe
from arra.errors import ArraError
from arra.stages.plan import MachinePlan, Plan, plan, plan_machine, sharing_on
from arra.stages.plan_machines import GIB, parse_machine
from arra.stages.planned_model import KnownPasses, planned_model, with_known_passes
from arra.train.memory import Sharing
from arra.train.settings import TrainSettings

MIMIC = ["train.steps=100"]
LLAMA_3B: dict[str, int] = {"layers": 24, "width": 3200, "inner": 8704, "codes": 16384, "classes": 1001}
CHAMELEON: dict[str, int] = {"layers": 32, "width": 4096, "inner": 11008, "vocabulary": 65536, "head": 128}


known: KnownPasses = {}


@pytest.fixture(autouse=True)
def _two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of one and two blocks, in half the time: here all blocks are alike."""
    monkeypatch.setattr("arra.train.activations.TRACED_BLOCKS", (1, 2))


def planned(name: str, *gpus: str, row: str | None = None, overrides: tuple[str, ...] = ()) -> Plan:
    recipe = load_recipe(name, row=row, overrides=overrides)
    model = with_known_passes(planned_model(recipe), recipe, known=known)
    return plan(recipe, machines=[parse_machine(each) for each in gpus], planned=model)


def on(found: Plan, written: str) -> MachinePlan:
    return next(each for each in found.machines if each.machine.written == written)


def shown(answer: Any, what: str) -> list[str]:
    """The cells of a row of the table."""
    line = next(line for line in answer.out.splitlines() if line.strip().startswith(what))
    return line.strip().removeprefix(what).split()


def test_the_3b_llamagen_by_hand() -> None:
    """24 blocks of width 3200 and inner width 8704; 16 bytes a weight in shards; two blocks and all else whole."""
    s = LLAMA_3B
    block = 4 * s["width"] ** 2 + 3 * s["width"] * s["inner"] + 2 * s["width"]
    root = 2 * s["codes"] * s["width"] + s["classes"] * s["width"] + s["width"]
    count = s["layers"] * block + root
    assert count == 3_096_659_200
    wide = ("train.batch_size=64", "train.precision=float32")
    found = planned("llamagen_c2i", "4x48", "8x80", row="3b", overrides=wide)
    assert sum(1 for _ in found.planned.parts.blocks) == s["layers"]
    for written, ranks in (("4x48", 4), ("8x80", 8)):
        memory, sharing = on(found, written).memory, on(found, written).sharing
        assert sharing == Sharing("fsdp", ranks)
        for part, each in (("weights", 4), ("gradients", 4), ("optimizer", 8)):
            assert getattr(memory, part) == pytest.approx(each * count / ranks, rel=0.01)
        assert memory.state == pytest.approx({4: 12.39e9, 8: 6.19e9}[ranks], rel=0.01)
        # float32: two blocks, the buffer of one and the root; the root's gradients wait while a block's are summed
        assert memory.gathered == pytest.approx(4 * (3 * block + root) + 4 * root + 8 * block, rel=0.01)
    # 256 positions; of each block 11.4 widths in float32 and two bytes of dropout
    rows, positions = 8, 8 * 256
    assert on(found, "8x80").rows == rows
    each = 4 * (6 * s["width"] + 2 * s["inner"]) + 2 * s["width"]
    kept = s["layers"] * positions * each
    assert kept < on(found, "8x80").memory.activations < 1.12 * kept  # and what a backward pass needs besides
    assert on(found, "8x80").memory.head == pytest.approx(
        positions * s["width"] * 8 + 4 * positions * s["codes"] + 4 * s["codes"] * s["width"], rel=0.01
    )


def test_the_7b_chameleon_by_hand() -> None:
    """7.013 billion: 112 GB at 16 bytes each, so 28 GB on each of 4 devices and 14 GB on each of 8."""
    s = CHAMELEON
    block = 4 * s["width"] ** 2 + 3 * s["width"] * s["inner"] + 2 * s["width"] + 4 * s["head"]
    root = 2 * s["vocabulary"] * s["width"] + s["width"]
    count = s["layers"] * block + root
    assert count == 7_013_158_912
    found = planned(
        "arra_mimic",
        "4x48",
        "8x80",
        row="arra-adapt",
        overrides=(*MIMIC, "train.batch_size=8", "train.micro_batch_size=1"),
    )
    assert (found.planned.name, found.planned.four_bit) == ("chameleon-7b", False)
    for written, ranks, state in (("4x48", 4, 28.05e9), ("8x80", 8, 14.03e9)):
        each = on(found, written)
        assert (each.sharing, each.rows) == (Sharing("fsdp", ranks), 1)
        assert each.memory.state - each.memory.projector == pytest.approx(state, rel=0.01)
        assert each.memory.weights == pytest.approx(4 * count / ranks, rel=0.01)
        # bfloat16: two blocks, the buffer of one, the root; then the root's gradients, narrow and wide
        gathered = 2 * (3 * block + root) + max(2 * root + 6 * block, 6 * root)
        assert each.memory.gathered == pytest.approx(gathered, rel=0.01)
        assert each.memory.total < each.machine.bytes_each
        # previews: weights in one piece, 16 rows of keys and values in bfloat16
        position = 2 * s["layers"] * s["width"] * 2
        assert each.painting.whole_weights == 2 * count
        assert each.painting.memory.cache == pytest.approx(16 * found.planned.length * position, rel=0.01)
        # no gradients are there meanwhile
        stays = each.memory.state - each.memory.gradients - each.memory.projector // 4
        assert each.needed == stays + each.memory.reserve + each.painting.beside
        assert each.fits
        saved = each.memory.state - each.memory.gradients - each.memory.projector // 4
        assert each.memory.host == saved  # the copy that is written in the background
    # full recomputation keeps what enters each block, and one block's inside
    entering = s["layers"] * 2 * found.planned.length * s["width"]
    assert entering < on(found, "4x48").memory.activations < 3 * entering
    projector = sum(parameter.numel() for one in found.planned.projectors for parameter in one.parameters())
    assert on(found, "4x48").memory.projector == 16 * projector


def test_one_card_of_24_gib_takes_four_bit_weights_alone() -> None:
    found = {
        row: planned("arra_mimic", "1x24", row=row, overrides=(*MIMIC, "train.batch_size=1")).machines[0]
        for row in ("arra-adapt", "arra-adapt-qlora")
    }
    full, lean = found["arra-adapt"], found["arra-adapt-qlora"]
    assert (full.fits, lean.fits) == (False, True)
    assert full.largest == 0
    assert lean.memory.weights == pytest.approx(4.4e9, rel=0.02)
    by_name = {remedy.what: remedy for remedy in full.remedies}
    four_bit = by_name["model.llm.train=lora, model.llm.frozen_dtype=bfloat16, model.llm.four_bit=true"]
    assert four_bit.fits
    assert four_bit.needed == pytest.approx(lean.needed, rel=0.01)
    offloaded = by_name["train.parallel.kind=fsdp, train.parallel.offload=true"]
    assert (offloaded.fits, offloaded.steps_fit) == (False, True)  # previews gather the weights in one piece
    assert not by_name["train.optimizer=adamw8bit"].fits


def test_what_is_advised_fits_when_it_is_done() -> None:
    """Settings are written as --set takes them, and their totals are those of the recipe with them."""
    tiny = ("train.batch_size=4", "train.precision=float32")
    whole = planned("llamagen_c2i", "2x3.9", row="b", overrides=tiny)
    found = whole.machines[0]
    assert not found.fits
    settings = [remedy for remedy in found.remedies if remedy.what.startswith("train.")]
    assert {remedy.what.split("=")[0] for remedy in settings} >= {"train.micro_batch_size", "train.recompute"}
    fitting, others = ([each for each in settings if each.fits == fits] for fits in (True, False))
    assert fitting
    for remedy in (*fitting, *others[:1]):
        recipe = load_recipe("llamagen_c2i", row="b", overrides=(*tiny, *remedy.what.split(", ")))
        done = plan_machine(recipe, whole.planned, machine=found.machine)
        assert done.needed == remedy.needed
        assert done.fits == remedy.fits


@pytest.mark.parametrize(
    ("changes", "devices", "expected"),
    [
        ({}, "8x80", Sharing("ddp", 8)),
        ({}, "8x2", Sharing("fsdp", 8)),
        ({}, "1x2", Sharing("ddp", 1)),
        ({"parallel": {"kind": "ddp"}}, "8x2", Sharing("ddp", 8)),
        ({"parallel": {"offload": True}}, "8x80", Sharing("fsdp", 8)),
        ({"parallel": {"kind": "hsdp", "replicas": 2}}, "8x80", Sharing("hsdp", 8, 2)),
    ],
)
def test_sharing_is_chosen_as_training_does(changes: dict[str, Any], devices: str, expected: Sharing) -> None:
    model = planned_model(load_recipe("llamagen_c2i", row="b"))  # 111 million: 1.8 GB with all moments
    assert sharing_on(parse_machine(devices), TrainSettings(steps=1, **changes), planned=model) == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 1}, r"train\.batch_size: 1 pictures cannot be shared by 8 devices; raise it"),
        ({"parallel": {"kind": "hsdp", "replicas": 3}}, r"train\.parallel\.replicas: 3 groups do not divide 8 ranks"),
        ({"parallel": {"kind": "ddp", "offload": True}}, r"train\.parallel\.offload: is of sharded weights"),
        (
            {"optimizer": "adamw8bit", "parallel": {"kind": "fsdp"}},
            r"adamw8bit does not train sharded weights",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(changes: dict[str, Any], told: str) -> None:
    model = planned_model(load_recipe("llamagen_c2i", row="b"))
    with pytest.raises(ArraError, match=told):
        sharing_on(parse_machine("8x2"), TrainSettings(steps=1, **changes), planned=model)


def test_devices_by_size_or_name() -> None:
    assert parse_machine("4x48").bytes_each == 48 * GIB
    assert parse_machine("8xH100") == parse_machine("8xH100")
    assert (parse_machine("8xH100").count, parse_machine("8xH100").bytes_each) == (8, 80 * GIB)
    assert parse_machine("1 x 23.6").bytes_each == int(23.6 * GIB)


def test_a_table_on_the_screen(run_arra: Callable[..., Any]) -> None:
    answer = run_arra("plan", "llamagen_c2i", "--row", "arra-base-b", "--gpus", "8x80", "--gpus", "16xl4")
    assert answer.code == 0, answer
    assert "llamagen_c2i, row arra-base-b: llamagen-b" in answer.out
    assert "projector: 1,181,184, thrown away after training" in answer.out
    assert "12 blocks of 7,079,424; 25,935,360 outside of them" in answer.out
    assert shown(answer, "of") == ["80.0", "24.0"]
    parts = ("weights", "gradients", "moments of the optimiser", "activations of a micro-batch", "hours of training")
    assert all(len(shown(answer, part)) == 2 for part in parts)
    assert shown(answer, "fits")[0] == "yes"


def test_what_does_not_fit_ends_with_code_1(run_arra: Callable[..., Any]) -> None:
    answer = run_arra("plan", "llamagen_c2i", "--row", "b", "--gpus", "1x3", "--set", "train.batch_size=4")
    assert answer.code == 1
    assert shown(answer, "fits") == ["no"]
    assert re.search(r"1x3: \d+\.\d GiB do not fit\. Each of these alone:", answer.out)
    assert re.search(r"  train\.recompute=full: \d+\.\d GiB", answer.out)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "many"], "--gpu many: 'many' is unknown; known are a10, a100"),
        (["--gpus", "8x"], "--gpu 8x: expected how many and how large, as in 4x48 (GiB), or their name"),
        (["--gpus", "0x80"], "--gpu 0x80: expected how many"),
        (["--gpus", "4x0"], "--gpu 4x0: expected how many"),
        (["--gpus", "8xh1000"], "--gpu 8xh1000: 'h1000' is unknown; known are a10, a100"),
        (["--gpus", "1x80", "--model", "gpt-5"], "--model gpt-5: unknown; known are chameleon-7b, chameleon-34b"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], told: str, run_arra: Callable[..., Any]) -> None:
    answer = run_arra("plan", "arra_mimic", *arguments)
    assert answer.error.startswith(told)


def test_who_stands_in_and_who_does_not(tmp_path: Path, run_arra: Callable[..., Any]) -> None:
    other = [f"model.llm.folder={tmp_path / 'none'}", "tokenizer.name=openmoji-vq4", "tokenizer.weights=null"]
    recipe = load_recipe("arra_mimic", overrides=[*MIMIC, *other, "data.image_size=64"])
    with pytest.raises(ArraError, match=r"none: no painting language model there; .* --model chameleon-7b"):
        planned_model(recipe)
    decoder = run_arra("plan", "llamagen_c2i", "--row", "b", "--gpus", "1x80", "--model", "chameleon-7b")
    assert decoder.error == "--model chameleon-7b: stands in for a language model, and the recipe trains a decoder"
    found = planned_model(load_recipe("arra_mimic", overrides=MIMIC), "chameleon-34b")
    assert found.name == "chameleon-34b"
    assert found.notes == ("prompts taken to have 128 tokens",)
