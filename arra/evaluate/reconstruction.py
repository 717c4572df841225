"""What a tokenizer keeps of pictures: PSNR, SSIM, LPIPS, Frechet distances, use of its codebook. The ceiling of models.

Pictures go in a batch at a time; memory holds numbers and features of them, never the pictures.
Legend: B batch, N pictures, H W pixels, F feature, K codes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from arra.encoders import Encoder
from arra.errors import ArraError
from arra.evaluate.distances import FRECHET_COMPONENTS, Interval, MeanStatistic, bootstrap, frechet_distance
from arra.models.weights import read_checkpoint
from arra.runs import file_hash
from arra.tokenizers import ImageTokenizer
from arra.train.perceptual import LEAST_IMAGE_SIZE, PerceptualDistance

EXTRA = "pip install 'arra[metrics]' -c constraints.txt"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases"
NO_INCEPTION = f"no Inception weights; give {INCEPTION_FILE} with --inception"
NO_PERCEPTUAL = "no VGG16 weights; give torchvision's vgg16-397923af.pth with --perceptual"
SSIM_LEAST_SIZE = 11
"""Pixels per side: the window of SSIM."""
UNBIASED_IMAGES = 5000
"""From about here on the upward bias of a Frechet distance is small."""
MOST_PSNR_DB = 100.0
"""What an exact reconstruction counts as."""


@dataclass(frozen=True)
class Reconstruction:
    """The measures of a set of pictures; null where `not_measured` says why."""

    num_images: int
    psnr_db: Interval
    """Mean over pictures of each one's own, of 8-bit pixels."""
    ssim: Interval | None
    """Gaussian window of 11 pixels, borders reflected, pixels in [0, 1] with a data range of 1."""
    lpips: Interval | None
    frechet: float | None
    """Between pictures and reconstructions, in principal axes of the judge's features: no FID."""
    frechet_features: str
    frechet_components: int
    rfid: float | None
    """In Inception's 2048 features, all of them, with the weights of `inception_sha256`."""
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


@dataclass(frozen=True)
class Inception:
    """torch-fidelity's InceptionV3 (the network of FID), with weights of the user's."""

    network: Callable[[Tensor], tuple[Tensor, ...]]
    sha256: str

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B F"]:
        """2048 features per picture."""
        return self.network(images.permute(0, 3, 1, 2).contiguous())[0].float()


def load_inception(weights: str | Path, *, device: torch.device | str = "cpu") -> Inception:
    """The feature extractor of FID.

    Raises:
        ArraError: torch-fidelity is not installed, or the file is missing, unsafe or of another network.
    """
    state = read_checkpoint(weights)  # torch-fidelity's own reading would run code that a file brings
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ArraError(f"rFID needs torch-fidelity ({error}); {EXTRA}") from error
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(state, copy)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(copy)
            )
        except RuntimeError as error:
            raise ArraError(
                f"{weights}: not the InceptionV3 of torch-fidelity ({' '.join(str(error).split())[:120]}); expected "
                f"{INCEPTION_FILE}"
            ) from error
    return Inception(network.to(device), file_hash(weights))


@dataclass
class ReconstructionMeter:
    """Sends pictures through a tokenizer and back, and measures what is left of them."""

    tokenizer: ImageTokenizer
    judge: Encoder
    device: torch.device
    perceptual: PerceptualDistance | None = None
    inception: Inception | None = None
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    """By measure, one number per picture."""
    features: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
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
        if self.perceptual is None:
            self.not_measured["lpips"] = NO_PERCEPTUAL
        elif size < LEAST_IMAGE_SIZE:
            self.not_measured["lpips"] = f"it needs {LEAST_IMAGE_SIZE} pixels a side, the pictures have {size}"
        else:
            self._note("lpips", self.perceptual(2 * a - 1, 2 * b - 1))
        networks = {"judge": self.judge} | ({} if self.inception is None else {"inception": self.inception})
        for name, network in networks.items():
            pair = (network.encode(images).cpu(), network.encode(back).cpu())
            self.features.setdefault(name, []).append(pair)
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
        raw, back = self._pairs("judge")
        components = min(FRECHET_COMPONENTS, num_images - 1, raw.shape[1])
        intervals = {name: bootstrap(MeanStatistic(torch.cat(parts))) for name, parts in self.values.items()}
        return Reconstruction(
            num_images=num_images,
            psnr_db=intervals["psnr_db"],
            ssim=intervals.get("ssim"),
            lpips=intervals.get("lpips"),
            frechet=frechet_distance(back, raw, num_components=components),
            frechet_features=self.judge.spec.name,
            frechet_components=components,
            rfid=None if self.inception is None else frechet_distance(*self._pairs("inception"), num_components=None),
            inception_sha256=None if self.inception is None else self.inception.sha256,
            code_use=float((self.counts > 0).double().mean()),
            code_perplexity=float(entropy.exp()),
            num_codes_seen=int(self.counts.sum()),
            num_codes=self.tokenizer.num_codes,
            is_biased=num_images < UNBIASED_IMAGES,
            not_measured=dict(self.not_measured),
        )

    def _note(self, name: str, values: Float[Tensor, " B"]) -> None:
        self.values.setdefault(name, []).append(values.double().cpu())

    def _pairs(self, network: str) -> tuple[Tensor, Tensor]:
        raw, back = zip(*self.features[network], strict=True)
        return torch.cat(raw), torch.cat(back)


def psnr_db(a: UInt8[Tensor, "B H W 3"], b: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each pair of 8-bit pictures, at most 100."""
    error = (a.double() - b.double()).div(255).square().mean((1, 2, 3))
    return (-10 * error.log10()).clamp_max(MOST_PSNR_DB)


def ssim(a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Structural similarity of each pair of pictures in [0, 1], whose data range is 1."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return cast(Tensor, structural_similarity_index_measure(b, a, data_range=1.0, reduction="none"))
