"""The spaces that pictures are compared in: the Inception of published FIDs, and every encoder of `arra.encoders`.

    a name --open_space--> Space --encode--> vectors by output --> arra.evaluate.collecting

`inception` is torch-fidelity's port of the network that ADM's evaluator, and with it every published ImageNet FID, runs
in TensorFlow: `features` are the 2048 of `pool_3:0` (FID, KID, precision, recall), `spatial` the first 7 channels of
`mixed_6/conv:0` in TensorFlow's order of rows, columns, channels (sFID), `logits` the 1008 without their bias (IS).
Any other name is an encoder's, whose `features` are its spec's output: DINOv2's and RAD-DINO's CLS token, CLIP's
projection, TorchXRayVision's pooled map; of TorchXRayVision's networks there are `findings` too. Convolutions are done
in float32 where a GPU's default would round to TF32.

Source: openai/guided-diffusion, evaluations/evaluator.py (which tensors); toshas/torch-fidelity (network and weights).

Legend: B batch, H W pixels, F feature.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from arra.encoders import PREFIXES, SPECS, Encoder, EncoderChoice, EncoderSpec, Output, check_encoder_name, open_encoder
from arra.encoders.xrv import XrvDenseNet
from arra.errors import ArraError
from arra.evaluate.sets import Space
from arra.models.weights import read_checkpoint
from arra.runs import file_hash

INCEPTION = "inception"
EXTRA = "pip install 'arra[metrics]' -c constraints.txt"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_HASH = "6726825d"
"""How the SHA-256 of the published file begins, by the custom of torch.hub that a file's name tells it."""
SPATIAL_CHANNELS = 7
"""As many as make, with 17 x 17 places, about as many numbers as the 2048 features."""
INCEPTION_SIZES = {"features": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": 1008}
INCEPTION_RESIZE = "299 px a side, bilinear as in TensorFlow 1, not antialiased"
FITS = {
    "squash": "both sides",
    "crop": "shorter side, then the middle square",
    "pad": "longer side, then zeros",
}
"""How a picture becomes a square, by the word of an encoder's spec."""


def check_space_name(name: str) -> None:
    """Nothing.

    Raises:
        ArraError: a name that means no space, the likeliest ones told.
    """
    if name == INCEPTION:
        return
    try:
        check_encoder_name(name)
    except ArraError:
        near = get_close_matches(name, (INCEPTION, *SPECS), n=3) or [INCEPTION, "dinov2-l14", "clip-l14-336"]
        raise ArraError(
            f"space '{name}': unknown; known are {', '.join(near)} and more (arra list encoders), or "
            f"{', '.join(PREFIXES.values())}"
        ) from None


def open_space(
    name: str,
    *,
    weights: str | Path | None = None,
    output: Output | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> Space:
    """A space by name: `inception`, a name of `arra list encoders`, timm:, open_clip: or python:.

    `weights` is a file, a folder or a repository, as for encoders; of `inception` a file, None meaning the place where
    torch-fidelity keeps it. `output` and `image_size` differ from an encoder's own only for who asks for it, and then
    the space's name says so.

    Raises:
        ArraError: an unknown name, a missing package, weights that are missing or not its own, an output that is no
            one vector, or a size that the network cannot see.
    """
    check_space_name(name)
    if name == INCEPTION:
        if output is not None or image_size is not None:
            raise ArraError("space inception: has its outputs and sees 299 pixels a side; leave output and size out")
        return load_inception(inception_file() if weights is None else weights, device=device)
    if output == "patches":
        raise ArraError(
            f"space {name}: 'patches' are many vectors of a picture, a space has one; choose cls, mean or another"
        )
    told = None if weights is None else str(weights)
    choice = EncoderChoice(name=name, weights=told, output=output, image_size=image_size)
    encoder = open_encoder(choice, device=device)
    label = choice.column.removeprefix("features.")
    return EncoderSpace(encoder, name=label, output=output, device=torch.device(device))


def inception_file() -> Path:
    """Where the Inception's weights lie if torch-fidelity, or torch.hub, has fetched them before.

    Raises:
        ArraError: they are not there; the line says how to fetch them.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not (folder / INCEPTION_FILE).is_file():
        raise ArraError(
            f"space inception: no weights in {folder}; where there is a network: wget -P {folder} {INCEPTION_URL}, or "
            "give the file with --inception"
        )
    return folder / INCEPTION_FILE


class InceptionSpace:
    """torch-fidelity's InceptionV3, a `Space` with the three outputs that ADM's evaluator measures."""

    name = INCEPTION
    sizes: Mapping[str, int] = INCEPTION_SIZES
    family = "InceptionV3 (TensorFlow, 2015-12-05), ImageNet-1k"
    resize = INCEPTION_RESIZE

    def __init__(self, network: nn.Module, *, weights_sha256: str, device: torch.device | str) -> None:
        self.network, self.device = network.to(device), torch.device(device)
        self.weights_sha256 = weights_sha256
        self._branch: Tensor | None = None
        first_branch: Any = network.get_submodule("Mixed_6d.branch1x1")
        first_branch.register_forward_hook(self._keep)

    @property
    def is_published(self) -> bool:
        """Whether the weights are those of published FIDs, by the hash in the published file's name."""
        return self.weights_sha256.startswith(INCEPTION_HASH)

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "B H W 3"]) -> dict[str, Float[Tensor, "B F"]]:
        """`features` (B, 2048), `spatial` (B, 2023) and `logits` (B, 1008), where the network lies."""
        with exact_convolutions():
            pooled, logits = self.network(images.to(self.device).permute(0, 3, 1, 2).contiguous())
        branch, self._branch = self._branch, None
        assert branch is not None
        spatial = branch[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # B 17 17 7 -> B 2023
        return {"features": pooled.float(), "spatial": spatial.float(), "logits": logits.float()}

    def _keep(self, _module: nn.Module, _given: Any, said: Tensor) -> None:
        self._branch = said  # rectified: the block's last step works in place


def load_inception(weights: str | Path, *, device: torch.device | str = "cpu") -> InceptionSpace:
    """The Inception of FID, sFID, IS, KID, precision and recall.

    Raises:
        ArraError: torch-fidelity is not installed, or the file is missing, unsafe or of another network.
    """
    state = read_checkpoint(weights)  # torch-fidelity's own reading would run code that a file brings
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ArraError(f"space inception: needs torch-fidelity ({error}); {EXTRA}") from error
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(state, copy)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy)
            )
        except RuntimeError as error:
            raise ArraError(
                f"{weights}: not the InceptionV3 of torch-fidelity ({' '.join(str(error).split())[:120]}); expected "
                f"{INCEPTION_FILE} of its releases: {INCEPTION_URL}"
            ) from error
    return InceptionSpace(network, weights_sha256=file_hash(weights), device=device)


