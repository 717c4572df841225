"""Our VQ tokenizer against arrays made by running LlamaGen itself on random weights (see llamagen/README.md)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import arra
from arra.tokenizers import ImageTokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from arra.tokenizers.weights import STRAY
from arra.train.settings import TokenizerTrainSettings
from arra.train.tokenizer import TokenizerTrainer

FOLDER = Path(__file__).parent / "llamagen"
WEIGHTS = FOLDER / "vq_f16_nrb2.pt"
FLIPPING_GAP = 1e-4
"""Where the best two codes are nearer than this (squared distance), another summation order may choose the other."""


@pytest.fixture(scope="module")
def gold() -> dict[str, Tensor]:
    with np.load(FOLDER / "vq_f16_nrb2.npz") as stored:
        return {key: torch.from_numpy(np.asarray(stored[key])) for key in stored.files}


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return arra.load_tokenizer("llamagen", weights=WEIGHTS)


def agree(ours: Tensor, theirs: Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


def test_settings_are_read_from_shapes(tokenizer: ImageTokenizer, gold: dict[str, Tensor]) -> None:
    settings = tokenizer.model.settings
    fields = ("channels", "num_res_blocks", "z_channels", "num_codes", "code_dim")
    assert [getattr(settings, field) for field in fields] == gold["config"].tolist()[:5]
    assert list(settings.ch_mult) == gold["ch_mult"].tolist()
    assert (tokenizer.num_codes, tokenizer.downsampling) == (128, 16)


@torch.no_grad()
def test_encoder(tokenizer: ImageTokenizer, gold: dict[str, Tensor]) -> None:
    agree(tokenizer.model.latents(gold["image"]), gold["pre_quant"])


@torch.no_grad()
def test_codes(tokenizer: ImageTokenizer, gold: dict[str, Tensor]) -> None:
    assert gold["dist_gap"].min() > FLIPPING_GAP  # so that every code must be the same
    codes = tokenizer.encode(gold["image"])
    assert codes.shape == (2, 4, 4)
    assert torch.equal(codes.flatten(1), gold["indices"])
    assert torch.equal(tokenizer.model.encode(gold["image"]), codes)


@torch.no_grad()
def test_decoder(tokenizer: ImageTokenizer, gold: dict[str, Tensor]) -> None:
    codes = gold["indices"].view(2, 4, 4)
    agree(tokenizer.model.quantize.rows(codes), gold["quantized"], atol=1e-6)
    recon = tokenizer.model.decode(codes)
    agree(recon, gold["recon"], atol=1e-4)
    levels = ((gold["recon"].clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    pixels = tokenizer.decode(codes)
    assert pixels.dtype == torch.uint8
    assert (pixels.float() - levels).abs().max() <= 0.5 + 0.02  # nearest level


@torch.no_grad()
def test_forward(tokenizer: ImageTokenizer, gold: dict[str, Tensor]) -> None:
    model = tokenizer.model
    quantized = model.quantize(model.latents(gold["image"]))
    assert torch.equal(quantized.codes.flatten(1), gold["indices"])
    agree(quantized.vectors, gold["quantized"], atol=1e-6)
    agree(model.decode_vectors(quantized.vectors), gold["recon_forward"], atol=1e-4)


def test_losses(tokenizer: ImageTokenizer, gold: dict[str, Tensor]) -> None:
    quantized = tokenizer.model.quantize(gold["pre_quant"], commitment=0.25, entropy_weight=0.1)
    assert quantized.codebook_loss.item() == pytest.approx(gold["vq_loss"].item(), rel=1e-4)
    assert quantized.commitment_loss.item() == pytest.approx(gold["commit_loss"].item(), rel=1e-4)
    assert quantized.entropy_loss.item() == pytest.approx(gold["entropy_loss"].item(), rel=2e-5)


@dataclass(frozen=True)
class TheImages:
    """Every step sees the golden pictures."""

    images: Tensor

    def draw(self, step: int, generator: torch.Generator) -> Tensor:
        return self.images

    def close(self) -> None:
        return None


def test_a_training_step_sees_the_losses_and_the_use_of_the_original(gold: dict[str, Tensor]) -> None:
    settings = TokenizerTrainSettings(
        steps=1, l1_weight=0.0, entropy_weight=0.1, restart_every_steps=None, warmup_steps=0
    )
    trainer = TokenizerTrainer(arra.load_tokenizer("llamagen", weights=WEIGHTS).model.train(), settings)
    terms = trainer.train_step(TheImages(gold["image"])).terms
    assert terms["l2"] == pytest.approx((gold["recon_forward"] - gold["image"]).square().mean().item(), rel=1e-5)
    for name, theirs in (("codebook", "vq_loss"), ("commitment", "commit_loss"), ("entropy", "entropy_loss")):
        assert terms[name] == pytest.approx(gold[theirs].item(), rel=1e-4), name
    # its window begins with 65,536 zeros, which count as code 0; here nothing counts that was not chosen
    assert 0 not in gold["indices"]
    assert trainer.code_use() == pytest.approx(gold["codebook_usage"].item() - 1 / 128)


def test_gradients_pass_straight_through(tokenizer: ImageTokenizer, gold: dict[str, Tensor]) -> None:
    """Pixels and commitment pull the encoder, the codebook loss pulls the rows, and neither pulls the other."""
    latents = gold["pre_quant"].clone().requires_grad_()
    quantized = tokenizer.model.quantize(latents)
    rows = tokenizer.model.quantize.embedding.weight

    def gradients(loss: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, [latents, rows], retain_graph=True, allow_unused=True))

    pixels, pixels_rows = gradients(quantized.vectors.square().sum() + quantized.vectors.sum())
    commitment, commitment_rows = gradients(quantized.commitment_loss)
    codebook, codebook_rows = gradients(quantized.codebook_loss)
    assert pixels_rows is None
    assert commitment_rows is None
    assert codebook is None
    assert pixels is not None
    assert commitment is not None
    assert codebook_rows is not None
    assert pixels.abs().sum() > 0
    assert commitment.abs().sum() > 0
    assert set(codebook_rows.abs().sum(1).nonzero()[:, 0].tolist()) == set(gold["indices"].unique().tolist())


@pytest.mark.parametrize(
    ("ch_mult", "total", "encoder", "decoder", "entries", "downsampling"),
    [
        ((1, 1, 2, 2, 4), 71_883_403, 29_298_176, 42_449_795, 344, 16),
        ((1, 2, 2, 4), 70_109_835, 28_559_232, 41_415_171, 300, 8),
    ],
    ids=["VQ-16", "VQ-8"],
)
def test_published_sizes(
    ch_mult: tuple[int, ...], total: int, encoder: int, decoder: int, entries: int, downsampling: int
) -> None:
    with torch.device("meta"):
        model = VQModel(VQSettings(ch_mult=ch_mult))
    assert model.num_parameters() == total
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    assert len(model.state_dict()) == entries - 1  # without LlamaGen's usage window
    assert model.settings.downsampling == downsampling


def test_published_key_names() -> None:
    """The names that hold VQ-16's only channel changes, in the shapes of the published file."""
    with torch.device("meta"):
        state = VQModel(VQSettings()).state_dict()
    shortcuts = {key for key in state if key.endswith("nin_shortcut.weight")}
    assert shortcuts == {
        f"{part}.nin_shortcut.weight"
        for part in (
            "encoder.conv_blocks.2.res.0",
            "encoder.conv_blocks.4.res.0",
            "decoder.conv_blocks.1.res.0",
            "decoder.conv_blocks.3.res.0",
        )
    }
    shapes = {
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "encoder.mid.1.proj_out.weight": (512, 512, 1, 1),
        "decoder.conv_blocks.0.attn.2.q.weight": (512, 512, 1, 1),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "quantize.embedding.weight": (16384, 8),
        "quant_conv.weight": (8, 256, 1, 1),
        "post_quant_conv.weight": (256, 8, 1, 1),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def stored_state() -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(WEIGHTS, weights_only=True)["model"]
    return state


def test_the_usage_window_is_no_weight(tokenizer: ImageTokenizer) -> None:
    state = stored_state()
    assert STRAY in state
    assert STRAY not in tokenizer.model.state_dict()
    assert set(tokenizer.model.state_dict()) == set(state) - {STRAY}
    for key, value in tokenizer.model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_missing_unexpected_and_misshapen_keys_are_named(tmp_path: Path) -> None:
    state = stored_state()
    del state["decoder.norm_out.weight"], state["quant_conv.bias"]
    state["loss.logvar"] = torch.zeros(1)
    state["post_quant_conv.weight"] = torch.zeros(16, 9, 1, 1)
    torch.save({"model": state}, tmp_path / "broken.pt")
    with pytest.raises(arra.ArraError) as caught:
        arra.load_tokenizer("llamagen", weights=tmp_path / "broken.pt")
    text = str(caught.value)
    assert "\n" not in text
    for words in (
        "missing decoder.norm_out.weight, quant_conv.bias",
        "unexpected loss.logvar",
        "post_quant_conv.weight is (16, 9, 1, 1), expected (16, 8, 1, 1)",
    ):
        assert words in text


@pytest.mark.parametrize("name", ["llamagen-vq16", "llamagen-vq8"])
def test_another_size_than_the_name_says(name: str) -> None:
    with pytest.raises(arra.ArraError, match="does not fit the tokenizer settings"):
        arra.load_tokenizer(name, weights=WEIGHTS)


def test_tokenizers_of_another_kind(tmp_path: Path) -> None:
    """Chameleon's VQGAN shares the outer names, a decoder shares nothing."""
    shared: dict[str, Any] = {
        "encoder.conv_in.weight": torch.zeros(32, 3, 3, 3),
        "encoder.conv_out.weight": torch.zeros(16, 32, 3, 3),
        "encoder.down.0.block.0.conv1.weight": torch.zeros(32, 32, 3, 3),
        "quantize.embedding.weight": torch.zeros(64, 8),
    }
    torch.save({"state_dict": shared}, tmp_path / "vqgan.pt")
    with pytest.raises(arra.ArraError, match=r"of another kind \(no encoder.conv_blocks\)"):
        arra.load_tokenizer("llamagen", weights=tmp_path / "vqgan.pt")
    with pytest.raises(arra.ArraError, match=r"no VQ tokenizer inside, encoder\.conv_in\.weight"):
        arra.load_tokenizer("llamagen", weights=FOLDER / "c2i_tiny.pt")
    with pytest.raises(arra.ArraError, match="no such checkpoint"):
        arra.load_tokenizer("llamagen", weights=tmp_path / "none.pt")
    with pytest.raises(arra.ArraError, match="give the file as weights=PATH"):
        arra.load_tokenizer("llamagen-vq16")


def test_the_averaged_weights_of_a_training_checkpoint(tmp_path: Path) -> None:
    state = stored_state()
    torch.save({"model": state, "ema": {key: value * 0.5 for key, value in state.items()}}, tmp_path / "both.pt")
    ema = arra.load_tokenizer("llamagen", weights=tmp_path / "both.pt", entry="ema")
    for key, value in ema.model.state_dict().items():
        assert torch.equal(value, state[key] * 0.5), key
