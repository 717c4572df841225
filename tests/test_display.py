"""Progress on a terminal of any width, and in a file."""

import io

import pytest
from rich.console import Console

from arra.display import Display

NOTE = "ntp 2.215, gva 0.412, 123,457 tokens/s, MFU 41%, 12.3 GiB, waiting 2%"


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_narrow_terminal_cuts_neither_the_note_nor_the_time_left(width: int) -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=width, force_terminal=True, legacy_windows=False, color_system=None)
    display = Display(console)
    display.show("train", "step", 120, 1000, NOTE)
    console.print(display.progress.get_renderable())
    shown = printed.getvalue()
    assert all(word in shown for word in NOTE.split())
    assert "120/1000" in shown
    assert "left -:--:--" in shown
    assert "…" not in shown


def test_brackets_in_a_note_are_text() -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=120, force_terminal=True, color_system=None)
    display = Display(console)
    display.show("train", "step", 1, 2, "saved in [/tmp/run]")
    console.print(display.progress.get_renderable())
    assert "saved in [/tmp/run]" in printed.getvalue()


def test_off_a_terminal_it_is_lines() -> None:
    printed = io.StringIO()
    with Display(Console(file=printed, width=80), seconds_between_lines=0.0) as display:
        tell = display.row("train")
        tell("step", 1, 3, NOTE)
        tell("step", 1, 3, NOTE)
        tell("step", 3, 3, "validation 2.250")
    assert printed.getvalue().splitlines() == [f"train: step 1/3  {NOTE}", "train: step 3/3  validation 2.250"]
