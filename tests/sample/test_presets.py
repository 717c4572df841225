"""Every family paints as its reference does where nobody says otherwise."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from arra.errors import ArraError
from arra.models import load_model, save_model
from arra.models.llamagen import original_state
from arra.sample.presets import PRESETS, family_default, find_preset, own_sampling
from arra.stages.init import init_painter
from arra.stages.painters import load_painter
from arra.stages.weights import import_weights
from arra.tokenizers.image import ImageTokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from tests.models import toy_chameleon
from tests.models.toy_lms import save_toy_lm
from tests.models.toys import toy_decoder

TOLD: dict[str, Any] = {"num_heads": 4, "grid": "2x2"}


def llamagen(folder: Path, **changes: Any) -> Path:
    """What `arra import` makes of a checkpoint in LlamaGen's own layout."""
    folder.mkdir()
    model = toy_decoder(**changes)
    torch.save({"model": original_state(model, torch.float32, source="toy")}, folder / "weights.pt")
    return import_weights(folder / "weights.pt", folder / "out", **TOLD).path


def chameleon(folder: Path, layout: str) -> Path:
    fields = toy_chameleon.config()
    toy_chameleon.save(folder, fields, toy_chameleon.state(fields, rows=1))
    toy_chameleon.text_tokenizer(folder / "tokenizer.json")
    return import_weights(folder, folder / "out", image_size=64, layout=layout).path


def test_imported_models_paint_as_their_reference(tmp_path: Path) -> None:
    found = {
        "llamagen-c2i": llamagen(tmp_path / "c2i"),
        "llamagen-t2i": llamagen(tmp_path / "t2i", condition="caption", caption_dim=6),
        "lumina": chameleon(tmp_path / "lumina", "lumina"),
        "chameleon": chameleon(tmp_path / "meta", "chameleon"),
    }
    settings = VQSettings(channels=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, num_codes=16, code_dim=4)
    ImageTokenizer(VQModel(settings), name="toy", weights_hash=None).save(tmp_path / "vq")
    for name, folder in found.items():
        assert load_painter(folder, tokenizer=str(tmp_path / "vq")).sampling == PRESETS[name].settings, name


def test_a_card_has_the_last_word(tmp_path: Path) -> None:
    model = toy_decoder(num_codes=2048)
    model.about["sampling"] = {"cfg_scale": 1.25}
    folder = save_model(model, tmp_path / "model")
    assert load_painter(folder, tokenizer="openmoji-vq4").sampling == PRESETS["plain"].settings.model_copy(
        update={"cfg_scale": 1.25}
    )


def test_models_without_a_reference(tmp_path: Path) -> None:
    llm = save_toy_lm(tmp_path / "lm", "smollm")
    painter = load_model(init_painter(str(llm), tmp_path / "painter", tokenizer="openmoji-vq4", image_size=16).path)
    assert family_default(painter) == PRESETS["lumina"].settings
    words = toy_decoder(condition="text", text_vocab_size=9, prefix_length=3)
    assert family_default(words) == PRESETS["plain"].settings


def test_the_numbers_of_the_references() -> None:
    told = {name: preset.settings.model_dump(exclude_defaults=True) for name, preset in PRESETS.items()}
    assert told == {
        "llamagen-c2i": {"cfg_scale": 4.0, "top_k": 2000},
        "llamagen-fid": {"cfg_scale": 1.5},
        "arra-fid": {"cfg_scale": 2.0},
        "llamagen-t2i": {"cfg_scale": 7.5, "top_k": 1000},
        "lumina": {"cfg_scale": 4.0, "top_k": 2000},
        "lumina-3": {"cfg_scale": 3.0, "top_k": 2000},
        "chameleon": {"cfg_scale": 3.0, "temperature": 0.7, "top_p": 0.9},
        "plain": {},
    }
    assert all(preset.source and preset.use for preset in PRESETS.values())


def test_names() -> None:
    assert find_preset("llamagen-fid") is PRESETS["llamagen-fid"]
    with pytest.raises(ArraError, match=r"^preset 'lamagen-fid': unknown; did you mean 'llamagen-fid'\? known are"):
        find_preset("lamagen-fid")
    with pytest.raises(ArraError, match=r"^preset 'x': unknown; known are llamagen-c2i, "):
        find_preset("x")


def test_a_card_that_says_nonsense() -> None:
    model = toy_decoder()
    model.about["sampling"] = {"cfg_scale": -1}
    with pytest.raises(ArraError, match=r"^model\.json: about\.sampling: .*greater than or equal to 0; mend it"):
        own_sampling(model)


def test_the_page_on_generation_lists_them_all() -> None:
    """In this order, with these numbers."""
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| ((?:cfg|no guidance).*?) \|", page, re.MULTILINE))
    assert list(rows) == list(PRESETS)
    words = {"cfg_scale": "cfg", "top_k": "top-k", "temperature": "temperature", "top_p": "top-p"}
    for name, preset in PRESETS.items():
        told = preset.settings.model_dump(exclude_defaults=True)
        expected = ", ".join(f"{words[key]} {told[key]}" for key in words if key in told)
        assert rows[name] == (expected or "no guidance, no filter")
