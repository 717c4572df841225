"""Any image network of timm as an encoder: `timm:ARCHITECTURE`, as `timm.list_models()` spells it.

    pixels --forward_features--> tokens or a map --sorted--> patches, class token, timm's own pooled vector

Mean, deviation, size and interpolation are those of the architecture's pretrained configuration. Its `crop_pct` is not
followed: timm looks at the middle of a photograph to score better, and here the crop is the picture already.

Outputs: `patches` and their `mean` of every network that keeps a square of them; `cls` and `concat` where there is a
class token; `projected` where what timm hands to a classifier (`forward_head(pre_logits=True)`) is something else than
the class token or the mean: SigLIP's attention pooling, ConvNeXt's norm after pooling, MobileNet's last convolution.
Layers are timm's `forward_intermediates`: the blocks of a transformer, the stages of a convolutional network.

Legend: B batch, S pixels, P patches, N tokens (class and register tokens first), F feature.
"""

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arra.encoders.base import EncoderSpec, EncoderStates, VisionEncoder, at_size, require_package
from arra.encoders.files import located, main_file, weights_hash
from arra.encoders.settings import Output
from arra.errors import ArraError
from arra.models.fitting import find_faults
from arra.models.weights import DAMAGE, read_weights

PREFIX = "timm:"
UNSORTED = ("Hiera",)
"""Networks whose last tokens are in another order than the picture's: they have a mean, no patches and no layers."""
SAME = 1e-4
"""Two pooled vectors of one picture that differ by less are the same pooling."""


@dataclass(frozen=True)
class TokenLayout:
    """Where a network's `forward_features` keeps what."""

    kind: Literal["tokens", "map", "map-last"]
    """(B, N, F); (B, F, h, w); (B, h, w, F)."""
    num_prefix: int
    """Tokens before the patches; the class token is the first of them."""
    has_cls: bool
    cls_in_blocks: bool
    """The class token is there from the first block on; else it joins after them."""

    def states_of(self, features: Tensor) -> EncoderStates:
        """The states in what `forward_features` gives."""
        if self.kind == "tokens":  # (B, N, F)
            patches = features[:, self.num_prefix :]
            side = math.isqrt(patches.shape[1])
            grid = (side, side) if side * side == patches.shape[1] else (patches.shape[1], 1)
            return EncoderStates(patches, grid, cls=features[:, 0] if self.has_cls else None)
        if self.kind == "map-last":
            features = features.permute(0, 3, 1, 2)
        return map_states(features)


def map_states(maps: Float[Tensor, "B F h w"], cls: Float[Tensor, "B F"] | None = None) -> EncoderStates:
    """States whose patches are the places of a feature map."""
    return EncoderStates(maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3]), cls=cls)


