"""Image tokenizers as users hold them: pixels in, codes out, and back; opened by name, file or folder.

Legend: B batch, H W pixels, h w latent grid.
"""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from arra.errors import ArraError
from arra.models.fitting import Fitting
from arra.models.hub import Description, FromHub
from arra.models.weights import Entry, Weights, read_weights
from arra.runs import atomic_file, atomic_write, file_hash
from arra.tokenizers.chameleon import WANTED, build_chameleon, codes_hash, vqgan_in, vqgan_part
from arra.tokenizers.vq import NO_DECODER, VQModel, VQSettings
from arra.tokenizers.weights import build_vq, describe_tokenizer, infer_vq_settings, vq_settings

WEIGHTS_FILE, CARD_FILE = "tokenizer.safetensors", "tokenizer.json"
EMBEDDED = "openmoji-vq4"
"""Name of the tokenizer that ships inside the package, trained by `recipes/tokenizer.yaml`."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "llamagen-vq16": {"ch_mult": (1, 1, 2, 2, 4)},
    "llamagen-vq8": {"ch_mult": (1, 2, 2, 4)},
    "chameleon": {"num_codes": 8192, "code_dim": 256, "normalize": False, "attention_levels": ()},
}
"""Fields of `VQSettings` of the published tokenizers; their weights come apart."""
ANY_SIZE = ("llamagen", "chameleon")
"""Names that take every size from the weights."""


class ImageTokenizer(FromHub):
    """A VQ model that takes and gives pictures in batches of bounded size."""

    def __init__(self, model: VQModel, *, name: str, weights_hash: str | None, about: dict[str, Any] | None = None):
        self.model, self.name, self.weights_hash = model.eval(), name, weights_hash
        self.about = about or {}
        """What the card says beyond the settings: how the weights were made, what they measured."""

    @property
    def num_codes(self) -> int:
        return self.model.settings.num_codes

    @property
    def codes_of(self) -> dict[str, Any]:
        """Name and weights hash of the tokenizer whose codes these are: its own, or the one it shares them with.

        A tokenizer whose decoder alone was trained further gives the codes of the one it was trained from.
        """
        return dict(self.about.get("codes_of") or {"tokenizer": self.name, "weights": self.weights_hash})

    @property
    def downsampling(self) -> int:
        return self.model.settings.downsampling

    @torch.no_grad()
    def encode(
        self, images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"], *, batch_size: int = 32
    ) -> Int[Tensor, "B h w"]:
        """Codes of images, uint8 or float in [-1, 1].

        Raises:
            ArraError: they are no such tensor, or the sides are no multiples of `downsampling`.
        """
        refuse_no_images(images, self.name)
        if images.dtype == torch.uint8:
            images = images.permute(0, 3, 1, 2)
        step = self.downsampling
        if images.shape[2] % step or images.shape[3] % step:
            raise ArraError(
                f"tokenizer {self.name}: images of {images.shape[2]}x{images.shape[3]} pixels; expected sides that are "
                f"multiples of {step}; crop or resize them first"
            )
        return torch.cat([self.model.encode(to_float(part)) for part in images.split(batch_size)])

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B h w"], *, batch_size: int = 32) -> UInt8[Tensor, "B H W 3"]:
        """Pictures of codes.

        Raises:
            ArraError: a code is outside the codebook, or the tokenizer has no decoder.
        """
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.num_codes):
            raise ArraError(
                f"tokenizer {self.name}: codes {codes.min()}..{codes.max()} are outside 0..{self.num_codes - 1}; "
                "they come from another tokenizer"
            )
        if not self.model.settings.has_decoder:
            raise ArraError(f"tokenizer {self.name}: {NO_DECODER}")
        return torch.cat([to_uint8(self.model.decode(part)) for part in codes.split(batch_size)])

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Nothing; the folder holds the weights (safetensors, float16 if `half`) and the card."""
        state = {k: (v.half() if half else v).contiguous() for k, v in self.model.state_dict().items()}
        with atomic_file(folder / WEIGHTS_FILE) as path:
            safetensors.torch.save_file(state, path)
        card = {"kind": "vq", "name": self.name, "settings": self.model.settings.model_dump(mode="json")}
        card |= {"sha256": file_hash(folder / WEIGHTS_FILE), "about": self.about}
        atomic_write(folder / CARD_FILE, json.dumps(card, indent=2) + "\n")

    def _write_folder(self, folder: Path) -> None:
        self.save(folder)

    @classmethod
    def _read_folder(cls, folder: Path, **options: Any) -> "ImageTokenizer":
        return load_tokenizer(folder, **options)

    @classmethod
    def _read_file(cls, file: Path, *, entry: Entry = "model", **options: Any) -> "ImageTokenizer":
        how = Fitting(ignore=tuple(options.pop("ignore", ())), init_missing=tuple(options.pop("init_missing", ())))
        weights = read_weights(file, entry=entry)
        name = "llamagen" if vqgan_part(weights) is None else "chameleon"
        return open_vq_weights(weights, known=options, how=how, name=name)

    def _describe(self) -> Description:
        return describe_tokenizer(self.model, self.name, self.about)


