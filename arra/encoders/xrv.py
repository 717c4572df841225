"""TorchXRayVision's DenseNet-121 as an encoder: chest X-rays, the space that FID-XRV is measured in.

    pixels --grey, [-1024, 1024]--> features --rectified--> a map of 7 x 7 --mean--> 1024 numbers (`features2`)

Grey is the mean of the three channels, as the library's README has it (its `load_image` takes the first channel; of a
grey picture they are the same). Pictures that are no square are cut to their middle before they become 224 x 224, the
way `XRayCenterCrop` and the network's own `fix_resolution` do.

The published files are pickles of whole modules, which the library opens with `weights_only=False`. Here only their
tensors are taken (`arra.encoders.pickled_modules`), and a file that names anything but the classes of such a network is
refused. That the published files name no other follows from the library's training script (`torch.save(model)` of a
plain DenseNet); no test opens them.
Source: mlmed/torchxrayvision 1.5.7, torchxrayvision/models.py and utils.py; scripts/train_utils.py for the files.

Legend: B batch, S pixels, P patches, F feature, C findings.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from arra.encoders.base import EncoderSpec, EncoderStates, VisionEncoder, at_size, require_package
from arra.encoders.files import located, main_file, weights_hash
from arra.encoders.pickled_modules import module_state
from arra.encoders.timm_vision import map_states
from arra.errors import ArraError
from arra.models.fitting import find_faults
from arra.models.weights import read_weights

RANGE = 1024.0
"""Pixels lie in [-RANGE, RANGE]: roughly the units of computed tomography."""
RELEASES = "github.com/mlmed/torchxrayvision/releases"
FOLDER = Path("~/.torchxrayvision/models_data")
"""Where the library keeps what it downloads."""

XRV_DENSENET121 = EncoderSpec(
    name="xrv-densenet121",
    feature_size=1024,
    image_size=224,
    mean=(0.5, 0.5, 0.5),
    std=(0.5 / RANGE, 0.5 / RANGE, 0.5 / RANGE),
    weights_sha256="",
    family="TorchXRayVision DenseNet-121, chest X-rays",
    licence="Apache-2.0",
    source=RELEASES,
    outputs=("mean", "patches"),
    interpolation="bilinear",
    fit="crop",
    num_layers=4,
)
CLASSES = (
    *(f"torchxrayvision.models.{name}" for name in ("DenseNet", "_DenseBlock", "_DenseLayer", "_Transition")),
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.pooling.AvgPool2d",
    "torch.nn.modules.linear.Linear",
)
"""Of a pickled DenseNet."""
BLOCKS = ("denseblock1", "denseblock2", "denseblock3", "norm5")
"""Where layers 1 to 4 end; the last dense block's maps have their norm."""
OTHER_NAMES = ("all", "nih", "pc", "chex", "rsna", "mimic_nb", "mimic_ch")
"""What the weights of the seven published networks are called: densenet121-res224-NAME."""
SHOWN = "densenet121-res224-"


