"""Folders of vision networks in Hugging Face layout: the real classes of `transformers`, of toy size."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as home
from torch import Tensor, nn

from arra.encoders import Output

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MLP: dict[str, Any] = {**SIZES, "intermediate_size": 48}
GRID: dict[str, Any] = {**MLP, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {**MLP, "vocab_size": 40, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
SAM: dict[str, Any] = {
    **SIZES, "output_channels": 12, "image_size": 64, "patch_size": 8, "window_size": 3, "global_attn_indexes": [1],
    "mlp_dim": 48,
}  # fmt: skip
IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class Toy:
    """A network of a family, and what its home library says of pixels."""

    name: str
    """The encoder it is loaded as."""
    make: Callable[[], nn.Module]
    """The whole model, where the vision part is one of several."""
    outputs: Callable[[Any, Tensor], dict[Output, Tensor]]
    processor: Callable[[int], Any]
    """The home library's image processor for a size."""
    image_size: int | None = None
    """What the encoder is told; None leaves it to the configuration."""

    @property
    def told(self) -> dict[str, Any]:
        return {} if self.image_size is None else {"image_size": self.image_size}


def shaken(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """The network with weights of which none is zero or one: fresh ones hide what is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            is_scale = value.dim() == 1 and name.endswith(("weight", "lambda1"))
            value.copy_(1 + 0.2 * noise if is_scale else noise * (0.5 / value.shape[-1] ** 0.5 if value.dim() else 1))
    return network.eval()


def save_toy(toy: Toy, folder: Path) -> Any:
    """The home network, which the folder now holds."""
    network: Any = shaken(toy.make())
    network.save_pretrained(folder)
    return network


def _clip() -> nn.Module:
    vision = {**GRID, "projection_dim": 20}
    return home.CLIPModel(home.CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=20))


def _clip_outputs(network: Any, pixels: Tensor) -> dict[Output, Tensor]:
    said = network.vision_model(pixel_values=pixels)
    patches = said.last_hidden_state[:, 1:]
    projected = network.get_image_features(pixel_values=pixels).pooler_output
    return {"projected": projected, "cls": said.pooler_output, "patches": patches}


def _siglip_outputs(network: Any, pixels: Tensor) -> dict[Output, Tensor]:
    said = network.vision_model(pixel_values=pixels)
    projected = network.get_image_features(pixel_values=pixels).pooler_output
    return {"projected": projected, "patches": said.last_hidden_state}


def naflex_processor(size: int) -> Any:
    """The home processor of as many patches as fill the size."""
    return home.Siglip2ImageProcessor(patch_size=8, max_num_patches=(size // 8) ** 2)


def _naflex_outputs(network: Any, pixels: Tensor) -> dict[Output, Tensor]:
    pictures = [(each.permute(1, 2, 0) * 127.5 + 127.5).round().to(torch.uint8).numpy() for each in pixels]
    given = naflex_processor(pixels.shape[2])(pictures, return_tensors="pt")
    projected = network.get_image_features(**given).pooler_output
    said = network.vision_model(**given)
    return {"projected": projected, "patches": said.last_hidden_state}


def _tokens(prefix: int) -> Callable[[Any, Tensor], dict[Output, Tensor]]:
    def outputs(network: Any, pixels: Tensor) -> dict[Output, Tensor]:
        tokens = network(pixel_values=pixels).last_hidden_state
        return {"cls": tokens[:, 0], "patches": tokens[:, prefix:]}

    return outputs


def _mae_outputs(network: Any, pixels: Tensor) -> dict[Output, Tensor]:
    """As the library masks and shuffles: nothing masked, and what it shuffled put back."""
    network.vit.config.mask_ratio = 0.0
    torch.manual_seed(3)
    said = network.vit(pixels)
    tokens = said.last_hidden_state
    order = said.ids_restore.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
    return {"cls": tokens[:, 0], "patches": tokens[:, 1:].gather(1, order)}


def _sam_outputs(network: Any, pixels: Tensor) -> dict[Output, Tensor]:
    maps = network.get_image_embeddings(pixels)
    return {"patches": maps.flatten(2).transpose(1, 2), "mean": nn.AdaptiveAvgPool2d(1)(maps).flatten(1)}


def _mae() -> nn.Module:
    decoder = {
        "decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 2,
        "decoder_intermediate_size": 16,
    }  # fmt: skip
    return home.ViTMAEForPreTraining(home.ViTMAEConfig(**GRID, **decoder))


def _sam() -> nn.Module:
    vision = home.SamVisionConfig(**SAM).to_dict()
    prompts = {"hidden_size": 12, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    masks = {"hidden_size": 12, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    config = home.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)
    return home.SamModel(config)


def _bit(size: int, **more: Any) -> Any:
    about = {**IMAGENET, **more}
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    return home.BitImageProcessor(**sizes, resample=3, **about)


def _square(name: str, **more: Any) -> Callable[[int], Any]:
    return lambda size: getattr(home, name)(size={"height": size, "width": size}, resample=2, **more)


def _padded(**more: Any) -> Callable[[int], Any]:
    return lambda size: home.SamImageProcessor(
        size={"longest_edge": size}, pad_size={"height": size, "width": size}, **more
    )


def _dinov2(**more: Any) -> nn.Module:
    return home.Dinov2Model(home.Dinov2Config(**SIZES, image_size=42, patch_size=14, **more))


TOYS = {
    toy.name: toy
    for toy in (
        Toy(
            "clip-l14", _clip, _clip_outputs,
            lambda size: home.CLIPImageProcessor(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            ),
        ),
        Toy(
            "siglip2-b16-224",
            lambda: home.SiglipModel(home.SiglipConfig(vision_config=GRID, text_config=TEXT)),
            _siglip_outputs,
            _square("SiglipImageProcessor", image_mean=[0.5] * 3, image_std=[0.5] * 3),
        ),
        Toy(
            "siglip2-b16-naflex",
            lambda: home.Siglip2Model(
                home.Siglip2Config(vision_config={**MLP, "patch_size": 8, "num_patches": 16}, text_config=TEXT)
            ),
            _naflex_outputs,
            _square("SiglipImageProcessor", image_mean=[0.5] * 3, image_std=[0.5] * 3),
        ),
        Toy("dinov2-b14", _dinov2, _tokens(1), _bit, 28),
        Toy("dinov2-g14", lambda: _dinov2(use_swiglu_ffn=True), _tokens(1), _bit, 42),
        Toy(
            "dinov2-b14-reg",
            lambda: home.Dinov2WithRegistersModel(
                home.Dinov2WithRegistersConfig(**SIZES, image_size=42, patch_size=14, num_register_tokens=3)
            ),
            _tokens(4), _bit, 28,
        ),
        Toy(
            "rad-dino", _dinov2, _tokens(1),
            lambda size: _bit(size, image_mean=[0.5307] * 3, image_std=[0.2583] * 3), 42,
        ),
        Toy(
            "dinov3-b16",
            lambda: home.DINOv3ViTModel(home.DINOv3ViTConfig(**MLP, patch_size=16, num_register_tokens=4)),
            _tokens(5), _square("DINOv3ViTImageProcessor"), 48,
        ),
        Toy(
            "dinov3-h16plus",
            lambda: home.DINOv3ViTModel(
                home.DINOv3ViTConfig(**MLP, patch_size=16, num_register_tokens=4, use_gated_mlp=True)
            ),
            _tokens(5), _square("DINOv3ViTImageProcessor"), 32,
        ),
        Toy("mae-b16", _mae, _mae_outputs, _square("ViTImageProcessor", **IMAGENET)),
        Toy("sam-b16", _sam, _sam_outputs, _padded()),
        Toy("medsam", _sam, _sam_outputs, _padded(do_normalize=False, resample=3)),
        Toy("medsam-wanglab", _sam, _sam_outputs, _padded()),
    )
}  # fmt: skip


def toy_clip_folder(folder: Path) -> Any:
    """A whole CLIP of toy size, which the folder now holds with a tokenizer of letters and a few words."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>", "re", "red</w>", "<|startoftext|>"]
    vocabulary = {word: place for place, word in enumerate([*words, "<|endoftext|>"])}
    home.CLIPTokenizer(
        vocab=vocabulary, merges=[("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>")]
    ).save_pretrained(folder)
    end = vocabulary["<|endoftext|>"]
    text = {
        **MLP, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "projection_dim": 20,
        "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    vision = {**GRID, "projection_dim": 20}
    network: Any = shaken(home.CLIPModel(home.CLIPConfig(vision_config=vision, text_config=text, projection_dim=20)))
    network.save_pretrained(folder)
    return network
