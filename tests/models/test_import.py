"""Every layout that LlamaGen's weights come in, read without running anything, and every mistake told in one line."""

import argparse
import json
import os
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from arra.errors import ArraError
from arra.models import load_decoder, save_model
from arra.models.decoder import Decoder, DecoderSettings
from arra.models.fitting import name_keys
from arra.models.llamagen import SIZES, told_settings
from arra.models.weights import Weights, read_weights
from arra.stages.weights import import_weights
from arra.tokenizers.image import load_tokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from tests.models.toys import toy_decoder

GOLDEN = Path(__file__).parents[1] / "golden" / "llamagen"
TOLD: dict[str, Any] = {"num_heads": 4, "grid": "2x2"}
Write = Callable[[dict[str, Tensor], Path], Path]


def network(kind: str) -> torch.nn.Module:
    if kind == "vq":
        torch.manual_seed(0)
        return VQModel(
            VQSettings(channels=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, num_codes=32, code_dim=4)
        )
    return toy_decoder(**({} if kind == "c2i" else {"condition": "caption", "caption_dim": 6}))


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def train_file(state: dict[str, Tensor], folder: Path) -> Path:
    args = argparse.Namespace(gpt_model="GPT-B", image_size=32, downsample_size=16, results_dir="/home/me", lr=1e-4)
    moments = {0: {"exp_avg": torch.ones(3), "step": torch.tensor(7.0)}}
    content = {"model": state, "optimizer": {"state": moments, "param_groups": []}, "steps": 7, "args": args}
    content["ema"] = {key: value * 0.5 for key, value in state.items()}
    torch.save(content, folder / "0000007.pt")
    return folder / "0000007.pt"


def pt(content: Any, folder: Path, name: str = "weights.pt", **how: Any) -> Path:
    torch.save(content, folder / name, **how)
    return folder / name


def fsdp_folder(state: dict[str, Tensor], folder: Path) -> Path:
    pt(state, folder, "consolidated.pth")
    torch.save({"state": {}}, folder / "optimizer.00000-of-00001.pth")
    (folder / "resume_step.txt").write_text("7\n")
    return folder


def shards(state: dict[str, Tensor], folder: Path, suffix: str, stem: str) -> Path:
    keys = list(state)
    names: dict[str, str] = {}
    for number in range(2):
        part = {key: state[key] for key in keys[number::2]}
        name = f"{stem}-{number + 1:05d}-of-00002.{suffix}"
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
        names |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def mixin_folder(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"n_head": 4, "block_size": 4, "token_dropout_p": 0.2}))
    return folder


LAYOUTS: dict[str, Write] = {
    "train": train_file,
    "bare": pt,
    "deepspeed": lambda state, folder: pt({"module": state}, folder),
    "lightning": lambda state, folder: pt({"state_dict": prefixed(state, "model."), "epoch": 3}, folder),
    "ddp": lambda state, folder: pt({"model": prefixed(state, "module.")}, folder),
    "compiled ddp": lambda state, folder: pt({"model": prefixed(state, "module._orig_mod.")}, folder),
    "compiled": lambda state, folder: pt({"model": prefixed(state, "_orig_mod.")}, folder),
    "fsdp": fsdp_folder,
    "fsdp wrapped": lambda state, folder: pt(prefixed(state, "_fsdp_wrapped_module."), folder),
    "before zip": lambda state, folder: pt({"model": state}, folder, _use_new_zipfile_serialization=False),
    "safetensors": lambda state, folder: save_file(state, folder / "w.safetensors") or folder / "w.safetensors",
    "safetensors by another name": lambda state, folder: save_file(state, folder / "w.bin") or folder / "w.bin",
    "safetensors shards": lambda state, folder: shards(state, folder, "safetensors", "model"),
    "pickled shards": lambda state, folder: shards(state, folder, "bin", "pytorch_model"),
    "mixin": mixin_folder,
    "pickled mixin": lambda state, folder: pt(state, folder, "pytorch_model.bin").parent,
    "one file in a folder": lambda state, folder: pt({"model": state}, folder, "vq.pt").parent,
}


