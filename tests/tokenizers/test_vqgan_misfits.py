"""Files that are not Chameleon's tokenizer, or not quite: each is told in one line, nothing in them runs or unfolds."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import arra
from arra.errors import ArraError
from arra.stages.weights import export_weights
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.chameleon import original_vqgan_state, read_vqgan_yaml
from arra.tokenizers.vq import VQModel, VQSettings
from arra.tokenizers.weights import original_vq_state
from tests.tokenizers.toy_vqgan import PLAIN, TOY, lively, save_meta


def edit_yaml(folder: Path, *path: str, value: Any) -> None:
    content = yaml.safe_load((folder / "vqgan.yaml").read_text())
    inner = content["model"]["params"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "vqgan.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("n_embed",), 64, r"n_embed 64 \(the tensors: 40\)"),
        (("embed_dim",), 7, r"embed_dim 7 \(the tensors: 6\)"),
        (("ddconfig", "ch"), 64, r"ch 64 \(the tensors: 32\)"),
        (("ddconfig", "ch_mult"), [1, 2], r"ch_mult \[1, 2\] \(the tensors: \[1, 2, 1\]\)"),
        (("ddconfig", "num_res_blocks"), 2, r"num_res_blocks 2 \(the tensors: 1\)"),
        (("ddconfig", "z_channels"), 16, r"z_channels 16 \(the tensors: 8\)"),
        (("ddconfig", "attn_resolutions"), [], r"attn_resolutions \[\] of 512, levels \[\] \(the tensors: \[1, 2\]\)"),
        (("ddconfig", "resolution"), 256, r"attn_resolutions \[128, 256\] of 256, levels \[0, 1\]"),
        (("ddconfig", "double_z"), True, r"model\.params\.ddconfig\.double_z: Input should be False"),
        (("ddconfig", "in_channels"), 1, r"ddconfig\.in_channels: Input should be 3"),
        (("ddconfig", "tanh_out"), True, r"ddconfig\.tanh_out: Input should be False"),
        (("ddconfig", "mirrored"), True, r"ddconfig\.mirrored: Extra inputs are not permitted"),
        (("ddconfig", "ch"), "32", r"ddconfig\.ch: Input should be a valid integer"),
        (("ddconfig",), None, r"params\.ddconfig: Input should be"),
        (("remap",), "used.npy", r"params\.remap: Input should be None"),
    ],
)
def test_a_yaml_of_another_network(path: tuple[str, ...], value: Any, message: str, tmp_path: Path) -> None:
    save_meta(tmp_path)
    edit_yaml(tmp_path, *path, value=value)
    with pytest.raises(ArraError, match=message) as caught:
        arra.load_tokenizer("chameleon", weights=tmp_path)
    assert "vqgan.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_training_words_of_a_yaml_are_not_looked_at(tmp_path: Path) -> None:
    save_meta(tmp_path)
    edit_yaml(tmp_path, "lossconfig", value={"target": "os.system", "params": {"disc_start": [1]}})
    edit_yaml(tmp_path, "ckpt_path", value="/elsewhere/vqgan.ckpt")
    edit_yaml(tmp_path, "monitor", value="val/rec_loss")
    assert arra.load_tokenizer("chameleon", weights=tmp_path).model.settings == TOY


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"model: {params: ",
        b"- 1",
        b"model: 5",
        b"[" * 20_000,
        b"{a: " * 10_000,
        b"model: !!python/object/apply:os.system ['true']",
        b"model: " + b"9" * 50_000,
        b"model: 2024-99-99",
        b"? [1, 2]\n: 3",
        b"1: 2",
        b"x" * 100_000,
    ],
    ids=lambda content: repr(content[:24]),
)
def test_hostile_yaml(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "vqgan.yaml"
    path.write_bytes(content)
    with pytest.raises(ArraError, match=r"vqgan\.yaml: ") as caught:
        read_vqgan_yaml(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [BOMB, MERGE_BOMB], ids=["plain", "merged"])
def test_aliases_are_not_unfolded(content: str, tmp_path: Path) -> None:
    (tmp_path / "vqgan.yaml").write_text(content)
    with pytest.raises(ArraError, match="it has aliases, which Meta's has not"):
        read_vqgan_yaml(tmp_path / "vqgan.yaml")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def pickled(folder: Path) -> None:
    (folder / "vqgan.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))


def cut(folder: Path) -> None:
    os.truncate(folder / "vqgan.ckpt", 20_000)


def emptied(folder: Path) -> None:
    os.truncate(folder / "vqgan.ckpt", 0)


def changed(**tensors: Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = torch.load(folder / "vqgan.ckpt", weights_only=True)["state_dict"]
        for key, value in tensors.items():
            if value is None:
                del state[key.replace("/", ".")]
            else:
                state[key.replace("/", ".")] = value
        torch.save({"state_dict": state}, folder / "vqgan.ckpt")

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, r"refused: not a checkpoint of plain tensors"),
        (cut, "not a readable checkpoint"),
        (emptied, "not a readable checkpoint"),
        (changed(**{"encoder/conv_in/weight": None}), r"no VQ tokenizer inside, encoder\.conv_in\.weight missing"),
        (changed(**{"encoder/conv_in/weight": torch.zeros(0, 3, 3, 3)}), "of another kind"),
        (changed(**{"encoder/conv_in/weight": torch.zeros(())}), r"no VQ tokenizer inside: .* is \(\)"),
        (changed(**{"encoder/down/1/block/0/conv1/weight": torch.zeros(())}), r"inside: encoder\.down\.1.* is \(\)"),
        (changed(**{"encoder/down/1/block/0/conv1/weight": torch.zeros(0, 32, 3, 3)}), r"ch_mult\.1: Input should be"),
        (changed(**{"quantize/embedding/weight": torch.zeros(0, 6)}), r"num_codes: Input should be greater than 1"),
        (
            changed(**{"encoder/down/7/attn/0/q/weight": torch.zeros(1)}),
            r"attention_levels: .*expected rising numbers in 0\.\.2",
        ),
        (changed(**{f"encoder/down/{'9' * 5000}/attn/0/q": torch.zeros(1)}), "unexpected encoder.down"),
        (changed(**{"decoder/up/0/block/0/conv1/bias": None}), r"missing decoder\.up\.0\.block\.0\.conv1\.bias"),
        (changed(**{"model_ema/decay": torch.zeros(1)}), r"unexpected model_ema\.decay \(--ignore PATTERN"),
        (changed(**{"post_quant_conv/bias": torch.zeros(9)}), r"post_quant_conv\.bias is \(9,\), expected \(8,\)"),
        (changed(**{"quant_conv/bias": torch.zeros(6, dtype=torch.int64)}), "expected floating numbers"),
    ],
)
def test_damaged_checkpoints(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    """Tensors are named as the file names them."""
    save_meta(tmp_path, described=False)
    damage(tmp_path)
    with pytest.raises(ArraError, match=message) as caught:
        arra.load_tokenizer("chameleon", weights=tmp_path)
    assert "\n" not in str(caught.value)
    assert not (Path.cwd() / "pwned").exists()


def test_keys_are_left_out_or_begun_anew_by_their_own_names(tmp_path: Path) -> None:
    save_meta(tmp_path)
    changed(**{"model_ema/decay": torch.zeros(1), "decoder/conv_out/bias": None})(tmp_path)
    tokenizer = arra.load_tokenizer(
        "chameleon", weights=tmp_path, ignore=["model_ema.*"], init_missing=["decoder.conv_out.*"]
    )
    origin = tokenizer.about["origin"]
    assert (origin["ignored"], origin["initialised"]) == ("model_ema.decay", "decoder.conv_out.bias")


def test_one_family_is_not_taken_for_the_other(tmp_path: Path) -> None:
    save_meta(tmp_path)
    for name in ("llamagen", "llamagen-vq16"):
        with pytest.raises(ArraError, match=r"of another kind \(no encoder\.conv_blocks\); pass a LlamaGen VQ file"):
            arra.load_tokenizer(name, weights=tmp_path / "vqgan.ckpt")
    theirs = VQModel(VQSettings(channels=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, num_codes=9, code_dim=4))
    torch.save({"model": theirs.state_dict()}, tmp_path / "vq.pt")
    with pytest.raises(ArraError, match=r"no Chameleon tokenizer inside \(no encoder\.down\)"):
        arra.load_tokenizer("chameleon", weights=tmp_path / "vq.pt")
    # our own files have LlamaGen's names, also those of Chameleon's network
    ImageTokenizer(lively(PLAIN), name="x", weights_hash=None).save(tmp_path / "ours")
    for name in ("llamagen", "chameleon"):
        with pytest.raises(ArraError, match=r"missing encoder\.conv_blocks\.2\.attn|no Chameleon tokenizer inside"):
            arra.load_tokenizer(name, weights=tmp_path / "ours")


def test_neither_original_can_hold_the_others_network(tmp_path: Path) -> None:
    settings = PLAIN.model_copy(update={"channels": 128, "num_res_blocks": 2})
    with torch.device("meta"):
        chameleon, half = VQModel(settings), VQModel(settings.model_copy(update={"has_decoder": False}))
    with pytest.raises(
        ArraError, match=r"LlamaGen cannot build .* codes that are not normalised.* attention in no lev"
    ):
        original_vq_state(chameleon, torch.float32, source="here")
    with pytest.raises(ArraError, match=r"LlamaGen cannot build .*; no decoder"):
        original_vq_state(half, torch.float32, source="here")
    with pytest.raises(ArraError, match=r"Meta's VQGAN cannot be this tokenizer: normalised codes"):
        original_vqgan_state(VQModel(TOY.model_copy(update={"normalize": True})), torch.float32, source="here")
    ImageTokenizer(lively(PLAIN), name="x", weights_hash=None).save(tmp_path / "ours")
    with pytest.raises(ArraError, match="LlamaGen cannot build this tokenizer"):
        export_weights(tmp_path / "ours", tmp_path / "vq.pt")


@pytest.mark.parametrize("levels", [(3,), (-1,), (1, 0), (1, 1)])
def test_levels_must_exist(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected rising numbers in 0\.\.2"):
        VQSettings(**{**TOY.model_dump(), "attention_levels": levels})


def test_settings_without_the_newer_fields_are_llamagens() -> None:
    old = {"channels": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 8, "num_codes": 9, "code_dim": 4}
    settings = VQSettings(**old)
    assert (settings.normalize, settings.attended, settings.has_decoder) == (True, (1,), True)
    assert VQSettings(**json.loads(settings.model_dump_json())) == settings
