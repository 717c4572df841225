"""Chameleon's network as `transformers` has it, with q/k norms that heads may share: settings, sizes, the norms.

    config.json / params.json --> ChameleonSettings --> build_chameleon --> ChameleonForConditionalGeneration

Meta trained q/k norms with one row of numbers per model-parallel rank; Lumina-mGPT and ARRA keep it so, `transformers`
writes the row out for every head. Here shared rows stay one parameter while training and are written out on saving.
Letters: H heads, R rows that they share, d numbers of a head.
Source: facebookresearch/chameleon `chameleon/inference/transformer.py` (sizes, norms).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from arra.errors import ArraError
from arra.settings import Settings

NORM_EPS = 1e-5
"""Of q/k norms, whatever the other norms have."""
MOST = 2**24
"""A size above this is no model's: it is refused before anything of that size is made."""
HEAD_NORM = re.compile(r"\.self_attn\.(?P<which>[qk])_norm\.(weight|bias)$")
TOKENIZER_PREFIX = "model.vqmodel."
"""Where `transformers` keeps the image tokenizer's encoder."""
Size = Field(gt=0, le=MOST)


class RotarySettings(Settings):
    """How positions turn queries and keys."""

    rope_type: Literal["default", "linear", "dynamic"] = "default"
    rope_theta: float = Field(default=10000.0, gt=0)
    factor: float | None = Field(default=None, gt=0)
    """Of linear and dynamic scaling."""

    @model_validator(mode="after")
    def _scaling_is_told(self) -> "RotarySettings":
        if (self.factor is None) != (self.rope_type == "default"):
            raise ValueError(f"{self.rope_type} with factor {self.factor}; linear and dynamic need one, default none")
        return self


class TokenizerShape(Settings):
    """Shape of the image tokenizer's encoder."""

    embed_dim: int = Field(default=256, gt=0, le=4096)
    num_embeddings: int = Field(default=8192, gt=0, le=2**20)
    double_latent: bool = False
    latent_channels: int = Field(default=256, gt=0, le=4096)
    resolution: int = Field(default=512, gt=0, le=2**16)
    in_channels: int = Field(default=3, gt=0, le=64)
    base_channels: int = Field(default=128, gt=0, le=4096)
    channel_multiplier: tuple[int, ...] = Field(default=(1, 1, 2, 2, 4), min_length=1, max_length=10)
    num_res_blocks: int = Field(default=2, gt=0, le=32)
    attn_resolutions: tuple[int, ...] | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)
    attn_type: str = "vanilla"