@pytest.mark.parametrize("kind", ["c2i", "t2i", "vq"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout(layout: str, kind: str, tmp_path: Path) -> None:
    model = network(kind)
    state = dict(model.state_dict())
    strays = {"quantize.codebook_used": torch.zeros(65536)} if kind == "vq" else {"causal_mask": torch.ones(1, 2, 2)}
    (tmp_path / "source").mkdir()
    source = LAYOUTS[layout](state | strays, tmp_path / "source")
    done = import_weights(source, tmp_path / "out", **({} if kind == "vq" else TOLD))
    loaded = load_tokenizer(done.path).model if kind == "vq" else load_decoder(done.path)
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in state.items())
    assert not loaded.training
    rows = dict(done.rows)
    assert rows["dropped"] == f"{next(iter(strays))} (no weights)"
    assert rows["steps"] == ("7" if layout in ("train", "fsdp") else "")
    if layout == "train":
        assert "args" in rows["left out"]
        assert "--entry ema" in rows["weights"]
        card = json.loads((done.path / ("tokenizer.json" if kind == "vq" else "model.json")).read_text())
        origin = card["about"]["origin"]
        assert origin["args"] == {"gpt_model": "GPT-B", "image_size": 32, "downsample_size": 16, "lr": 1e-4}
        assert (origin["source"], origin["entry"], origin["steps"]) == ("0000007.pt", "model", 7)
        assert len(origin["sha256"]["0000007.pt"]) == 64
        assert str(tmp_path) not in json.dumps(card)


@pytest.mark.parametrize("kind", ["c2i", "t2i", "vq"])
def test_the_averaged_weights(kind: str, tmp_path: Path) -> None:
    model = network(kind)
    source = train_file(dict(model.state_dict()), tmp_path)
    out = import_weights(source, tmp_path / "out", entry="ema", **({} if kind == "vq" else TOLD)).path
    loaded = load_tokenizer(out).model if kind == "vq" else load_decoder(out)
    assert all(torch.equal(loaded.state_dict()[key], value * 0.5) for key, value in model.state_dict().items())


def test_what_generate_leaves_behind_is_told(tmp_path: Path) -> None:
    state = dict(toy_decoder().state_dict())
    for layer in range(2):
        for cache in ("k_cache", "v_cache"):
            state[f"layers.{layer}.attention.kv_cache.{cache}"] = torch.zeros(2, 4, 8, 8)
    rows = dict(import_weights(pt({"model": state}, tmp_path), tmp_path / "out", **TOLD).rows)
    assert rows["dropped"] == "layers.{0..1}.attention.kv_cache.{k_cache,v_cache} (no weights)"


def test_who_tells_the_grid_and_the_heads(tmp_path: Path) -> None:
    """Nothing is guessed: a wrong grid would load and paint noise."""
    state = dict(toy_decoder().state_dict())
    with pytest.raises(ArraError, match="nothing in it tells the grid of codes, and a wrong one paints noise"):
        import_weights(pt(state, tmp_path), tmp_path / "out", num_heads=4)
    with pytest.raises(ArraError, match=r"the number of heads .* on the command line --num-heads"):
        import_weights(tmp_path / "weights.pt", tmp_path / "out", grid="2x2")
    table = {"freqs_cis": torch.zeros(1 + 9, 4, 2)}
    config = {"n_head": 4, "block_size": 16, "norm_eps": 1e-6, "n_kv_head": None}
    args = {"image_size": 256, "downsample_size": 16}

    def told(name: str = "w.pt", **parts: Any) -> dict[str, Any]:
        found = told_settings(Weights(state=parts.pop("state", state), source=Path(name), **parts))
        return {field: value for field, (value, _) in found.items()}

    assert told() == told("c2i_B_2560.pt") == {}
    assert told("c2i_L_384.pt") == {"grid": (24, 24)}
    assert told("t2i_XL_stage2_512.pt") == {"grid": (32, 32)}
    assert told("c2i_L_384.pt", args=args) == {"grid": (16, 16)}
    assert told(args=args, config=config) == {"grid": (4, 4), "num_heads": 4, "norm_eps": 1e-6}
    assert told(state=state | table, config=config) == {"grid": (3, 3), "num_heads": 4, "norm_eps": 1e-6}
    folder = tmp_path / "mixin"
    folder.mkdir()
    model = load_decoder(mixin_folder(state, folder))
    assert (model.settings.num_heads, model.settings.grid, model.settings.token_dropout) == (4, (2, 2), 0.2)
    assert model.about["origin"]["told"]["grid"] == "config.json"
    other = load_decoder(folder, grid=(1, 4))
    assert other.settings.grid == (1, 4)
    assert other.about["origin"]["told"]["grid"] == "given, against (2, 2) by config.json"
    assert load_decoder(folder, grid=[2, 2]).about["origin"]["told"]["grid"] == "given"
    assert told(config={"attn_dropout_p": 0.1, "drop_path_rate": 0.3}) == {"attn_dropout": 0.1, "drop_path": 0.3}
    with pytest.raises(ArraError, match="the class table has no null class"):
        told(config={"class_dropout_prob": 0.0})
    assert told(config={"class_dropout_prob": 0.0}, state={"cls_embedding.uncond_embedding": torch.zeros(2, 2)}) == {}


def test_what_is_no_archive_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_text("hello\n")
    with pytest.raises(ArraError, match=r"not a readable checkpoint \(no archive of torch\.save\)"):
        read_weights(tmp_path / "w.pt")


def test_the_size_given_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ArraError, match=r"missing layers\.\{2\.\.11\}\.attention\.\{wqkv,wo\}\.weight"):
        import_weights(pt(dict(toy_decoder().state_dict()), tmp_path), tmp_path / "out", size="b", grid="2x2")
    with torch.device("meta"):
        shapes = Decoder(DecoderSettings(**SIZES["b"] | {"num_layers": 12}, num_codes=4, num_classes=1)).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in shapes.items()}
    out = import_weights(pt(state, tmp_path, "c2i_B_256.pt"), tmp_path / "b", size="B").path
    assert load_decoder(out).settings.num_heads == 12