def load_tokenizer(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    entry: Entry = "model",
    ignore: Sequence[str] = (),
    init_missing: Sequence[str] = (),
    **settings: Any,
) -> ImageTokenizer:
    """An image tokenizer in eval mode, in float32.

    `name` is "openmoji-vq4" (ships with the package), "llamagen-vq16", "llamagen-vq8", "llamagen" or "chameleon" (every
    size from the weights), or a folder: one made by `save`, LlamaGen's own (config.json and weights), or one that holds
    `vqgan.ckpt`. `weights` is the checkpoint of the published names, for Chameleon also its folder or a language
    model's; `entry` the weights to take from it; keys that match `ignore` are left out, missing ones that match
    `init_missing` get initial weights; other arguments are fields of `VQSettings`.

    Raises:
        ArraError: an unknown name, weights that are missing, damaged or do not fit.
    """
    how = Fitting(ignore=tuple(ignore), init_missing=tuple(init_missing))
    if name == EMBEDDED:
        tokenizer = _load_folder(Path(str(resources.files("arra.tokenizers") / EMBEDDED)), how)
        tokenizer.name = EMBEDDED
        return tokenizer
    folder, known_names = Path(name), (*PUBLISHED, *ANY_SIZE)
    if folder.is_dir() and not (name in known_names and weights is not None):
        source = vqgan_in(folder)
        is_foreign = source != folder or (folder / "config.json").is_file()
        if (folder / WEIGHTS_FILE).is_file() or not is_foreign:  # a language model's folder has a tokenizer.json too
            return _load_folder(folder, how)
        return open_vq_weights(read_weights(source, entry=entry), known=settings, how=how)
    if name not in known_names:
        known = ", ".join(dict.fromkeys([EMBEDDED, "llamagen", *PUBLISHED]))
        raise ArraError(f"tokenizer '{name}': neither a folder nor a known name; known are {known}")
    if weights is None:
        raise ArraError(
            f"tokenizer '{name}': its weights do not come with the package; give the file as weights=PATH "
            "(--weights or --tokenizer-weights on the command line, tokenizer.weights in a recipe)"
        )
    sizes = {} if name in ANY_SIZE else PUBLISHED[str(name)]
    source = vqgan_in(Path(weights)) if name == "chameleon" else Path(weights)
    return open_vq_weights(read_weights(source, entry=entry), known={**sizes, **settings}, how=how, name=str(name))


