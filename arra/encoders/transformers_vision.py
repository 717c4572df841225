"""Encoders whose home library is `transformers`: CLIP, SigLIP2, DINOv2 and v3, RAD-DINO, MAE, SAM and MedSAM.

    config.json --numbers only--> configuration --network class--> network <--vision part alone-- weights

The networks are the library's own classes and so are the numbers. Of `config.json` the sizes of the vision part are
taken and nothing else, weights come from `arra.models.weights`; nothing in a folder can run. A folder may hold the
whole model (a CLIP with its text tower, a SAM with its decoder) or the vision part alone. Of SAM and MedSAM, Meta's own
file (`sam_vit_b_01ec64.pth`, `medsam_vit_b.pth`) does too: its tensors tell the sizes.

Legend: B batch, S pixels the encoder sees, P patches, F feature, N tokens with the CLS token and registers in front.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arra.encoders.base import EncoderSpec, EncoderStates, VisionEncoder, at_size, require_package
from arra.encoders.files import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    located,
    main_file,
    read_json,
    weights_hash,
)
from arra.encoders.specs import KNOWN
from arra.errors import ArraError
from arra.models.fitting import name_keys
from arra.models.weights import read_weights

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "mlp_dim",
    "projection_dim", "output_channels", "num_register_tokens", "num_patches", "window_size",
)  # fmt: skip
SIDES = ("image_size", "patch_size")
SWITCHES = (
    "qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "use_swiglu_ffn", "use_gated_mlp",
    "use_mask_token", "use_abs_pos", "use_rel_pos", "vision_use_head",
)  # fmt: skip
NUMBERS = ("layer_norm_eps", "rope_theta", "mlp_ratio")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
MOST, MOST_LAYERS = 2**16, 512
"""More is no encoder's: refused before anything of that size is made."""
BLOCK_NAMES = (
    (r"blocks\.(\d+)\.norm1\.", r"layers.\1.layer_norm1."),
    (r"blocks\.(\d+)\.norm2\.", r"layers.\1.layer_norm2."),
    (r"blocks\.", "layers."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"neck\.0\.", "neck.conv1."),
    (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."),
    (r"neck\.3\.", "neck.layer_norm2."),
)
"""Meta's names of SAM's image encoder, and those of `transformers`."""
META_PREFIX = "image_encoder."


@dataclass(frozen=True)
class Family:
    """Networks of one class."""

    config: str
    network: str
    """Both names in `transformers`."""
    types: tuple[str, ...]
    """`model_type` of the whole model and of its vision part."""
    others: re.Pattern[str]
    """Keys of weights that are not the vision part's, or tables that old files hold."""
    prefix: int
    """Tokens before the patches, registers aside."""
    resized: bool = False
    """Its network asks to be told that the size is another than its position embeddings'."""


FAMILIES: dict[str, Family] = {
    "clip": Family(
        "CLIPVisionConfig", "CLIPVisionModel", ("clip", "clip_vision_model"),
        re.compile(r"^(text_model\.|text_projection\.|logit_scale$)|\.position_ids$"), 1, True,
    ),
    "siglip": Family(
        "SiglipVisionConfig", "SiglipVisionModel", ("siglip", "siglip_vision_model"),
        re.compile(r"^(text_model\.|logit_scale$|logit_bias$)|\.position_ids$"), 0, True,
    ),
    "siglip2": Family(
        "Siglip2VisionConfig", "Siglip2VisionModel", ("siglip2", "siglip2_vision_model"),
        re.compile(r"^(text_model\.|logit_scale$|logit_bias$)|\.position_ids$"), 0,
    ),
    "dinov2": Family("Dinov2Config", "Dinov2Model", ("dinov2",), re.compile(r"^classifier\."), 1),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", ("dinov2_with_registers",),
        re.compile(r"^classifier\."), 1,
    ),
    "dinov3_vit": Family("DINOv3ViTConfig", "DINOv3ViTModel", ("dinov3_vit",), re.compile(r"^classifier\."), 1),
    "vit_mae": Family("ViTMAEConfig", "ViTMAEModel", ("vit_mae",), re.compile(r"^decoder\."), 1, True),
    "sam": Family(
        "SamVisionConfig", "SamVisionModel", ("sam", "sam_vision_model"),
        re.compile(r"^(prompt_encoder|mask_decoder|shared_image_embedding)\."), 0,
    ),
}  # fmt: skip
UNUSED = re.compile(r"(^|\.)mask_token$")
"""A parameter of masked training, which encoding never touches and files may lack."""