def test_every_misfit_is_named_and_only_patterns_excuse_it(tmp_path: Path) -> None:
    state = dict(toy_decoder().state_dict())
    extra = {f"align.{number}.weight": torch.zeros(2) for number in range(3)} | {"head.bias": torch.zeros(2)}
    source = pt(state | extra, tmp_path, "extra.pt")
    with pytest.raises(ArraError, match=r"unexpected align\.\{0\.\.2\}\.weight, head\.bias"):
        import_weights(source, tmp_path / "out", **TOLD)
    with pytest.raises(ArraError, match=r"unexpected head\.bias \(--ignore PATTERN"):
        import_weights(source, tmp_path / "out", ignore=["align.*"], **TOLD)
    done = import_weights(source, tmp_path / "out", ignore=["align.*", "head.*"], **TOLD)
    assert dict(done.rows)["ignored"] == "align.{0..2}.weight, head.bias"
    del state["norm.weight"], state["layers.1.attention.wo.weight"]
    source = pt(state, tmp_path, "short.pt")
    for pattern in ("nothing", "*"):  # what is missing cannot be ignored
        with pytest.raises(ArraError, match=r"missing .*norm\.weight"):
            import_weights(source, tmp_path / "gone", ignore=[pattern], **TOLD)
    with pytest.raises(ArraError, match=r"missing layers\.1\.attention\.wo\.weight;"):
        import_weights(source, tmp_path / "gone", init_missing=["norm.*"], **TOLD)
    assert not (tmp_path / "gone").exists()
    state["norm.weight"] = torch.ones(32, dtype=torch.int8)
    with pytest.raises(ArraError, match=r"norm\.weight holds torch\.int8, expected floating numbers"):
        import_weights(pt(state, tmp_path, "int.pt"), tmp_path / "gone", init_missing=["*wo*"], **TOLD)


