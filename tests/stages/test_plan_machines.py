"""Machines on `arra plan`'s command line, and what their cards can do."""

import pytest

from arra.errors import ArraError
from arra.stages.plan_machines import CARDS, GIB, parse_machine


@pytest.mark.parametrize(
    ("written", "count", "gib", "name"),
    [
        ("8xa6000-48g", 8, 48, "a6000"),
        ("8xA6000-Ada", 8, 48, "a6000-ada"),
        ("2xa6000-ada-48gb", 2, 48, "a6000-ada"),
        ("4xa100-40g", 4, 40, "a100"),
        ("h100", 1, 80, "h100"),
        ("2 x 23.5", 2, 23.5, None),
        ("cpu-24g", 1, 24, "cpu"),
        ("2xcpu-12g", 2, 12, "cpu"),
    ],
)
def test_how_machines_are_written(written: str, count: int, gib: float, name: str | None) -> None:
    found = parse_machine(written)
    assert (found.count, found.bytes_each, found.name) == (count, int(gib * GIB), name)
    assert found.device_type == ("cpu" if name == "cpu" else "cuda")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("8xa6000-80g", "a6000 has 48 GiB, found 80; for another card write its GiB"),
        ("4xa100-50g", "a100 has 80 or 40 GiB, found 50"),
        ("8xa6000-", "expected how many and how large"),
        ("0xh100", "expected how many"),
        ("cpu-0g", "expected how many"),
        ("8xa6000ada", "'a6000ada' is unknown; known are a10, .*, a6000-ada, .*, cpu; or write how many"),
        ("48", "expected how many"),
        ("4x48-48g", "expected how many"),
    ],
)
def test_what_no_machine_is(written: str, told: str) -> None:
    with pytest.raises(ArraError, match=f"^--gpu {written}: .*{told}"):
        parse_machine(written)


def test_every_card_has_a_peak() -> None:
    """Data sheets: bfloat16 of tensor cores is never slower than float32, and the paper's card is the Ada one."""
    for name in CARDS:
        machine = parse_machine(name)
        narrow, wide = machine.peak("bfloat16"), machine.peak("float32")
        assert narrow is not None
        assert wide is not None
        assert 8e12 <= wide <= narrow
    assert parse_machine("a6000-ada").peak("bfloat16") == pytest.approx(364.2e12)
    assert parse_machine("1x48").peak("bfloat16") is None
