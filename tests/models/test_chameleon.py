"""Chameleon's weights from every published layout, to the same network, and back."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arra.errors import ArraError
from arra.models.chameleon import (
    CHAMELEON_SIZES,
    SharedHeadNorm,
    build_chameleon,
    chameleon_settings,
    expand_head_norms,
    export_state,
    read_chameleon,
    share_head_norms,
    size_name,
    zero_image_head,
)
from tests.models import toy_chameleon as toy

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "swin": {"swin_norm": True, "num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-3},
}
IDS = torch.randint(0, 290, (2, 12), generator=torch.Generator().manual_seed(3))


def logits(lm: Any, ids: Tensor = IDS) -> Tensor:
    """Without the masking of image logits in transformers' own forward."""
    with torch.no_grad():
        found: Tensor = lm.lm_head(lm.model(ids).last_hidden_state)
    return found


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hugging_face_folder_gives_its_own_logits(shape: str, tmp_path: Path) -> None:
    """The weights are those that transformers itself saved, its image tokenizer among them."""
    from transformers import ChameleonForConditionalGeneration

    fields = toy.config(**SHAPES[shape])
    theirs = build_chameleon(chameleon_settings("toy", fields), rows=None, image_tokenizer=True).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    loaded = ChameleonForConditionalGeneration.from_pretrained(tmp_path)
    found = read_chameleon(tmp_path)
    assert (found.layout_kind, found.head_norm_rows, found.lm.training) == ("hf", None, False)
    torch.testing.assert_close(logits(found.lm), logits(loaded), atol=1e-4, rtol=0)
    text = torch.ones(found.settings.vocab_size, dtype=torch.bool)
    text[4:20] = False
    torch.testing.assert_close(logits(found.lm)[..., text], loaded(IDS).logits[..., text], atol=1e-4, rtol=0)
    assert loaded(IDS).logits[..., ~text].max() < -1e30  # what ours never does
    same(export_state(found.lm, "hf"), dict(theirs.state_dict()))
    tokenizer = [parameter for name, parameter in found.lm.named_parameters() if "vqmodel" in name]
    assert tokenizer
    assert not any(parameter.requires_grad for parameter in tokenizer)
    assert found.lm.model.layers[0].self_attn.q_norm.weight.requires_grad


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_shared_norms_go_to_every_layout_and_back(shape: str, rows: int, tmp_path: Path) -> None:
    from transformers import ChameleonForConditionalGeneration

    fields = toy.config(**SHAPES[shape])
    weights = toy.state(fields, rows=rows)
    found = read_chameleon(toy.save(tmp_path / "lumina", fields, weights))
    assert (found.layout_kind, found.head_norm_rows) == ("shared", rows)
    assert not hasattr(found.lm.model, "vqmodel")
    same(export_state(found.lm, "lumina"), weights)

    written_out = export_state(found.lm, "hf")
    heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    assert [len(written_out[f"model.layers.1.self_attn.{which}_norm.bias"]) for which in "qk"] == list(heads)
    found.lm.save_pretrained(tmp_path / "hf", state_dict=written_out)
    again = read_chameleon(tmp_path / "hf")
    assert again.head_norm_rows is None or rows == fields["num_key_value_heads"]
    assert torch.equal(logits(again.lm), logits(found.lm))
    theirs = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(theirs), logits(found.lm))

    assert share_head_norms(again.lm, rows)
    same(export_state(again.lm, "lumina"), weights)
    assert torch.equal(logits(again.lm), logits(found.lm))
    assert share_head_norms(again.lm, rows)  # twice changes nothing


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_metas_files_give_what_metas_network_gives(shape: str, ranks: int, fused: bool, tmp_path: Path) -> None:
    fields = toy.config(**SHAPES[shape], model_parallel_size=ranks)
    weights = toy.state(fields, rows=ranks)
    folder = toy.save_meta(tmp_path, fields, toy.to_meta(weights, fields, fused=fused))
    found = read_chameleon(folder, vocabulary=toy.vocabulary())
    assert (found.layout_kind, found.head_norm_rows) == ("meta", ranks)
    theirs = toy.meta_logits(toy.to_meta(weights, fields, fused=False), fields, IDS[0])
    torch.testing.assert_close(logits(found.lm, IDS[:1])[0], theirs, atol=1e-4, rtol=0)
    same(export_state(found.lm, "lumina"), weights)
    assert found.lm.config.model_parallel_size == ranks
    assert found.lm.config.image_token_id == toy.vocabulary()["<reserved08707>"]


