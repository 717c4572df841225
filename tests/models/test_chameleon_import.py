"""`arra import` and `arra export` of Chameleon's family: from every kind of source to a folder that paints, and out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arra
from arra.errors import ArraError
from arra.models import CausalLM
from arra.models.chameleon import read_chameleon
from arra.sample.grammar import image_state
from arra.stages.weights import export_weights, import_weights
from arra.tokenizers.vocabulary import LUMINA_TEMPLATE
from tests.models import toy_chameleon as toy

ASKED: dict[str, Any] = {"image_size": 64}
CODES = torch.randint(0, 16, (2, 4, 4), generator=torch.Generator().manual_seed(5))


def lumina(folder: Path, *, rows: int = 1, extra: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    fields = toy.config(**changes)
    toy.save(folder, fields, toy.state(fields, rows=rows) | (extra or {}))
    toy.text_tokenizer(folder / "tokenizer.json")
    return folder


def hugging_face(folder: Path) -> Path:
    fields = toy.config()
    toy.save(folder, fields, toy.state(fields, rows=None))
    toy.text_tokenizer(folder / "tokenizer.json")
    return folder


def meta(root: Path, *, ranks: int = 2) -> Path:
    """As Meta's download lies on the disk; its codes are 8,192."""
    fields = toy.config(8192)
    files = toy.to_meta(toy.state(fields, rows=ranks), fields, fused=True)
    toy.text_tokenizer(root / "tokenizer" / "text_tokenizer.json", 8192)
    return toy.save_meta(root / "models" / "7b", fields, files)


def opened(folder: Path) -> CausalLM:
    model = arra.load_model(folder)
    assert isinstance(model, CausalLM)
    return model


def told(done: Any, what: str) -> str:
    found: str = dict(done.rows)[what]
    return found


def test_lumina_paints_as_it_is(tmp_path: Path) -> None:
    """The folder's logits are those of the source's network on the layout's tokens; norms stay shared."""
    done = import_weights(lumina(tmp_path / "Lumina-mGPT-7B-512", rows=2), tmp_path / "out", **ASKED)
    model = opened(tmp_path / "out")
    layout = model.layout
    assert (layout.family, layout.template, model.settings.grid) == ("lumina", LUMINA_TEMPLATE, (4, 4))
    assert model.settings.head_norm_rows == 2
    assert "sampling" not in model.about  # it paints as its family does
    assert re.match(r"rows of codes kept \(.*\): a model of this kind paints", told(done, "image head"))
    found = model.logits(CODES, prompts=["a cat", "a much longer prompt"])
    source = read_chameleon(tmp_path / "Lumina-mGPT-7B-512").lm
    for row, prompt in enumerate(["a cat", "a much longer prompt"]):
        assert model.text_tokenizer is not None
        words = model.text_tokenizer.encode(layout.text(prompt, (4, 4)))
        tokens = layout.sequence(words, CODES[row].numpy()).tokens.tolist()
        with torch.no_grad():
            states = source.model(torch.tensor([tokens])).last_hidden_state
        places = [place - 1 for place, token in enumerate(tokens) if 4 <= token < 20 and place > len(words)]
        theirs = source.lm_head(states[0, places])[:, 4:20].detach()
        torch.testing.assert_close(found[row], theirs, atol=1e-4, rtol=0)
    import_weights(tmp_path / "Lumina-mGPT-7B-512" / "model.safetensors", tmp_path / "again", **ASKED)
    assert torch.equal(opened(tmp_path / "again").logits(CODES, prompts=["a", "b"]),
                       model.logits(CODES, prompts=["a", "b"]))  # fmt: skip


