"""Networks on the meta device: those of a rank that gets its weights from another one, equal in all but numbers."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from arra.config import Recipe, load_recipe, parse_recipe
from arra.errors import ArraError
from arra.models import save_model
from arra.models.chameleon import CHAMELEON_SIZES, build_chameleon, chameleon_settings, read_chameleon
from arra.models.language_folder import load_language_model, read_language_card, read_language_model
from arra.stages.init import init_painter
from arra.stages.language import first_language_model
from arra.stages.model import build_model, decoder_settings
from arra.stages.weights import import_weights
from tests.models import toy_chameleon as toy
from tests.models.toy_lms import FAMILIES, save_toy_lm
from tests.models.toys import toy_decoder

NO_MORE = 200 * 2**20
"""Bytes that a process may grow while it makes a network of billions of weights: objects, no numbers."""


def same_but_for_numbers(full: nn.Module, empty: nn.Module) -> None:
    """Names, shapes, types, what is trained, ties, and what is saved; all of the second on the meta device."""

    def tensors(model: nn.Module) -> dict[str, Any]:
        named = dict(model.named_parameters(remove_duplicate=False))
        buffers = {name: (tuple(value.shape), value.dtype) for name, value in model.named_buffers()}
        names: dict[int, list[str]] = {}
        for name, parameter in named.items():
            names.setdefault(id(parameter), []).append(name)
        return {
            "parameters": [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in named.items()],
            "ties": list(names.values()),
            "buffers": buffers,
            "saved": list(model.state_dict()),
            "hooks": [len(module._forward_hooks) for module in model.modules()],
            "training": {module.training for module in model.modules()},
        }

    expected, found = tensors(full), tensors(empty)
    for what, value in expected.items():
        assert found[what] == value, what
    assert all(value.is_meta for value in (*empty.parameters(), *empty.buffers()))
    assert not any(value.is_meta for value in (*full.parameters(), *full.buffers()))


def painter_recipe(folder: Path, *, dropout: float = 0.0, **llm: Any) -> Recipe:
    told = {"name": "toy", "train": {"steps": 1}, "model": {"llm": {"folder": str(folder), "dropout": dropout, **llm}}}
    return parse_recipe(yaml.safe_dump(told), Recipe, source="toy")


@pytest.fixture(scope="module")
def painters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a toy painter: llama, smollm (tied), chameleon (norms of every head), lumina (shared ones)."""
    place = tmp_path_factory.mktemp("painters")
    made: dict[str, Path] = {}

    def painter(kind: str) -> Path:
        if kind not in made and kind in FAMILIES:
            llm = save_toy_lm(place / f"{kind}-lm", kind)
            made[kind] = init_painter(str(llm), place / kind, tokenizer="openmoji-vq4", image_size=16).path
        elif kind not in made:
            fields = toy.config()
            source = toy.save(place / f"{kind}-64", fields, toy.state(fields, rows=2 if kind == "lumina" else None))
            toy.text_tokenizer(source / "tokenizer.json")
            made[kind] = import_weights(source, place / kind, image_size=64).path
        return made[kind]

    return painter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_language_model_needs_its_configuration_alone(family: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    folder = save_toy_lm(tmp_path / "lm", family)
    full = read_language_model(folder, dtype=dtype)
    (folder / "model.safetensors").unlink()
    same_but_for_numbers(full, read_language_model(folder, dtype=dtype, empty=True))


def test_the_type_of_the_weights_where_the_configuration_says_none(tmp_path: Path) -> None:
    folder = save_toy_lm(tmp_path / "lm", "llama")
    read_language_model(folder, dtype=torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"dtype": "bfloat16",', ""))
    empty = read_language_model(folder, dtype=None, empty=True)
    same_but_for_numbers(read_language_model(folder, dtype=None), empty)
    assert {parameter.dtype for parameter in empty.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["llama", "smollm", "chameleon", "lumina"])
@pytest.mark.parametrize(
    "llm",
    [{"dropout": 0.05}, {"train": "lora", "frozen_dtype": "bfloat16", "lora": {"rank": 4}}, {"train": "head"}],
    ids=["all", "lora", "head"],
)
def test_a_painter_ready_to_train(kind: str, llm: dict[str, Any], painters: Callable[[str], Path]) -> None:
    recipe, card = painter_recipe(painters(kind), **llm), read_language_card(painters(kind))
    before = torch.random.get_rng_state()
    empty = first_language_model(recipe, card, empty=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    full = first_language_model(recipe, card)
    same_but_for_numbers(full, empty)
    assert empty.settings == full.settings
    assert empty.companions == full.companions


def test_heads_that_differ_share_no_norms_in_either(painters: Callable[[str], Path], tmp_path: Path) -> None:
    """A card says that norms are shared; whether they can be, the numbers in the file decide."""
    model = load_language_model(painters("lumina"), dtype=None)
    save_model(model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    state = load_file(weights)
    state["model.layers.1.self_attn.k_norm.bias"][1, 0] += 1
    save_file(state, weights, metadata={"format": "pt"})
    full = load_language_model(tmp_path / "model", dtype=None)
    same_but_for_numbers(full, load_language_model(tmp_path / "model", dtype=None, empty=True))
    assert len(full.lm.model.layers[0].self_attn.q_norm.weight) == 4  # type: ignore[union-attr,index]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_metas_own_files(dtype: torch.dtype | None, fused: bool, tmp_path: Path) -> None:
    fields = toy.config()
    folder = toy.save_meta(tmp_path, fields, toy.to_meta(toy.state(fields, rows=2), fields, fused=fused))
    same_but_for_numbers(read_chameleon(folder, dtype=dtype).lm, read_chameleon(folder, dtype=dtype, empty=True).lm)


def test_what_does_not_fit_is_refused_without_numbers_too(tmp_path: Path) -> None:
    fields = toy.config()
    state = toy.state(fields, rows=1)
    state["model.norm.weight"] = torch.ones(7)
    folder = toy.save(tmp_path, fields, state)
    with pytest.raises(ArraError, match=r"model\.norm\.weight is \(7,\), expected \(32,\)"):
        read_chameleon(folder, empty=True)


def test_four_bits_are_refused(painters: Callable[[str], Path]) -> None:
    recipe = painter_recipe(painters("llama"), train="lora", four_bit=True)
    with pytest.raises(ArraError, match=r"^model\.llm\.four_bit: weights in four bits cannot be shared out"):
        first_language_model(recipe, read_language_card(painters("llama")), empty=True)


TEXT = {"name": "flan-t5-xl", "weights": "none"}


@pytest.mark.parametrize("condition", ["class", "caption", "text"])
@pytest.mark.parametrize("rep", [False, True])
def test_decoders(condition: str, rep: bool) -> None:
    told: dict[str, Any] = {
        "name": "toy",
        "train": {"steps": 1},
        "data": {"image_size": 32},
        "model": {"condition": condition, "num_layers": 2, "hidden_size": 32, "drop_path": 0.2},
        "align": {"target": "rep"} if rep else None,
        "text_encoder": TEXT if condition == "caption" else None,
    }
    recipe = parse_recipe(yaml.safe_dump(told), Recipe, source="toy")
    settings = decoder_settings(recipe, num_codes=16, downsampling=4)
    empty = build_model(recipe, settings, text=None, empty=True)
    assert settings.rep_token == rep
    same_but_for_numbers(build_model(recipe, settings, text=None), empty)


def test_given_weights_are_not_read(tmp_path: Path) -> None:
    save_model(toy_decoder(), tmp_path / "given")
    (tmp_path / "given" / "model.safetensors").write_bytes(b"no weights")
    recipe = load_recipe("llamagen_c2i", row="tiny", overrides=[f"model.weights={tmp_path / 'given'}"])
    settings = toy_decoder().settings
    assert build_model(recipe, settings, text=None, empty=True).norm.weight.is_meta
    with pytest.raises(ArraError, match="given"):
        build_model(recipe, settings, text=None)


def grown() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_billions_of_weights_take_no_memory() -> None:
    before = grown()
    recipe = load_recipe("llamagen_c2i", row="3b")
    decoder = build_model(recipe, decoder_settings(recipe, num_codes=16384, downsampling=16), text=None, empty=True)
    with torch.device("meta"):
        seven = build_chameleon(chameleon_settings("7b", CHAMELEON_SIZES["7b"]), rows=1, image_tokenizer=False)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 3_096_659_200
    assert sum(parameter.numel() for parameter in seven.parameters()) == 7_013_158_912
    assert grown() - before < NO_MORE