def test_norms_of_ranks_are_averaged(tmp_path: Path) -> None:
    fields = toy.config()
    files = toy.to_meta(toy.state(fields, rows=2), fields, fused=False)
    for key in ("norm.weight", "layers.1.ffn_norm.weight", "layers.0.attention_norm.weight"):
        files[1][key] = files[0][key] + 1
    lm = read_chameleon(toy.save_meta(tmp_path, fields, files)).lm
    for key, norm in (
        ("norm.weight", lm.model.norm),
        ("layers.1.ffn_norm.weight", lm.model.layers[1].post_attention_layernorm),
        ("layers.0.attention_norm.weight", lm.model.layers[0].input_layernorm),
    ):
        torch.testing.assert_close(norm.weight.detach(), files[0][key] + 0.5)


def test_a_type_is_kept_or_changed(tmp_path: Path) -> None:
    fields = toy.config()
    weights = {key: value.bfloat16() for key, value in toy.state(fields, rows=1).items()}
    lumina = toy.save(tmp_path / "lumina", fields, weights)
    meta = toy.save_meta(tmp_path / "meta", fields, toy.to_meta(weights, fields, fused=True))
    for folder in (lumina, meta):
        for asked, given in ((None, torch.bfloat16), (torch.float32, torch.float32)):
            lm = read_chameleon(folder, dtype=asked).lm
            assert {parameter.dtype for parameter in lm.parameters()} == {given}
            assert torch.equal(lm.lm_head.weight.float(), weights["lm_head.weight"].float())