class TransformersVision(VisionEncoder):
    """A vision network of `transformers`."""

    def __init__(self, spec: EncoderSpec, network: nn.Module, kind: str, *, weights_hash: str) -> None:
        super().__init__(spec, network, weights_hash=weights_hash)
        self.kind, family = kind, FAMILIES[kind]
        config: Any = network.config
        self.config = config
        self.prefix = family.prefix + getattr(config, "num_register_tokens", 0)
        self.blocks = next(
            module
            for module in network.modules()
            if isinstance(module, nn.ModuleList) and len(module) == spec.num_layers
        )
        resized = family.resized and spec.image_size != config.image_size
        self._told = {"interpolate_pos_encoding": True} if resized else {}

    def states_of(self, pixels: Float[Tensor, "B 3 S S"], layers: Sequence[int]) -> list[EncoderStates]:
        """See `VisionEncoder.states_of`."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int, _module: nn.Module, _given: Any, said: Any) -> None:
            kept[layer] = said[0] if isinstance(said, tuple) else said

        hooks = [self.blocks[layer - 1].register_forward_hook(partial(keep, layer)) for layer in dict.fromkeys(layers)]
        try:
            end = self._end(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return [*(self._split(kept[layer], end.grid) for layer in layers), end]

    def _end(self, pixels: Float[Tensor, "B 3 S S"]) -> EncoderStates:
        side = self.config.patch_size
        grid = pixels.shape[2] // side, pixels.shape[3] // side
        if self.kind == "sam":
            maps: Tensor = self.network(pixels).last_hidden_state  # B F h w
            return EncoderStates(maps.flatten(2).transpose(1, 2), grid)
        if self.kind == "siglip2":
            return self._end_of_naflex(pixels, grid)
        if self.kind == "vit_mae":
            # the order of noise is the order of patches: nothing is masked (see the configuration), nothing shuffled
            order = torch.arange(grid[0] * grid[1], device=pixels.device).float().expand(len(pixels), -1)
            said = self.network(pixels, noise=order, **self._told)
        elif self.kind == "clip":
            tower = getattr(self.network, "vision_model", self.network)
            said = tower(pixel_values=pixels, **self._told)
            states = self._split(said.last_hidden_state, grid)
            project = getattr(self.network, "visual_projection", None)
            projected = None if project is None else project(said.pooler_output)
            return replace(states, cls=said.pooler_output, projected=projected)
        else:
            said = self.network(pixel_values=pixels, **self._told)
        states = self._split(said.last_hidden_state, grid)
        return replace(states, projected=said.pooler_output) if self.kind == "siglip" else states

    def _end_of_naflex(self, pixels: Float[Tensor, "B 3 S S"], grid: tuple[int, int]) -> EncoderStates:
        side = self.config.patch_size
        cut = pixels.unfold(2, side, side).unfold(3, side, side)  # B 3 h w side side
        patches = cut.permute(0, 2, 3, 4, 5, 1).reshape(len(pixels), grid[0] * grid[1], -1)
        said = self.network(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device),
            spatial_shapes=torch.tensor([grid] * len(pixels), device=pixels.device),
        )
        return replace(self._split(said.last_hidden_state, grid), projected=said.pooler_output)

    def _split(self, tokens: Tensor, grid: tuple[int, int]) -> EncoderStates:
        """States of tokens: (B, N, F), or of SAM (B, h, w, F)."""
        if tokens.dim() == 4:
            tokens = tokens.flatten(1, 2)
        cls = tokens[:, 0] if FAMILIES[self.kind].prefix else None
        return EncoderStates(tokens[:, self.prefix :], grid, cls=cls)


def load_transformers_vision(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> TransformersVision:
    """The encoder of a known name in float32, from a folder, a file, or its repository on the hub.

    Raises:
        ArraError: a missing package, no weights, those of another family, or a size that it cannot see.
    """
    known = KNOWN[name]
    require_package(name, "transformers")
    path = located(weights if weights is not None else str(known.repository), name=name)
    main = main_file(path)
    state = read_weights(main).state
    if known.kind == "sam" and any(key.startswith(META_PREFIX) for key in state):
        state = _vision_part(_named_as_home(state), known.kind)
        numbers = _numbers_of_sam(state, main)
    else:
        config = read_json(main.parent / CONFIG_FILE)
        numbers = _numbers(config, main.parent / CONFIG_FILE, name, known.kind)
        _check_preprocessor(main.parent / PREPROCESSOR_FILE, known.spec)
        state = _vision_part(state, known.kind)
    network = _network(state, numbers, known.kind, main.parent if path.is_dir() else path)
    spec = at_size(_spec_of(known.spec, network, known.kind), image_size)
    identity = weights_hash(path)
    spec = replace(spec, weights_sha256=identity)
    return TransformersVision(spec, network.to(device), known.kind, weights_hash=identity)


def _vision_part(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Its tensors, in memory of their own: a mapped file may change under them."""
    return {key: value.clone() for key, value in state.items() if not FAMILIES[kind].others.search(key)}