class TimmTrunk:
    """A network of timm, asked for states; other encoders that keep one inside share it."""

    def __init__(self, network: nn.Module, name: str, image_size: int) -> None:
        self.network, self.name = network, name
        device = next(network.parameters()).device
        trial = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            self._look(trial)

    def _look(self, pixels: Float[Tensor, "1 3 S S"]) -> None:
        """Nothing; the trunk knows what its network has to give."""
        network: Any = self.network
        features = network.forward_features(pixels)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise ArraError(
                f"encoder {self.name}: its features are neither tokens nor a map; choose another architecture, or wrap "
                "it in a function of your own: python:MODULE:NAME"
            )
        sorted_ = type(network).__name__ not in UNSORTED
        maps = []
        if sorted_ and hasattr(network, "forward_intermediates"):
            maps = network.forward_intermediates(pixels, intermediates_only=True, output_fmt="NCHW")
        self.layout = self._layout_of(features, knows_layers=bool(maps))
        states = self.layout.states_of(features)
        self.feature_size, self.grid = int(states.patches.shape[2]), states.grid
        self.has_mean = states.patches.shape[1] > 0
        self.num_layers = len(maps) if maps and self.has_mean else None
        self.has_patches = sorted_ and self.has_mean and self.grid[0] == self.grid[1]
        pooled = network.forward_head(features, pre_logits=True)
        others = [states.cls] if states.cls is not None else []
        others += [states.patches.mean(1)] if self.has_mean else []
        known = any(pooled.shape == each.shape and torch.allclose(pooled, each, SAME, SAME) for each in others)
        self.pooled_size = None if known else int(pooled.shape[1])
        """Of timm's own pooled vector, where it is something else."""

    def _layout_of(self, features: Tensor, *, knows_layers: bool) -> TokenLayout:
        has_cls = getattr(self.network, "cls_token", None) is not None
        told = getattr(self.network, "num_prefix_tokens", None)
        if features.ndim == 4:
            last = "NHWC" in str(getattr(self.network, "output_fmt", "NCHW"))
            return TokenLayout("map-last" if last else "map", 0, has_cls=False, cls_in_blocks=False)
        network: Any = self.network
        asks = inspect.signature(network.forward_intermediates).parameters if knows_layers else {}
        in_blocks = has_cls and "return_prefix_tokens" in asks
        return TokenLayout("tokens", int(has_cls) if told is None else int(told), has_cls, in_blocks)

    def states_of(
        self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]
    ) -> tuple[Tensor, EncoderStates, list[EncoderStates]]:
        """What `forward_features` gives, as it is and sorted; states after blocks, counted from 1, as asked for."""
        network: Any = self.network
        if not layers:
            features = network.forward_features(pixels)
            return features, self.layout.states_of(features), []
        wanted = sorted(set(layers))
        asked = {"return_prefix_tokens": True} if self.layout.cls_in_blocks else {}
        features, maps = network.forward_intermediates(
            pixels, indices=[layer - 1 for layer in wanted], norm=False, output_fmt="NCHW", **asked
        )
        taken = {}
        for layer, each in zip(wanted, maps, strict=True):
            places, before = each if isinstance(each, tuple) else (each, None)
            taken[layer] = map_states(places, None if before is None else before[:, 0])
        return features, self.layout.states_of(features), [taken[layer] for layer in layers]

    def check(self, output: Output, layers: Sequence[int] | None) -> None:
        """Nothing.

        Raises:
            ArraError: the blocks have no class token, and it is asked for after some of them.
        """
        if layers and output in ("cls", "concat") and not self.layout.cls_in_blocks:
            raise ArraError(
                f"encoder {self.name}: its class token joins after the blocks; with layers choose output: mean"
            )

    def outputs(self) -> tuple[Output, ...]:
        """Those that the end of the network has, the pooled vector aside."""
        has: dict[Output, bool] = {
            "cls": self.layout.has_cls,
            "mean": self.has_mean,
            "concat": self.layout.has_cls and self.has_mean,
            "patches": self.has_patches,
        }
        return tuple(output for output, there in has.items() if there)