class XrvDenseNet(VisionEncoder):
    """A DenseNet of torchxrayvision, which is a classifier too."""

    def __init__(
        self,
        spec: EncoderSpec,
        network: nn.Module,
        *,
        weights_hash: str,
        targets: Sequence[str] = (),
        thresholds: Sequence[float] | None = None,
    ) -> None:
        super().__init__(spec, network, weights_hash=weights_hash)
        self._named = [place for place, target in enumerate(targets) if target]
        self.findings = tuple(target for target in targets if target)
        """What the classifier was trained to see, in its order; it has unused places, which are left out."""
        self.thresholds = thresholds
        """Of all places: the probability that becomes 0.5; None leaves probabilities as they are."""

    def states_of(self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[EncoderStates]:
        """See `VisionEncoder.states_of`; the mean at the end equals `features2`."""
        x, taken = pixels.mean(1, keepdim=True), {}
        network: Any = self.network
        for name, module in network.features.named_children():
            x = module(x)
            if name in BLOCKS:
                # later layers rectify in place
                taken[BLOCKS.index(name) + 1] = map_states(x.clone() if name != BLOCKS[-1] else F.relu(x))
        return [*(taken[layer] for layer in layers), taken[len(BLOCKS)]]

    @torch.no_grad()
    def scores_of(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B C"]:
        """How likely each of `findings` is, in [0, 1], told from the output `mean`.

        Of published weights the library's own scores: each probability is scaled piecewise so that its operating point
        becomes 0.5, which leaves the order of pictures, and with it every AUROC, as it is.
        """
        from torchxrayvision.models import op_norm

        network: Any = self.network
        scores: Tensor = network.classifier(features).sigmoid()
        if self.thresholds is not None:
            scores = op_norm(scores, torch.tensor(self.thresholds, dtype=scores.dtype, device=scores.device))
        return scores[:, self._named]


def load_xrv(
    name: str = "xrv-densenet121",
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> XrvDenseNet:
    """A DenseNet-121 of torchxrayvision from a published file, a state dict, or the name of published weights.

    `weights` is a path, or a name such as densenet121-res224-all, whose file is looked for where the library keeps it;
    None is densenet121-res224-all. What the classifier's places mean is told by the published file's name; in a file of
    another name they are the library's default ones, if their number is right, and probabilities stay as they are.

    Raises:
        ArraError: a missing package, no file, a file with anything but such a network, or another size than 224.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-image; the library also turns warnings off for everybody
        require_package(name, "torchxrayvision.models", package="torchxrayvision")
        from torchxrayvision.models import DenseNet
    spec = at_size(replace(XRV_DENSENET121, name=name), image_size)
    path = _file(name, str(weights) if weights is not None else f"{SHOWN}all")
    state = _state(path)
    classes = state["classifier.bias"].shape[0] if "classifier.bias" in state else 18
    network = DenseNet(num_classes=classes)
    expected = network.state_dict()
    kept = {key: value for key, value in state.items() if key in expected or not key.startswith("op_threshs")}
    if faults := find_faults(expected, kept):
        raise ArraError(f"{path}: not weights of {name}: {'; '.join(faults)}; name a file of its own")
    network.load_state_dict(kept)
    identity = weights_hash(path)
    about = _published(path)
    return XrvDenseNet(
        replace(spec, weights_sha256=identity),
        network.to(device),
        weights_hash=identity,
        targets=about.get("labels", DenseNet.targets if classes == len(DenseNet.targets) else ()),
        thresholds=about.get("op_threshs"),
    )


def _file(name: str, weights: str) -> Path:
    """The file of weights told by path, repository or published name."""
    from torchxrayvision.models import model_urls

    kind = weights.removeprefix(SHOWN)
    if Path(weights).expanduser().exists() or kind not in OTHER_NAMES:
        return main_file(located(weights, name=name))
    url = str(model_urls[f"{SHOWN}{kind}"]["weights_url"])
    path = FOLDER.expanduser() / url.rsplit("/", 1)[1]
    if not path.is_file():
        raise ArraError(f"encoder {name}: {SHOWN}{kind} is not here; fetch it: wget -P {FOLDER} {url}")
    return path


def _published(path: Path) -> Mapping[str, Any]:
    """What the library says of a published file of this name: `labels` and `op_threshs`; of another nothing."""
    from torchxrayvision.models import model_urls

    every = [model_urls[f"{SHOWN}{kind}"] for kind in OTHER_NAMES]
    return next((each for each in every if each["weights_url"].rsplit("/", 1)[1] == path.name), {})


def _state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; of a pickled module, its tensors alone."""
    if not path.is_file():
        raise ArraError(f"{path}: no such file; expected weights of {XRV_DENSENET121.name}, from {RELEASES}")
    told = None if path.suffix == ".safetensors" else module_state(path, classes=CLASSES)
    return read_weights(path).state if told is None else told
