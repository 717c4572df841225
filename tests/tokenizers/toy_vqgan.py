"""A toy of Chameleon's tokenizer, and its files as Meta's download has them."""

from pathlib import Path

import torch
from torch import Tensor

from arra.tokenizers.chameleon import original_vqgan_state, original_vqgan_yaml
from arra.tokenizers.vq import VQModel, VQSettings

TOY = VQSettings(
    channels=32,
    ch_mult=(1, 2, 1),
    num_res_blocks=1,
    z_channels=8,
    num_codes=40,
    code_dim=6,
    normalize=False,
    attention_levels=(1, 2),
)
PLAIN = TOY.model_copy(update={"attention_levels": ()})


def lively(settings: VQSettings) -> VQModel:
    """A network whose norms and biases say something, with latents that spread over the whole codebook."""
    torch.manual_seed(3)
    model = VQModel(settings)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.quant_conv.weight.data *= 10
    model.quantize.embedding.weight.data.normal_()
    return model.eval()


def some_images(*shape: int) -> Tensor:
    return torch.rand(2, 3, *(shape or (16, 24)), generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_meta(folder: Path, settings: VQSettings = TOY, *, described: bool = True, **more: Tensor) -> VQModel:
    """The network of a folder with vqgan.ckpt (and vqgan.yaml), as Meta's download has them."""
    model = lively(settings)
    folder.mkdir(parents=True, exist_ok=True)
    state = original_vqgan_state(model, torch.float32, source="toy")
    torch.save({"state_dict": {**state, **more}}, folder / "vqgan.ckpt")
    if described:
        (folder / "vqgan.yaml").write_text(original_vqgan_yaml(settings))
    return model
