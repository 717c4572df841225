"""What a tokenizer keeps: equal to closed forms and to other libraries, the same at any batch size."""

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from arra.encoders import load_encoder
from arra.errors import ArraError
from arra.evaluate.distances import FrechetStatistic, bootstrap, frechet_distance
from arra.evaluate.reconstruction import ReconstructionMeter, paired_frechet, psnr_db, ssim, ssim_llamagen
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
    for each in (a, b):  # one library mirrors a picture about its outermost pixels, the other beside them
        for edge in (each[:, :6], each[:, -6:], each[:, :, :6], each[:, :, -6:]):
            edge.fill_(99)
    floats = [each.permute(0, 3, 1, 2).float() / 255 for each in (a, b)]
    expected = [
        structural_similarity(
            x, y, data_range=255, channel_axis=2, gaussian_weights=True, use_sample_covariance=False, full=True
        )[1].mean()  # without `full` it leaves out the borders
        for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    ours = ssim(*floats)
    assert ours.tolist() == pytest.approx(expected, rel=1e-6)
    assert ours.max() < 0.95


def test_ssim_as_llamagen_has_it_is_scikit_images_called_with_twice_the_range() -> None:
    from skimage.metrics import structural_similarity

    a = pictures()
    b = (a + 12 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255).to(torch.uint8)
    expected = [
        structural_similarity(x / 255, y / 255, data_range=2.0, channel_axis=2)
        for x, y in zip(a.numpy().astype(np.float64), b.numpy().astype(np.float64), strict=True)
    ]
    floats = [each.permute(0, 3, 1, 2).double() / 255 for each in (a, b)]
    assert ssim_llamagen(*floats).tolist() == pytest.approx(expected, rel=1e-9)
    assert np.mean(expected) > ssim(*floats).mean().item() + 0.05  # it flatters


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
    assert one.frechet.value == pytest.approx(other.frechet.value, rel=0.05)
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
    assert measured.ssim_llamagen is not None  # its window is smaller
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


class Summaries:
    """In place of Inception: six numbers of a picture, with some noise of their own."""

    name, weights_sha256, family, resize = "inception", "0" * 64, "toy", "none"
    sizes: ClassVar[dict[str, int]] = {"features": 6}

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        pixels = images.float() / 255
        return {"features": torch.cat([pixels.mean((1, 2)), pixels.square().mean((1, 2))], dim=1)}


def test_rfid_is_torch_fidelitys_and_its_interval_draws_pairs(tokenizer: ImageTokenizer) -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason="the other library; pip install 'arra[metrics]'")
    found, images = meter(tokenizer, inception=Summaries()), pictures(60, side=16)
    back = torch.cat([found.add(part) for part in images.split(25)])
    features = [Summaries().encode(each)["features"] for each in (images, back)]
    measured = found.measured()
    assert measured.rfid is not None
    theirs = fid.fid_statistics_to_metric(*[fid.fid_features_to_statistics(each) for each in features], verbose=False)
    assert measured.rfid.value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    pairs = bootstrap(FrechetStatistic(features[1], features[0], num_components=None))
    assert measured.rfid.high - measured.rfid.low == pytest.approx(pairs.high - pairs.low, rel=0.15)
    assert measured.rfid.low < measured.rfid.value < measured.rfid.high
    assert measured.inception_sha256 == Summaries.weights_sha256
    assert "rfid" not in measured.not_measured


def test_the_distance_is_in_principal_axes_of_the_pictures(tokenizer: ImageTokenizer) -> None:
    found, images = meter(tokenizer), pictures(8, side=16)
    back = found.add(images)
    raw, seen = (found.judge.encode(each) for each in (images, back))
    measured = found.measured()
    assert measured.frechet_components == 7
    assert measured.frechet.value == pytest.approx(frechet_distance(seen, raw, num_components=7), rel=1e-4)


def test_nothing_lost_is_no_distance() -> None:
    features = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    same = paired_frechet(features, features)
    assert same.value == pytest.approx(0, abs=1e-9)
    assert np.abs(same.per_picture).max() < 1e-6