def test_other_classes_from_a_published_model(tmp_path: Path) -> None:
    """Ignoring the class table and initialising it anew is how a model starts on other classes."""
    model = toy_decoder(num_classes=5)
    source, table = pt(dict(model.state_dict()), tmp_path), "cls_embedding.embedding_table.weight"
    arguments: dict[str, Any] = {"num_heads": 4, "grid": (2, 2), "ignore": [table], "init_missing": [table]}
    first, second = (load_decoder("llamagen", weights=source, num_classes=2, **arguments) for _ in range(2))
    assert first.state_dict()[table].shape == (3, 32)
    assert 0.01 < first.state_dict()[table].std() < 0.03
    assert torch.equal(first.state_dict()[table], second.state_dict()[table])
    assert torch.equal(first.state_dict()["output.weight"], model.state_dict()["output.weight"])
    assert first.about["origin"]["initialised"] == table


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path: Path) -> None:
    """Files are mapped while they are read; what is loaded lives on when the file is overwritten in place."""
    model = toy_decoder()
    save_file(dict(model.state_dict()), tmp_path / "w.safetensors")
    for source in (pt(dict(model.state_dict()), tmp_path), tmp_path / "w.safetensors"):
        loaded = load_decoder("llamagen", weights=source, num_heads=4, grid=(2, 2))
        with source.open("r+b") as file:
            file.write(b"\0" * source.stat().st_size)
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
        assert loaded.rotary.table.isfinite().all()
        assert all(parameter.requires_grad for parameter in loaded.parameters())


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


def test_hostile_files_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_arra: Any) -> None:
    monkeypatch.chdir(tmp_path)
    state = dict(toy_decoder().state_dict())
    torch.save({"model": state, "args": Hostile()}, "zip.pt")
    torch.save({"model": state, "args": Hostile()}, "old.pt", _use_new_zipfile_serialization=False)
    Path("plain.pt").write_bytes(pickle.dumps(Hostile()))
    Path("shards").mkdir()
    torch.save(Hostile(), "shards/pytorch_model.bin")
    for name in ("zip.pt", "old.pt", "plain.pt", "shards"):
        error = run_arra("import", name, "out", "--grid", "2x2").error
        assert "refused: not a checkpoint of plain tensors" in error
        assert "could run code" in error
    assert "posix.system" in run_arra("import", "zip.pt", "out").error
    assert not list(tmp_path.rglob("hacked"))
    assert not Path("out").exists()


def test_shapes_without_data_are_refused(tmp_path: Path) -> None:
    """A few bytes may claim terabytes: by strides of zero, by packing, or by a card that claims a billion layers."""
    huge = dict(toy_decoder().state_dict()) | {"tok_embeddings.weight": torch.zeros(1).expand(10**9, 32)}
    with pytest.raises(ArraError, match=r"tensors without their data: tok_embeddings\.weight"):
        read_weights(pt({"model": huge}, tmp_path))
    hollow = {"model": {"norm.weight": torch.zeros(10**9, device="meta")}}
    with pytest.raises(ArraError, match=r"tensors without their data: norm\.weight"):
        read_weights(pt(hollow, tmp_path))
    pt({"model": dict(toy_decoder().state_dict())}, tmp_path, "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    with pytest.raises(ArraError, match="parts of it are compressed, which torch"):
        read_weights(tmp_path / "bomb.pt")
    folder = save_model(toy_decoder(), tmp_path / "model")
    card = json.loads((folder / "model.json").read_text())
    card["settings"]["num_layers"] = 10**9
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(ArraError, match="tensors for 1000000000 layers"):
        load_decoder(folder)


def test_damage_is_one_line_whatever_it_hits(tmp_path: Path) -> None:
    """Bytes changed in the pickle and in the archive's directory: the file opens, or one error says why not."""
    whole, path, chance = (GOLDEN / "ckpt_train_style.pt").read_bytes(), tmp_path / "damaged.pt", random.Random(0)
    errors = []
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 3, 20))):
            place = chance.randrange(3000) if chance.random() < 0.6 else -chance.randrange(1, 4000)
            damaged[place] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except ArraError as error:
            errors.append(str(error))
    assert 0 < len(errors) < 150
    assert all(error.startswith(f"{path}: ") and "\n" not in error for error in errors)


