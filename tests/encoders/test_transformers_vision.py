"""Vision encoders of `transformers`: the same numbers as at home, the vision part alone, and nothing read blindly."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as home
from skimage.data import chelsea
from torch import Tensor

from arra.encoders import SPECS, Output, load_encoder
from arra.encoders.base import preprocessed
from arra.encoders.transformers_vision import TransformersVision
from arra.errors import ArraError
from tests.encoders.toy_vision import GRID, SAM, TOYS, Toy, save_toy, shaken

TOLERANCE = 1e-5
"""Pixels in float32 of the same picture differ in the last bits, by the order of scaling and subtracting."""
LEVEL = 1 / 255


def assert_same(found: Tensor, expected: Tensor, *, within: float = TOLERANCE) -> None:
    """Nothing; equal within the tolerance, absolute and relative."""
    torch.testing.assert_close(found, expected, atol=within, rtol=within)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Toy, Any, TransformersVision, Path]]:
    """Each toy at home and as an encoder, and their folder."""
    everything = {}
    for name, toy in TOYS.items():
        folder = tmp_path_factory.mktemp(name)
        network = save_toy(toy, folder)
        encoder = load_encoder(name, weights=folder, **toy.told)
        assert isinstance(encoder, TransformersVision)
        everything[name] = (toy, network, encoder, folder)
    return everything


def pictures(size: int, count: int = 2) -> Tensor:
    """(B, S, S, 3) uint8 noise: every pixel counts."""
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def at_home(toy: Toy, network: Any, images: Tensor, size: int) -> dict[Output, Tensor]:
    """Outputs of home processor and home model."""
    given = toy.processor(size)([image.numpy() for image in images], return_tensors="pt")
    found: dict[Output, Tensor] = toy.outputs(network, given["pixel_values"])
    found.setdefault("mean", found["patches"].mean(1))
    if "cls" in found:
        found["concat"] = torch.cat([found["cls"], found["mean"]], 1)
    return found


@pytest.mark.parametrize("name", TOYS)
def test_numbers_are_those_of_the_home_library(loaded: dict[str, Any], name: str) -> None:
    """Home processor and home model on pictures of the encoder's size, for every output."""
    toy, network, encoder, _ = loaded[name]
    size = encoder.spec.image_size
    images = pictures(size)
    home_says = at_home(toy, network, images, size)
    assert set(home_says) == set(encoder.spec.outputs)
    for output, expected in home_says.items():
        found = encoder.encode(images, aggregate=output)
        assert found.dtype == torch.float32
        assert expected.std() > 0.05, output
        assert_same(found, expected)
    assert torch.equal(encoder.encode(images), encoder.encode(images, aggregate=encoder.spec.output))
    assert encoder.encode(images).shape == (2, encoder.spec.feature_size)
    floats = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert_same(encoder.encode(floats), encoder.encode(images), within=1e-4)


@pytest.mark.parametrize("name", [name for name in TOYS if name != "siglip2-b16-naflex"])
@pytest.mark.parametrize("turned", [False, True])
def test_pixels_are_those_of_the_home_processor(name: str, turned: bool) -> None:
    """A photograph that is no square, at the real size: within the rounding of the home library, in uint8."""
    spec = SPECS[name]
    photograph = chelsea().transpose(1, 0, 2).copy() if turned else chelsea()  # 300 x 451
    given = TOYS[name].processor(spec.image_size)(photograph, return_tensors="pt")["pixel_values"]
    ours = preprocessed(torch.from_numpy(photograph)[None], spec)
    assert ours.shape == given.shape == (1, 3, spec.image_size, spec.image_size)
    levels = (ours - given).abs() * torch.tensor(spec.std).view(1, 3, 1, 1) / LEVEL
    assert levels.mean() < 0.35  # rounding alone is a quarter
    assert levels.max() < 2.1  # torchvision's own uint8 resize has fixed-point weights


