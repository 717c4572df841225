"""Image tokenizers as users hold them: pixels in, codes out, and back; opened by name, file or folder.

Legend: B batch, H W pixels, h w latent grid.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int, UInt8
from pydantic import ValidationError
from torch import Tensor

from arra.errors import ArraError
from arra.runs import atomic_file, atomic_write, file_hash
from arra.tokenizers.vq import VQModel, VQSettings
from arra.tokenizers.weights import infer_vq_settings, load_vq_weights, read_vq_checkpoint

WEIGHTS_FILE, CARD_FILE = "tokenizer.safetensors", "tokenizer.json"
EMBEDDED = "openmoji-vq4"
"""Name of the tokenizer that ships inside the package, trained by `recipes/tokenizer.yaml`."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "llamagen-vq16": {"ch_mult": (1, 1, 2, 2, 4)},
    "llamagen-vq8": {"ch_mult": (1, 2, 2, 4)},
}


class ImageTokenizer:
    """A VQ model that takes and gives pictures in batches of bounded size."""

    def __init__(self, model: VQModel, *, name: str, weights_hash: str | None, about: dict[str, Any] | None = None):
        self.model, self.name, self.weights_hash = model.eval(), name, weights_hash
        self.about = about or {}
        """What the card says beyond the settings: how the weights were made, what they measured."""

    @property
    def num_codes(self) -> int:
        return self.model.settings.num_codes

    @property
    def downsampling(self) -> int:
        return self.model.settings.downsampling

    @torch.no_grad()
    def encode(
        self, images: UInt8[Tensor, "B H W 3"] | Float[Tensor, "B 3 H W"], *, batch_size: int = 32
    ) -> Int[Tensor, "B h w"]:
        """Codes of images, uint8 or float in [-1, 1].

        Raises:
            ArraError: the sides are no multiples of `downsampling`.
        """
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
            ArraError: a code is outside the codebook.
        """
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.num_codes):
            raise ArraError(
                f"tokenizer {self.name}: codes {codes.min()}..{codes.max()} are outside 0..{self.num_codes - 1}; "
                "they come from another tokenizer"
            )
        return torch.cat([to_uint8(self.model.decode(part)) for part in codes.split(batch_size)])

    def save(self, folder: Path, *, half: bool = False) -> None:
        """Nothing; the folder holds the weights (safetensors, float16 if `half`) and the card."""
        state = {k: (v.half() if half else v).contiguous() for k, v in self.model.state_dict().items()}
        with atomic_file(folder / WEIGHTS_FILE) as path:
            try:
                safetensors.torch.save_file(state, path)
            except safetensors.SafetensorError as error:  # how the library tells a full disk
                raise ArraError(
                    f"{folder / WEIGHTS_FILE}: cannot be written ({error}); free space and try again"
                ) from error
        card = {"kind": "vq", "name": self.name, "settings": self.model.settings.model_dump(mode="json")}
        card |= {"sha256": file_hash(folder / WEIGHTS_FILE), "about": self.about}
        atomic_write(folder / CARD_FILE, json.dumps(card, indent=2) + "\n")


def load_tokenizer(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    entry: Literal["model", "ema"] = "model",
    **settings: Any,
) -> ImageTokenizer:
    """An image tokenizer in eval mode.

    `name` is "openmoji-vq4" (ships with the package), a folder made by `save`, "llamagen-vq16", "llamagen-vq8", or
    "llamagen" (every size from the weights; `ch_mult=` where several fit). `weights` is the checkpoint file of the
    last three, `entry` the weights to take from it; other arguments are fields of `VQSettings`.

    Raises:
        ArraError: an unknown name, weights that are missing, damaged or do not fit.
    """
    if name == EMBEDDED:
        tokenizer = _load_folder(Path(str(resources.files("arra.tokenizers") / EMBEDDED)))
        tokenizer.name = EMBEDDED
        return tokenizer
    folder = Path(name)
    if folder.is_dir():
        return _load_folder(folder)
    if name not in (*PUBLISHED, "llamagen"):
        known = ", ".join([EMBEDDED, "llamagen", *PUBLISHED])
        raise ArraError(f"tokenizer '{name}': neither a folder nor a known name; known are {known}")
    if weights is None:
        raise ArraError(f"tokenizer '{name}': its weights do not come with the package; give the file as weights=PATH")
    state = read_vq_checkpoint(weights, entry=entry)
    fields = infer_vq_settings(state, source=str(weights), known={**PUBLISHED.get(str(name), {}), **settings})
    model = VQModel(_settings(str(weights), fields))
    load_vq_weights(model, state, source=str(weights))
    return ImageTokenizer(model, name=str(name), weights_hash=file_hash(weights))


def _load_folder(folder: Path) -> ImageTokenizer:
    try:
        card = json.loads((folder / CARD_FILE).read_text())
        name, fields, expected = card["name"], dict(card["settings"]), card["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArraError(
            f"{folder / CARD_FILE}: not a readable tokenizer card ({error}); make the tokenizer again"
        ) from error
    weights = folder / WEIGHTS_FILE
    state = read_vq_checkpoint(weights)
    found = file_hash(weights)
    if found != expected:
        raise ArraError(
            f"{weights}: SHA-256 {found[:12]}... is not the card's; the file is damaged, make or fetch it again"
        )
    model = VQModel(_settings(str(folder / CARD_FILE), fields))
    load_vq_weights(model, {k: v.float() for k, v in state.items()}, source=str(weights))
    return ImageTokenizer(model, name=name, weights_hash=found, about=card.get("about"))


def _settings(source: str, fields: dict[str, Any]) -> VQSettings:
    try:
        return VQSettings(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArraError(f"{source}: tokenizer settings: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def to_float(images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Images in [-1, 1]; float ones as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_uint8(images: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B H W 3"]:
    """Images in [-1, 1], clamped and rounded to the nearest of 256 levels."""
    levels = (images.clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