def test_shards_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    state = dict(toy_decoder().state_dict())
    save_file(state, tmp_path / "outside.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", ""):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state, name)}))
        with pytest.raises(ArraError, match="expected the names of files beside it"):
            read_weights(tmp_path / "model")
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}))
    with pytest.raises(ArraError, match=r"shards missing: part-1\.safetensors, part-2\.safetensors"):
        read_weights(tmp_path / "model")
    for text in ("[]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ArraError, match="not a readable index of shards"):
            read_weights(tmp_path / "model")


def test_mistakes_are_one_line_and_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_arra: Any) -> None:
    monkeypatch.chdir(tmp_path)
    whole = pt({"model": dict(toy_decoder().state_dict())}, tmp_path, "whole.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("hello\n" * 100)
    Path("empty.pt").write_bytes(b"")
    Path("lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Path("page.pt").write_text("<!DOCTYPE html><html></html>")
    Path("cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    pt({"optimizer": {}, "steps": 1}, tmp_path, "other.pt")
    pt({"ema": dict(toy_decoder().state_dict())}, tmp_path, "average.pt")
    pt({"model": {"shared.weight": torch.zeros(2), "encoder.block.0.x": torch.zeros(2)}}, tmp_path, "t5.pt")
    pt([torch.zeros(2)], tmp_path, "list.pt")
    pt({"model": {"a": torch.zeros(1), "_orig_mod.a": torch.zeros(1)}}, tmp_path, "twice.pt")
    pt({"model": {"a": torch.zeros(1), "b": 3}}, tmp_path, "odd.pt")
    Path("full").mkdir()
    Path("full/x").touch()
    Path("many").mkdir()
    shutil.copy("whole.pt", "many/a.pt")
    shutil.copy("whole.pt", "many/b.pt")
    shutil.copy(GOLDEN / "vq_f16_nrb2.pt", "vq.pt")
    save_model(toy_decoder(), "ours")
    mistakes = {
        ("none.pt",): "none.pt: no such checkpoint file",
        ("cut.pt",): "cut.pt: not a readable checkpoint",
        ("text.pt",): "text.pt: (refused|not a readable checkpoint)",
        ("empty.pt",): "empty.pt: (refused|not a readable checkpoint)",
        ("lfs.pt",): "lfs.pt: a Git LFS pointer, not the weights; run: git lfs pull",
        ("page.pt",): "page.pt: a web page",
        ("cut.safetensors",): "cut.safetensors: not a readable safetensors file",
        ("other.pt",): "no 'model' weights inside; it holds optimizer, steps",
        ("average.pt",): "no 'model' weights inside; it holds ema; pass --entry ema",
        ("whole.pt", "--entry", "ema"): "no 'ema' weights inside; it holds model; pass --entry model",
        ("whole.pt", "--entry", "best"): "--entry best: unknown; expected model or ema",
        ("t5.pt",): r"weights of neither kind, keys begin with encoder, shared; a decoder has tok_embeddings\.weight",
        ("list.pt",): "holds a list, expected a state dict",
        ("twice.pt",): "the same keys with and without _orig_mod",
        ("odd.pt",): "entries that are no tensors: b",
        ("many",): "several checkpoints: a.pt, b.pt; name one of them",
        ("full",): "no checkpoint in it",
        ("ours",): "in arra's format already",
        ("vq.pt", "--size", "b"): "a VQ tokenizer, whose shapes tell everything; drop --size",
        ("whole.pt", "--size", "huge"): "--size huge: unknown; expected one of b, l, xl",
        ("whole.pt", "--grid", "24"): "--grid 24: expected rows x columns of codes",
        ("whole.pt", "--grid", "0x4"): "--grid 0x4: expected rows x columns",
        ("whole.pt", "--dtype", "int8"): "--dtype int8: unknown; expected one of float32, float16, bfloat16",
        ("whole.pt", "--grid", "2x2", "--num-heads", "5"): "settings make no model: .*32 over 5 heads",
    }
    for arguments, message in mistakes.items():
        source, *options = arguments
        assert_line(run_arra("import", source, "out", *options).error, message)
    assert_line(run_arra("import", "whole.pt", "full", "--grid", "2x2").error, "full: not empty; name a new folder")
    assert_line(run_arra("import", "whole.pt", "cut.pt", "--grid", "2x2").error, "cut.pt: is a file, expected a folder")
    assert not Path("out").exists()
    fine = run_arra("import", "whole.pt", "out", "--grid", "2x2", "--num-heads", "4")
    assert (fine.code, fine.out.splitlines()[-1]) == (0, "out")


def assert_line(error: str, pattern: str) -> None:
    assert re.search(pattern, error), error


def test_one_kind_is_not_taken_for_the_other(tmp_path: Path) -> None:
    source = pt({"model": dict(toy_decoder().state_dict())}, tmp_path)
    with pytest.raises(ArraError, match="no VQ tokenizer inside"):
        load_tokenizer("llamagen", weights=source)
    with pytest.raises(ArraError, match="not a LlamaGen decoder"):
        load_decoder("llamagen", weights=GOLDEN / "vq_f16_nrb2.pt")


def test_published_captions_name_their_encoder(tmp_path: Path) -> None:
    """LlamaGen's own scripts feed FLAN-T5-XL's 2048 features of cleaned captions."""
    for width, expected in ((2048, {"name": "flan-t5-xl", "clean": True}), (6, None)):
        source = pt(dict(toy_decoder(condition="caption", caption_dim=width).state_dict()), tmp_path)
        out = import_weights(source, tmp_path / str(width), **TOLD).path
        assert load_decoder(out).about.get("text_encoder") == expected


def test_about_is_kept(tmp_path: Path) -> None:
    model = toy_decoder()
    model.about["text_encoder"] = {"name": "flan-t5-xl"}
    folder = save_model(model, tmp_path / "model")
    assert load_decoder(folder).about == {"text_encoder": {"name": "flan-t5-xl"}}
    card = json.loads((folder / "model.json").read_text())
    for key, value in (("about", [1]), ("text_tokenizer", "../../elsewhere.json")):
        (folder / "model.json").write_text(json.dumps(card | {key: value}))
        with pytest.raises(ArraError, match=r"expected about .* and text_tokenizer null or 'tokenizer\.json'"):
            load_decoder(folder)


def test_tokenizers_are_named_after_their_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("vq")
    assert isinstance(model, VQModel)
    source = pt({"model": dict(model.state_dict())}, tmp_path, "mine_ds2.pt")
    assert load_tokenizer(import_weights(source, tmp_path / "out").path).name == "mine_ds2"
    monkeypatch.setattr("arra.tokenizers.image.PUBLISHED", {"llamagen-vq2": model.settings.model_dump()})
    named = load_tokenizer(import_weights(source, tmp_path / "published").path)
    assert named.name == "llamagen-vq2"
    assert named.about["origin"]["source"] == "mine_ds2.pt"


def test_keys_are_folded_but_never_lost() -> None:
    keys = [f"a.{i}.{part}.{kind}" for i in (0, 1, 2, 7) for part in ("q", "k") for kind in ("weight", "bias")]
    assert name_keys([*keys, "norm.weight"]) == "a.{0..2,7}.{q,k}.{weight,bias}, norm.weight"
    assert name_keys(["x.1", "x.2", "y"]) == "x.{1..2}, y"
    assert name_keys([]) == ""
