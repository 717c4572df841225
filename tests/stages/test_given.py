"""Completions, inpaintings, variations: what is given stays as it is, the rest is painted, and each seed is its own."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from arra.errors import ArraError
from arra.models import Decoder
from arra.sample.decoding import FREE
from arra.sample.generate import Engine
from arra.sample.logits import SamplingSettings
from arra.stages.given import GivenPicture, GivenRequest, given_request, read_given
from arra.tokenizers.image import ImageTokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from tests.data.hostile import make_hostile_folder
from tests.models.toys import toy_decoder

GRID = (6, 9)
SMALL = (3, 4)
STEP, CODES = 4, 64
SEEDS = list(range(40))


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    torch.manual_seed(1)
    shape = {"channels": 32, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "z_channels": 8, "code_dim": 4}
    model = VQModel(VQSettings(**shape, num_codes=CODES))
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return ImageTokenizer(model, name="toy", weights_hash=None)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of another size and shape than the model's."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(noise).resize((90, 50), Image.Resampling.BICUBIC).save(path)
    return path


def request(**asked: Any) -> GivenRequest:
    found = given_request(**asked)
    assert found is not None
    return found


def read(tokenizer: ImageTokenizer, grid: tuple[int, int] = GRID, **asked: Any) -> GivenPicture:
    return read_given(request(**asked), tokenizer, grid=grid)


def painted(tokenizer: ImageTokenizer, grid: tuple[int, int] = GRID, **asked: Any) -> Tensor:
    """Where the first seed's row is painted, in rows of the picture."""
    rows: Tensor = read(tokenizer, grid, **asked).rows([0])
    return rows[0].unflatten(0, grid) == FREE


def model() -> Decoder:
    return toy_decoder(num_codes=CODES, grid=SMALL, num_classes=5)


def test_no_request() -> None:
    assert given_request() is None


@pytest.mark.parametrize(
    "how",
    [
        {"keep": "top:0.5"},
        {"keep": "bottom:0.34"},
        {"keep": "left:0.2"},
        {"keep": "right:.7"},
        {"box": "5,4,11,7"},
        {"strength": 0.4},
    ],
)
def test_what_is_given_comes_out_as_it_went_in(tokenizer: ImageTokenizer, photo: Path, how: dict[str, Any]) -> None:
    kind = {"keep": "complete", "box": "inpaint", "strength": "vary"}[next(iter(how))]
    given = read(tokenizer, SMALL, **{kind: photo}, **how).rows(SEEDS[:3])
    settings = SamplingSettings(cfg_scale=2.0, temperature=30.0)  # toys are sure of themselves
    with Engine(model(), tokenizer, settings=settings, batch_size=2) as engine:
        result = engine.generate(seeds=SEEDS[:3], labels=[3] * 3, given_codes=given)
        alone = engine.generate(seeds=[2], labels=[3], given_codes=given[2:])
    codes, stays = result.codes.flatten(1), given != FREE
    assert stays.any()
    assert not stays.all()
    assert torch.equal(codes[stays], given[stays])
    assert len(codes.unique(dim=0)) == 3  # seeds paint the rest
    assert torch.equal(alone.codes[0], result.codes[2])
    assert result.images is not None
    assert torch.equal(result.images[2:], tokenizer.decode(result.codes[2:]))


