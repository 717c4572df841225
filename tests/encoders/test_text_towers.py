"""Text halves of CLIPs: the home library's vectors, whatever stands beside a prompt, and files that do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as home
from safetensors.torch import load_file, save_file

from arra.encoders.text_towers import TextTower, load_text_tower
from arra.errors import ArraError
from tests.encoders.toy_vision import shaken, toy_clip_folder

PROMPTS = ["the red fox", "a", "a prompt that has many more letters than its context", "the red fox"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "right", "effusion", '"', "##s", "is", "<", "there"]
CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, toy_clip_folder(folder)


@pytest.fixture(scope="module")
def biomedclip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A small BERT in open_clip's own text tower, its tensors as open_clip saves them, its tokenizer beside them."""
    encoder = pytest.importorskip("open_clip.hf_model").HFTextEncoder
    folder = tmp_path_factory.mktemp("biomedclip")
    config = home.BertConfig(
        vocab_size=len(WORDS), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=300,
    )  # fmt: skip
    network = encoder("", 24, config=config, pooler_type="cls_last_hidden_state_pooler", proj_type="mlp")
    shaken(network)
    state = {f"text.{key}": value for key, value in network.state_dict().items() if ".pooler." not in key}
    state["text.transformer.embeddings.position_ids"] = torch.arange(300)[None]  # older files hold it
    save_file(state, folder / "open_clip_model.safetensors")
    home.BertTokenizer(vocab={word: place for place, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder, network


def port_name(key: str) -> str:
    """What BioMedCLIP's Hugging Face port calls a tensor of open_clip's file."""
    parts = {
        "text.proj.0": "text_projection.fc1", "text.proj.2": "text_projection.fc2",
        "text.transformer.": "text_model.", "word_embeddings": "token_embedding",
        "token_type_embeddings": "token_type_embedding", "position_embeddings": "position_embedding",
        "embeddings.LayerNorm": "embeddings.layer_norm", "encoder.layer.": "encoder.layers.",
        "attention.self.key": "self_attn.k_proj", "attention.self.query": "self_attn.q_proj",
        "attention.self.value": "self_attn.v_proj", "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "layer_norm1", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
        "output.LayerNorm": "layer_norm2",
    }  # fmt: skip
    for ours, theirs in parts.items():
        key = key.replace(ours, theirs)
    return key


@torch.no_grad()
def test_clips_text_half_equals_transformers(clip: tuple[Path, Any]) -> None:
    folder, network = clip
    tower = load_text_tower("clip-b32", weights=folder)
    tokenizer = home.CLIPTokenizer.from_pretrained(folder)
    given = tokenizer(PROMPTS, padding=True, truncation=True, max_length=tower.context, return_tensors="pt")
    wanted = network.get_text_features(**given).pooler_output
    found = tower.encode(PROMPTS)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (found - found[0]).abs().amax(1).gt(1e-3).tolist() == [False, True, True, False]
    counts = tower.num_tokens(PROMPTS)
    assert [count > tower.context for count in counts] == [False, False, True, False]
    assert counts[0] == len(tokenizer(PROMPTS[0]).input_ids)


@torch.no_grad()
def test_biomedclips_text_half_equals_open_clip(biomedclip: tuple[Path, Any], tmp_path: Path) -> None:
    from open_clip.tokenizer import HFTokenizer

    folder, network = biomedclip
    tower = load_text_tower("biomedclip", weights=folder)
    prompts = ["right  effusions", "There is NO \u201ceffusion\u201d &lt;", "effusion " * 400, "xylophone"]
    ids = HFTokenizer(str(folder), context_length=256)(prompts)
    torch.testing.assert_close(tower.encode(prompts), network(ids), **CLOSE)
    assert tower.context == 256
    assert tower.num_tokens(prompts) == [5, 9, 402, 3]
    # the port's names are the same network
    state = load_file(folder / "open_clip_model.safetensors")
    state.pop("text.transformer.embeddings.position_ids")
    ported = {port_name(key): value for key, value in state.items()}
    assert len(ported) == len(state)
    shutil.copytree(folder, tmp_path / "port")
    (tmp_path / "port" / "open_clip_model.safetensors").unlink()
    save_file(ported, tmp_path / "port" / "model.safetensors")
    port = load_text_tower("biomedclip", weights=tmp_path / "port")
    torch.testing.assert_close(port.encode(prompts), tower.encode(prompts), rtol=0, atol=0)
    assert port.weights_hash != tower.weights_hash


def test_neighbours_change_nothing_but_rounding(clip: tuple[Path, Any], biomedclip: tuple[Path, Any]) -> None:
    for name, (folder, _) in {"clip-l14": clip, "biomedclip": biomedclip}.items():
        tower = load_text_tower(name, weights=folder)
        alone = torch.cat([tower.encode([prompt]) for prompt in PROMPTS])
        torch.testing.assert_close(tower.encode(PROMPTS, batch_size=3), alone, **CLOSE)


def test_a_text_in_place_of_several_is_told(clip: tuple[Path, Any]) -> None:
    tower: TextTower = load_text_tower("clip-b16", weights=clip[0])
    with pytest.raises(ArraError, match=r"prompts: expected a list of texts, got 'a fox'; write \['a fox'\]"):
        tower.encode("a fox")
    with pytest.raises(ArraError, match="expected a list of texts"):
        tower.encode([])


def test_what_does_not_fit_is_told(clip: tuple[Path, Any], biomedclip: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ArraError, match=r"text tower of 'dinov2-b14': there is none; choose of clip-b32, .*biomedclip"):
        load_text_tower("dinov2-b14", weights=clip[0])
    with pytest.raises(ArraError, match=r"no text tensor embeddings\.token_type_embeddings\.weight in it"):
        load_text_tower("biomedclip", weights=clip[0])
    with pytest.raises(ArraError, match=r"no config\.json in it"):
        load_text_tower("clip-b32", weights=biomedclip[0])
    broken = tmp_path / "broken"
    shutil.copytree(clip[0], broken)
    (broken / "tokenizer.json").write_text('{"a":')
    with pytest.raises(ArraError, match=r"broken: its tokenizer cannot be read .*fetch its tokenizer\.json of a CLIP"):
        load_text_tower("clip-b32", weights=broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ArraError, match=r"broken: no tokenizer in it; fetch the tokenizer\.json of a CLIP"):
        load_text_tower("clip-b32", weights=broken)
    shutil.copy(biomedclip[0] / "tokenizer.json", broken)
    with pytest.raises(ArraError, match="not that of its network"):
        load_text_tower("clip-b32", weights=broken)
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["hidden_size"] = -1
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArraError, match=r"text_config\.hidden_size is '-1', expected an integer from 1"):
        load_text_tower("clip-b32", weights=broken)
    state = load_file(broken / "model.safetensors")
    save_file({key: value for key, value in state.items() if key.startswith("v")}, broken / "model.safetensors")
    config["text_config"]["hidden_size"] = 32
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArraError, match=r"no tensors text_model\.\* in it; expected a whole clip-b32"):
        load_text_tower("clip-b32", weights=broken)
