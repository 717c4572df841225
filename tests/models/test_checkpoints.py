"""Files in and out: every layout, nothing dangerous, nothing silent."""

import json
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from arra.errors import ArraError
from arra.models import load_decoder, save_model
from arra.models.decoder import Decoder, DecoderSettings
from arra.models.llamagen import infer_settings, read_checkpoint
from arra.tokenizers.text import train_text_tokenizer
from tests.models.toys import toy_decoder

make = partial(toy_decoder, grid=(2, 3))
SHAPE: dict[str, Any] = {"num_heads": 4, "grid": (2, 3)}


def same(one: Decoder, other: Decoder) -> None:
    assert one.settings.ffn_width == other.settings.ffn_width
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("wrap", ["model", "module", "state_dict", None])
def test_layouts(wrap: str | None, tmp_path: Path) -> None:
    model = make()
    state: dict[str, Any] = dict(model.state_dict())
    state["freqs_cis"] = torch.zeros(7, 4, 2)
    state["layers.0.attention.kv_cache.k_cache"] = torch.zeros(2, 4, 8, 8)
    state["layers.1.attention.kv_cache.v_cache"] = torch.zeros(2, 4, 8, 8)
    path = tmp_path / "weights.pt"
    torch.save({wrap: state, "steps": 3} if wrap else state, path)
    same(load_decoder("llamagen", weights=path, **SHAPE), model)


def test_fsdp_folder_and_safetensors(tmp_path: Path) -> None:
    model = make()
    torch.save(model.state_dict(), tmp_path / "consolidated.pth")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    same(load_decoder("llamagen", weights=tmp_path, **SHAPE), model)
    same(load_decoder("llamagen", weights=tmp_path / "w.safetensors", **SHAPE), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "condition": "caption", "caption_dim": 6},
        {"condition": "text", "text_vocab_size": 9, "prefix_length": 5},
        {"ffn_hidden_size": 48, "num_classes": 3},
    ],
)
def test_shapes_tell_the_settings(changes: dict[str, Any]) -> None:
    model = make(**changes)
    known = SHAPE if model.settings.prefix_rotary == "zero" else {**SHAPE, "prefix_rotary": "identity"}
    inferred = DecoderSettings(**infer_settings(model.state_dict(), source="here", known=known))
    for field in ("num_layers", "hidden_size", "num_codes", "kv_heads", "ffn_width", "condition", "prefix_length"):
        assert getattr(inferred, field) == getattr(model.settings, field), field


def test_heads_that_cannot_be_told(tmp_path: Path) -> None:
    torch.save(make().state_dict(), tmp_path / "w.pt")
    with pytest.raises(ArraError, match=r"pass num_heads= \(and grid=, which is \(16, 16\)"):
        load_decoder("llamagen", weights=tmp_path / "w.pt")


def test_published_sizes_tell_the_heads() -> None:
    with torch.device("meta"):
        state = Decoder(DecoderSettings(num_layers=12, num_heads=12, hidden_size=768)).state_dict()
    assert infer_settings(state, source="here", known={})["num_heads"] == 12


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    state: dict[str, Tensor] = dict(make().state_dict())
    del state["norm.weight"], state["layers.1.attention.wo.weight"]
    state["align_head.weight"] = torch.zeros(1)
    state["output.weight"] = torch.zeros(16, 8)
    torch.save({"model": state}, tmp_path / "w.pt")
    with pytest.raises(ArraError) as caught:
        load_decoder("llamagen", weights=tmp_path / "w.pt", **SHAPE)
    text = str(caught.value)
    assert "\n" not in text
    for word in ("missing layers.1.attention.wo.weight, norm.weight", "unexpected align_head.weight"):
        assert word in text
    assert "output.weight is (16, 8), expected (16, 32)" in text


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


def test_hostile_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": Hostile()}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ArraError, match="refused"):
            read_checkpoint(name)
    assert not Path("hacked").exists()


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ArraError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
    torch.save(make().state_dict(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(b"nothing")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("cut.pt", "cut.safetensors", "empty.pt"):
        with pytest.raises(ArraError, match=name):
            read_checkpoint(tmp_path / name)
    torch.save({"optimizer": {}, "steps": 1}, tmp_path / "other.pt")
    with pytest.raises(ArraError, match="it holds optimizer, steps"):
        read_checkpoint(tmp_path / "other.pt")
    torch.save({"model": dict(make().state_dict())}, tmp_path / "plain.pt")
    with pytest.raises(ArraError, match="no 'ema' weights inside"):
        read_checkpoint(tmp_path / "plain.pt", entry="ema")
    torch.save({"discriminator.weight": torch.zeros(1)}, tmp_path / "vq.pt")
    with pytest.raises(ArraError, match="not a LlamaGen decoder"):
        load_decoder("llamagen", weights=tmp_path / "vq.pt")


@pytest.mark.parametrize("condition", ["class", "caption", "text"])
def test_save_and_load(condition: str, tmp_path: Path) -> None:
    extra: dict[str, Any] = {}
    if condition == "text":
        tokenizer = train_text_tokenizer(["a red heart", "a blue heart"])
        extra = {"text_vocab_size": tokenizer.vocab_size, "prefix_length": 8}
    model = make(condition=condition, num_kv_heads=2, **extra)
    if condition == "text":
        model.text_tokenizer = tokenizer
    folder = save_model(model, tmp_path / "deep" / "model")
    again = load_decoder(folder)
    assert again.settings == model.settings
    assert not again.training
    same(again, model)
    files = {"model.safetensors", "model.json"} | ({"tokenizer.json"} if condition == "text" else set())
    assert {path.name for path in folder.iterdir()} == files
    if condition == "text":
        codes = torch.zeros(1, 2, 3, dtype=torch.int64)
        assert torch.equal(model.logits(codes, prompts=["red"]), again.logits(codes, prompts=["red"]))
    save_model(again, folder)
    same(load_decoder(str(folder)), model)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ArraError, match=r"no model\.json"):
        load_decoder(tmp_path)
    folder = save_model(make(), tmp_path / "m")
    card = json.loads((folder / "model.json").read_text())
    for text in ("{", "[]", json.dumps({"kind": "other", "settings": {}})):
        (folder / "model.json").write_text(text)
        with pytest.raises(ArraError, match=r"model\.json"):
            load_decoder(folder)
    card["settings"]["num_heads"] = 5
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(ArraError, match="settings make no model"):
        load_decoder(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArraError):
        save_model(make(), tmp_path / "file")


def test_names() -> None:
    with pytest.raises(ArraError, match="known are llamagen, llamagen-b, llamagen-l"):
        load_decoder("llamagen-m")
    with pytest.raises(ArraError, match="without weights="):
        load_decoder("llamagen")
    with pytest.raises(ArraError, match="num_layer"):
        load_decoder("llamagen-b", num_layer=3)
    model = load_decoder("llamagen-b", num_layers=1, num_codes=8, num_classes=2)
    assert (model.settings.num_heads, model.settings.hidden_size, model.settings.ffn_width) == (12, 768, 2048)
