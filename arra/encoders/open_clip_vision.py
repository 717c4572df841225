"""The picture half of any CLIP of open_clip: `open_clip:ARCHITECTURE`, `open_clip:ARCHITECTURE/TAG`, and BioMedCLIP.

    pixels --tower--> tokens after the last norm --class token or pooling--> through the projection: what CLIP compares

Only the vision tower is made, from open_clip's own builder; a text tower may want the network, and is never needed.
Outputs: `projected` equals `encode_image(normalize=False)`; `cls` is the class token before the projection, where the
tower pools by one; `patches` are its tokens (of a convolutional tower, the places of its last map), `mean` their mean.

Weights are a file of open_clip (.safetensors, .bin, .pt, also a training checkpoint), OpenAI's TorchScript file, a
folder with `open_clip_config.json`, or a repository of the hub; without any, the repository of the TAG.

Legend: B batch, S pixels, P patches, N tokens, F feature, E projected feature.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arra.encoders.base import (
    CLIP_MEAN,
    CLIP_STD,
    EncoderSpec,
    EncoderStates,
    VisionEncoder,
    at_size,
    require_package,
)
from arra.encoders.files import located, main_file, read_json, weights_hash
from arra.encoders.pickled_modules import is_torchscript, torchscript_state
from arra.encoders.settings import Output
from arra.encoders.timm_vision import TimmTrunk, known_architecture, map_states, patch_of
from arra.errors import ArraError
from arra.models.fitting import find_faults
from arra.models.weights import read_weights

PREFIX, CONFIG_FILE = "open_clip:", "open_clip_config.json"
SHAPE_FIELDS = ("layers", "width", "patch_size", "timm_model_name")
"""What tells one architecture from another; sizes of the picture may differ."""
LARGEST = 2**16
"""No number of a published configuration comes near."""
FITS = {"shortest": "crop", "squash": "squash", "longest": "pad"}
"""open_clip's ways to make a picture square; of a square picture they are all the same."""

BIOMEDCLIP = EncoderSpec(
    name="biomedclip",
    feature_size=512,
    image_size=224,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    weights_sha256="",
    family="BioMedCLIP, ViT-B/16, PMC-15M",
    licence="MIT",
    source="huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
    output="projected",
    outputs=("projected", "cls", "mean", "concat", "patches"),
    fit="crop",
    num_layers=12,
    patch_size=16,
)
BIOMEDCLIP_REPOSITORY = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
BIOMEDCLIP_TRUNK = "vit_base_patch16_224"
PORT_EPSILON = 1e-12
"""Of every norm in the Hugging Face port's configuration; timm's is 1e-6, and the two differ by about 1e-5."""


@dataclass(frozen=True)
class TowerPlan:
    """How a tower is made and what it is shown."""

    embed_dim: int
    vision: dict[str, Any]
    """The keys of open_clip's CLIPVisionCfg."""
    quick_gelu: bool
    preprocess: dict[str, Any]