class ChameleonSettings(Settings):
    """What makes the network, under the names of `config.json`."""

    vocab_size: int = Field(default=65536, gt=0, le=MOST)
    hidden_size: int = Size
    intermediate_size: int = Size
    num_hidden_layers: int = Field(gt=0, le=4096)
    num_attention_heads: int = Field(gt=0, le=4096)
    num_key_value_heads: int = Field(gt=0, le=4096)
    max_position_embeddings: int = Field(default=4096, gt=0, le=MOST)
    rms_norm_eps: float = Field(default=1e-5, gt=0, lt=1)
    initializer_range: float = Field(default=0.02, ge=0)
    attention_bias: bool = False
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    mlp_bias: bool = False
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: Literal[False] = False
    swin_norm: bool = False
    """Norms stand behind attention and feed-forward, not before them (34B)."""
    model_parallel_size: int = Field(default=1, gt=0, le=4096)
    rope: RotarySettings = RotarySettings()
    vq_config: TokenizerShape = TokenizerShape()
    vocabulary_map: dict[str, int] | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _heads_divide(self) -> "ChameleonSettings":
        if self.hidden_size % (2 * self.num_attention_heads) or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads and {self.num_key_value_heads} key-value heads do not divide a "
                f"width of {self.hidden_size}"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Numbers of one head."""
        return self.hidden_size // self.num_attention_heads


CHAMELEON_SIZES: dict[str, dict[str, Any]] = {
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "34b": {
        "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64,
        "num_key_value_heads": 8, "swin_norm": True, "model_parallel_size": 4,
    },
}  # fmt: skip
"""The published sizes; Hugging Face calls the larger one 30B."""


def size_name(settings: ChameleonSettings) -> str | None:
    """The published size of these settings, as in "7b"; None for another."""
    told = settings.model_dump()
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return next(
        (name for name, size in CHAMELEON_SIZES.items() if all(told[field] == size[field] for field in shape)), None
    )


def chameleon_settings(source: str, fields: Mapping[str, Any]) -> ChameleonSettings:
    """The settings that a `config.json` holds; fields that say nothing about the network are passed over.

    Raises:
        ArraError: they make no Chameleon; every field at fault is named.
    """
    taken = {name: fields[name] for name in ChameleonSettings.model_fields if fields.get(name) is not None}
    if "num_attention_heads" in taken:  # old configurations leave it out where all heads have their own
        taken.setdefault("num_key_value_heads", taken["num_attention_heads"])
    shape = fields.get("vq_config")
    if isinstance(shape, Mapping):
        taken["vq_config"] = {name: shape[name] for name in TokenizerShape.model_fields if shape.get(name) is not None}
    taken["rope"] = _rotary(fields)
    try:
        return ChameleonSettings(**taken)
    except ValidationError as error:
        faults = [".".join(map(str, fault["loc"])) + f" {fault['msg']}" for fault in error.errors()]
        told = "; ".join(fault.strip() for fault in faults[:4])
        raise ArraError(f"{source}: makes no Chameleon: {told}; fetch it again from its publisher") from error


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings out of `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    told = fields.get("rope_parameters")
    if not isinstance(told, Mapping):
        scaling = fields.get("rope_scaling")
        told = dict(scaling) if isinstance(scaling, Mapping) else {}
    kind = told.get("rope_type", told.get("type"))
    found = {"rope_type": kind, "factor": told.get("factor")}
    found["rope_theta"] = told.get("rope_theta", fields.get("rope_theta"))
    return {name: value for name, value in found.items() if value is not None}


def require_transformers() -> None:
    """Nothing.

    Raises:
        ArraError: the package is not installed; the line says how to get it.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ArraError(
            "Chameleon: the package 'transformers' is missing; pip install 'arra[llm]' -c constraints.txt"
        ) from None


def build_chameleon(settings: ChameleonSettings, *, rows: int | None, image_tokenizer: bool) -> Any:
    """A fresh `ChameleonForConditionalGeneration`, on torch's default device.

    With `rows`, q/k norms share so many; without `image_tokenizer` it has no `model.vqmodel`.
    """
    require_transformers()
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    fields = settings.model_dump(mode="json", exclude={"rope", "vocabulary_map"})
    config = ChameleonConfig(
        **fields,
        vocabulary_map=settings.vocabulary_map or {},
        rope_parameters=settings.rope.model_dump(exclude_none=True),
        **_ids(settings.vocabulary_map or {}),
    )
    lm = ChameleonForConditionalGeneration(config)
    if image_tokenizer:
        lm.model.vqmodel.requires_grad_(False)
    else:
        del lm.model.vqmodel
    if rows is not None:
        for layer in lm.model.layers:
            _share(layer.self_attn, rows)
    return lm