class EncoderSpace:
    """An encoder as a `Space`: `features` are one output of it, never normalised."""

    def __init__(self, encoder: Encoder, *, name: str, output: Output | None, device: torch.device) -> None:
        spec = encoder.spec
        self.encoder, self.name, self.device = encoder, name, device
        self.weights_sha256, self.family, self.resize = encoder.weights_hash, spec.family, resize_of(spec)
        if output is None and spec.output == "patches":  # of a user's own network, as soon as it gives any
            output = "mean"
        self.output = output
        classifies = isinstance(encoder, XrvDenseNet) and output in (None, "mean")  # it reads the pooled map
        self.findings: tuple[str, ...] = encoder.findings if classifies and isinstance(encoder, XrvDenseNet) else ()
        """What the numbers of the output `findings` are about; of all but chest X-ray classifiers nothing."""
        size = spec.feature_size if output in (None, spec.output) else self._size_of_features()
        self.sizes: Mapping[str, int] = {"features": size}
        if self.findings:
            self.sizes = {**self.sizes, "findings": len(self.findings)}

    def _size_of_features(self) -> int:
        side = self.encoder.spec.image_size
        return self.encode(torch.zeros(1, side, side, 3, dtype=torch.uint8))["features"].shape[1]

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "B H W 3"]) -> dict[str, Float[Tensor, "B F"]]:
        """`features` (B, F), and of a chest X-ray classifier `findings` in [0, 1], where the network lies."""
        with exact_convolutions():
            features = self.encoder.encode(images.to(self.device), aggregate=self.output)
            told = {"features": features}
            if self.findings and isinstance(self.encoder, XrvDenseNet):
                told["findings"] = self.encoder.scores_of(features)
        return told


def resize_of(spec: EncoderSpec) -> str:
    """How an encoder makes pictures its size, in words for a card."""
    return (
        f"{spec.image_size} px, {FITS[spec.fit]}, {spec.interpolation} (torch), antialiased when shrinking; as it is "
        "at that size"
    )


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """A block in which cuDNN's convolutions of float32 are float32: by default they round their input to 10 bits."""
    cudnn: Any = torch.backends.cudnn
    conv = cudnn.conv
    usual = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = usual