def test_the_folder_is_an_ordinary_one_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, ChameleonForConditionalGeneration

    import_weights(lumina(tmp_path / "in", rows=2), tmp_path / "out", **ASKED)
    theirs = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert len(theirs.model.layers[0].self_attn.q_norm.weight) == 4
    ours = opened(tmp_path / "out")
    assert len(ours.lm.model.layers[0].self_attn.q_norm.weight) == 2  # type: ignore[union-attr,index]
    ids = torch.randint(0, 290, (1, 9))
    with torch.no_grad():
        assert torch.equal(theirs.model(ids).last_hidden_state, ours(ids).last_hidden)
    names = toy.vocabulary()
    ends = [names["<reserved08706>"], names["</s>"]]
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (0, ends)
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.text_tokenizer is not None
    assert words("a cat", add_special_tokens=False)["input_ids"] == ours.text_tokenizer.encode("a cat")


def test_training_goes_on_with_shared_norms(tmp_path: Path) -> None:
    import_weights(lumina(tmp_path / "in", rows=2), tmp_path / "out", **ASKED)
    model = opened(tmp_path / "out")
    with torch.no_grad():
        for parameter in model.lm.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    arra.save_model(model, tmp_path / "trained")
    again = opened(tmp_path / "trained")
    for key, value in model.lm.state_dict().items():
        assert torch.equal(again.lm.state_dict()[key], value), key


def test_arras_checkpoint(tmp_path: Path) -> None:
    extra = {f"adaptor.layers.{layer}.{part}": torch.ones(3) for layer in (0, 2) for part in ("weight", "bias")}
    done = import_weights(lumina(tmp_path / "in", extra=extra), tmp_path / "out", **ASKED)
    assert told(done, "left out") == "adaptor.layers.{0,2}.{bias,weight}"
    model = opened(tmp_path / "out")
    assert model.layout.template == "{prompt}"  # ARRA's own runs took the bare prompt
    assert model.about["origin"]["ignored"] == told(done, "left out")


def test_an_image_head_that_paints_nothing_is_zeroed(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "in")
    done = import_weights(source, tmp_path / "out", **ASKED)
    model = opened(tmp_path / "out")
    assert model.layout.family == "lumina"
    assert model.logits(CODES, prompts=["a", "b"]).abs().max() == 0
    assert "zeroed" in told(done, "image head")
    text = torch.ones(300, dtype=torch.bool)
    text[4:20] = False
    head = read_chameleon(source).lm.lm_head.weight
    assert torch.equal(model.lm.state_dict()["lm_head.weight"][text], head[text])

    done = import_weights(source, tmp_path / "anole", zero_image_head=False, **ASKED)
    model = opened(tmp_path / "anole")
    assert model.layout.family == "chameleon"  # what a model was taught that paints already
    assert torch.equal(model.lm.state_dict()["lm_head.weight"], head)
    assert told(done, "image head").endswith("as asked")
    assert re.search(r"kept \(their numbers (0\.9|1\.[01])\d times", told(done, "image head"))
    import_weights(
        source, tmp_path / "mixed", zero_image_head=False, layout="lumina", template="draw {prompt}", **ASKED
    )
    assert (opened(tmp_path / "mixed").layout.family, opened(tmp_path / "mixed").layout.template) == (
        "lumina", "draw {prompt}",
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_metas_download(ranks: int, tmp_path: Path) -> None:
    """The text tokenizer is found where Meta's script puts it; `<image>` takes a reserved place for transformers."""
    from transformers import AutoTokenizer, ChameleonForConditionalGeneration

    source = meta(tmp_path, ranks=ranks)
    done = import_weights(source, tmp_path / "out", dtype="bfloat16", **ASKED)
    assert told(done, "text tokenizer").endswith("tokenizer/text_tokenizer.json")
    assert {name for name, _ in done.rows if name.startswith("sha256")} == {
        "sha256 text_tokenizer.json",
        *(f"sha256 {path.name}" for path in source.glob("*.pth")),
    }
    model = opened(tmp_path / "out")
    assert (model.settings.num_codes, model.settings.head_norm_rows) == (8192, ranks)
    assert (model.layout.family, model.layout.template, model.about["zeroed_image_head"]) == (
        "lumina",
        "{prompt}",
        True,
    )
    assert not model.lm.state_dict()["lm_head.weight"][model.layout.code_ids()].any()  # as published they paint nothing
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["dtype"], config["model_parallel_size"]) == (0, "bfloat16", ranks)
    assert config["vocabulary_map"]["<image>"] == toy.vocabulary(8192)["<reserved08707>"]
    assert ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out").config.image_token_id
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (words.bos_token_id, words.pad_token_id) == (0, 1)