@pytest.mark.parametrize("name", TOYS)
def test_layers_are_what_blocks_leave(loaded: dict[str, Any], name: str) -> None:
    _, network, encoder, _ = loaded[name]
    images, size = pictures(encoder.spec.image_size), TOYS[name]
    blocks = [
        module
        for part, module in network.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == 3 and "text" not in part
    ]
    kept: dict[int, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _module, _given, said, at=at: kept.__setitem__(at, said))
        for at, block in enumerate(blocks[0], start=1)
    ]
    at_home(size, network, images, encoder.spec.image_size)
    for hook in hooks:
        hook.remove()
    if name == "mae-b16":  # shuffled at home: the mean does not mind
        means = [kept[at][:, 1:].mean(1) for at in (3, 1)]
        assert_same(encoder.encode(images, aggregate="mean", layers=(3, 1)), torch.cat(means, 1))
        return
    expected = {at: states.flatten(1, 2) if states.dim() == 4 else states for at, states in kept.items()}
    patches = encoder.encode(images, aggregate="patches", layers=(3, 1))
    tokens = [expected[at][:, -patches.shape[1] :] for at in (3, 1)]
    assert_same(patches, torch.cat(tokens, 2))
    if "cls" in encoder.spec.outputs:
        cls = encoder.encode(images, aggregate="cls", layers=[2])
        assert_same(cls, expected[2][:, 0])
    assert not any(module._forward_hooks for module in encoder.network.modules())
    with pytest.raises(ArraError, match=rf"encoder {name}: layer 4 is outside 1\.\.3"):
        encoder.encode(images, aggregate="mean", layers=[4])


@pytest.mark.parametrize("name", TOYS)
def test_batch_mates_do_not_matter(loaded: dict[str, Any], name: str) -> None:
    encoder = loaded[name][2]
    images = pictures(encoder.spec.image_size, 3)
    together = encoder.encode(images, aggregate="patches")
    assert_same(encoder.encode(images[1:2], aggregate="patches")[0], together[1])
    assert torch.equal(encoder.encode(images, aggregate="patches"), together)
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())