@pytest.mark.parametrize("grid", [(6, 9), (9, 6), (1, 8)])
def test_a_picture_is_given_as_the_model_sees_pictures(
    tokenizer: ImageTokenizer, photo: Path, grid: tuple[int, int]
) -> None:
    """The middle at the model's own pixels: of a picture that has them already, the picture itself."""
    pixels = np.random.default_rng(1).integers(0, 256, (grid[0] * STEP, grid[1] * STEP, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    codes = tokenizer.encode(torch.from_numpy(pixels)[None])[0]
    assert torch.equal(read(tokenizer, grid, vary=photo, strength=0.0).rows([7])[0], codes.flatten())
    wide = np.pad(pixels, ((0, 0), (10, 10), (0, 0)))
    Image.fromarray(wide).save(photo)
    assert torch.equal(read(tokenizer, grid, vary=photo, strength=0.0).rows([7])[0], codes.flatten())


def test_a_turned_picture_is_set_upright(tokenizer: ImageTokenizer, photo: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photo) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright, turned = (read(tokenizer, vary=path, strength=0.0) for path in (photo, tmp_path / "turned.png"))
    assert torch.equal(upright.codes, turned.codes)


def test_sides_and_shares(tokenizer: ImageTokenizer, photo: Path) -> None:
    rows, columns = torch.arange(GRID[0])[:, None], torch.arange(GRID[1])[None, :]
    for keep, stays in (
        ("top:0.5", rows < 3),
        ("bottom:0.5", rows >= 3),
        ("top : 0.4", rows < 2),
        ("left:0.5", columns < 5),  # of 9 columns 4.5 are 5
        ("right:0.34", columns >= 6),
    ):
        found = painted(tokenizer, complete=photo, keep=keep)
        assert torch.equal(found, ~stays.expand(GRID)), keep
    assert torch.equal(
        painted(tokenizer, complete=photo), painted(tokenizer, complete=photo, keep="top:0.5")
    )  # the default
    for keep, kept in (("top:0.05", 0), ("bottom:0.95", 6)):
        with pytest.raises(ArraError, match=f"--keep {keep}: keeps {kept} of 6 rows of codes; keep at least one"):
            painted(tokenizer, complete=photo, keep=keep)


def test_a_box_paints_the_codes_that_it_touches(tokenizer: ImageTokenizer, photo: Path) -> None:
    """A code is painted if and only if one of its pixels is in the box."""
    for box in ("0,0,1,1", "3,3,4,4", "3,3,5,5", "4,8,8,12", "35,23,36,24", "0,5,36,6", "0,0,36,24"):
        left, top, right, bottom = map(int, box.split(","))
        pixels = torch.zeros(GRID[0] * STEP, GRID[1] * STEP, dtype=torch.bool)
        pixels[top:bottom, left:right] = True
        touched = pixels.unflatten(1, (-1, STEP)).unflatten(0, (-1, STEP)).any(3).any(1)
        assert torch.equal(painted(tokenizer, inpaint=photo, box=box), touched), box
    for box in ("0,0,37,24", "30,0,36,25"):
        with pytest.raises(ArraError, match=r"--box .*: outside the model's picture of 36 x 24 pixels \(the middle of"):
            painted(tokenizer, inpaint=photo, box=box)


def test_a_variation_belongs_to_its_seed(tokenizer: ImageTokenizer, photo: Path) -> None:
    """And the share of codes that is painted is the strength; what one strength paints, every greater one does."""
    before = None
    for strength in (0.0, 0.1, 0.5, 0.9, 1.0):
        picture = read(tokenizer, vary=photo, strength=strength)
        rows = picture.rows(SEEDS)
        for seed in (0, 17, 39):
            assert torch.equal(picture.rows([seed])[0], rows[seed])
        assert torch.equal(picture.rows(SEEDS[::-1]), rows.flip(0))
        free = rows == FREE
        assert torch.equal(rows[~free], picture.codes.expand(len(SEEDS), -1)[~free])
        assert float(free.double().mean()) == pytest.approx(strength, abs=0.05)
        if 0 < strength < 1:
            assert len(free.unique(dim=0)) == len(SEEDS)
        if before is not None:
            assert bool((free | ~before).all())
        before = free
    assert bool(free.all())


def test_strength_nought_is_the_reconstruction_and_one_is_painting_anew(tokenizer: ImageTokenizer, photo: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (SMALL[0] * STEP, SMALL[1] * STEP, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    nought, one = (read(tokenizer, SMALL, vary=photo, strength=strength).rows([4, 5]) for strength in (0.0, 1.0))
    with Engine(model(), tokenizer, settings=SamplingSettings()) as engine:
        same = engine.generate(seeds=[4, 5], labels=[0, 1], given_codes=nought)
        anew = engine.generate(seeds=[4, 5], labels=[0, 1], given_codes=one)
        plain = engine.generate(seeds=[4, 5], labels=[0, 1])
    back = tokenizer.decode(tokenizer.encode(torch.from_numpy(pixels)[None]))
    assert same.images is not None
    assert torch.equal(same.images, back.expand(2, -1, -1, -1))
    assert torch.equal(anew.codes, plain.codes)


def test_which_codes_are_painted_says_nothing_about_what_is_painted(tokenizer: ImageTokenizer, photo: Path) -> None:
    """The draws of the mask are not those of the painting: as many of each code are painted in either half."""
    rows = read(tokenizer, SMALL, vary=photo, strength=0.5).rows(range(500))
    with Engine(
        model(), settings=SamplingSettings(temperature=1e5), batch_size=500
    ) as engine:  # any code as likely as another
        codes = engine.generate(seeds=range(500), labels=[0] * 500).codes.flatten(1)
    free = rows == FREE
    shares = [float((codes[mask] < CODES // 2).double().mean()) for mask in (free, ~free)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)


def test_facts(photo: Path) -> None:
    """The name without its folder, and the hash of the bytes that are used."""
    digest = hashlib.sha256(photo.read_bytes()).hexdigest()
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"complete": photo, "keep": "left:0.25"}, {"keep": "left:0.25"}),
        ({"inpaint": photo, "box": " 1, 2,3,4"}, {"box": [1, 2, 3, 4]}),
        ({"vary": photo}, {"strength": 0.5}),
    ]
    for options, how in asked:
        found = request(**options)
        photo.write_bytes(photo.read_bytes())
        assert found.facts() == {found.kind: "photo.png", **how, "picture_sha256": digest}
        assert "PNG" not in repr(found)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"complete": 1, "vary": 1}, "--complete and --vary do not go together; give one"),
        ({"complete": 1, "inpaint": 1, "vary": 1}, "--complete and --inpaint and --vary do not go together"),
        ({"keep": "top:0.5"}, "--keep: belongs to --complete IMAGE; give that, or leave it out"),
        ({"vary": 1, "box": "0,0,1,1"}, "--box: belongs to --inpaint IMAGE"),
        ({"complete": 1, "strength": 0.5}, "--strength: belongs to --vary IMAGE"),
        ({"inpaint": 1}, "--inpaint: say what is painted anew: --box x0,y0,x1,y1"),
        ({"inpaint": 1, "box": "0,0,5"}, "--box 0,0,5: expected x0,y0,x1,y1 in pixels"),
        ({"inpaint": 1, "box": "5,0,5,9"}, "--box 5,0,5,9: expected x0,y0,x1,y1 in pixels, x0 < x1 and y0 < y1"),
        ({"inpaint": 1, "box": "-1,0,5,9"}, "--box -1,0,5,9: expected"),
        ({"vary": 1, "strength": 1.01}, r"--strength 1.01: expected 0 \(the picture as it is\) to 1"),
        ({"vary": 1, "strength": float("nan")}, "--strength nan: expected 0"),
        ({"complete": 1, "keep": "top"}, "--keep top: expected top, bottom, left or right and a share"),
        ({"complete": 1, "keep": "up:0.5"}, "--keep up:0.5: expected top"),
        ({"complete": 1, "keep": "top:0"}, "--keep top:0: expected .* between 0 and 1"),
        ({"complete": 1, "keep": "top:1"}, "--keep top:1: expected .* between 0 and 1"),
        ({"complete": 1, "keep": "top:nan"}, "--keep top:nan: expected"),
    ],
)
def test_what_does_not_go_together_or_is_no_number(photo: Path, options: dict[str, Any], line: str) -> None:
    asked: dict[str, Any] = {name: photo if value == 1 else value for name, value in options.items()}
    with pytest.raises(ArraError, match=line) as raised:
        given_request(**asked)
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, line in (("none.png", "No such file"), ("", "Is a directory"), ("pipe", "not a regular file")):
        with pytest.raises(ArraError, match=rf"cannot be read \({line}.*\); expected the file of a picture"):
            given_request(vary=tmp_path / name)


def test_hostile_pictures_are_refused_in_one_line(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    folder = make_hostile_folder(tmp_path / "set", count=400)
    kinds = set()
    for item in folder.items:
        told = item.kind.split()[0] in ("claims", "is", "cut", "20000x1") or item.kind.endswith("as picture")
        if not told or item.kind in kinds or item.file is None or item.expected != "bad":
            continue
        kinds.add(item.kind)
        with pytest.raises(ArraError, match=r"^--vary .*: not a readable image \(.+\)") as raised:
            read(tokenizer, vary=item.file)
        assert "\n" not in str(raised.value)
    assert len(kinds) > 15
    assert "is 20000x20000 PNG" in kinds
