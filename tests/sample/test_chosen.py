"""The settings that were chosen for a run: kept, read, and refused where they are another model's."""

from pathlib import Path

import pytest

from arra.errors import ArraError
from arra.sample.chosen import CHOSEN_FILE, read_chosen, write_chosen
from arra.sample.logits import SamplingSettings


def test_what_is_chosen_is_read(tmp_path: Path) -> None:
    assert read_chosen(tmp_path, steps=7) is None
    chosen = SamplingSettings(cfg_scale=3.5, cfg_schedule="power", cfg_power=2, top_k=9)
    write_chosen(tmp_path, chosen, steps=7, about={"by": "hand"})
    assert read_chosen(tmp_path, steps=7) == chosen


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    write_chosen(tmp_path, SamplingSettings(), steps=7, about={})
    with pytest.raises(ArraError, match=r"chosen when the run was at step 7, it is at 8; delete it, and choose again"):
        read_chosen(tmp_path, steps=8)
    for broken in ("", "[]", '{"sampling": {"cfg_scale": -1}, "steps": 7}', '{"sampling": {}}'):
        (tmp_path / CHOSEN_FILE).write_text(broken)
        with pytest.raises(ArraError, match=r"sampling\.json: not what arra guidance writes; delete it"):
            read_chosen(tmp_path, steps=7)
