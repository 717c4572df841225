"""Image tokenizers as users hold them: both kinds of pixels, any batch, saved and opened without a change."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image
from skimage.data import chelsea
from torch import Tensor

import arra
from arra.data.images import center_crop
from arra.data.openmoji import draw
from arra.errors import ArraError
from arra.tokenizers import EMBEDDED, ImageTokenizer
from arra.tokenizers.image import CARD_FILE, WEIGHTS_FILE, refuse_no_images, to_float, to_uint8
from arra.tokenizers.vq import VQModel, VQSettings

TINY = VQSettings(channels=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8, num_codes=64, code_dim=4)


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(VQModel(TINY), name="tiny", weights_hash=None, about={"psnr_db": 12.5})


@pytest.fixture(scope="module")
def images() -> Tensor:
    """(7, 16, 24, 3) uint8: smooth pictures, so that codes have margins."""
    noise = torch.rand(7, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(noise, scale_factor=4, mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def test_every_level_survives_the_way_to_float_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    floats = to_float(levels)
    assert (floats.min().item(), floats.max().item()) == (-1, 1)
    assert torch.equal(to_uint8(floats), levels.permute(0, 2, 3, 1))
    assert torch.equal(to_uint8(floats * 3), to_uint8((floats * 3).clamp(-1, 1)))
    assert torch.equal(to_float(floats), floats)


def test_shapes(tokenizer: ImageTokenizer, images: Tensor) -> None:
    codes = tokenizer.encode(images)
    assert (codes.shape, codes.dtype) == ((7, 4, 6), torch.int64)
    assert codes.unique().numel() > 3
    assert 0 <= codes.min() <= codes.max() < tokenizer.num_codes == 64
    pixels = tokenizer.decode(codes)
    assert (pixels.shape, pixels.dtype, pixels.is_contiguous()) == ((7, 16, 24, 3), torch.uint8, True)
    assert tokenizer.encode(images[:0]).shape == (0, 4, 6)
    assert tokenizer.decode(codes[:0]).shape == (0, 16, 24, 3)


def test_uint8_and_float_are_the_same_pictures(tokenizer: ImageTokenizer, images: Tensor) -> None:
    floats = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(floats))


def test_batch_mates_do_not_matter(tokenizer: ImageTokenizer, images: Tensor) -> None:
    codes = tokenizer.encode(images)
    pixels = tokenizer.decode(codes)
    for batch_size in (1, 2, 7):
        assert torch.equal(tokenizer.encode(images, batch_size=batch_size), codes)
        found = tokenizer.decode(codes, batch_size=batch_size)
        assert (found.int() - pixels.int()).abs().max() <= 1  # a value halfway between two levels may round either way
    assert torch.equal(tokenizer.encode(images[[4, 1]]), codes[[4, 1]])


def test_nothing_is_trained_or_recorded(tokenizer: ImageTokenizer, images: Tensor) -> None:
    assert not tokenizer.model.training
    floats = to_float(images.permute(0, 3, 1, 2)).requires_grad_()
    assert not tokenizer.encode(floats).requires_grad
    assert not tokenizer.decode(tokenizer.encode(images)).requires_grad


@pytest.mark.parametrize(("height", "width"), [(15, 24), (16, 22), (1, 1)])
def test_sizes_that_do_not_fit(tokenizer: ImageTokenizer, height: int, width: int) -> None:
    message = f"tokenizer tiny: images of {height}x{width} pixels; expected sides that are multiples of 4; crop or"
    for images in (torch.zeros(1, height, width, 3, dtype=torch.uint8), torch.zeros(1, 3, height, width)):
        with pytest.raises(ArraError, match=message):
            tokenizer.encode(images)


def test_what_is_no_batch_of_images() -> None:
    bytes_, floats = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)
    refuse_no_images(bytes_, "tiny")
    refuse_no_images(floats, "tiny")
    wrong = (bytes_[0], bytes_.permute(0, 3, 1, 2), floats.permute(0, 2, 3, 1), floats[:, :1], bytes_.numpy(), None)
    for images in wrong:
        with pytest.raises(ArraError, match=r"images: got .*; expected a tensor, uint8 \(B, H, W, 3\) or float"):
            refuse_no_images(images, "tiny")


@pytest.mark.parametrize("wrong", [-1, 64])
def test_codes_of_another_tokenizer(tokenizer: ImageTokenizer, wrong: int) -> None:
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    codes[0, 2, 1] = wrong
    with pytest.raises(ArraError, match=r"are outside 0\.\.63; they come from another tokenizer"):
        tokenizer.decode(codes)


@pytest.mark.parametrize("half", [False, True])
def test_save_and_load(half: bool, tokenizer: ImageTokenizer, images: Tensor, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "deep" / "vq", half=half)
    again = arra.load_tokenizer(tmp_path / "deep" / "vq")
    assert (again.name, again.about, again.model.settings) == ("tiny", {"psnr_db": 12.5}, TINY)
    for key, value in again.model.state_dict().items():
        ours = tokenizer.model.state_dict()[key]
        assert value.dtype == torch.float32
        assert torch.equal(value, ours.half().float() if half else ours), key
    if not half:
        assert torch.equal(again.encode(images), tokenizer.encode(images))
    again.save(tmp_path / "again", half=half)
    assert arra.load_tokenizer(tmp_path / "again").weights_hash == again.weights_hash
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert files == {WEIGHTS_FILE, CARD_FILE}


def flip_a_weight(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut_the_weights(folder: Path) -> None:
    os.truncate(folder / WEIGHTS_FILE, 5000)


def drop_the_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def write_card(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / CARD_FILE).write_text(text)


def change_settings(**fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        card = json.loads((folder / CARD_FILE).read_text())
        card["settings"] |= fields
        (folder / CARD_FILE).write_text(json.dumps(card))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_weight, r"tokenizer\.safetensors: SHA-256 .* is not the card's; the file is damaged"),
        (cut_the_weights, r"tokenizer\.safetensors: not a readable safetensors file"),
        (drop_the_weights, r"tokenizer\.safetensors: no such checkpoint file"),
        (write_card(""), r"tokenizer\.json: not a readable tokenizer card"),
        (write_card("[]"), r"tokenizer\.json: not a readable tokenizer card"),
        (write_card("{}"), r"tokenizer\.json: not a readable tokenizer card \('name'\); make the tokenizer again"),
        (write_card('{"name": "x", "settings": 5, "sha256": ""}'), r"tokenizer\.json: not a readable tokenizer card"),
        (change_settings(code_dim=0), r"tokenizer\.json: tokenizer settings: code_dim: Input should be greater than 0"),
        (change_settings(colour="red"), r"tokenizer settings: colour: Extra inputs are not permitted"),
        (change_settings(num_codes=32), r"quantize\.embedding\.weight is \(64, 4\), expected \(32, 4\)"),
    ],
)
def test_damaged_folders(
    damage: Callable[[Path], Any], message: str, tokenizer: ImageTokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArraError, match=message) as caught:
        arra.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_names() -> None:
    with pytest.raises(ArraError, match="neither a folder nor a known name; known are openmoji-vq4, llamagen"):
        arra.load_tokenizer("openmoji")


def test_a_full_disk_is_one_line(tokenizer: ImageTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ArraError, match=r"tokenizer\.safetensors: cannot be written .*No space left .*; free space"):
        tokenizer.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_packaged_tokenizer_paints_what_it_saw() -> None:
    """Whatever weights ship: drawings come back recognisable, a photograph, never seen, at least in its colours."""
    packaged = arra.load_tokenizer(EMBEDDED)
    assert (packaged.name, packaged.downsampling) == (EMBEDDED, 4)
    drawn = [Image.open(io.BytesIO(draw(code))) for code in ("1F353", "1F3E0", "1F600", "1F692", "1F98B", "2764")]
    pictures = [*drawn, Image.fromarray(chelsea())]
    pixels = torch.from_numpy(np.stack([center_crop(picture, 32) for picture in pictures]))
    codes = packaged.encode(pixels)
    assert codes.shape == (7, 8, 8)
    mse = (packaged.decode(codes).double() - pixels.double()).div(255).square().mean((1, 2, 3))
    psnr_db = -10 * mse.log10()
    assert psnr_db[:6].mean() > 24
    assert psnr_db[6] > 15
    assert codes.unique().numel() > 100
