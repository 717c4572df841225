"""What a tokenizer keeps of pictures: PSNR, SSIM, LPIPS, Frechet distances, use of its codebook. The ceiling of models.

Pictures go in a batch at a time; memory holds a few numbers of each, never the pictures, and a network's vectors of
them lie in a temporary file. A picture and its reconstruction are one draw of every interval.
Legend: B batch, N pictures, H W pixels, F feature, C principal axis.
"""

import weakref
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from tempfile import TemporaryFile
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from arra.encoders import Encoder
from arra.errors import ArraError
from arra.evaluate.card import ENOUGH_IMAGES
from arra.evaluate.distances import FRECHET_COMPONENTS, Interval, MeanStatistic, bootstrap
from arra.evaluate.measured import Measured
from arra.evaluate.moments import FrechetTo, Moments, MomentSums
from arra.evaluate.sets import Blocks, Space
from arra.evaluate.spaces import EXTRA, INCEPTION_FILE
from arra.tokenizers import ImageTokenizer
from arra.train.perceptual import LEAST_IMAGE_SIZE, PerceptualDistance

NO_INCEPTION = f"no Inception weights; give {INCEPTION_FILE} of torch-fidelity's releases with --inception"
NO_PERCEPTUAL = "no VGG16 weights; give torchvision's vgg16-397923af.pth with --perceptual"
SSIM_LEAST_SIZE = 11
"""Pixels per side: the window of SSIM."""
LLAMAGEN_WINDOW = 7
"""Pixels per side: scikit-image's window of SSIM unless it is told to be Gaussian."""
MOST_PSNR_DB = 100.0
"""What an exact reconstruction counts as."""
BLOCK_PICTURES = 4096
"""Whose vectors are read from the file at a time."""


@dataclass(frozen=True)
class Reconstruction:
    """The measures of a set of pictures; null where `not_measured` says why."""

    num_images: int
    psnr_db: Interval
    """Mean over pictures of each one's own, of 8-bit pixels."""
    ssim: Interval | None
    """Gaussian window of 11 pixels, borders reflected, pixels in [0, 1] with a data range of 1."""
    ssim_llamagen: Interval | None
    """As LlamaGen's published numbers have it, which is far higher: a data range of 2 for pixels in [0, 1], a flat
    window of 7 pixels, borders left out."""
    lpips: Interval | None
    frechet: Interval
    """Between pictures and reconstructions, in principal axes of the judge's features: no FID."""
    frechet_features: str
    frechet_components: int
    rfid: Interval | None
    """In Inception's 2048 features, all of them, with the weights of `inception_sha256`. Its reference is the very
    pictures that were reconstructed: never comparable to a FID, whose reference is a training set's statistics."""
    inception_sha256: str | None
    code_use: float
    """Share of the codebook chosen at least once among `num_codes_seen` codes: it grows with their number."""
    code_perplexity: float
    """exp of the entropy of the codes' frequencies: the number of equally frequent codes that would carry as much."""
    num_codes_seen: int
    num_codes: int
    is_biased: bool
    """So few pictures that the Frechet distances are clearly too large; compare at equal numbers only."""
    not_measured: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass
class ReconstructionMeter:
    """Sends pictures through a tokenizer and back, and measures what is left of them."""

    tokenizer: ImageTokenizer
    judge: Encoder
    device: torch.device
    perceptual: PerceptualDistance | None = None
    inception: Space | None = None
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    """By measure, one number per picture."""
    vectors: dict[str, tuple["_Vectors", "_Vectors"]] = field(default_factory=dict)
    """By network, of pictures and of their reconstructions."""
    counts: Tensor | None = None
    """How often each code was chosen."""
    not_measured: dict[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, images: UInt8[Tensor, "B H W 3"]) -> UInt8[Tensor, "B H W 3"]:
        """The reconstructions, after they have been measured."""
        images = images.to(self.device)
        codes = self.tokenizer.encode(images)
        back = self.tokenizer.decode(codes)
        counts = torch.bincount(codes.flatten(), minlength=self.tokenizer.num_codes).cpu()
        self.counts = counts if self.counts is None else self.counts + counts
        self._note("psnr_db", psnr_db(images, back))
        a, b = (each.permute(0, 3, 1, 2).float() / 255 for each in (images, back))
        size = min(images.shape[1:3])
        if find_spec("torchmetrics") is None:
            self.not_measured["ssim"] = f"torchmetrics is not there; {EXTRA}"
        elif size < SSIM_LEAST_SIZE:
            self.not_measured["ssim"] = f"its window has {SSIM_LEAST_SIZE} pixels a side, the pictures {size}"
        else:
            self._note("ssim", ssim(a, b))
        if size < LLAMAGEN_WINDOW:
            self.not_measured["ssim_llamagen"] = f"its window has {LLAMAGEN_WINDOW} pixels a side, the pictures {size}"
        else:
            self._note("ssim_llamagen", ssim_llamagen(a, b))
        if self.perceptual is None:
            self.not_measured["lpips"] = NO_PERCEPTUAL
        elif size < LEAST_IMAGE_SIZE:
            self.not_measured["lpips"] = f"it needs {LEAST_IMAGE_SIZE} pixels a side, the pictures have {size}"
        else:
            self._note("lpips", self.perceptual(2 * a - 1, 2 * b - 1))
        for place, seen in enumerate((images, back)):
            self._keep("judge", place, self.judge.encode(seen))
            if self.inception is not None:
                self._keep("inception", place, self.inception.encode(seen)["features"])
        return back.cpu()

    def measured(self) -> Reconstruction:
        """All measures of what was added.

        Raises:
            ArraError: fewer than two pictures.
        """
        num_images = sum(map(len, self.values.get("psnr_db", [])))
        if num_images < 2 or self.counts is None:
            raise ArraError(f"reconstruction: {num_images} pictures; at least 2 are needed, give more")
        if self.inception is None:
            self.not_measured["rfid"] = NO_INCEPTION
        share = self.counts.double() / self.counts.sum()
        entropy = -(share * share.clamp_min(1e-300).log()).sum()
        raw, back = (each.mapped() for each in self.vectors["judge"])
        components = min(FRECHET_COMPONENTS, num_images - 1, raw.shape[1])
        axes = _principal_axes(raw, number=components)
        intervals = {name: bootstrap(MeanStatistic(torch.cat(parts))) for name, parts in self.values.items()}
        return Reconstruction(
            num_images=num_images,
            psnr_db=intervals["psnr_db"],
            ssim=intervals.get("ssim"),
            ssim_llamagen=intervals.get("ssim_llamagen"),
            lpips=intervals.get("lpips"),
            frechet=_interval(paired_frechet(_on_axes(raw, axes), _on_axes(back, axes))),
            frechet_features=self.judge.spec.name,
            frechet_components=components,
            rfid=(
                None
                if self.inception is None
                else _interval(paired_frechet(*(each.mapped() for each in self.vectors["inception"])))
            ),
            inception_sha256=None if self.inception is None else self.inception.weights_sha256,
            code_use=float((self.counts > 0).double().mean()),
            code_perplexity=float(entropy.exp()),
            num_codes_seen=int(self.counts.sum()),
            num_codes=self.tokenizer.num_codes,
            is_biased=num_images < ENOUGH_IMAGES,
            not_measured=dict(self.not_measured),
        )

    def _note(self, name: str, values: Float[Tensor, " B"]) -> None:
        self.values.setdefault(name, []).append(values.double().cpu())

    def _keep(self, network: str, place: int, features: Float[Tensor, "B F"]) -> None:
        self.vectors.setdefault(network, (_Vectors(), _Vectors()))[place].add(features)