@pytest.mark.parametrize("rows", [1, 2])
def test_export_to_lumina_gives_the_sources_tensors(rows: int, tmp_path: Path) -> None:
    source = lumina(tmp_path / "in", rows=rows, num_key_value_heads=2, rope_theta=500.0)
    import_weights(source, tmp_path / "out", **ASKED)
    done = export_weights(tmp_path / "out", tmp_path / "lumina", to="lumina")
    assert done.hint.startswith("Lumina-mGPT: ")
    fields = toy.config(num_key_value_heads=2, rope_theta=500.0)
    found = read_chameleon(tmp_path / "lumina", dtype=None)
    assert (found.head_norm_rows, found.layout_kind) == (rows, "shared")
    for key, value in toy.state(fields, rows=rows).items():
        assert torch.equal(found.lm.state_dict()[key], value), key
    config = json.loads((tmp_path / "lumina" / "config.json").read_text())
    for name in ("hidden_size", "num_key_value_heads", "rope_theta", "rope_scaling", "vocabulary_map", "swin_norm"):
        assert config[name] == fields[name]
    assert (config["mask_image_logits"], config["model_parallel_size"]) == (False, rows)
    assert (tmp_path / "lumina" / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()


def test_export_of_a_model_with_the_rep_token(tmp_path: Path) -> None:
    """Lumina's code would not write it; to `transformers` everybody says what to write."""
    import_weights(lumina(tmp_path / "in"), tmp_path / "out", **ASKED)
    card = json.loads((tmp_path / "out" / "model.json").read_text())
    layout = card["settings"]["layout"]
    assert layout["rep"] is layout["rep_id"] is None  # this vocabulary lacks <reserved08795>
    layout["rep"] = opened(tmp_path / "out").config.vocab_size - 1
    (tmp_path / "out" / "model.json").write_text(json.dumps(card))
    with pytest.raises(ArraError, match=r"out: was trained with the REP token .* Lumina-mGPT's code does not write"):
        export_weights(tmp_path / "out", tmp_path / "lumina", to="lumina")
    assert not (tmp_path / "lumina").exists()
    assert export_weights(tmp_path / "out", tmp_path / "hf", to="hf").path.is_dir()


def test_export_to_hugging_face(tmp_path: Path) -> None:
    from transformers import ChameleonForConditionalGeneration

    import_weights(lumina(tmp_path / "in"), tmp_path / "out", **ASKED)
    done = export_weights(tmp_path / "out", tmp_path / "hf", to="hf", dtype="bfloat16")
    assert done.hint == f"transformers: ChameleonForConditionalGeneration.from_pretrained('{tmp_path / 'hf'}')"
    theirs = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert tuple(theirs.model.layers[0].self_attn.q_norm.weight.shape) == (4, 8)
    assert theirs.lm_head.weight.dtype == torch.bfloat16
    assert opened(tmp_path / "hf").settings == opened(tmp_path / "out").settings
    (tmp_path / "hf" / "model.json").unlink()  # as others publish
    import_weights(tmp_path / "hf", tmp_path / "back", zero_image_head=False, layout="lumina", **ASKED)
    assert opened(tmp_path / "back").settings.head_norm_rows is None


def test_heads_that_differ_go_to_hugging_face_alone(tmp_path: Path) -> None:
    import_weights(hugging_face(tmp_path / "in"), tmp_path / "out", **ASKED)
    with pytest.raises(ArraError, match="differs between heads, so 1 shared rows cannot hold it; export with --to hf"):
        export_weights(tmp_path / "out", tmp_path / "lumina", to="lumina")
    assert not (tmp_path / "lumina").exists()
    export_weights(tmp_path / "out", tmp_path / "hf", to="hf")
    for to, told_so in (("llamagen", "expected hf or lumina"), ("onnx", "expected hf or lumina"), ("hf", "exists")):
        with pytest.raises(ArraError, match=told_so):
            export_weights(tmp_path / "out", tmp_path / "hf", to=to)


@pytest.mark.parametrize(
    ("options", "told_so"),
    [
        ({"layout": "mine"}, "--layout mine: unknown; expected lumina or chameleon"),
        ({"size": "b", "num_heads": 4}, "drop --size, --num-heads"),
        ({"image_size": 100}, "--image-size 100: no multiple of 16"),
        ({"image_size": 48}, "sides of 3 x 3 codes cannot be written"),
        ({"grid": "4x4", "image_size": 64}, "drop one of them"),
        ({"grid": "4"}, "--grid 4: expected rows x columns"),
        ({}, "1063 tokens do not fit the model's 512 positions"),
        ({"template": "no place", **ASKED}, "{prompt}.* once"),
        ({"text_tokenizer": Path("nowhere.json")}, "nowhere.json: cannot be read"),
        ({"dtype": "int8"}, "--dtype int8: unknown"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], told_so: str, tmp_path: Path) -> None:
    with pytest.raises(ArraError, match=told_so) as caught:
        import_weights(lumina(tmp_path / "in"), tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_text_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    source = lumina(tmp_path / "in")
    (source / "tokenizer.json").rename(tmp_path / "words.json")
    with pytest.raises(ArraError, match="no text tokenizer beside the weights; pass --text-tokenizer FILE"):
        import_weights(source, tmp_path / "out", **ASKED)
    content = json.loads((tmp_path / "words.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["IMGIMGAZ"], vocab["IMGIMGBZ"] = vocab["IMGIMGBZ"], vocab["IMGIMGAZ"]
    (tmp_path / "swapped.json").write_text(json.dumps(content))
    with pytest.raises(ArraError, match=r"IMGIMGAZ is token 5, but 4 in config.json of .* and 1 more"):
        import_weights(source, tmp_path / "out", text_tokenizer=tmp_path / "swapped.json", **ASKED)
    del vocab["IMGIMGBZ"]
    (tmp_path / "lacking.json").write_text(json.dumps(content))
    with pytest.raises(ArraError, match="code 1 has none"):
        import_weights(meta(tmp_path), tmp_path / "out", text_tokenizer=tmp_path / "lacking.json", **ASKED)
    narrow = lumina(tmp_path / "narrow", vocab_size=40)
    with pytest.raises(ArraError, match="token 40 is outside the model's vocabulary of 40"):
        import_weights(narrow, tmp_path / "out", **ASKED)
    assert not (tmp_path / "out").exists()
    import_weights(source, tmp_path / "out", text_tokenizer=tmp_path / "words.json", **ASKED)
    assert opened(tmp_path / "out").text_tokenizer is not None


def test_a_vocabulary_in_another_order(tmp_path: Path) -> None:
    """A code's id is read off its name, in head and layout alike."""
    names = toy.vocabulary()
    order = [11, 4, 19, *[token for token in range(4, 20) if token not in (4, 11, 19)]]
    codes = [name for name in names if name.startswith("IMGIMG")]
    content = json.loads(toy.text_tokenizer(tmp_path / "in" / "tokenizer.json").read_text())
    content["model"]["vocab"] |= dict(zip(codes, order, strict=True))
    fields = toy.config()
    fields["vocabulary_map"] = fields["vocabulary_map"] | dict(zip(codes, order, strict=True))
    toy.save(tmp_path / "in", fields, toy.state(fields, rows=1))
    (tmp_path / "in" / "tokenizer.json").write_text(json.dumps(content))
    import_weights(tmp_path / "in", tmp_path / "out", **ASKED)
    model = opened(tmp_path / "out")
    assert model.layout.code_ids().tolist() == order
    import_weights(lumina(tmp_path / "plain"), tmp_path / "other", **ASKED)
    states = torch.randn(3, 32)
    other = opened(tmp_path / "other").head(states)
    torch.testing.assert_close(model.head(states), other[:, torch.tensor(order) - 4])


def test_sources_of_other_kinds(tmp_path: Path) -> None:
    folder = lumina(tmp_path / "in", model_type="llama")
    with pytest.raises(ArraError, match="arra init"):
        import_weights(folder, tmp_path / "out")
    with pytest.raises(ArraError, match=r"drop --text-tokenizer"):
        import_weights(folder, tmp_path / "out", text_tokenizer=folder / "tokenizer.json")
    import_weights(lumina(tmp_path / "good"), tmp_path / "ours", **ASKED)
    with pytest.raises(ArraError, match="in arra's format already"):
        import_weights(tmp_path / "ours", tmp_path / "out")


def test_opened_without_a_folder_of_its_own(tmp_path: Path) -> None:
    """`load_model` gives what import and opening again give; paths may be strings."""
    source = lumina(tmp_path / "in", rows=2)
    words = source / "tokenizer.json"
    model = arra.load_model("lumina-mgpt", weights=str(source), text_tokenizer=str(words), grid=[4, 4])
    import_weights(source, tmp_path / "out", **ASKED)
    again = opened(tmp_path / "out")
    assert isinstance(model, CausalLM)
    assert model.settings == again.settings
    assert torch.equal(model.logits(CODES, prompts=["a", "b"]), again.logits(CODES, prompts=["a", "b"]))
    narrow = arra.load_model("chameleon", weights=source, dtype=torch.bfloat16, **ASKED)
    assert arra.generate(narrow, prompts=["a"], seeds=[0], cfg_scale=4.0).codes.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("options", "told_so"),
    [
        ({}, "chameleon: its weights do not come with the package"),
        ({"weights": "nowhere"}, "nowhere: no such file or folder; expected Chameleon's"),
        ({"seed": 3}, "chameleon: seed: unknown; expected text_tokenizer, zero_image_head"),
        ({"grid": "4x4"}, "chameleon: grid: Input should be a valid tuple; got '4x4'"),
        ({"image_size": "large"}, "chameleon: image_size: Input should be a valid integer"),
        ({"image_size": 0}, "--image-size 0: no multiple of 16"),
        ({"init_missing": ["*"], **ASKED}, "chameleon: init_missing: its files hold all weights"),
    ],
)
def test_wrong_wishes_in_python(options: dict[str, Any], told_so: str, tmp_path: Path) -> None:
    source = {"weights": lumina(tmp_path / "in")} if options else {}
    with pytest.raises(ArraError, match=told_so):
        arra.load_model("chameleon", **{**source, **options})


def test_a_folder_of_transformers_is_no_painter(tmp_path: Path) -> None:
    folder = lumina(tmp_path / "in")
    with pytest.raises(
        ArraError, match=r"in: a language model of transformers \(chameleon\).* see arra import, or load_"
    ):
        arra.load_model(folder)
    lumina(tmp_path / "other", model_type="llama")
    with pytest.raises(ArraError, match=r"transformers \(llama\), no painter yet; see arra init"):
        arra.load_model(tmp_path / "other")


@pytest.mark.parametrize("grid", [(2, 4), (4, 2), (6, 6)])
def test_pictures_keep_to_the_grammar(grid: tuple[int, int], tmp_path: Path) -> None:
    """Each token of a painted sequence is what the published processors of the family allow there."""
    model = arra.load_model("lumina-mgpt", weights=lumina(tmp_path / "in"), **ASKED)
    assert isinstance(model, CausalLM)
    prompts = ["a cat", "<racm3:break><reserved08706> \U0001f98a"]
    found = arra.generate(model, prompts=prompts, seeds=[1, 2], cfg_scale=4.0, top_k=2000, grid=grid).codes
    for prompt, codes in zip(prompts, found, strict=True):
        assert model.text_tokenizer is not None
        words = model.text_tokenizer.encode(model.layout.text(prompt, grid))
        tokens = model.layout.sequence(words, codes.numpy()).tokens.tolist()
        assert tokens.count(model.layout.begin_image) == 1
        for place in range(len(words) + 5, len(tokens) - 1):
            state = image_state(model.layout, tokens[:place])
            assert state.guided
            assert state.codes_only if state.forced is None else state.forced == tokens[place]