def _numbers(config: dict[str, Any], path: Path, name: str, kind: str) -> dict[str, Any]:
    """The sizes of the vision part in a configuration, looked at one by one."""
    types = FAMILIES[kind].types
    if (found := config.get("model_type")) not in types:
        raise ArraError(
            f"{path}: model_type is {str(found)[:40]!r}, expected {' or '.join(map(repr, types))}; not the weights of "
            f"{name}, name another folder{_named_by(found)}"
        )
    vision = config
    if len(types) > 1 and found == types[0]:
        vision = config.get("vision_config") or {}
        if not isinstance(vision, dict):
            raise ArraError(f"{path}: vision_config is no object; fetch the file again")
        if kind == "clip" and "projection_dim" in config:
            vision = {**vision, "projection_dim": config["projection_dim"]}
    for part in (config, vision):
        if part.get("auto_map"):
            raise ArraError(f"{path}: wants code of its own (auto_map), which is never run; take auto_map out of it")
        if part.get("quantization_config"):
            raise ArraError(f"{path}: its weights are quantised; name a folder of full weights")
    return {
        field: _checked(field, value, path) for field, value in vision.items() if _is_known(field) and value is not None
    }


def _named_by(model_type: object) -> str:
    kind = next((kind for kind, family in FAMILIES.items() if model_type in family.types), None)
    names = [name for name, known in KNOWN.items() if known.kind == kind and kind is not None]
    return f" or encoder ({', '.join(names[:3])}, ...)" if names else ""


def _is_known(field: str) -> bool:
    return field in {*SIZES, *SIDES, *SWITCHES, *NUMBERS, "hidden_act", "global_attn_indexes", "num_channels"}


def _checked(field: str, value: Any, path: Path) -> Any:
    """The value of a field of a configuration."""

    def refuse(expected: str) -> ArraError:
        return ArraError(f"{path}: {field} is {str(value)[:60]!r}, expected {expected}; fetch the file again")

    if field in SIDES and isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    most = MOST_LAYERS if field == "num_hidden_layers" else MOST
    least = 0 if field in ("num_register_tokens", "window_size") else 1
    if field in NUMBERS:
        if type(value) not in (int, float) or not 0 < value < MOST:
            raise refuse("a number above 0")
    elif field in SIZES or field in SIDES:
        if type(value) is not int or not least <= value <= most:
            raise refuse(f"an integer from {least} to {most}")
    elif field in SWITCHES:
        if type(value) is not bool:
            raise refuse("true or false")
    elif field == "hidden_act":
        if value not in ACTIVATIONS:
            raise refuse(" or ".join(ACTIVATIONS))
    elif field == "num_channels":
        if value != 3:
            raise refuse("3")
    elif not isinstance(value, list) or any(type(each) is not int or not 0 <= each < MOST for each in value):
        raise refuse("a list of blocks")
    return value


def _check_preprocessor(path: Path, spec: EncoderSpec) -> None:
    """Nothing.

    Raises:
        ArraError: the folder says that its network wants other means and deviations than the name stands for.
    """
    if not path.is_file():
        return
    told = read_json(path)
    normalises = told.get("do_normalize", True)
    for key, wanted, none in (("image_mean", spec.mean, [0.0] * 3), ("image_std", spec.std, [1.0] * 3)):
        found = told.get(key) if normalises else none
        if not isinstance(found, list) or len(found) != 3 or not all(type(each) in (int, float) for each in found):
            continue
        if any(abs(ours - theirs) > 1e-3 for ours, theirs in zip(wanted, found, strict=True)):
            others = [
                name
                for name, known in KNOWN.items()
                if known.kind == KNOWN[spec.name].kind
                and all(abs(a - b) < 1e-3 for a, b in zip(getattr(known.spec, key[6:]), found, strict=True))
            ]
            raise ArraError(
                f"{path}: {key} is {found}, encoder {spec.name} takes {list(wanted)}; not its weights, "
                f"{f'say {others[0]}' if others else 'name another folder'}"
            )


def _network(state: dict[str, Tensor], numbers: dict[str, Any], kind: str, source: Path) -> nn.Module:
    """The network with its weights, every one in its place."""
    family = FAMILIES[kind]
    class_name = family.network
    if kind == "clip" and "visual_projection.weight" in state:
        class_name = "CLIPVisionModelWithProjection"
    told = {**numbers, "mask_ratio": 0.0} if kind == "vit_mae" else numbers
    return filled_network(class_name, family.config, numbers=told, state=state, source=source)