@pytest.mark.parametrize("name", TOYS)
def test_patches_are_in_raster_order(loaded: dict[str, Any], name: str) -> None:
    """What changes in one patch of the picture changes that patch's vector most, a step later than its embedding."""
    encoder = loaded[name][2]
    size = encoder.spec.image_size
    side = encoder.config.patch_size
    grid, (row, column) = size // side, (0, 1)
    plain = torch.full((1, size, size, 3), 127, dtype=torch.uint8)
    marked = plain.clone()
    marked[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = pictures(side, 1)
    change = encoder.encode(marked, aggregate="patches", layers=[1]) - encoder.encode(
        plain, aggregate="patches", layers=[1]
    )
    assert change.norm(dim=2)[0].argmax() == row * grid + column


@pytest.mark.parametrize(
    ("name", "size"), [("clip-l14", 48), ("siglip2-b16-224", 48), ("mae-b16", 48), ("siglip2-b16-naflex", 48)]
)
def test_other_sizes_interpolate_positions_as_at_home(loaded: dict[str, Any], name: str, size: int) -> None:
    toy, network, own, folder = loaded[name]
    encoder = load_encoder(name, weights=folder, image_size=size)
    assert (own.spec.image_size, encoder.spec.image_size) == (32, size)
    images = pictures(size)
    found = encoder.encode(images, aggregate="patches")
    assert found.shape[1] == 36
    with torch.no_grad():
        if name == "siglip2-b16-naflex":
            expected = at_home(toy, network, images, size)["patches"]
        else:
            tower = network.vit if name == "mae-b16" else network.vision_model
            order = {"noise": torch.arange(36).float().expand(2, -1)} if name == "mae-b16" else {}
            pixels = preprocessed(images, encoder.spec)
            expected = tower(pixel_values=pixels, interpolate_pos_encoding=True, **order).last_hidden_state
    assert_same(found, expected[:, -36:])


def test_sizes_that_cannot_be_seen_are_refused(loaded: dict[str, Any]) -> None:
    with pytest.raises(ArraError, match="encoder clip-l14: 50 pixels are no multiple of its patches' 8; choose 48"):
        load_encoder("clip-l14", weights=loaded["clip-l14"][3], image_size=50)
    with pytest.raises(ArraError, match="encoder sam-b16: sees 64 pixels a side and nothing else, not 32"):
        load_encoder("sam-b16", weights=loaded["sam-b16"][3], image_size=32)


PARTS: dict[str, tuple[str, Any]] = {
    "clip-l14": ("vision_model", None),
    "siglip2-b16-224": ("vision_model", None),
    "siglip2-b16-naflex": ("vision_model", None),
    "mae-b16": ("vit", None),
}


@pytest.mark.parametrize("name", PARTS)
def test_the_vision_part_alone_is_enough(loaded: dict[str, Any], name: str, tmp_path: Path) -> None:
    _, network, whole, _ = loaded[name]
    getattr(network, PARTS[name][0]).save_pretrained(tmp_path)
    alone = load_encoder(name, weights=tmp_path)
    images = pictures(32)
    for output in alone.spec.outputs:
        assert_same(alone.encode(images, aggregate=output), whole.encode(images, aggregate=output))
    if name == "clip-l14":  # another default would go unseen
        with pytest.raises(ArraError, match="encoder clip-l14: has no output 'projected'; it has cls, mean"):
            alone.encode(images)


def test_clip_with_its_projection_alone(loaded: dict[str, Any], tmp_path: Path) -> None:
    _, network, whole, _ = loaded["clip-l14"]
    part = home.CLIPVisionModelWithProjection(home.CLIPVisionConfig(**GRID, projection_dim=20))
    part.vision_model, part.visual_projection = network.vision_model, network.visual_projection
    part.save_pretrained(tmp_path)
    alone = load_encoder("clip-l14", weights=tmp_path)
    assert torch.equal(alone.encode(pictures(32)), whole.encode(pictures(32)))


def test_a_classifier_and_a_vision_part_of_other_classes_fit(tmp_path: Path) -> None:
    classifier: Any = shaken(home.Dinov2ForImageClassification(home.Dinov2Config(**GRID | {"image_size": 32})))
    classifier.save_pretrained(tmp_path / "dino")
    encoder = load_encoder("dinov2-s14", weights=tmp_path / "dino", image_size=32)
    images = pictures(32)
    with torch.no_grad():
        expected = classifier.dinov2(preprocessed(images, encoder.spec)).pooler_output
    assert_same(encoder.encode(images), expected)
    vision: Any = shaken(home.SamVisionModel(home.SamVisionConfig(**SAM)))
    vision.save_pretrained(tmp_path / "sam")
    encoder = load_encoder("sam-h16", weights=tmp_path / "sam")
    with torch.no_grad():
        expected = vision(preprocessed(pictures(64), encoder.spec)).last_hidden_state.mean((2, 3))
    assert_same(encoder.encode(pictures(64)), expected)


def as_meta(network: Any) -> dict[str, Tensor]:
    """SAM's weights under the names of Meta's file, in which the rest of the model has names of its own."""
    renamed = {}
    for key, value in network.state_dict().items():
        if not key.startswith("vision_encoder."):
            renamed[key] = value
            continue
        key = key.removeprefix("vision_encoder.").replace("layers.", "blocks.").replace("projection", "proj")
        if key.startswith("blocks"):
            key = key.replace("layer_norm", "norm")
        for ours, theirs in (("conv1", "0"), ("layer_norm1", "1"), ("conv2", "2"), ("layer_norm2", "3")):
            key = key.replace(f"neck.{ours}", f"neck.{theirs}")
        renamed[f"image_encoder.{key}"] = value
    return renamed


@pytest.mark.parametrize("wrapped", [False, True])
def test_metas_own_file_of_sam(loaded: dict[str, Any], tmp_path: Path, wrapped: bool) -> None:
    """Its tensors tell the sizes: heads, windows, blocks that look everywhere."""
    _, network, encoder, _ = loaded["medsam"]
    state = as_meta(network)
    assert "image_encoder.blocks.0.norm1.weight" in state
    assert "image_encoder.neck.3.bias" in state
    torch.save({"model": state, "epoch": 3} if wrapped else state, tmp_path / "medsam_vit_b.pth")
    theirs = load_encoder("medsam", weights=tmp_path / "medsam_vit_b.pth")
    assert theirs.spec.feature_size == 12
    for layers in (None, [1, 2, 3]):
        ours = encoder.encode(pictures(64), aggregate="patches", layers=layers)
        assert torch.equal(theirs.encode(pictures(64), aggregate="patches", layers=layers), ours)
    del state["image_encoder.pos_embed"]
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(ArraError, match=r"torn\.pth: no image encoder of SAM .*pos_embed.* is missing"):
        load_encoder("medsam", weights=tmp_path / "torn.pth")


def test_a_half_of_a_padded_side_goes_up() -> None:
    """As SAM's own transform rounds it: 5 of 16 pixels at 8 a side are 2.5 rows, so 3."""
    spec = replace(SPECS["sam-b16"], image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = preprocessed(torch.full((1, 5, 16, 3), 255, dtype=torch.uint8), spec)
    assert (pixels[0, 0, :, 0] > 0.5).tolist() == [True] * 3 + [False] * 5


def test_padding_is_zero_after_normalisation_and_is_averaged_in(loaded: dict[str, Any]) -> None:
    """As in the released extraction; a square has none."""
    encoder = loaded["sam-b16"][2]
    wide = pictures(64)[:, :32]
    pixels = preprocessed(wide, encoder.spec)
    assert (pixels[:, :, 32:] == 0).all()
    assert pixels[:, :, :32].std() > 0.5
    mean = encoder.encode(wide)
    assert_same(mean, encoder.encode(wide, aggregate="patches").mean(1))


@pytest.mark.parametrize("layout", ["shards", "pickle", "pickled shards", "one file", "half"])
def test_other_layouts_of_the_same_weights(loaded: dict[str, Any], tmp_path: Path, layout: str) -> None:
    _, network, encoder, folder = loaded["dinov2-b14"]
    place = tmp_path
    if layout == "shards":
        network.save_pretrained(tmp_path, max_shard_size="20KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
    else:
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        state = safetensors.torch.load_file(folder / "model.safetensors")
        if layout == "pickle":
            torch.save(state, tmp_path / "pytorch_model.bin")
        elif layout == "pickled shards":
            keys = sorted(state)
            parts = {"a.bin": keys[::2], "b.bin": keys[1::2]}
            for file, names in parts.items():
                torch.save({key: state[key] for key in names}, tmp_path / file)
            index = {"weight_map": {key: file for file, names in parts.items() for key in names}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        elif layout == "one file":
            place = tmp_path / "own name.safetensors"
            safetensors.torch.save_file(state, place)
        else:
            safetensors.torch.save_file(
                {key: value.half() for key, value in state.items()}, tmp_path / "model.safetensors"
            )
    found = load_encoder("dinov2-b14", weights=place, image_size=28)
    assert isinstance(found, TransformersVision)
    assert next(found.network.parameters()).dtype == torch.float32
    assert_same(found.encode(pictures(28)), encoder.encode(pictures(28)), within=2e-2 if layout == "half" else 0)


def test_the_weights_are_not_the_files_pages(loaded: dict[str, Any], tmp_path: Path) -> None:
    """A file that is changed under a loaded encoder changes nothing of it."""
    folder = loaded["dinov2-b14"][3]
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    encoder = load_encoder("dinov2-b14", weights=tmp_path, image_size=28)
    before = encoder.encode(pictures(28))
    size = (tmp_path / "model.safetensors").stat().st_size
    with (tmp_path / "model.safetensors").open("r+b") as opened:
        opened.seek(size // 2)
        opened.write(b"\1" * (size // 2))
    assert torch.equal(encoder.encode(pictures(28)), before)


@pytest.fixture
def folder(loaded: dict[str, Any], tmp_path: Path) -> Path:
    """A DINOv2 folder to spoil."""
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((loaded["dinov2-b14"][3] / file).read_bytes())
    return tmp_path


def load(folder: Path, name: str = "dinov2-b14") -> str:
    """What the refusal says."""
    with pytest.raises(ArraError) as caught:
        load_encoder(name, weights=folder, image_size=28)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder: Path, **fields: Any) -> None:
    """Nothing; config.json says otherwise."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_another_familys_folder_is_refused(loaded: dict[str, Any], folder: Path) -> None:
    told = load(folder, "clip-l14")
    assert (
        "config.json: model_type is 'dinov2', expected 'clip' or 'clip_vision_model'; not the weights of clip-l14"
        in told
    )
    assert "or encoder (dinov2-s14" in told
    assert "model_type is 'sam', expected 'dinov2'" in load(loaded["sam-b16"][3])
    assert "model_type is 'dinov2', expected 'dinov2_with_registers'" in load(folder, "dinov2-b14-reg")


def test_torn_and_foreign_weights_are_refused(folder: Path) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    for spoil, expected in (
        (lambda s: s.pop("layernorm.weight"), "weights missing: layernorm.weight"),
        (
            lambda s: s.update({"encoder.layer.9.x": torch.ones(2)}),
            "weights with no place in this network: encoder.layer.9.x",
        ),
        (lambda s: s.update({"layernorm.bias": torch.ones(31)}), "weights of another shape: layernorm.bias"),
    ):
        spoilt = dict(state)
        spoil(spoilt)
        safetensors.torch.save_file(spoilt, folder / "model.safetensors")
        assert expected in load(folder)
    safetensors.torch.save_file(
        {key: value for key, value in state.items() if "mask_token" not in key}, folder / "model.safetensors"
    )
    load_encoder("dinov2-b14", weights=folder, image_size=28)  # encoding never masks
    change(folder, hidden_size=4096, num_hidden_layers=100)
    assert "config.json is of a network of" in load(folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "wants code of its own (auto_map), which is never run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised; name a folder of full weights"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected an integer from 1 to 65536"),
        ({"hidden_size": True}, "hidden_size is 'True', expected an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is '1000000000', expected an integer from 1 to 512"),
        ({"hidden_act": "os.system"}, "hidden_act is 'os.system', expected gelu or"),
        ({"num_channels": 1}, "num_channels is '1', expected 3"),
        ({"image_size": [28, 42]}, "image_size is '[28, 42]', expected an integer"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps is 'x', expected a number above 0"),
        ({"use_swiglu_ffn": 1}, "use_swiglu_ffn is '1', expected true or false"),
        ({"num_attention_heads": 5}, "weights of another shape: encoder.layer.{0..2}.attention"),
    ],
)  # fmt: skip
def test_configurations_are_not_believed(folder: Path, fields: dict[str, Any], expected: str) -> None:
    change(folder, **fields)
    assert expected in load(folder)


def test_what_a_configuration_adds_is_not_taken(folder: Path, loaded: dict[str, Any]) -> None:
    change(
        folder,
        _attn_implementation="someone/kernel",
        attn_implementation="someone/kernel",
        architectures=["Evil"],
        image_size=[42, 42],
    )
    encoder = load_encoder("dinov2-b14", weights=folder, image_size=28)
    assert torch.equal(encoder.encode(pictures(28)), loaded["dinov2-b14"][2].encode(pictures(28)))


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('it ran')",))


def test_pickles_with_code_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"layernorm.weight": Evil()}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: refused: not a checkpoint of plain tensors" in load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert "pytorch_model.bin: refused" in load(folder)


def test_missing_and_broken_files_are_told(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("[1]")
    assert "config.json: holds a list, expected an object" in load(folder)
    (folder / "config.json").write_text("{")
    assert "config.json: not readable JSON" in load(folder)
    (folder / "config.json").unlink()
    assert "no config.json in it; expected an encoder in Hugging Face layout" in load(folder)
    (folder / "model.safetensors").unlink()
    assert "no weights in it; expected one of model.safetensors" in load(folder)
    assert "none: no such file or folder; expected the weights of encoder dinov2-b14" in load(tmp_path / "none")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    (folder / "config.json").write_text("{}")
    assert "expected the names of files beside it" in load(folder)


def test_a_folder_that_wants_other_means_is_refused(folder: Path) -> None:
    """Weights of RAD-DINO under the name of DINOv2 would work, and be fed wrong pixels."""
    about = {"do_normalize": True, "image_mean": [0.5307] * 3, "image_std": [0.2583] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    assert "encoder dinov2-b14 takes [0.485, 0.456, 0.406]; not its weights, say rad-dino" in load(folder)
    load_encoder("rad-dino", weights=folder, image_size=28)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": "x", "image_std": None}))
    load_encoder("dinov2-b14", weights=folder, image_size=28)


def test_medsam_ports_differ_in_their_pixels(loaded: dict[str, Any], tmp_path: Path) -> None:
    folder = loaded["medsam"][3]
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    about = {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    load_encoder("medsam-wanglab", weights=tmp_path)
    with pytest.raises(ArraError, match=r"encoder medsam takes \[0.0, 0.0, 0.0\]"):
        load_encoder("medsam", weights=tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    load_encoder("medsam", weights=tmp_path)


def test_no_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert load(folder) == (
        "encoder dinov2-b14: the package 'transformers' is missing; pip install 'arra[encoders]' -c constraints.txt"
    )


def test_folders_in_the_hubs_older_names(loaded: dict[str, Any], tmp_path: Path) -> None:
    """The names that published DINOv2, DINOv3 and CLIP files have, and a table that old CLIP files carry."""
    expected = {
        "dinov2-b14": "encoder.layer.0.attention.attention.query.weight",
        "dinov3-b16": "layer.0.attention.k_proj.weight",
        "clip-l14": "vision_model.encoder.layers.0.self_attn.k_proj.weight",
        "mae-b16": "vit.encoder.layer.0.attention.attention.query.weight",
        "sam-b16": "vision_encoder.layers.0.attn.qkv.weight",
    }
    for name, key in expected.items():
        assert key in safetensors.torch.load_file(loaded[name][3] / "model.safetensors"), name
    state = safetensors.torch.load_file(loaded["clip-l14"][3] / "model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((loaded["clip-l14"][3] / "config.json").read_bytes())
    old = load_encoder("clip-l14", weights=tmp_path)
    assert torch.equal(old.encode(pictures(32)), loaded["clip-l14"][2].encode(pictures(32)))


REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "clip-b32": ("CLIPVisionConfig", {}),
    "clip-b16": ("CLIPVisionConfig", {"patch_size": 16}),
    "clip-l14": (
        "CLIPVisionConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
        | {"projection_dim": 768},
    ),
    "siglip2-b16-224": ("SiglipVisionConfig", {}),
    "dinov2-b14": ("Dinov2Config", {}),
    "dinov2-b14-reg": ("Dinov2WithRegistersConfig", {"patch_size": 14}),
    "dinov3-s16": ("DINOv3ViTConfig", {}),
    "mae-b16": ("ViTMAEConfig", {}),
    "sam-b16": ("SamVisionConfig", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_specs_are_those_of_the_published_networks(name: str) -> None:
    """The library's defaults are the published base networks; built without memory, each says its sizes."""
    from arra.encoders.specs import KNOWN
    from arra.encoders.transformers_vision import FAMILIES, _spec_of

    config_class, more = REAL[name]
    family = FAMILIES[KNOWN[name].kind]
    network_class = "CLIPVisionModelWithProjection" if family.network == "CLIPVisionModel" else family.network
    with torch.device("meta"):
        network = getattr(home, network_class)(getattr(home, config_class)(**more))
    assert _spec_of(SPECS[name], network, KNOWN[name].kind) == SPECS[name]


def test_features_do_not_depend_on_how_a_picture_is_given(loaded: dict[str, Any]) -> None:
    encoder = loaded["clip-l14"][2]
    larger = torch.from_numpy(np.ascontiguousarray(chelsea()[:256, :256]))[None]
    floats = larger.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert_same(encoder.encode(larger), encoder.encode(floats), within=1e-3)
