"""Chameleon's image tokenizer: Meta's files as our VQ network, and our network under Meta's names.

`vqgan.ckpt` holds the whole network, `vqgan.yaml` beside it its sizes (the tensors tell them too). Checkpoints of the
language model in Hugging Face's format hold the encoder half below `model.vqmodel.`, without the decoder.

Source: `transformers` models/chameleon (key names, `attn_resolutions`); Lumina-mGPT (folders of its repository).
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from arra.errors import ArraError
from arra.models.fitting import Fitted, Fitting
from arra.models.weights import Weights
from arra.tokenizers.vq import Decoder, Encoder, Level, VQModel, VQSettings
from arra.tokenizers.weights import build_vq, infer_vq_settings, vq_settings

FILE = "vqgan.ckpt"
FOLDERS = ("", "tokenizer", "original_tokenizers")
"""Where a download keeps that file: a folder of its own, Meta's, Lumina's."""
PREFIXES = ("", "vqmodel.", "model.vqmodel.")
"""What the keys begin with: of Meta's file, and of a language model's (a reader may have taken off `model.`)."""
TRAINING_ONLY = r"^loss\."
"""Discriminator and perceptual network, which Meta's training kept in the same file."""
MOST_YAML_BYTES = 2**16
WANTED = "vqgan.ckpt, its folder, or a Chameleon checkpoint in Hugging Face's format"


def vqgan_in(path: Path) -> Path:
    """The `vqgan.ckpt` that a folder holds, in it or where Meta's and Lumina's downloads keep it; else the path."""
    places = [path / folder / FILE for folder in FOLDERS] if path.is_dir() else []
    return next((place for place in places if place.is_file()), path)


def vqgan_part(weights: Weights) -> Weights | None:
    """The tensors of a VQ tokenizer in Meta's names, of a file that may hold a language model too; None without any."""
    for prefix in PREFIXES:
        if any(key.startswith(f"{prefix}encoder.down.") for key in weights.state):
            state = {key.removeprefix(prefix): value for key, value in weights.state.items() if key.startswith(prefix)}
            return replace(weights, state=state, stripped=(*weights.stripped, *([prefix] if prefix else [])))
    return None


def build_chameleon(part: Weights, known: Mapping[str, Any], how: Fitting) -> tuple[VQModel, Fitted]:
    """A network in eval mode with what `vqgan_part` found, and what was left over.

    Raises:
        ArraError: tensors are missing, unexpected or of another shape, or the yaml beside them says otherwise.
    """
    source, state = str(part.source), part.state
    places = {
        "normalize": False,
        "attention_levels": _attended(state),
        "has_decoder": any(key.startswith("decoder.") for key in state),
    }
    told = infer_vq_settings(state, source=source, known=places, level="down", block="block", wanted=WANTED)
    if (described := part.files[0].with_suffix(".yaml")).is_file():
        _compare(read_vqgan_yaml(described), told, described, part.files[0].name)
    settings = vq_settings(source, {**told, **known})
    return build_vq(part, settings, how, named=under_metas_names, stray=TRAINING_ONLY)