def _ids(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Configuration of ids by their names: published files call `<pad>` the first token of a text."""
    names = {"bos_token_id": "<s>", "eos_token_id": "</s>"}
    return {field: vocabulary[name] for field, name in names.items() if name in vocabulary}


class SharedHeadNorm(nn.Module):
    """Layer norm of every head's own numbers, whose R rows of gains and shifts serve H / R neighbouring heads each."""

    def __init__(self, *, rows: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.ones(rows, head_dim))
        self.bias = nn.Parameter(torch.zeros(rows, head_dim))

    def forward(self, states: Float[Tensor, "*any H d"]) -> Float[Tensor, "*any H d"]:
        """The states, normed head by head."""
        times = self.num_heads // len(self.weight)
        normed = F.layer_norm(states, states.shape[-1:], eps=NORM_EPS)
        return normed * self.weight.repeat_interleave(times, 0) + self.bias.repeat_interleave(times, 0)

    def extra_repr(self) -> str:
        """Its sizes, for printing."""
        return f"rows={len(self.weight)}, num_heads={self.num_heads}, head_dim={self.weight.shape[1]}"


def _share(attention: Any, rows: int) -> None:
    """Puts norms with shared rows in the place of an attention's own; a row is that of its group's first head."""
    for name, num_heads in (("q_norm", attention.num_heads), ("k_norm", attention.num_key_value_heads)):
        own = getattr(attention, name)
        if rows < 1 or num_heads % rows:
            raise ArraError(f"q/k norms: {rows} rows do not divide {num_heads} heads; expected a divisor")
        shared = SharedHeadNorm(rows=rows, num_heads=num_heads, head_dim=attention.head_dim)
        for part in ("weight", "bias"):
            parameter = getattr(own, part)
            first = parameter.detach()[:: num_heads // rows].clone()
            setattr(shared, part, nn.Parameter(first, requires_grad=parameter.requires_grad))
        setattr(attention, name, shared)


def share_head_norms(lm: Any, rows: int, *, state: Mapping[str, Tensor] | None = None) -> bool:
    """Whether the q/k norms now share so many rows; where heads of one row differ nothing changes.

    `state` has the numbers that are compared, where the network itself is on the meta device.

    Raises:
        ArraError: the number does not divide the heads.
    """
    attentions = [layer.self_attn for layer in lm.model.layers]
    norms = [norm for attention in attentions for norm in (attention.q_norm, attention.k_norm)]
    if any(isinstance(norm, SharedHeadNorm) for norm in norms):
        return all(isinstance(norm, SharedHeadNorm) and len(norm.weight) == rows for norm in norms)
    for norm in norms:
        if rows < 1 or len(norm.weight) % rows:
            raise ArraError(f"q/k norms: {rows} rows do not divide {len(norm.weight)} heads; expected a divisor")
        if state is None and not all(_repeated(part, rows) for part in (norm.weight, norm.bias)):
            return False
    if not all(_repeated(value, rows) for key, value in (state or {}).items() if HEAD_NORM.search(key)):
        return False
    for attention in attentions:
        _share(attention, rows)
    return True


def _repeated(values: Float[Tensor, "H d"], rows: int) -> bool:
    """Whether the rows of every group of neighbouring heads are one and the same."""
    groups = values.detach().unflatten(0, (rows, -1))  # (R, H / R, d)
    return bool((groups == groups[:, :1]).all())


def expand_head_norms(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict with q/k norms written out for every head, as `transformers` reads it."""
    heads = {"q": int(config.num_attention_heads), "k": int(config.num_key_value_heads)}
    expanded = dict(state)
    for key, value in state.items():
        if (found := HEAD_NORM.search(key)) and len(value) != heads[found["which"]]:
            expanded[key] = value.repeat_interleave(heads[found["which"]] // len(value), 0)
    return expanded


def shared_head_norms(state: Mapping[str, Tensor], rows: int, *, source: str) -> dict[str, Tensor]:
    """The state dict with so many rows in every q/k norm.

    Raises:
        ArraError: heads that would share a row differ.
    """
    shared = dict(state)
    for key, value in state.items():
        if not HEAD_NORM.search(key) or len(value) == rows:
            continue
        if len(value) % rows or not _repeated(value, rows):
            raise ArraError(
                f"{source}: {key} differs between heads, so {rows} shared rows cannot hold it; export with --to hf"
            )
        shared[key] = value[:: len(value) // rows].clone()
    return shared


def export_state(lm: Any, layout: Literal["hf", "lumina"], *, source: str = "model") -> dict[str, Tensor]:
    """The state dict in a published layout of the q/k norms: one row a head ("hf"), or shared rows ("lumina").

    Raises:
        ArraError: heads that would share a row differ.
    """
    state = {key: value.detach() for key, value in lm.state_dict().items()}
    if layout == "hf":
        return expand_head_norms(state, lm.config)
    norm = lm.model.layers[0].self_attn.q_norm
    rows = len(norm.weight) if isinstance(norm, SharedHeadNorm) else lm.config.model_parallel_size
    return shared_head_norms(state, int(rows), source=source)


@torch.no_grad()
def zero_image_head(lm: Any, code_ids: Int[Tensor, "K"] | Sequence[int]) -> None:
    """Nothing; the head's rows of image codes are zero now, so that all codes start equally likely.

    Meta's Chameleon was released with image rows that paint nothing; those of Lumina-mGPT, Anole and ARRA do paint.
    """
    weight = lm.get_output_embeddings().weight
    weight[torch.as_tensor(code_ids, device=weight.device)] = 0
