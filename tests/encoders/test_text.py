"""FLAN-T5 from a folder: the numbers of transformers, whoever stands beside a caption; no file runs anything."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import arra
from arra.encoders import TEXT_SPECS, TextEncoder, text_encoder_hash
from arra.errors import ArraError
from tests.encoders.toy_t5 import make_toy_t5

CAPTIONS = [
    "a red circle left",
    "",
    "blue",
    "a photo of a green square, middle, right of a frame",
    "red circle " * 250,
    "ünïcode 漢字 \U0001f600 </s> <pad> <extra_id_0>",
]
NAME = "flan-t5-small"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_t5(tmp_path_factory.mktemp("t5") / "whole")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return arra.load_text_encoder(NAME, weights=folder, dtype="float32")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_numbers_are_those_of_transformers(folder: Path, dtype: str) -> None:
    """Alone, padded to 120 slots by the library's own tokenizer, through the library's own loading."""
    from transformers import AutoTokenizer, T5EncoderModel

    network = T5EncoderModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    captions = CAPTIONS[:5]
    encoder = arra.load_text_encoder(NAME, weights=folder, dtype=dtype)
    assert encoder.tokenize(CAPTIONS) == tokenizer(CAPTIONS).input_ids
    asked = tokenizer(captions, max_length=120, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = network(input_ids=asked.input_ids, attention_mask=asked.attention_mask).last_hidden_state.float()
    found = encoder.encode(captions)
    assert found.features.shape == (5, 120, 512)
    assert found.features.dtype == torch.float32
    assert torch.equal(found.mask, asked.attention_mask.bool())
    expected = expected * found.mask[:, :, None]
    tolerance = 1e-5 if dtype == "float32" else 0.1
    torch.testing.assert_close(found.features, expected, rtol=0, atol=tolerance)
    assert expected.abs().max() > 1


def test_who_stands_beside_a_caption_changes_nothing(encoder: TextEncoder) -> None:
    together = encoder.encode(CAPTIONS, batch_size=6)
    for batch_size in (1, 4):
        other = encoder.encode(CAPTIONS[::-1], batch_size=batch_size)
        torch.testing.assert_close(other.features.flip(0), together.features, rtol=0, atol=1e-5)
        assert torch.equal(other.mask.flip(0), together.mask)
    for place, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        torch.testing.assert_close(alone.features[0], together.features[place], rtol=0, atol=1e-5)


def test_one_text_is_no_sequence_of_captions(encoder: TextEncoder) -> None:
    with pytest.raises(ArraError, match=r"got one text, expected a sequence of them, as in \['a red bar'\]"):
        encoder.encode("a red bar")


def test_slots_begin_on_the_left_and_the_rest_is_zero(encoder: TextEncoder) -> None:
    found = encoder.encode(CAPTIONS)
    lengths = [min(count, 120) for count in found.num_tokens]
    assert found.mask.sum(1).tolist() == lengths
    assert lengths[1] == 1  # the empty caption has its end token
    for row, length in enumerate(lengths):
        assert found.mask[row, :length].all()
        assert not found.features[row, length:].any()
        assert found.features[row, :length].abs().sum(1).gt(0).all()
    empty = encoder.encode([])
    assert empty.features.shape == (0, 120, 512)
    assert empty.num_cut == 0


def test_a_long_caption_keeps_its_end_token_and_is_counted(encoder: TextEncoder) -> None:
    long, words = CAPTIONS[4], "red circle " * 250
    assert len(words.split()) == 500
    found = encoder.encode([long, "blue"])
    assert found.num_cut == 1
    assert found.num_tokens[0] > 500
    (ids,) = encoder.tokenize([long])
    whole = torch.tensor([[*ids[:119], 1]])
    said = encoder.network(input_ids=whole, attention_mask=torch.ones_like(whole)).last_hidden_state
    torch.testing.assert_close(found.features[:1], said, rtol=0, atol=1e-5)


def test_other_files_hold_the_same_encoder(folder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    """Shards and PyTorch files give the same vectors and the same identity."""
    shards = make_toy_t5(tmp_path / "shards", shard_size="400KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    weights = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")  # the other name of it
    torch.save(weights, pickled / "pytorch_model.bin")
    for other in (shards, pickled):
        loaded = arra.load_text_encoder(NAME, weights=other, dtype="float32")
        assert loaded.weights_hash == encoder.weights_hash == text_encoder_hash(NAME, other)
        assert torch.equal(loaded.encode(CAPTIONS).features, encoder.encode(CAPTIONS).features)


def test_sentencepiece_alone_gives_its_ids(copy: Path, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra 'text' is not installed")
    (tmp_path / "lines.txt").write_text(
        "red green blue circle\na photo of a bar in the middle\nabcdefghijklmnopqrstuvwxyz 0123456789,.-\n" * 50
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(copy / "spiece"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (copy / "tokenizer.json").unlink()
    known = sentencepiece.SentencePieceProcessor(model_file=str(copy / "spiece.model"))
    encoder = arra.load_text_encoder(NAME, weights=copy)
    for caption in ("a red circle", "", "blue  bar, middle."):
        assert encoder.tokenize([caption]) == [[*known.encode(caption), 1]]


def changed(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_any_change_is_another_encoder(folder: Path, copy: Path) -> None:
    known = text_encoder_hash(NAME, folder)
    weights = load_file(copy / "model.safetensors")
    for name in (
        "shared.weight",
        "encoder.block.1.layer.1.DenseReluDense.wo.weight",
        "encoder.final_layer_norm.weight",
    ):
        for place in (0, -1):
            tuned = weights[name].clone()
            tuned.flatten()[place] += 1e-3
            save_file({**weights, name: tuned}, copy / "model.safetensors")
            assert text_encoder_hash(NAME, copy) != known
    save_file({**weights, "decoder.final_layer_norm.weight": torch.zeros(512)}, copy / "model.safetensors")
    assert text_encoder_hash(NAME, copy) == known  # the decoder is not asked
    changed(copy, dropout_rate=0.5, transformers_version="0")
    assert text_encoder_hash(NAME, copy) == known
    changed(copy, layer_norm_epsilon=1e-3)
    assert text_encoder_hash(NAME, copy) != known


def refused(copy: Path | str | None, name: str = NAME) -> str:
    with pytest.raises(ArraError) as caught:
        arra.load_text_encoder(name, weights=copy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_folder_or_another_one(folder: Path, tmp_path: Path) -> None:
    assert refused(None).endswith("fetched with: hf download google/flan-t5-small --local-dir FOLDER")
    assert "no such folder; expected flan-t5-small" in refused(tmp_path / "none")
    assert "no config.json in it" in refused(tmp_path)
    assert "512 wide (d_model), those of flan-t5-xl 2048; say flan-t5-small" in refused(folder, "flan-t5-xl")
    assert "unknown; known are flan-t5-small, flan-t5-base" in refused(folder, "t5")
    with pytest.raises(ArraError, match="dtype 'float16' is unknown; expected float32 or bfloat16"):
        arra.load_text_encoder(NAME, weights=folder, dtype="float16")


def test_a_missing_package_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "'transformers' is missing; pip install 'arra[text]' -c constraints.txt" in refused(folder)
    assert text_encoder_hash(NAME, folder)  # the identity needs no package


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 't5'"),
        ({"num_layers": 2**40}, "num_layers is 1099511627776, expected an integer from 1 on"),
        ({"d_kv": "8"}, "d_kv is '8'"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None"),
        ({"feed_forward_proj": "gated-x"}, "feed_forward_proj is 'gated-x', expected gated-gelu or relu"),
        ({"num_layers": 3}, "weight encoder.block.2.layer.0.SelfAttention.k.weight is missing (and "),
        ({"num_layers": 1}, "weight encoder.block.1.layer.0.SelfAttention.k.weight does not belong"),
        ({"d_ff": 96}, "is torch.float32 [48, 512], expected floats [96, 512] as config.json says"),
        ({"vocab_size": 50}, "its tokenizer is not T5's (58 tokens for 50 embeddings"),
        ({"vocab_size": 32128}, "its tokenizer is not T5's (58 tokens for 32128 embeddings"),
    ],
)
def test_a_configuration_that_does_not_fit(copy: Path, values: dict[str, object], message: str) -> None:
    changed(copy, **values)
    assert message in refused(copy)


def test_damaged_files_are_told_in_a_line(copy: Path, tmp_path: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    for broken in (b"", content[:100], content[:-10], b"\xff" * 200):
        (copy / "model.safetensors").write_bytes(broken)
        assert "no whole safetensors file" in refused(copy)
    (copy / "model.safetensors").unlink()
    assert "no model.safetensors and no model.safetensors.index.json" in refused(copy)
    (copy / "tokenizer.json").write_text('{"model": 1}')
    assert "its tokenizer cannot be read" in refused(copy)
    (copy / "tokenizer.json").unlink()
    assert "no tokenizer.json and no spiece.model" in refused(copy)
    (copy / "config.json").write_text("[" * 10_000)
    assert "config.json: unreadable" in refused(copy)


def test_a_tokenizer_of_another_model(copy: Path) -> None:
    """transformers would make one of four signs of it and say nothing."""
    content = json.loads((copy / "tokenizer.json").read_text())
    for model in ({"type": "BPE"}, {"type": "BPE", "vocab": {"r": 0, "e": 1}, "merges": []}, {"type": "WordLevel"}):
        (copy / "tokenizer.json").write_text(json.dumps({**content, "model": model}))
        assert "its tokenizer " in refused(copy)


def test_an_index_names_files_beside_it_alone(folder: Path, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy.parent / "outside.safetensors")
    for name in ("../outside.safetensors", str(copy.parent / "outside.safetensors"), "none.safetensors", "config.json"):
        content = json.dumps({"weight_map": {"shared.weight": name}})
        (copy / "model.safetensors.index.json").write_text(content)
        assert f"names {name[:100]!r}, which is no weight file beside it" in refused(copy)
    for text in ("", "[]", '{"weight_map": 3}', "null"):
        (copy / "model.safetensors.index.json").write_text(text)
        assert "no index of weights" in refused(copy)


class Trap:
    """What a hostile pickle would run."""

    sprung = False

    def __reduce__(self) -> tuple[object, ...]:
        return (setattr, (Trap, "sprung", True))


def test_a_hostile_pickle_runs_nothing(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"shared.weight": Trap()}, copy / "pytorch_model.bin")
    assert "fetch the safetensors files instead" in refused(copy)
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "fetch the safetensors files instead" in refused(copy)
    torch.save([1, 2], copy / "pytorch_model.bin")
    assert "expected names with tensors, found list" in refused(copy)
    assert not Trap.sprung


def test_code_in_the_folder_is_never_run(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('run')\n")
    changed(copy, auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, architectures=["Evil"])
    about = json.loads((copy / "tokenizer_config.json").read_text())
    about["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (copy / "tokenizer_config.json").write_text(json.dumps(about))
    assert arra.load_text_encoder(NAME, weights=copy).encode(["red"]).mask.sum() > 1


@pytest.mark.parametrize("name", list(TEXT_SPECS))
def test_specs_are_the_published_sizes(name: str) -> None:
    """Shapes of google/flan-t5-*, from their configurations; the count is that of the real architecture."""
    from transformers import T5Config, T5EncoderModel

    d_ff, num_layers, num_heads = {
        "flan-t5-small": (1024, 8, 6),
        "flan-t5-base": (2048, 12, 12),
        "flan-t5-large": (2816, 24, 16),
        "flan-t5-xl": (5120, 24, 32),
        "flan-t5-xxl": (10240, 24, 64),
    }[name]
    shape = {"d_ff": d_ff, "num_layers": num_layers, "num_heads": num_heads, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        network = T5EncoderModel(T5Config(d_model=TEXT_SPECS[name].feature_size, d_kv=64, vocab_size=32128, **shape))
    own = {name: value for name, value in network.named_parameters() if name != "encoder.embed_tokens.weight"}
    assert sum(value.numel() for value in own.values()) == TEXT_SPECS[name].num_parameters
