"""Networks of the user as encoders: shown what was promised, known by their source; nothing of Python's is called."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from arra.encoders import load_encoder
from arra.encoders.base import Encoder, EncoderSpec
from arra.encoders.python_object import CallableEncoder, load_python
from arra.errors import ArraError

SOURCE = """
import torch
from torch import nn

def colours(pixels):
    assert pixels.dtype == torch.float32 and pixels.shape[1:] == (3, 32, 32) and -1 <= pixels.min() <= pixels.max() <= 1
    return pixels.mean((2, 3))

colours.image_size = 32

def quarters(pixels):
    return nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(2).transpose(1, 2)

def three(pixels):
    return torch.zeros(len(pixels), 3, 5)

def one(pixels):
    return torch.zeros(1, 4)

def words(pixels):
    return ["a"] * len(pixels)

class Net(nn.Module):
    image_size = 16
    def __init__(self, weights=None):
        super().__init__()
        self.linear, self.drop = nn.Linear(3, 4), nn.Dropout(0.5)
        nn.init.ones_(self.linear.weight), nn.init.zeros_(self.linear.bias)
        if weights is not None:
            from safetensors.torch import load_file
            self.linear.load_state_dict(load_file(weights))
    def forward(self, pixels):
        return self.drop(self.linear(pixels.mean((2, 3))))

number = 5
"""
ENCODER = """
import torch
from arra.encoders.base import EncoderSpec

class Mine:
    weights_hash = "h" * 64
    spec = EncoderSpec("mine", 2, 8, (0.5,) * 3, (0.5,) * 3, "", "mine", "mine", "mine")
    def encode(self, images, *, aggregate=None, layers=None, grid=None):
        return torch.full((len(images), 2), float(grid or 7))