def filled_network(
    class_name: str,
    config_name: str,
    *,
    numbers: Mapping[str, Any],
    state: Mapping[str, Tensor],
    source: Path,
    **arguments: Any,
) -> nn.Module:
    """A network of `transformers` in float32, made from the numbers of its configuration and filled with a state dict.

    `arguments` are the network's own.

    Raises:
        ArraError: it cannot be made, or a weight is missing, too much, or of another shape.
    """
    import transformers

    from arra.models.language_folder import BROKEN, quiet

    network_class = getattr(transformers, class_name)
    try:
        config = getattr(transformers, config_name)(**numbers)
        with torch.device("meta"):
            wanted = sum(value.numel() for value in network_class(config, **arguments).state_dict().values())
        held = sum(value.numel() for value in state.values())
        if wanted > 2 * held:  # before memory is taken for what the file does not hold
            raise ArraError(
                f"{source}: holds {held:,} numbers, config.json is of a network of {wanted:,}; fetch the folder again"
            )
        with quiet():  # what it would warn of is refused below
            network, info = network_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are told below
                output_loading_info=True,
                **arguments,
            )
    except BROKEN as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ArraError(f"{source}: no {class_name} that can be made ({reason}); fetch the folder again") from error
    faults = {
        "missing": [key for key in info["missing_keys"] if not UNUSED.search(key)],
        "of another shape": [str(each[0]) for each in info["mismatched_keys"]],
        "with no place in this network": list(info["unexpected_keys"]),
    }
    for what, keys in faults.items():
        if keys:
            raise ArraError(f"{source}: weights {what}: {name_keys(sorted(keys))[:300]}; fetch the folder again")
    loaded: nn.Module = network
    return loaded


def _spec_of(spec: EncoderSpec, network: Any, kind: str) -> EncoderSpec:
    """The spec with the sizes of a network."""
    config, outputs, size = network.config, spec.outputs, network.config.hidden_size
    if kind == "sam":
        size = config.output_channels
    if kind == "clip":
        size = config.projection_dim
        if not hasattr(network, "visual_projection"):  # asking for it says so; another default would go unseen
            outputs = tuple(output for output in outputs if output != "projected")
    if kind.startswith("siglip") and not config.vision_use_head:
        outputs = tuple(output for output in outputs if output != "projected")
    image_size = spec.image_size
    if kind in ("clip", "siglip", "vit_mae", "sam"):  # whose positions are one for each patch of that size
        image_size = config.image_size
    elif kind == "siglip2":
        image_size = math.isqrt(config.num_patches) * config.patch_size
    return replace(
        spec,
        feature_size=size,
        outputs=outputs,
        image_size=image_size,
        num_layers=config.num_hidden_layers,
        patch_size=None if spec.patch_size is None else config.patch_size,
    )


def _named_as_home(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SAM's image encoder out of Meta's file, in the names of `transformers`."""
    named = {}
    for key, value in state.items():
        if not key.startswith(META_PREFIX):
            continue
        short = key.removeprefix(META_PREFIX)
        for pattern, home in BLOCK_NAMES:
            short = re.sub(f"^{pattern}", home, short)
        named[f"vision_encoder.{short}"] = value
    return named


def _numbers_of_sam(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The sizes of SAM's image encoder, off its tensors."""
    at = "vision_encoder."
    try:
        patch, positions = state[f"{at}patch_embed.projection.weight"], state[f"{at}pos_embed"]
        blocks = {int(found[1]) for key in state if (found := re.match(rf"{at}layers\.(\d+)\.", key))}
        tables = [state[f"{at}layers.{block}.attn.rel_pos_h"] for block in range(len(blocks))]
        width, side, grid = patch.shape[0], patch.shape[2], positions.shape[1]
        spans = [(table.shape[0] + 1) // 2 for table in tables]
        return {
            "hidden_size": width,
            "mlp_dim": state[f"{at}layers.0.mlp.lin1.weight"].shape[0],
            "output_channels": state[f"{at}neck.conv1.weight"].shape[0],
            "num_hidden_layers": len(blocks),
            "num_attention_heads": width // tables[0].shape[1],
            "image_size": grid * side,
            "patch_size": side,
            "window_size": min(spans),
            "global_attn_indexes": [block for block, span in enumerate(spans) if span == grid],
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ArraError(
            f"{path}: no image encoder of SAM ({' '.join(str(error).split())[:120]} is missing); fetch the file again"
        ) from error
