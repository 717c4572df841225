"""What a tokenizer keeps: equal to closed forms and to other libraries, the same at any batch size."""

import builtins
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arra.encoders import load_encoder
from arra.errors import ArraError
from arra.evaluate.distances import frechet_distance
from arra.evaluate.reconstruction import ReconstructionMeter, load_inception, psnr_db, ssim
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from arra.train.perceptual import PerceptualDistance

CPU = torch.device("cpu")


def pictures(number: int = 6, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(number, 3, 4, 4, generator=generator)
    large = torch.nn.functional.interpolate(smooth, size=(side, side), mode="bilinear")
    return (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    settings = VQSettings(channels=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, num_codes=40, code_dim=4)
    return ImageTokenizer(VQModel(settings), name="random", weights_hash=None)


def meter(tokenizer: ImageTokenizer, **networks: Any) -> ReconstructionMeter:
    return ReconstructionMeter(tokenizer, load_encoder("efficientnet-lite1"), CPU, **networks)


def test_psnr_and_ssim_equal_other_libraries() -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a = pictures()
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    b = (a + 12 * noise).clamp(0, 255).round().to(torch.uint8)
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert psnr_db(a, b).tolist() == pytest.approx(expected)
    assert psnr_db(a, a).tolist() == [100.0] * len(a)
    pytest.importorskip("torchmetrics", reason="SSIM is its; pip install 'arra[metrics]'")
    floats = [each.permute(0, 3, 1, 2).float() / 255 for each in (a, b)]
    expected = [
        structural_similarity(
            x, y, data_range=255, channel_axis=2, gaussian_weights=True, use_sample_covariance=False, full=True
        )[1].mean()  # without `full` it leaves out the borders
        for x, y in zip(a.numpy(), b.numpy(), strict=True)
    ]
    ours = ssim(*floats)
    assert ours.tolist() == pytest.approx(expected, abs=2e-3)
    assert ours.max() < 0.95
    # LlamaGen's evaluation doubles the data range, which flatters
    doubled = [
        structural_similarity(x / 255, y / 255, data_range=2.0, channel_axis=2)
        for x, y in zip(a.numpy().astype(np.float64), b.numpy().astype(np.float64), strict=True)
    ]
    assert np.mean(doubled) > ours.mean().item() + 0.05


def test_measures_do_not_depend_on_the_batches(tokenizer: ImageTokenizer) -> None:
    images = pictures()
    whole, parts = meter(tokenizer), meter(tokenizer)
    back = whole.add(images)
    again = torch.cat([parts.add(part) for part in images.split([1, 3, 2])])
    assert (back != again).double().mean() < 0.02  # of two equally near codes rounding chooses
    one, other = whole.measured(), parts.measured()
    assert one.psnr_db.value == pytest.approx(other.psnr_db.value, abs=0.01)
    assert one.psnr_db.value == pytest.approx(psnr_db(images, back).mean().item())
    assert one.psnr_db.low < one.psnr_db.value < one.psnr_db.high
    assert one.frechet == pytest.approx(other.frechet, rel=0.05)
    assert (one.num_images, one.num_codes_seen, one.is_biased) == (6, 6 * 16 * 16, True)


def test_use_and_perplexity_of_the_codebook(tokenizer: ImageTokenizer) -> None:
    images = pictures()
    found = meter(tokenizer)
    found.add(images)
    counts = np.bincount(tokenizer.encode(images).flatten().numpy(), minlength=40)
    share = counts[counts > 0] / counts.sum()
    measured = found.measured()
    assert measured.code_use == pytest.approx(len(share) / 40)
    assert measured.code_perplexity == pytest.approx(math.exp(-(share * np.log(share)).sum()))
    assert 1 < measured.code_perplexity <= len(share)
    assert measured.num_codes == 40


def test_what_is_not_measured_says_why(tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = meter(tokenizer)
    found.add(pictures(side=8))
    measured = found.measured()
    assert (measured.ssim, measured.lpips, measured.rfid) == (None, None, None)
    assert set(measured.not_measured) == {"ssim", "lpips", "rfid"}
    assert "--inception" in measured.not_measured["rfid"]
    monkeypatch.setattr("arra.evaluate.reconstruction.find_spec", lambda name: None)
    found = meter(tokenizer)
    found.add(pictures())
    assert found.measured().ssim is None
    assert "pip install 'arra[metrics]'" in found.measured().not_measured["ssim"]
    with pytest.raises(ArraError, match="0 pictures; at least 2"):
        meter(tokenizer).measured()


def test_lpips_is_the_networks(tokenizer: ImageTokenizer) -> None:
    torch.manual_seed(0)
    network = PerceptualDistance()
    found, images = meter(tokenizer, perceptual=network), pictures(side=16)
    back = found.add(images)
    floats = [each.permute(0, 3, 1, 2).float() / 127.5 - 1 for each in (images, back)]
    measured = found.measured()
    assert measured.lpips is not None
    assert measured.lpips.value == pytest.approx(network(*floats).mean().item(), rel=1e-5)
    assert "lpips" not in measured.not_measured


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of torch-fidelity's published file."""
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="rFID's network; pip install 'arra[metrics]'"
    )

    class Names(Exception):
        pass

    shapes: dict[str, Tensor] = {}

    class Fresh(module.FeatureExtractorInceptionV3):  # type: ignore[name-defined]
        def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
            shapes.update(self.state_dict())
            raise Names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.torch, "load", lambda *args, **kwargs: {})
        with pytest.raises(Names):
            Fresh("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in shapes.items():
        if value.dim() > 1:
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = torch.ones_like(value) if name.endswith(("running_var", "bn.weight")) else value * 0
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def test_rfid_equals_torch_fidelity(tokenizer: ImageTokenizer, inception_file: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    found, images = meter(tokenizer, inception=load_inception(inception_file)), pictures(4)
    back = found.add(images)
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception_file)
    )
    features = [network(each.permute(0, 3, 1, 2))[0] for each in (images, back)]
    measured = found.measured()
    assert measured.rfid == pytest.approx(frechet_distance(features[1], features[0], num_components=None), rel=1e-4)
    # on few axes of the same features, where their matrix root is well conditioned, the library agrees with us
    axes = torch.randn(2048, 2, generator=torch.Generator().manual_seed(0)) / 45
    few = [each @ axes for each in features]
    with np.errstate(all="ignore"):
        theirs = fid_statistics_to_metric(*[fid_features_to_statistics(each) for each in few], verbose=False)
    library = theirs["frechet_inception_distance"]
    assert frechet_distance(few[0], few[1], num_components=None) == pytest.approx(library, rel=1e-4)
    assert measured.inception_sha256 is not None
    assert "rfid" not in measured.not_measured


def test_inception_weights_that_do_not_fit_are_told(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ArraError, match=r"other\.pth: not the InceptionV3 of torch-fidelity .*2015-12-05"):
        load_inception(tmp_path / "other.pth")
    with pytest.raises(ArraError, match="no such"):
        load_inception(tmp_path / "none.pth")
    usual = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torch_fidelity"):
            raise ImportError("No module named 'torch_fidelity'")
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ArraError, match=r"rFID needs torch-fidelity .*pip install 'arra\[metrics\]'"):
        load_inception(inception_file)