class _Vectors:
    """Vectors of pictures, written to a temporary file as they come and mapped from there."""

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115 - closed when these vectors are let go
        weakref.finalize(self, self._file.close)
        self._size = 0

    def add(self, features: Float[Tensor, "B F"]) -> None:
        """Nothing; the vectors are the next ones of the file."""
        self._size = features.shape[1]
        self._file.write(features.float().cpu().contiguous().numpy().tobytes())

    def mapped(self) -> Blocks:
        """All of them."""
        self._file.flush()
        return np.memmap(self._file, dtype=np.float32, mode="r").reshape(-1, self._size)


def paired_frechet(raw: Blocks, back: Blocks) -> Measured:
    """The Fréchet distance of reconstructions to the very pictures they were made from, whose rows are theirs.

    A picture's value is the distance and what the picture adds to it on both sides: the interval draws pairs.
    """
    of_raw, of_back = _moments(raw), _moments(back)
    ours, theirs = FrechetTo(of_raw).measured(of_back, back), FrechetTo(of_back).measured(of_raw, raw)
    return Measured(value=ours.value, per_picture=ours.per_picture + theirs.per_picture - theirs.value)


def _moments(features: Blocks) -> Moments:
    sums = MomentSums(features.shape[1])
    for start in range(0, len(features), BLOCK_PICTURES):
        sums.add(features[start : start + BLOCK_PICTURES])
    return sums.finish()


def _principal_axes(features: Blocks, *, number: int) -> Float64[np.ndarray, "F C"]:
    return np.linalg.eigh(_moments(features).covariance)[1][:, -number:]


def _on_axes(features: Blocks, axes: Float64[np.ndarray, "F C"]) -> Float32[np.ndarray, "N C"]:
    starts = range(0, len(features), BLOCK_PICTURES)
    return np.concatenate([features[start : start + BLOCK_PICTURES] @ axes for start in starts]).astype(np.float32)


def _interval(measured: Measured) -> Interval:
    return bootstrap(MeanStatistic(torch.from_numpy(measured.per_picture)))


def psnr_db(a: UInt8[Tensor, "B H W 3"], b: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each pair of 8-bit pictures, at most 100."""
    error = (a.double() - b.double()).div(255).square().mean((1, 2, 3))
    return (-10 * error.log10()).clamp_max(MOST_PSNR_DB)


def ssim(a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Structural similarity of each pair of pictures in [0, 1], whose data range is 1, in float64."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(b.double(), a.double(), data_range=1.0, reduction="none")
    return cast(Tensor, found)


def ssim_llamagen(a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Structural similarity of each pair of pictures in [0, 1] as if their data range were 2, in float64.

    Source: LlamaGen, tokenizer/tokenizer_image/reconstruction_vq_ddp.py, which calls scikit-image with data_range=2.0;
    torchmetrics has neither its sample covariances nor its borders.
    """
    first, second = 0.01 * 2, 0.03 * 2
    x, y = a.double(), b.double()

    def window(values: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(values, LLAMAGEN_WINDOW, stride=1)  # (B, 3, H - 6, W - 6)

    sample = LLAMAGEN_WINDOW**2 / (LLAMAGEN_WINDOW**2 - 1)
    mean_x, mean_y = window(x), window(y)
    var_x, var_y = (sample * (window(v * v) - mean * mean) for v, mean in ((x, mean_x), (y, mean_y)))
    covariance = sample * (window(x * y) - mean_x * mean_y)
    above = (2 * mean_x * mean_y + first**2) * (2 * covariance + second**2)
    below = (mean_x**2 + mean_y**2 + first**2) * (var_x + var_y + second**2)
    return (above / below).mean((1, 2, 3))