class OpenClipVision(VisionEncoder):
    """A vision tower of open_clip."""

    def __init__(
        self, spec: EncoderSpec, tower: nn.Module, *, weights_hash: str, trunk: TimmTrunk | None = None
    ) -> None:
        super().__init__(spec, tower, weights_hash=weights_hash)
        self.trunk = trunk

    def states_of(self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[EncoderStates]:
        """See `VisionEncoder.states_of`; the end's `projected` equals the tower's own output."""
        tower: Any = self.network
        if self.trunk is not None:
            return self._of_trunk(pixels, layers)
        if hasattr(tower, "attnpool"):  # CLIP's residual network
            stages = {layer - 1 for layer in layers} | {4}
            told = tower.forward_intermediates(pixels, indices=sorted(stages))
            maps = dict(zip(sorted(stages), map(map_states, told["image_intermediates"]), strict=True))
            end = replace(maps[4], projected=told["image_features"])
            return [*(maps[layer - 1] for layer in layers), end]
        return self._of_transformer(pixels, layers)

    def _of_trunk(self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[EncoderStates]:
        tower, trunk = self.network, self.trunk
        assert trunk is not None
        features, end, taken = trunk.states_of(pixels, layers)
        projected = tower.head(tower.trunk.forward_head(features))  # type: ignore[operator,union-attr]
        return [*taken, replace(end, projected=projected)]

    def _of_transformer(self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[EncoderStates]:
        tower: Any = self.network
        last = len(tower.transformer.resblocks)
        wanted = sorted({*layers, last})
        told = tower.forward_intermediates(
            pixels, indices=[layer - 1 for layer in wanted], output_fmt="NLC", output_extra_tokens=True
        )
        grid = tower.grid_size
        found = zip(told["image_intermediates"], told["image_intermediates_prefix"], strict=True)
        states = {
            layer: EncoderStates(patches, grid, cls=prefix[:, 0])
            for layer, (patches, prefix) in zip(wanted, found, strict=True)
        }
        patches, cls = states[last].patches, states[last].cls
        assert cls is not None
        if tower.attn_pool is None:  # else the norm comes after an attention over the tokens
            cls = tower.ln_post(cls)
            patches = patches if tower.final_ln_after_pool else tower.ln_post(patches)
        end = EncoderStates(patches, grid, cls=cls, projected=told["image_features"])
        return [*(states[layer] for layer in layers), end]

    def _check(self, output: Output, layers: Sequence[int] | None) -> None:
        super()._check(output, layers)
        if self.trunk is not None:
            self.trunk.check(output, layers)


def load_open_clip(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> OpenClipVision:
    """The vision tower of `open_clip:ARCHITECTURE[/TAG]`, from a file, a folder, a repository, or the TAG's repository.

    Mean, deviation and resizing come from the folder's open_clip_config.json, else from the TAG, else from what all
    published weights of the architecture agree on (where they do not agree, OpenAI's).

    Raises:
        ArraError: no such architecture or tag, a missing package, no weights, or weights that do not fit.
    """
    architecture, _, tag = name.removeprefix(PREFIX).partition("/")
    require_package(name, "open_clip", package="open_clip_torch")
    path = located(weights if weights is not None else _tagged(name, architecture, tag), name=name)
    plan = _plan(name, architecture, tag, path)
    file = main_file(path)
    scripted = is_torchscript(file)
    state = torchscript_state(file) if scripted else read_weights(file).state
    # OpenAI's own files, which alone are TorchScript, were trained with the quick form
    plan = replace(plan, quick_gelu=plan.quick_gelu or scripted)
    spec = at_size(_spec(name, plan), image_size)
    tower = _tower(name, plan, None if plan.vision.get("timm_model_name") else spec.image_size)
    _fill(tower, _visual(state, path), source=str(path), name=name)
    return _ready(spec, tower, device=device, identity=weights_hash(path))


def load_biomedclip(
    name: str = "biomedclip",
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> OpenClipVision:
    """BioMedCLIP's vision tower, from Microsoft's open_clip files or from the Hugging Face port's weights.

    The port (`chuhac/BiomedCLIP-vit-bert-hf`) comes with code of its own, which is not run: its tensors are renamed
    into the same tower, by their names, and the norms take its epsilon. Both were compared at random weights: the
    first with open_clip, the second with the port's network rebuilt from parts of `transformers`; no test has the
    published weights themselves.
    Source: HealthX-Lab/MedCLIP-SAMv2, saliency_maps/model/convert.py and modeling_biomed_clip.py (the port's layout).

    Raises:
        ArraError: a missing package, no weights, or weights of another network.
    """
    require_package(name, "open_clip", package="open_clip_torch")
    path = located(weights if weights is not None else BIOMEDCLIP_REPOSITORY, name=name)
    plan = TowerPlan(
        BIOMEDCLIP.feature_size,
        {"timm_model_name": BIOMEDCLIP_TRUNK, "timm_pool": "", "timm_proj": "linear"},
        quick_gelu=False,
        preprocess={},
    )
    spec = at_size(replace(BIOMEDCLIP, name=name), image_size)
    tower = _tower(name, plan, None)
    state = read_weights(main_file(path)).state
    if any(key.startswith("vision_model.encoder.layers.") for key in state):
        visual = ported_state(state, str(path))
        for module in tower.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = PORT_EPSILON
    else:
        visual = _visual(state, path)
    _fill(tower, visual, source=str(path), name=name)
    return _ready(spec, tower, device=device, identity=weights_hash(path))


def ported_state(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The port's vision tensors under open_clip's names, query, key and value in one.

    Raises:
        ArraError: some are missing.
    """
    whole = {
        "embeddings.patch_embedding": "patch_embed.proj",
        "post_layernorm": "norm",
    }
    parts = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.out_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    depth = len({key.split(".")[3] for key in state if key.startswith("vision_model.encoder.layers.")})
    renamed: dict[str, Tensor] = {}
    try:
        renamed["head.proj.weight"] = state["visual_projection.weight"]
        renamed["trunk.cls_token"] = state["vision_model.embeddings.class_embedding"].view(1, 1, -1)
        renamed["trunk.pos_embed"] = state["vision_model.embeddings.position_embedding.weight"].unsqueeze(0)
        for kind in ("weight", "bias"):
            for theirs, ours in whole.items():
                renamed[f"trunk.{ours}.{kind}"] = state[f"vision_model.{theirs}.{kind}"]
            for number in range(depth):
                block, layer = f"trunk.blocks.{number}", f"vision_model.encoder.layers.{number}"
                for theirs, ours in parts.items():
                    renamed[f"{block}.{ours}.{kind}"] = state[f"{layer}.{theirs}.{kind}"]
                three = [state[f"{layer}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
                renamed[f"{block}.attn.qkv.{kind}"] = torch.cat(three)
    except KeyError as error:
        raise ArraError(
            f"{source}: no {error.args[0]} in it; expected the weights of BiomedCLIP-vit-bert-hf"
        ) from error
    except (RuntimeError, IndexError) as error:
        raise ArraError(f"{source}: its tensors have no shapes of BiomedCLIP-vit-bert-hf; fetch it again") from error
    return renamed


def _tagged(name: str, architecture: str, tag: str) -> str:
    """The repository of an architecture's published weights."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(architecture)
    if not tag:
        known = f", or name published ones as {PREFIX}{architecture}/TAG, TAG of {', '.join(tags)}" if tags else ""
        raise ArraError(f"encoder {name}: no weights; set weights to a file, folder or repository{known}")
    repository = (get_pretrained_cfg(architecture, tag) or {}).get("hf_hub", "").rstrip("/")
    if tag in tags and not repository:
        raise ArraError(
            f"encoder {name}: open_clip has '{tag}' outside the hub; download it and set weights to the file"
        )
    if not repository:
        raise ArraError(f"encoder {name}: no published weights '{tag}'; choose of {', '.join(tags) or 'none'}")
    return str(repository)


def _plan(name: str, architecture: str, tag: str, path: Path) -> TowerPlan:
    """The tower of a name, told by the folder's configuration and by open_clip's own."""
    from open_clip.factory import get_model_config, list_models
    from open_clip.pretrained import get_pretrained_cfg

    folder = path if path.is_dir() else path.parent
    beside = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    own = deepcopy(get_model_config(architecture)) if architecture in list_models() else None
    told = beside.get("model_cfg", beside) if beside else own
    if told is None:
        raise ArraError(
            f"encoder {name}: open_clip has no architecture '{architecture}', and {folder} no {CONFIG_FILE}; "
            "open_clip.list_models() tells all"
        )
    about = get_pretrained_cfg(architecture, tag) if tag else {}
    preprocess = beside.get("preprocess_cfg") or about or _agreed(architecture)
    place = str(folder / CONFIG_FILE) if beside else f"encoder {name}"
    try:
        embed_dim, vision, quick = told["embed_dim"], dict(told["vision_cfg"]), bool(told.get("quick_gelu", False))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArraError(f"{place}: expected embed_dim and vision_cfg {{...}}; fetch it again") from error
    if own is not None:
        differing = [key for key in SHAPE_FIELDS if vision.get(key) != own["vision_cfg"].get(key)]
        if differing:
            key = differing[0]
            raise ArraError(
                f"{place}: its {key} is {vision.get(key)}, that of {architecture} {own['vision_cfg'].get(key)}; "
                "name the architecture that it is of"
            )
    plan = TowerPlan(embed_dim, vision, quick or bool(about.get("quick_gelu", False)), dict(preprocess))
    _check_plan(name, plan, place)
    return plan


def _check_plan(name: str, plan: TowerPlan, place: str) -> None:
    """Nothing; a configuration that somebody else wrote holds plain values, and names no place to fetch from."""
    from open_clip.model import CLIPVisionCfg

    def plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return len(value) < 16 and all(plain(each) for each in value)
        if isinstance(value, dict):
            return all(isinstance(each, str | int | float | bool) for each in value.values())
        if isinstance(value, int | float):
            return 0 <= value <= LARGEST
        return value is None or isinstance(value, str)

    known = {field.name for field in fields(CLIPVisionCfg)}
    odd = [key for key, value in plan.vision.items() if key not in known or not plain(value)]
    if odd or not isinstance(plan.embed_dim, int) or not 0 < plan.embed_dim <= LARGEST:
        what = f"vision_cfg.{odd[0]}: {plan.vision[odd[0]]!r}" if odd else f"embed_dim: {plan.embed_dim!r}"
        raise ArraError(f"{place}: {what[:120]}: nothing that this open_clip knows; update it, or fetch the file again")
    if trunk := plan.vision.get("timm_model_name"):
        known_architecture(name, str(trunk))


def _agreed(architecture: str) -> dict[str, Any]:
    """Preprocessing that all published weights of an architecture share; empty where they differ."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    keys = ("mean", "std", "interpolation", "resize_mode")
    every = [get_pretrained_cfg(architecture, tag) for tag in list_pretrained_tags_by_model(architecture)]
    told = {tuple(each.get(key) for key in keys) for each in every}
    return dict(zip(keys, told.pop(), strict=True)) if len(told) == 1 else {}


def _spec(name: str, plan: TowerPlan) -> EncoderSpec:
    """What the plan says; outputs, layers and sizes of a timm tower are known once it is made."""
    preprocess, size = plan.preprocess, plan.vision.get("image_size", 224)
    numbers = {"mean": preprocess.get("mean", CLIP_MEAN), "std": preprocess.get("std", CLIP_STD)}
    for key, value in numbers.items():
        right = isinstance(value, list | tuple) and len(value) == 3
        if not right or not all(isinstance(each, int | float) and (key == "mean" or each > 0) for each in value):
            raise ArraError(f"encoder {name}: preprocess_cfg.{key}: {value!r}; expected three numbers")
    size = size[0] if isinstance(size, list | tuple) else size
    return EncoderSpec(
        name=name,
        feature_size=plan.embed_dim,
        image_size=size,
        mean=tuple(numbers["mean"]),
        std=tuple(numbers["std"]),
        weights_sha256="",
        family=f"CLIP {name.removeprefix(PREFIX)}",
        licence="that of its weights",
        source="open_clip, weights of your own",
        output="projected",
        outputs=("projected",),
        interpolation="bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic",
        fit=FITS.get(preprocess.get("resize_mode", "shortest"), "crop"),  # type: ignore[arg-type]
        patch_size=_patch(plan),
    )


def _patch(plan: TowerPlan) -> int | None:
    """Of a transformer; a residual network sees one size, and a trunk of timm is asked itself."""
    trunk = plan.vision.get("timm_model_name")
    if trunk:
        import timm

        with torch.device("meta"):
            return patch_of(timm.create_model(trunk, pretrained=False, num_classes=0))
    return None if isinstance(plan.vision.get("layers"), list | tuple) else plan.vision.get("patch_size", 16)


def _tower(name: str, plan: TowerPlan, image_size: int | None) -> Any:
    """The tower with initial weights."""
    from open_clip.model import _build_vision_tower

    vision = {**plan.vision, "timm_model_pretrained": False, "output_tokens": False}
    if image_size is not None:
        vision["image_size"] = image_size
    try:
        return _build_vision_tower(plan.embed_dim, vision, plan.quick_gelu)
    except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ArraError(
            f"encoder {name}: open_clip cannot make its tower ({reason}); check its configuration"
        ) from error


def _visual(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of the vision tower, by their names in it."""
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    if not visual:
        raise ArraError(f"{path}: no tensors visual.* in it; expected the weights of a CLIP in open_clip's layout")
    return visual


def _fill(tower: Any, visual: Mapping[str, Tensor], *, source: str, name: str) -> None:
    """Nothing; the tower holds the weights."""
    from open_clip.model import resize_pos_embed

    state = {f"visual.{key}": value for key, value in visual.items()}
    if "visual.positional_embedding" in state and state["visual.positional_embedding"].ndim == 2:
        state["visual.positional_embedding"] = state["visual.positional_embedding"].float()
        try:
            resize_pos_embed(state, SimpleNamespace(visual=tower))
        except RuntimeError as error:
            raise ArraError(
                f"{source}: not weights of {name} (its positions fill no square); name a file of its own"
            ) from error
    expected = tower.state_dict()
    given = {key.removeprefix("visual."): value for key, value in state.items()}
    if faults := find_faults(expected, given):
        raise ArraError(f"{source}: not weights of {name}: {'; '.join(faults)}; name a file of its own")
    tower.load_state_dict({key: value.to(expected[key].dtype) for key, value in given.items()})


def _ready(spec: EncoderSpec, tower: Any, *, device: str | torch.device, identity: str) -> OpenClipVision:
    """The encoder, its spec completed by what the tower has."""
    tower = tower.to(device).eval().requires_grad_(False)
    own: tuple[Output, ...] = ("projected",)
    trunk, outputs = None, own
    if hasattr(tower, "trunk"):
        native = tower.trunk.pretrained_cfg["input_size"][-1]
        if spec.image_size != native and hasattr(tower.trunk, "set_input_size"):  # it keeps embeddings of positions
            tower.set_input_size(spec.image_size)
        trunk = TimmTrunk(tower.trunk, spec.name, spec.image_size)
        outputs, num_layers = (*own, *trunk.outputs()), trunk.num_layers
    elif hasattr(tower, "attnpool"):
        outputs, num_layers = (*own, "mean", "patches"), 5
    else:
        by_token = tower.attn_pool is None and tower.pool_type == "tok"
        outputs = (*own, "cls", "mean", "concat", "patches") if by_token else (*own, "mean", "patches")
        num_layers = len(tower.transformer.resblocks)
    spec = replace(spec, outputs=outputs, num_layers=num_layers, weights_sha256=identity)
    return OpenClipVision(spec, tower, weights_hash=identity, trunk=trunk)