def test_gradients_of_shared_norms_are_the_sums_over_their_heads(tmp_path: Path) -> None:
    fields = toy.config(num_key_value_heads=2)
    folder = toy.save(tmp_path, fields, toy.state(fields, rows=2))
    shared, apart = read_chameleon(folder).lm, read_chameleon(folder).lm
    for layer in apart.model.layers:
        for which, heads in (("q_norm", 4), ("k_norm", 2)):
            own = getattr(layer.self_attn, which)
            written = SharedHeadNorm(rows=heads, num_heads=heads, head_dim=8)
            for part in ("weight", "bias"):
                getattr(written, part).data = getattr(own, part).data.repeat_interleave(heads // 2, 0)
            setattr(layer.self_attn, which, written)
    for lm in (shared, apart):
        lm.lm_head(lm.model(IDS).last_hidden_state).square().mean().backward()
    for ours, theirs in zip(shared.model.layers, apart.model.layers, strict=True):
        for part in ("weight", "bias"):
            grads = getattr(theirs.self_attn.q_norm, part).grad  # heads 0 and 1, 2 and 3 share
            torch.testing.assert_close(getattr(ours.self_attn.q_norm, part).grad, grads.unflatten(0, (2, 2)).sum(1))


def test_norms_that_differ_are_never_shared(tmp_path: Path) -> None:
    fields = toy.config()
    found = read_chameleon(toy.save(tmp_path, fields, toy.state(fields, rows=None)))
    before = {key: value.clone() for key, value in found.lm.state_dict().items()}
    assert not share_head_norms(found.lm, 1)
    same(dict(found.lm.state_dict()), before)
    with pytest.raises(ArraError, match=r"q_norm.weight differs between heads, so 1 shared rows"):
        export_state(found.lm, "lumina")
    with pytest.raises(ArraError, match=r"3 rows do not divide 4 heads"):
        share_head_norms(found.lm, 3)
    same(expand_head_norms(before, found.lm.config), before)


def test_published_sizes() -> None:
    """7B and 34B, built without memory."""
    counts = {}
    for name, fields in CHAMELEON_SIZES.items():
        with torch.device("meta"):
            lm = build_chameleon(chameleon_settings(name, fields), rows=fields.get("model_parallel_size", 1),
                                 image_tokenizer=False)  # fmt: skip
        assert size_name(chameleon_settings(name, fields)) == name
        counts[name] = sum(parameter.numel() for parameter in lm.parameters())
        assert tuple(lm.model.layers[0].self_attn.k_norm.weight.shape) == (fields.get("model_parallel_size", 1), 128)
        assert ("Swin" in type(lm.model.layers[0]).__name__) == (name == "34b")
    # attention, feed-forward, norms, q/k norms; embeddings, head, last norm
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 + 4 * 128
    assert counts["7b"] == 32 * block + 2 * 65536 * 4096 + 4096
    block = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 22016 + 2 * 8192 + 4 * 4 * 128
    assert size_name(chameleon_settings("toy", toy.config())) is None
    assert [round(count / 1e9, 1) for count in counts.values()] == [7.0, 34.3]
    assert counts["34b"] == 48 * block + 2 * 65536 * 8192 + 8192


@torch.no_grad()
def test_an_image_head_is_zeroed_and_nothing_else(tmp_path: Path) -> None:
    fields = toy.config()
    lm = read_chameleon(toy.save(tmp_path, fields, toy.state(fields, rows=1))).lm
    before = {key: value.clone() for key, value in lm.state_dict().items()}
    zero_image_head(lm, range(4, 20))
    found = logits(lm)
    assert found[..., 4:20].abs().max() == 0
    assert found[..., :4].abs().min() > 0
    after = lm.state_dict()
    assert torch.equal(after["lm_head.weight"][20:], before["lm_head.weight"][20:])
    same({key: value for key, value in after.items() if key != "lm_head.weight"},
         {key: value for key, value in before.items() if key != "lm_head.weight"})  # fmt: skip


def test_the_released_checkpoint_of_arra(tmp_path: Path) -> None:
    """Its projector is left out, and said so; a rotary table is no weight."""
    fields = toy.config()
    weights = toy.state(fields, rows=1)
    extra = {"adaptor.layers.0.weight": torch.ones(3, 32), "adaptor.layers.0.bias": torch.ones(3)}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    found = read_chameleon(toy.save(tmp_path, fields, weights | extra))
    assert found.left.ignored == ("adaptor.layers.0.bias", "adaptor.layers.0.weight")
    assert found.left.dropped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    same(export_state(found.lm, "lumina"), weights)


def test_the_first_token_is_what_its_name_says(tmp_path: Path) -> None:
    """Published configurations name <pad> the first token of a text."""
    fields = toy.config()
    assert fields["bos_token_id"] == 1
    lm = read_chameleon(toy.save(tmp_path, fields, toy.state(fields, rows=1))).lm
    assert (lm.config.bos_token_id, lm.config.eos_token_id) == (0, 2)
    assert (lm.generation_config.bos_token_id, lm.generation_config.eos_token_id) == (0, 2)


@pytest.mark.parametrize(
    ("changes", "same_as"),
    [
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rope_theta": 500.0}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"rope_type": "linear", "factor": 2}}),
        ({"num_key_value_heads": None, "unknown": {"a": [1]}, "quantization_config": 5, "auto_map": {"A": "b.C"}}, {}),
        ({"pad_token_id": "zero", "torch_dtype": "int3", "attn_implementation": "mine"}, {}),
    ],
)
def test_configurations_of_every_age(changes: dict[str, Any], same_as: dict[str, Any], tmp_path: Path) -> None:
    weights = toy.state(toy.config(), rows=1)
    ours = read_chameleon(toy.save(tmp_path / "ours", toy.config(**changes), weights)).lm
    theirs = read_chameleon(toy.save(tmp_path / "theirs", toy.config(**same_as), weights)).lm
    assert torch.equal(logits(ours), logits(theirs))
    plain = read_chameleon(toy.save(tmp_path / "plain", toy.config(), weights)).lm
    assert torch.equal(logits(plain), logits(theirs)) == (not same_as)


def lacks(key: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def harm(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        del weights[key]

    return harm


def edits(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, weights: config.update(changes)


def replaced(key: str, shape: tuple[int, ...]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, weights: weights.update({key: torch.ones(shape)})


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (edits(model_type="llama"), r"config.json: model_type is 'llama', expected 'chameleon'; other .* arra init"),
        (edits(model_type=None), r"model_type is None, expected 'chameleon'"),
        (edits(hidden_size="wide"), r"config.json: makes no Chameleon: hidden_size Input should be a valid integer"),
        (edits(num_hidden_layers=4000), r"4000 layers"),
        (edits(num_hidden_layers=3), r"missing model.layers.2"),
        (edits(num_attention_heads=3), r"3 heads and 4 key-value heads do not divide a width of 32"),
        (edits(hidden_act="relu"), r"hidden_act Input should be 'silu'"),
        (edits(tie_word_embeddings=True), r"tie_word_embeddings Input should be False"),
        (edits(rope_scaling={"type": "yarn", "factor": 2}), r"rope.rope_type Input should be"),
        (edits(rope_scaling={"type": "linear"}), r"linear and dynamic need one"),
        (edits(vocabulary_map={"<s>": "a"}), r"vocabulary_map.<s> Input should be a valid integer"),
        (lacks("model.norm.weight"), r"missing model.norm.weight"),
        (lacks("model.layers.0.self_attn.q_norm.weight"), r"q_norm.weight missing .* expected Chameleon's"),
        (replaced("model.layers.1.mlp.up_proj.weight", (4, 32)), r"up_proj.weight is \(4, 32\), expected \(48, 32\)"),
        (replaced("model.layers.0.self_attn.q_norm.weight", (3, 8)), r"q/k norms of shapes \(3, 8\) and \(1, 8\)"),
        (replaced("model.layers.0.self_attn.q_norm.weight", ()), r"q/k norms of shapes \(\) and \(1, 8\)"),
        (replaced("model.layers.1.self_attn.k_norm.bias", (2, 8)), r"k_norm.bias is \(2, 8\), expected \(1, 8\)"),
        (replaced("model.more.weight", (2, 8)), r"unexpected model.more.weight"),
        (replaced("model.vqmodel.quantize.embedding.weight", (16, 8)), r"missing model.vqmodel"),
    ],
)
def test_what_does_not_fit_is_named(harm: Callable[..., None], told: str, tmp_path: Path) -> None:
    config = toy.config()
    weights = toy.state(config, rows=1)
    harm(config, weights)
    with pytest.raises(ArraError, match=told) as caught:
        read_chameleon(toy.save(tmp_path, config, weights))
    assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_hostile_and_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fields = toy.config()
    folder = toy.save(tmp_path / "model", fields, toy.state(fields, rows=1))
    config = (folder / "config.json").read_text()
    for text, told in (("{", "not readable JSON"), ("[1]", "holds a list"), ("[" * 9999, "not readable JSON")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ArraError, match=told):
            read_chameleon(folder)
    (folder / "config.json").write_text(config)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArraError, match="not a readable safetensors file"):
        read_chameleon(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Bomb()}))
    with pytest.raises(ArraError, match="could run code"):
        read_chameleon(folder)
    index = {"weight_map": {"lm_head.weight": "../../etc/passwd"}}
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArraError, match="expected the names of files beside it"):
        read_chameleon(folder)
    assert not Path("exploded").exists()
    with pytest.raises(ArraError, match="no such file or folder"):
        read_chameleon(tmp_path / "nowhere")
    with pytest.raises(ArraError, match=r"neither config.json nor params.json in it"):
        read_chameleon(tmp_path)


