"""A codebook that is not normalised trains as another does: squared distances, frozen codes, rows of any length."""

import pytest
import torch
from torch import Tensor

from arra.errors import ArraError
from arra.tokenizers.vq import Quantizer, VQModel, VQSettings
from arra.train.pictures import HeldPictures
from arra.train.settings import TokenizerTrainSettings
from arra.train.tokenizer import TokenizerTrainer

TOY = VQSettings(
    channels=32,
    ch_mult=(1, 1),
    num_res_blocks=1,
    z_channels=8,
    num_codes=32,
    code_dim=4,
    normalize=False,
    attention_levels=(),
)


def toy() -> VQModel:
    torch.manual_seed(0)
    model = VQModel(TOY)
    model.quantize.embedding.weight.data.normal_(std=0.5)
    return model


def pictures() -> Tensor:
    made = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    for i in range(4):
        made[i, i % 3, :, 4 * i :] = 255
    return made


def train(model: VQModel, *, steps: int = 20, **settings: object) -> list[float]:
    """Losses of the steps."""
    told = {"steps": steps, "batch_size": 4, "warmup_steps": 2, "augment": 0.0, "learning_rate": 3e-3, **settings}
    trainer = TokenizerTrainer(model, TokenizerTrainSettings.model_validate(told))
    held = HeldPictures(pictures(), 4, 0.0)
    return [trainer.train_step(held).loss for _ in range(steps)]


def test_losses_are_squared_distances_as_they_are() -> None:
    quantizer = toy().quantize
    z = (torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1)) * 2).requires_grad_()
    said = quantizer(z, commitment=0.25)
    rows = quantizer.embedding.weight[said.codes].permute(0, 3, 1, 2)
    torch.testing.assert_close(said.vectors, rows)
    torch.testing.assert_close(said.codebook_loss, (rows - z).square().mean())
    torch.testing.assert_close(said.commitment_loss, 0.25 * (rows - z).square().mean())
    straight, *_ = torch.autograd.grad(said.vectors.sum(), z, retain_graph=True)
    assert torch.equal(straight, torch.ones_like(z))
    pulled, *_ = torch.autograd.grad(said.commitment_loss, z, retain_graph=True)
    torch.testing.assert_close(pulled, 0.5 * (z - rows).detach() / z.numel())
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(said.codebook_loss, z)


def test_a_tokenizer_learns_its_pictures() -> None:
    model = toy()
    losses = train(model, steps=30)
    assert losses[-1] < 0.6 * losses[0]
    lengths = model.quantize.embedding.weight.norm(dim=1)
    assert lengths.std() > 0.05  # not brought to one length


def test_the_decoder_alone() -> None:
    model = toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = pictures().float() / 127.5 - 1
    codes = model.encode(images)
    losses = train(model, part="decoder")
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(model.encode(images), codes)
    for name, value in model.state_dict().items():
        frozen = name.startswith(("encoder.", "quant_conv.", "quantize."))
        assert torch.equal(value, before[name]) == frozen, name


def test_the_entropy_loss_is_refused() -> None:
    """Its temperature is made for vectors of length one: at others it is flat, and would do nothing unseen."""
    with pytest.raises(ArraError, match="entropy_weight: the entropy loss is made for normalised codes"):
        train(toy(), steps=1, entropy_weight=0.1)
    train(toy(), steps=1, entropy_weight=0.1, part="decoder")  # there it is not computed


def test_a_half_cannot_learn_to_paint() -> None:
    half = VQModel(TOY.model_copy(update={"has_decoder": False}))
    for part in ("decoder", "all"):
        with pytest.raises(ArraError, match="the encoder half alone"):
            train(half, steps=1, part=part)


@pytest.mark.parametrize("normalize", [False, True])
def test_revived_rows_lie_beside_their_vectors_at_any_scale(normalize: bool) -> None:
    quantizer = Quantizer(16, 8, normalize=normalize)
    z = torch.randn(6, 8) * torch.tensor([1e-3, 1, 1, 1, 50, 2e3])[:, None]
    noise = 0.05 * torch.randn(6, 8)
    rows, wanted = quantizer.beside(z, noise), quantizer.compared(z[:, :, None, None])[:, :, 0, 0]
    apart = (rows - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert apart.max() < 0.4
    assert apart.min() > 0
    assert torch.equal(
        quantizer.beside(z, torch.zeros_like(z)), quantizer.compared(wanted[:, :, None, None])[:, :, 0, 0]
    )