made = Mine()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the user's files."""
    (tmp_path / "my_encoders.py").write_text(SOURCE)
    (tmp_path / "my_own.py").write_text(ENCODER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in ("my_encoders", "my_own"):
        sys.modules.pop(name, None)


@pytest.fixture
def pictures() -> Tensor:
    return torch.randint(0, 256, (3, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_a_function_of_vectors(pictures: Tensor) -> None:
    encoder = load_encoder("python:my_encoders:colours")
    assert isinstance(encoder, Encoder)
    spec = encoder.spec
    assert (spec.name, spec.image_size, spec.feature_size) == ("python:my_encoders:colours", 32, 3)
    assert (spec.output, spec.outputs) == ("mean", ("mean",))
    wanted = (pictures.float() / 127.5 - 1).mean((1, 2))
    torch.testing.assert_close(encoder.encode(pictures), wanted, atol=2e-2, rtol=0)  # it is shown 32 pixels of 40
    small = pictures[:, :32, :32]
    torch.testing.assert_close(encoder.encode(small), (small.float() / 127.5 - 1).mean((1, 2)))
    with pytest.raises(ArraError, match="has no output 'patches'; it has mean"):
        encoder.encode(pictures, aggregate="patches")
    with pytest.raises(ArraError, match="only the end of the network can be taken"):
        encoder.encode(pictures, layers=(1,))


def test_a_function_of_patches(pictures: Tensor) -> None:
    encoder = load_python("python:my_encoders:quarters", image_size=40)
    assert (encoder.spec.output, encoder.spec.outputs, encoder.spec.image_size) == ("patches", ("patches", "mean"), 40)
    patches = encoder.encode(pictures)
    floats = pictures.float() / 127.5 - 1
    torch.testing.assert_close(patches[:, 1], floats[:, :20, 20:].mean((1, 2)))  # the upper right: raster order
    torch.testing.assert_close(encoder.encode(pictures, aggregate="mean"), floats.mean((1, 2)))
    torch.testing.assert_close(encoder.encode(pictures, grid=1)[:, 0], floats.mean((1, 2)))


def test_a_class_is_made_with_the_weights(pictures: Tensor, folder: Path) -> None:
    save_file({"weight": torch.full((4, 3), 2.0), "bias": torch.ones(4)}, folder / "net.safetensors")
    plain = load_python("python:my_encoders:Net")
    filled = load_python("python:my_encoders:Net", weights="net.safetensors")
    once, again = filled.encode(pictures), filled.encode(pictures)
    assert torch.equal(once, again)  # dropout is off
    assert not once.requires_grad
    torch.testing.assert_close(once, 2 * plain.encode(pictures) + 1)
    assert plain.weights_hash != filled.weights_hash
    with pytest.raises(ArraError, match="weights are handed to a class; colours is none"):
        load_python("python:my_encoders:colours", weights="net.safetensors")


def test_an_encoder_is_taken_as_it_is(pictures: Tensor) -> None:
    for name in ("python:my_own:Mine", "python:my_own:made"):
        encoder = load_python(name)
        assert encoder.spec.name == "mine"
        assert isinstance(encoder.spec, EncoderSpec)
        assert encoder.weights_hash == "h" * 64
        assert encoder.encode(pictures, grid=3).tolist() == [[3, 3]] * 3
        with pytest.raises(ArraError, match="sees 8 pixels a side, as its own spec says, not 16"):
            load_python(name, image_size=16)


def test_identity_follows_the_source(folder: Path) -> None:
    def fresh() -> str:
        sys.modules.pop("my_encoders", None)
        return load_python("python:my_encoders:colours").weights_hash

    before = fresh()
    assert fresh() == before
    assert load_python("python:my_encoders:quarters", image_size=8).weights_hash != before
    (folder / "my_encoders.py").write_text(SOURCE + "\n# changed\n")
    assert fresh() != before


def double(pixels: Tensor) -> Tensor:
    return pixels.mean((2, 3)) * 2


def test_a_callable_without_a_module(pictures: Tensor) -> None:
    encoder = CallableEncoder(double, image_size=40)
    assert encoder.spec.name == "python:double"
    torch.testing.assert_close(encoder.encode(pictures), 2 * (pictures.float() / 127.5 - 1).mean((1, 2)))
    torch.manual_seed(0)
    parts = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    networks = [Wrapped(nn.Sequential(*parts, last)) for last in (nn.ReLU(), nn.Tanh())]
    hashes = {CallableEncoder(network, name="mine", image_size=8).weights_hash for network in networks}
    assert len(hashes) == 2  # the same tensors in another network


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Any:
        return self.inner(pixels)


def test_what_has_no_source_needs_an_identity() -> None:
    made: dict[str, Any] = {}
    exec("def nowhere(pixels):\n    return pixels.mean((2, 3))", made)
    with pytest.raises(ArraError, match=r"the file that defines it cannot be read, .* pass identity="):
        CallableEncoder(made["nowhere"], image_size=8)
    assert CallableEncoder(made["nowhere"], image_size=8, identity="v1").weights_hash == "v1"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("python:my_encoders", "expected python:MODULE:NAME"),
        ("python:../my:x", "expected python:MODULE:NAME"),
        ("python:my_encodings:colours", "no module 'my_encodings' in .* or among the installed ones"),
        ("python:my_encoders:colors", "my_encoders has no 'colors'; it has colours, quarters"),
        ("python:my_encoders:number", "a int is neither an encoder nor a callable"),
        ("python:my_encoders:three", "its 3 patches fill no square; leave class and register tokens out"),
        ("python:my_encoders:words", "of 1 pictures it gave list; expected a tensor"),
        ("python:os:system", "os is a module of Python itself"),
        ("python:subprocess:Popen", "subprocess is a module of Python itself"),
        ("python:builtins:exec", "builtins is a module of Python itself"),
        ("python:torch.utils.cpp_extension:subprocess.Popen", r"a part of Python itself \(subprocess\)"),
        ("python:arra.encoders.files:Path", r"a part of Python itself \(pathlib\)"),
        ("python:my_encoders:colours.__class__", r"a part of Python itself \(builtins\)"),
    ],
)
def test_what_the_user_can_put_right(name: str, told: str) -> None:
    with pytest.raises(ArraError, match=told) as caught:
        load_python(name)
    assert "\n" not in str(caught.value)


def test_one_vector_for_several_pictures_is_told(pictures: Tensor) -> None:
    encoder = load_python("python:my_encoders:one", image_size=8)
    with pytest.raises(ArraError, match=r"of 3 pictures it gave \(1, 4\); expected a tensor \(3, F\) or \(3, P, F\)"):
        encoder.encode(pictures)


def test_errors_of_the_users_code_keep_their_traceback(folder: Path) -> None:
    (folder / "my_encoders.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_python("python:my_encoders:colours")