def test_metas_files_hostile_and_damaged(tmp_path: Path) -> None:
    fields = toy.config()
    files = toy.to_meta(toy.state(fields, rows=2), fields, fused=True)
    good = toy.save_meta(tmp_path / "good", fields, files)

    def refused(told: str, harm: Callable[[Path], object]) -> None:
        folder = tmp_path / re.sub(r"\W", "", told)
        toy.save_meta(folder, fields, files)
        harm(folder)
        with pytest.raises(ArraError, match=told) as caught:
            read_chameleon(folder)
        assert "\n" not in str(caught.value)

    def rewrite(**changes: Any) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            told = json.loads((folder / "params.json").read_text())
            told["model"] |= changes
            (folder / "params.json").write_text(json.dumps(told))

        return change

    def put(key: str, value: Any) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            content = {name: tensor for name, tensor in files[1].items() if name != key}
            torch.save(content if value is None else content | {key: value}, folder / "consolidated.01.pth")

        return change

    def drop(name: str) -> Callable[[Path], object]:
        return lambda folder: folder.joinpath(name).rename(folder / "elsewhere")

    def drop_all(folder: Path) -> None:
        for path in folder.glob("consolidated.0*"):
            path.unlink()

    def cut(folder: Path) -> None:
        whole = (folder / "consolidated.01.pth").read_bytes()
        (folder / "consolidated.01.pth").write_bytes(whole[: len(whole) // 2])

    refused(r"of 2 ranks consolidated.01.pth missing", drop("consolidated.01.pth"))
    refused(r"of 2 ranks consolidated.00.pth missing", drop("consolidated.00.pth"))
    refused(r"consolidated.01.pth: not a readable", cut)
    refused(r"could run code", lambda f: (f / "consolidated.01.pth").write_bytes(pickle.dumps({"a": Bomb()})))
    refused(r"01.pth: not the tensors .* missing norm.weight", put("norm.weight", None))
    refused(r"wqkv.weight is \(5, 5\), expected \(48, 32\)", put("layers.0.attention.wqkv.weight", torch.ones(5, 5)))
    refused(r"unexpected more", put("more", torch.ones(1)))
    refused(r"4000 layers, but", rewrite(n_layers=4000))
    refused(r"missing layers.2.", rewrite(n_layers=3))
    refused(r"makes no Chameleon: num_attention_heads", rewrite(n_heads=None))
    refused(r"hidden_size Input should be greater than 0", rewrite(dim=-1))
    refused(r"key-value heads do not divide among the files of 2 ranks", rewrite(n_kv_heads=1))
    refused(r"params.json: not readable JSON", lambda f: (f / "params.json").write_text("no"))
    refused(r"no matrix output.weight in it", lambda f: torch.save({"a": torch.ones(1)}, f / "consolidated.00.pth"))
    refused(r"no consolidated.pth", drop_all)
    assert read_chameleon(good).head_norm_rows == 2
