"""Counted operations are those that one writes down: of the decoder's training step, of projectors, of convolutions."""

import pytest
import torch

from arra.align import Alignment
from arra.data.batches import TrainBatch, text_batch
from arra.models import Decoder, DecoderSettings
from arra.train.flops import count_flops
from arra.train.objective import compute_losses

BATCH, PREFIX, GRID, WIDTH, LAYERS, HEADS, CODES, FEATURE = 3, 5, (2, 4), 16, 2, 2, 24, 12
POSITIONS = GRID[0] * GRID[1]
FED = PREFIX + POSITIONS - 1
"""Positions that a model is fed: nothing comes after the last code."""


def decoder(**changes: float) -> Decoder:
    settings = DecoderSettings(
        num_layers=LAYERS, num_heads=HEADS, hidden_size=WIDTH, num_codes=CODES, grid=GRID, condition="text",
        prefix_length=PREFIX, text_vocab_size=30, **changes,
    )  # fmt: skip
    return Decoder(settings).train()


def batch() -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(CODES, (BATCH, POSITIONS), generator=generator)
    features = {"teacher": torch.randn(BATCH, FEATURE, generator=generator)}
    return text_batch([[5, 6], [7], []], codes, prefix_length=PREFIX, features=features)


def step(model: Decoder, alignment: Alignment | None = None) -> int:
    return count_flops(lambda: compute_losses(model, batch(), alignment).total.backward())


def by_hand(model: Decoder) -> int:
    """Each matrix product forward and its two in the backward pass; attention's two forward and five back."""
    inner = model.settings.ffn_width
    products = BATCH * FED * LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * inner)
    head = BATCH * POSITIONS * WIDTH * CODES
    attention = BATCH * LAYERS * FED * FED * WIDTH
    return 2 * (3 * (products + head) + 7 * attention)


@pytest.mark.parametrize("changes", [{}, {"resid_dropout": 0.1, "ffn_dropout": 0.1, "token_dropout": 0.1}])
def test_a_training_step_of_the_decoder(changes: dict[str, float]):
    model = decoder(**changes)
    assert step(model) == by_hand(model)


def test_layers_that_somebody_listens_to_count_the_same():
    """Then torch's own products run in place of ours, and the head's logits are made once more in the backward pass."""
    model = decoder()
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    assert step(model) == by_hand(model) + 2 * BATCH * POSITIONS * WIDTH * CODES


def test_a_projector_costs_its_two_layers_at_the_positions_that_are_aligned():
    model = decoder()
    alignment = Alignment(hidden_size=WIDTH, feature_size=FEATURE, inner_size=20, layer=1)
    projected = BATCH * POSITIONS * (WIDTH * 20 + 20 * FEATURE)
    # its gradient enters layer 1, which has one anyway: nothing else becomes dearer
    assert step(model, alignment) - step(model) == 2 * 3 * projected


def test_a_measured_term_costs_its_forward_pass_alone():
    model = decoder()
    costs = [
        step(model, Alignment(hidden_size=WIDTH, feature_size=FEATURE, layer=1, weight=weight)) - step(model)
        for weight in (1.0, 0.0)
    ]
    assert costs[0] == 3 * costs[1] > 0


def test_operations_that_torch_counts_not_by_itself():
    a, b, total = torch.randn(3, 4), torch.randn(4, 5), torch.zeros(3, 5)
    assert count_flops(lambda: total.addmm_(a, b)) == 2 * 3 * 4 * 5
    assert count_flops(lambda: a @ b[:, 0]) == 2 * 3 * 4
    assert count_flops(lambda: torch.einsum("bij,bjk->bik", a[None], b[None])) == 2 * 3 * 4 * 5
    picture, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
    assert count_flops(lambda: torch.conv2d(picture, weight, padding=1)) == 2 * 2 * 5 * 3 * 9 * 64
    heads = torch.randn(2, 3, 7, 4)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(heads, heads, heads)) == 2 * 2 * (2 * 3 * 7 * 7 * 4)