def open_vq_weights(
    weights: Weights, *, known: dict[str, Any], how: Fitting, name: str | None = None
) -> ImageTokenizer:
    """A tokenizer in eval mode from weights in LlamaGen's names or Meta's; `about` says where they come from.

    Without a name it gets that of the published tokenizer of its shape, or of the source.

    Raises:
        ArraError: they are no VQ tokenizer's, or do not fit the settings.
    """
    if name == "chameleon" or (name is None and vqgan_part(weights) is not None):
        return _open_chameleon(weights, known=known, how=how, name=name)
    source = str(weights.source)
    if weights.config.get("codebook_l2_norm") is False:
        raise ArraError(
            f"{source}: codebook_l2_norm is false in its config.json; LlamaGen's tokenizers are read here with "
            "normalised vectors only"
        )
    fields = infer_vq_settings(weights.state, source=source, known=known)
    model, left = build_vq(weights, vq_settings(source, fields), how)
    name = name or _published_name(model.settings) or weights.source.name.partition(".")[0]
    origin = weights.facts() | left.facts()
    return ImageTokenizer(model, name=name, weights_hash=file_hash(weights.files[0]), about={"origin": origin})


def _open_chameleon(weights: Weights, *, known: dict[str, Any], how: Fitting, name: str | None) -> ImageTokenizer:
    """A tokenizer from weights in Meta's names.

    Its codes are told by the tensors that make them: several files hold the same encoder, some among the many shards of
    a language model.
    """
    part = vqgan_part(weights)
    if part is None:
        raise ArraError(
            f"{weights.source}: no Chameleon tokenizer inside (no encoder.down); pass {WANTED}, or name a folder that "
            "arra saved in place of 'chameleon'"
        )
    model, left = build_chameleon(part, known, how)
    name = name or _published_name(model.settings) or weights.source.name.partition(".")[0]
    own = codes_hash(model)
    about = {"origin": part.facts() | left.facts(), "codes_of": {"tokenizer": "chameleon", "weights": own}}
    weights_hash = file_hash(part.files[0]) if model.settings.has_decoder else own
    return ImageTokenizer(model, name=name, weights_hash=weights_hash, about=about)


def _published_name(settings: VQSettings) -> str | None:
    """The published tokenizer of this shape, also where this is its encoder half."""
    shapes = {VQSettings(**shape): name for name, shape in PUBLISHED.items()}
    return shapes.get(settings.model_copy(update={"has_decoder": True}))


def _load_folder(folder: Path, how: Fitting) -> ImageTokenizer:
    try:
        card = json.loads((folder / CARD_FILE).read_text())
        name, fields, expected = card["name"], dict(card["settings"]), card["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArraError(
            f"{folder / CARD_FILE}: not a readable tokenizer card ({error}); make the tokenizer again"
        ) from error
    path = folder / WEIGHTS_FILE
    weights = read_weights(path)
    found = file_hash(path)
    if found != expected:
        raise ArraError(
            f"{path}: SHA-256 {found[:12]}... is not the card's; the file is damaged, make or fetch it again"
        )
    model, _ = build_vq(weights, vq_settings(str(folder / CARD_FILE), fields), how)
    return ImageTokenizer(model, name=name, weights_hash=found, about=card.get("about"))


def refuse_no_images(images: Any, name: str) -> None:
    """Nothing, if this is a batch of images of one of the two kinds.

    Raises:
        ArraError: it is not.
    """
    tensor = isinstance(images, Tensor) and images.dim() == 4
    if tensor and images.shape[3 if images.dtype == torch.uint8 else 1] == 3:
        return
    found = f"{type(images).__name__} of {getattr(images, 'dtype', '?')} {tuple(getattr(images, 'shape', ()))}"
    raise ArraError(
        f"tokenizer {name}: images: got {found}; expected a tensor, uint8 (B, H, W, 3) or float (B, 3, H, W)"
    )


def to_float(images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Images in [-1, 1]; float ones as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_uint8(images: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B H W 3"]:
    """Images in [-1, 1], clamped and rounded to the nearest of 256 levels."""
    levels = (images.clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
