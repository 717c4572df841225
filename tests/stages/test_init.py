"""`arra init`: a language model and an image tokenizer go in, a folder that `transformers` reads comes out."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from tokenizers.processors import TemplateProcessing

import arra
from arra.errors import ArraError
from arra.models import CausalLM
from arra.runs import file_hash
from arra.stages.init import init_painter
from tests.models.toy_lms import SPECIAL, save_toy_lm, toy_words

TOKENIZER = "openmoji-vq4"
NUM_CODES = 2048


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_lm(tmp_path_factory.mktemp("lm") / "llama", padding=20)


@pytest.fixture(scope="module")
def made(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "painter"
    return init_painter(str(llm), out, tokenizer=TOKENIZER, image_size=32).path


def opened(folder: Path) -> CausalLM:
    model = arra.load_model(folder)
    assert isinstance(model, CausalLM)
    return model


def test_the_command_says_what_it_made(llm: Path, tmp_path: Path, run_arra: Callable[..., Any]) -> None:
    out = tmp_path / "painter"
    answer = run_arra("init", out, "--llm", llm, "--tokenizer", TOKENIZER, "--image-size", 32)
    assert answer.code == 0, answer
    lines = answer.out.splitlines()
    assert lines[-1] == str(out)
    said = {line[:12].strip(): line[12:].strip() for line in lines[:-1]}
    assert said["kind"] == "LlamaForCausalLM, 2 layers of 32"
    assert said["vocabulary"] == "320 rows before, 2,416 now, head of its own"
    assert said["codes"] == f"2,048 of {TOKENIZER}: ids 367..2414"
    assert said["picture"] == "32 x 32 pixels: 77 tokens"  # 64 codes, 8 rows, begin, 2 sides, end, end of text
    assert float(said["first loss"].partition(" ")[0]) == pytest.approx(7.9, abs=0.2)


def test_transformers_reads_the_folder(llm: Path, made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words, old = AutoTokenizer.from_pretrained(made), toy_words()
    assert words.convert_tokens_to_ids(["<|image_start|>", "<|image_row|>", "<|image_code_0|>"]) == [300, 302, 367]
    text = "a red bar on the left"
    assert words(text)["input_ids"] == old(text)["input_ids"]
    lm, before = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (made, llm))
    asked = words(text, return_tensors="pt")
    torch.testing.assert_close(lm(**asked).logits[..., :300], before(**asked).logits[..., :300], atol=1e-6, rtol=0)
    told = {"do_sample": False, "max_new_tokens": 8, "bad_words_ids": [[code] for code in range(300, 2416)]}
    assert torch.equal(lm.generate(**asked, **told), before.generate(**asked, do_sample=False, max_new_tokens=8))


def test_we_read_the_folder(made: Path, llm: Path) -> None:
    model = opened(made)
    assert model.settings.grid == (8, 8)
    assert model.layout.family == "generic"
    assert model.layout.closing == (1,)
    assert model.layout.code_ids().tolist() == list(range(367, 367 + NUM_CODES))
    assert model.layout.max_positions == 512
    assert model.about["start"] == "codebook"
    assert model.about["codes_of"] == arra.load_tokenizer(TOKENIZER).codes_of
    assert model.about["origin"] == {
        "source": "llama",
        "sha256": {"model.safetensors": file_hash(llm / "model.safetensors")},
    }
    codes = torch.randint(NUM_CODES, (2, 8, 8))
    assert model.logits(codes, prompts=["a red bar", ""]).shape == (2, 64, NUM_CODES)


def test_no_prompt_becomes_a_sign(made: Path) -> None:
    model = opened(made)
    assert model.text_tokenizer is not None
    for text in ("<|image_code_5|>", "a<|image_start|>b", SPECIAL[0], SPECIAL[1]):
        ids = model.text_tokenizer.encode(text)
        assert ids
        assert max(ids) < 300
        assert min(ids) > 1


def test_codes_that_are_near_begin_near(made: Path) -> None:
    rows = opened(made).lm.get_input_embeddings().weight.detach()[367 : 367 + NUM_CODES : 16]  # type: ignore[operator]
    vectors = arra.load_tokenizer(TOKENIZER).model.quantize.rows(torch.arange(0, NUM_CODES, 16)[None, None])[0, :, 0].T
    apart = [torch.cdist(each, each).flatten() for each in (rows, vectors)]
    assert torch.corrcoef(torch.stack(apart))[0, 1] > 0.999


def test_the_same_seed_writes_the_same_weights(llm: Path, made: Path, tmp_path: Path) -> None:
    again = init_painter(str(llm), tmp_path / "again", tokenizer=TOKENIZER, image_size=32).path
    other = init_painter(str(llm), tmp_path / "other", tokenizer=TOKENIZER, image_size=32, seed=1).path
    mine, same, different = (file_hash(folder / "model.safetensors") for folder in (made, again, other))
    assert mine == same != different


def test_without_rows_neither_sides_nor_rows_are_written(llm: Path, tmp_path: Path) -> None:
    done = init_painter(str(llm), tmp_path / "square", tokenizer=TOKENIZER, image_size=16, rows=False, dtype="bfloat16")
    model = opened(done.path)
    assert (model.layout.new_line, model.layout.first_size) == (None, None)
    assert model.layout.prefix([5], (4, 4)) == [5, 300]
    assert json.loads((done.path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_rep_token_is_known_and_not_written(llm: Path, made: Path, tmp_path: Path, run_arra: Any) -> None:
    """It begins like the other signs, no prompt becomes it, and it stands in pictures only where a recipe says so."""
    out = tmp_path / "rep"
    answer = run_arra("init", out, "--llm", llm, "--tokenizer", TOKENIZER, "--image-size", 32, "--rep-token")
    assert answer.code == 0, answer
    assert "rep token   id 303, for align.target: rep" in answer.out
    model = opened(out)
    assert (model.layout.rep, model.layout.rep_id) == (None, 303)
    assert (opened(made).layout.rep, opened(made).layout.rep_id) == (None, None)
    assert model.layout.prefix([5], (8, 8)) == [5, 300, 311, 311]
    assert model.layout.code_ids().tolist() == list(range(368, 368 + NUM_CODES))
    assert model.text_tokenizer is not None
    assert max(model.text_tokenizer.encode("a<|image_rep|>b")) < 300
    for table in (model.lm.get_input_embeddings().weight, model.lm.get_output_embeddings().weight):  # type: ignore[operator]
        assert 0.3 < float((table[303].std() / table[302].std()).detach()) < 3
    written = model.layout.model_copy(update={"rep": model.layout.rep_id})
    assert written.prefix([5], (8, 8)) == [5, 303, 300, 311, 311]


def test_what_the_lm_puts_before_a_text_stays_before_it(made: Path, tmp_path: Path) -> None:
    folder = save_toy_lm(tmp_path / "gemma", "gemma2")
    words = toy_words()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    words.save_pretrained(folder)
    told: dict[str, Any] = {"tokenizer": TOKENIZER, "image_size": 32, "template": "Draw, {width} wide: {prompt}"}
    model = opened(init_painter(str(folder), tmp_path / "out", **told).path)
    assert model.layout.bos == 0
    tokens = model.condition(prompts=["a red bar"]).tokens[0].tolist()
    assert tokens[0] == 0
    assert tokens[-3] == model.layout.begin_image
    assert model.text_tokenizer is not None
    assert tokens[1:-3] == model.text_tokenizer.encode("Draw, 32 wide: a red bar")
    assert opened(made).layout.bos is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"--llm": "no/such/folder/here"}, "no/such/folder/here: no such folder; "),
        ({"--llm": "./gone"}, "./gone: no such folder; "),
        ({"--tokenizer": "nothing"}, "tokenizer 'nothing': neither a folder nor a known name"),
        ({"--tokenizer": "llamagen-vq16"}, "tokenizer 'llamagen-vq16': its weights do not come with the package"),
        ({"--image-size": 30}, "--image-size 30: no multiple of 4"),
        ({"--image-size": 128}, "1061 tokens do not fit the model's 512 positions"),
        ({"--start": "zero"}, "--start zero: unknown; expected codebook or mean"),
        ({"--dtype": "int8"}, "--dtype int8: unknown"),
        ({"--template": "a picture"}, "--template: expected a text with {prompt} in it once, found 'a picture'"),
        (
            {"--template": "{prompt}, {hight} high"},
            "--template: {hight} in '{prompt}, {hight} high' is nothing that is",
        ),
    ],
)
def test_wrong_wishes_are_told_in_one_line(
    changes: dict[str, Any], line: str, llm: Path, tmp_path: Path, run_arra: Callable[..., Any]
) -> None:
    told = {"--llm": llm, "--tokenizer": TOKENIZER, "--image-size": 32, **changes}
    answer = run_arra("init", tmp_path / "out", *(part for pair in told.items() for part in pair))
    assert line in answer.error
    assert not (tmp_path / "out").exists()


def test_used_folders_are_refused(made: Path, llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ArraError, match="exists already; name a new folder"):
        init_painter(str(llm), made, tokenizer=TOKENIZER, image_size=32)
    with pytest.raises(ArraError, match=r"has the token <\|image_start\|> already"):
        init_painter(str(made), tmp_path / "twice", tokenizer=TOKENIZER, image_size=32)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("config.json", "{}", "no causal language model that can be read"),
        ("config.json", None, "no config.json in it"),
        ("model.safetensors", "nothing", "no causal language model that can be read"),
        ("tokenizer.json", "{", "its tokenizer cannot be read"),
    ],
)
def test_damaged_folders_are_refused(name: str, text: str | None, line: str, llm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llm, tmp_path / "damaged"))
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(ArraError, match=re.escape(line)) as refused:
        init_painter(str(folder), tmp_path / "out", tokenizer=TOKENIZER, image_size=32)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_code_that_a_folder_brings_is_never_run(llm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llm, tmp_path / "evil"))
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    for name, own in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**told, "auto_map": own}))
    out = init_painter(str(folder), tmp_path / "out", tokenizer=TOKENIZER, image_size=32).path
    opened(out)
    assert not mark.exists()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(ArraError, match="no causal language model that can be read"):
        init_painter(str(folder), tmp_path / "other", tokenizer=TOKENIZER, image_size=32)
    assert not mark.exists()


def test_a_repository_is_fetched_without_what_is_not_needed(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = [*(file.name for file in llm.iterdir()), "pytorch_model.bin", "consolidated.safetensors", "onnx/a.json"]
    fetched: list[str] = []

    def snapshot(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "org/toy"
        fetched.extend(filter_repo_objects(offered, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(llm)

    monkeypatch.setattr("arra.stages.init.snapshot_download", snapshot)
    model = opened(init_painter("org/toy", tmp_path / "out", tokenizer=TOKENIZER, image_size=32).path)
    assert sorted(fetched) == sorted(file.name for file in llm.iterdir())
    assert model.about["origin"]["source"] == "org/toy"


@pytest.mark.parametrize("error", [OSError, LocalEntryNotFoundError, HFValidationError])
def test_a_repository_that_is_not_there_is_told(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(name: str, **options: Any) -> str:
        raise error("no connection")

    monkeypatch.setattr("arra.stages.init.snapshot_download", snapshot)
    assert issubclass(RepositoryNotFoundError, OSError)
    with pytest.raises(ArraError, match=r"^org/toy: neither a folder nor a repository that can be fetched \(.*\); "):
        init_painter("org/toy", tmp_path / "out", tokenizer=TOKENIZER, image_size=32)


def test_a_repository_without_weights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arra.stages.init.snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(ArraError, match=r"^org/toy: the repository holds no model\*\.safetensors"):
        init_painter("org/toy", tmp_path / "out", tokenizer=TOKENIZER, image_size=32)


def test_without_transformers_the_extra_is_named(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ArraError, match=r"language models: the package 'transformers' is missing; pip install 'arra\[llm\]'"
    ):
        init_painter(str(llm), tmp_path / "out", tokenizer=TOKENIZER, image_size=32)


def test_a_model_that_paints_already_is_refused(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = torch.nn.Module()
    lm.config = SimpleNamespace(model_type="chameleon")  # type: ignore[assignment]
    monkeypatch.setattr("arra.stages.init.read_language_model", lambda folder, dtype: lm)
    with pytest.raises(ArraError, match="Chameleon has codes of its own; bring it in with arra import"):
        init_painter(str(llm), tmp_path / "out", tokenizer=TOKENIZER, image_size=32)