class TimmVision(VisionEncoder):
    """An image network of timm without its classifier."""

    def __init__(self, spec: EncoderSpec, network: nn.Module, trunk: TimmTrunk, *, weights_hash: str) -> None:
        super().__init__(spec, network, weights_hash=weights_hash)
        self.trunk = trunk

    def states_of(self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[EncoderStates]:
        """See `VisionEncoder.states_of`; the end equals timm's `forward_features`."""
        features, end, taken = self.trunk.states_of(pixels, layers)
        if "projected" in self.spec.outputs:
            network: Any = self.network
            end = replace(end, projected=network.forward_head(features, pre_logits=True))
        return [*taken, end]

    def _check(self, output: Output, layers: Sequence[int] | None) -> None:
        super()._check(output, layers)
        self.trunk.check(output, layers)


def load_timm(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> TimmVision:
    """A network of timm by `timm:ARCHITECTURE[.TAG]`, from a file or repository, else with timm's pretrained weights.

    Files are timm's own, or of the original authors where timm converts them (DINOv2, MAE, OpenAI's CLIP). Embeddings
    of positions are resampled to another image size as timm does.

    Raises:
        ArraError: no such architecture, a missing package, no weights, weights that do not fit, or a size that it
            cannot see.
    """
    architecture = known_architecture(name, name.removeprefix(PREFIX))
    network = _created(name, architecture)
    spec = at_size(_spec(name, network), image_size)
    if image_size is not None and network.pretrained_cfg.get("fixed_input_size"):
        network = _created(name, architecture, img_size=image_size)
    path = located(weights if weights is not None else _pretrained(name, network), name=name)
    fill_timm(network, read_weights(main_file(path)).state, source=str(path), name=name)
    network = network.to(device).eval().requires_grad_(False)
    trunk = TimmTrunk(network, name, spec.image_size)
    spec = _completed(spec, trunk)
    identity = weights_hash(path)
    return TimmVision(replace(spec, weights_sha256=identity), network, trunk, weights_hash=identity)


def known_architecture(name: str, architecture: str) -> str:
    """The name itself, if it is one of timm's own architectures (with or without a tag), and names no place to fetch.

    Raises:
        ArraError: it is none, or the package is missing.
    """
    require_package(name, "timm")
    import timm

    if ":" in architecture or "/" in architecture:
        raise ArraError(
            f"encoder {name}: '{architecture}' names a place, not an architecture; write timm:ARCHITECTURE, and the "
            "place as weights: PATH or ORG/NAME"
        )
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture.split('.')[0].split('_')[0]}*")[:6]
        raise ArraError(
            f"encoder {name}: timm {timm.__version__} has no architecture '{architecture}'"
            f"{'; near it are ' + ', '.join(near) if near else ''}; timm.list_models() tells all"
        )
    return architecture


def _created(name: str, architecture: str, **more: Any) -> Any:
    import timm

    try:
        return timm.create_model(architecture, pretrained=False, num_classes=0, **more)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        told = ", ".join(f"{key} {value}" for key, value in more.items())
        raise ArraError(
            f"encoder {name}: timm cannot make it{' with ' + told if told else ''} ({_one_line(error)}); leave "
            "image_size out, or choose another architecture"
        ) from error


def _spec(name: str, network: Any) -> EncoderSpec:
    """What the architecture's pretrained configuration says; outputs are known once it has seen a picture."""
    from timm.data import resolve_model_data_config

    data, about = resolve_model_data_config(network), network.pretrained_cfg
    side = data["input_size"][-1]
    architecture = ".".join(part for part in (about.get("architecture"), about.get("tag")) if part)
    return EncoderSpec(
        name=name,
        feature_size=network.num_features,
        image_size=side,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        weights_sha256="",
        family=architecture,
        licence=about.get("license") or "that of its weights",
        source=f"huggingface.co/{about['hf_hub_id']}" if about.get("hf_hub_id") else "PyPI timm, weights of your own",
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        fit="crop",
        patch_size=patch_of(network),
    )


def patch_of(network: Any) -> int | None:
    """Pixels a side of a patch, or the stride of a convolutional network, which sees any size; None: neither."""
    if network.pretrained_cfg.get("fixed_input_size"):
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        return patch[0] if isinstance(patch, tuple) else patch
    return network.feature_info[-1]["reduction"] if getattr(network, "feature_info", None) else None


def _completed(spec: EncoderSpec, trunk: TimmTrunk) -> EncoderSpec:
    """The spec with the outputs that the network has."""
    outputs = (*trunk.outputs(), *(("projected",) if trunk.pooled_size else ()))
    default: Output = "cls" if "cls" in outputs else "mean" if "mean" in outputs else "projected"
    size = trunk.pooled_size if default == "projected" else trunk.feature_size
    assert size is not None
    return replace(spec, feature_size=size, output=default, outputs=outputs, num_layers=trunk.num_layers)


def _pretrained(name: str, network: Any) -> str:
    """The repository of timm's own weights."""
    repository, url = (network.pretrained_cfg.get(key) for key in ("hf_hub_id", "url"))
    if not repository and url:
        raise ArraError(f"encoder {name}: its weights lie outside the hub; download {url} and set weights to the file")
    if not repository:
        raise ArraError(f"encoder {name}: timm has no pretrained weights of it; set weights to a file")
    return str(repository)


def fill_timm(network: Any, state: Mapping[str, Tensor], *, source: str, name: str) -> None:
    """Nothing; the network holds the weights, its classifier left out, everything else in its place.

    Raises:
        ArraError: they are of another architecture.
    """
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        state = dict(state) if convert is None else dict(convert(dict(state), network))
    except DAMAGE as error:
        raise ArraError(f"{source}: not weights of {name} ({_one_line(error)}); name a file of its own") from error
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    expected = network.state_dict()
    kept = {
        key: value
        for key, value in state.items()
        if key in expected or not key.startswith(tuple(f"{head}." for head in heads))
    }
    if faults := find_faults(expected, kept):
        raise ArraError(f"{source}: not weights of {name}: {'; '.join(faults)}; name a file of its own")
    network.load_state_dict({key: value.to(expected[key].dtype) for key, value in kept.items()})


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