def _attended(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The encoder's levels that have attention."""
    found = (re.match(r"encoder\.down\.([0-9]{1,3})\.attn\.", key) for key in state)
    return tuple(sorted({int(each[1]) for each in found if each}))


def under_metas_names(model: VQModel) -> nn.Module:
    """The network's own layers, held by modules that carry Meta's names: what is loaded there is loaded here."""
    own: dict[str, nn.Module] = {name: getattr(model, name) for name in ("quantize", "quant_conv", "post_quant_conv")}
    own["encoder"] = _half(model.encoder, down=[_level(level) for level in model.encoder.conv_blocks])
    if model.settings.has_decoder:  # Meta counts from full resolution
        own["decoder"] = _half(model.decoder, up=[_level(level) for level in reversed(model.decoder.conv_blocks)])
    return nn.ModuleDict(own)


def _half(half: Encoder | Decoder, **levels: list[nn.ModuleDict]) -> nn.ModuleDict:
    middle = dict(zip(("block_1", "attn_1", "block_2"), half.mid, strict=True))
    lists = {name: nn.ModuleList(each) for name, each in levels.items()}
    ends = {"conv_in": half.conv_in, "norm_out": half.norm_out, "conv_out": half.conv_out}
    return nn.ModuleDict({**ends, **lists, "mid": nn.ModuleDict(middle)})


def _level(level: nn.Module) -> nn.ModuleDict:
    assert isinstance(level, Level)
    step = {level.step_name: getattr(level, level.step_name)} if level.step_name else {}
    return nn.ModuleDict({"block": level.res, "attn": level.attn, **step})


def original_vqgan_state(model: VQModel, dtype: torch.dtype, *, source: str) -> dict[str, Tensor]:
    """The state dict as `vqgan.ckpt` has it.

    Raises:
        ArraError: Meta's class has no word for the network.
    """
    lacks = []
    if model.settings.normalize:
        lacks.append("normalised codes, Meta's are compared as they are")
    if not model.settings.has_decoder:
        lacks.append("no decoder, Meta's file has one")
    if lacks:
        raise ArraError(
            f"{source}: Meta's VQGAN cannot be this tokenizer: {'; '.join(lacks)}; keep it in arra's format"
        )
    state = under_metas_names(model).state_dict()
    return {key: value.detach().to(dtype).contiguous() for key, value in state.items()}


def original_vqgan_yaml(settings: VQSettings, *, resolution: int = 512) -> str:
    """`vqgan.yaml` to go with it; `resolution` is that of training, and places the attention."""
    ddconfig = {
        "double_z": False,
        "z_channels": settings.z_channels,
        "resolution": resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": settings.channels,
        "ch_mult": list(settings.ch_mult),
        "num_res_blocks": settings.num_res_blocks,
        "attn_resolutions": [resolution // 2**level for level in settings.attended],
        "dropout": 0.0,
    }
    params = {"embed_dim": settings.code_dim, "n_embed": settings.num_codes, "ddconfig": ddconfig}
    return yaml.safe_dump({"model": {"params": params}}, sort_keys=False)


def codes_hash(model: VQModel) -> str:
    """SHA-256 of the tensors that decide which codes a picture gets, in whatever file they came."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if key.startswith(("encoder.", "quant_conv.", "quantize.")):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Shape(BaseModel):
    """ddconfig of a vqgan.yaml. Words that would make another network are known, to be refused."""

    model_config = ConfigDict(strict=True, extra="forbid")

    double_z: Literal[False] = False
    z_channels: int
    resolution: int
    in_channels: Literal[3] = 3
    out_ch: Literal[3] = 3
    ch: int
    ch_mult: list[int]
    num_res_blocks: int
    attn_resolutions: list[int] | None = None
    dropout: float = 0.0  # of training alone; there is none here
    attn_type: Literal["vanilla"] = "vanilla"
    resamp_with_conv: Literal[True] = True
    give_pre_end: Literal[False] = False
    tanh_out: Literal[False] = False


class _Params(BaseModel):
    """model.params of a vqgan.yaml; what else it holds (lossconfig, ckpt_path, ...) is of training."""

    model_config = ConfigDict(strict=True, extra="ignore")

    embed_dim: int
    n_embed: int
    remap: None = None  # would number the codes anew
    ddconfig: _Shape


class _Model(BaseModel):
    params: _Params


class _File(BaseModel):
    model: _Model


class _Loader(yaml.SafeLoader):
    """Plain data without aliases: a few nested ones unfold to more than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, which Meta's has not")
        return super().compose_node(parent, index)


def read_vqgan_yaml(path: Path) -> dict[str, tuple[str, Any]]:
    """What a `vqgan.yaml` says, by its own words, as field of `VQSettings` and value: {"ch": ("channels", 128), ...}.

    Raises:
        ArraError: it cannot be read, or tells of another network.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_YAML_BYTES + 1)
        if len(content) > MOST_YAML_BYTES:
            raise ValueError(f"more than {MOST_YAML_BYTES:,} bytes")
        params = _File.model_validate(yaml.load(content.decode(), Loader=_Loader)).model.params
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))[:80] or "the whole"
        raise ArraError(f"{path}: {place}: {first['msg']}; expected Meta's vqgan.yaml, fetch it again") from error
    except (OSError, yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArraError(f"{path}: not a readable vqgan.yaml ({reason}); fetch it again") from error
    shape = params.ddconfig
    named = set(shape.attn_resolutions or ())
    return {
        "ch": ("channels", shape.ch),
        "ch_mult": ("ch_mult", tuple(shape.ch_mult)),
        "num_res_blocks": ("num_res_blocks", shape.num_res_blocks),
        "z_channels": ("z_channels", shape.z_channels),
        "n_embed": ("num_codes", params.n_embed),
        "embed_dim": ("code_dim", params.embed_dim),
        f"attn_resolutions {sorted(named)} of {shape.resolution}, levels": (
            "attention_levels",
            tuple(i for i in range(len(shape.ch_mult)) if shape.resolution >> i in named),
        ),
    }


def _compare(described: Mapping[str, tuple[str, Any]], told: Mapping[str, Any], path: Path, file: str) -> None:
    odd = [
        f"{word} {_plain(value)} (the tensors: {_plain(told[field])})"
        for word, (field, value) in described.items()
        if told[field] != value
    ]
    if odd:
        raise ArraError(
            f"{path}: does not describe {file} beside it: {', '.join(odd)}; fetch both from one place, or take the "
            "yaml away: the tensors tell all"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
