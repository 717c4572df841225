"""Laws of the objective: it is the plain formula, and the same however a batch is cut, padded or mixed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arra.align import Alignment, Alignments, Balance, Loss, Places, ProjectorKind, Target
from arra.data.batches import NOTHING, TrainBatch, make_batch, text_batch
from arra.data.conditions import Prefix
from arra.data.language import padded_batch
from arra.data.layout import ImageLayout, Written
from arra.models import CausalLM, Decoder, Painter
from arra.models.adapters import LoraSettings, add_lora
from arra.train.objective import Losses, compute_losses, located
from tests.models.toy_lms import toy_lm
from tests.models.toys import toy_decoder

LAYOUT = ImageLayout(
    family="generic", bos=0, begin_image=41, end_image=42, new_line=43, closing=(1,), first_code=20, num_codes=16,
    unconditional="empty_prompt",
)  # fmt: skip
GRIDS = [(2, 2), (3, 2), None, (1, 4), (2, 2), None]
"""Of the pictures; the others are rows of text."""
SPLITS = [[6], [1] * 6, [2, 4], [4, 2], [3, 1, 2]]
Z_WEIGHT = 0.01


def language_model(family: str) -> CausalLM:
    return CausalLM(toy_lm(family, rows=50), layout=LAYOUT, grid=(2, 2)).train()


def mixed_batch() -> TrainBatch:
    """Prompts and pictures of several lengths between rows of text."""
    generator = torch.Generator().manual_seed(4)
    written = []
    for number, grid in enumerate(GRIDS):
        ids = torch.randint(2, 20, (4 + 3 * number,), generator=generator).numpy()
        if grid is None:
            labels = np.concatenate([[NOTHING], ids[1:]])
            written.append(Written(ids, labels, np.zeros(len(ids), dtype=bool)))
        else:
            codes = torch.randint(16, grid, generator=generator).numpy()
            written.append(LAYOUT.sequence(ids[:number].tolist(), codes))
    return padded_batch(written, features={"teacher": torch.randn(len(written), 8, generator=generator)})


def aligning(weight: float = 0.5, hidden_size: int = 32) -> Alignment:
    return Alignment(hidden_size=hidden_size, feature_size=8, layer=1, weight=weight)


def rows_of(batch: TrainBatch, rows: Sequence[int]) -> TrainBatch:
    return batch.changed(lambda part: part[list(rows)])


def cropped(batch: TrainBatch) -> TrainBatch:
    """The batch without padding that all its rows share, as a bucket of short rows would have it."""
    width = int((batch.labels != NOTHING).any(0).nonzero().max()) + 1
    return replace(
        batch, tokens=batch.tokens[:, :width], labels=batch.labels[:, :width], code_mask=batch.code_mask[:, :width]
    )


def numbers(losses: Sequence[Losses]) -> list[Tensor]:
    found = [torch.stack([each.total, each.ntp, each.z, each.gva]) for each in losses if each.gva is not None]
    assert len(found) == len(losses)
    return list(torch.stack(found).sum(0).detach())


def gradients(model: Painter, alignment: Alignment | None) -> list[Tensor]:
    parameters = [*model.parameters(), *([] if alignment is None else alignment.parameters())]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def close(ours: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "smollm", "gemma2", "phi", "cohere", "granite"])
def test_it_is_the_plain_formula(family: str) -> None:
    """Whole logits of `transformers` itself, shifted by one; states at every position, projected and averaged."""
    model, batch, alignment = language_model(family), mixed_batch(), aligning()
    ours = compute_losses(model, batch, alignment, z_weight=Z_WEIGHT)
    ours.total.backward()
    found = gradients(model, alignment)
    assert batch.features is not None
    output = model.lm(input_ids=batch.tokens, output_hidden_states=True)
    logits, labels = output.logits[:, :-1], batch.labels[:, 1:]
    ntp = F.cross_entropy(logits[labels != NOTHING], labels[labels != NOTHING])
    z = logits.logsumexp(2).square()[labels != NOTHING].mean()
    images = []
    for row, grid in enumerate(GRIDS):
        if grid is not None:
            states = output.hidden_states[1][row, :-1][batch.code_mask[row, 1:]]
            images.append(
                1 - F.cosine_similarity(alignment.projector(states), batch.features["teacher"][row], dim=1).mean()
            )
    gva = torch.stack(images).mean()
    total = ntp + Z_WEIGHT * z + 0.5 * gva
    close(numbers([ours]), [total, ntp, z, gva])
    total.backward()
    close(found, gradients(model, alignment))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("order", [range(6), (5, 2, 0, 4, 1, 3)])
def test_parts_add_up_to_the_whole(split: Sequence[int], order: Sequence[int]) -> None:
    """Parts of any size and of rows of any length, a part of text alone among them."""
    model, batch, alignment = language_model("gemma2"), mixed_batch(), aligning()
    whole = compute_losses(model, batch, alignment, z_weight=Z_WEIGHT)
    whole.total.backward()
    wanted = gradients(model, alignment)
    parts, start = [], 0
    for size in split:
        part = cropped(rows_of(batch, list(order)[start : start + size]))
        losses = compute_losses(
            model,
            part,
            alignment,
            z_weight=Z_WEIGHT,
            num_tokens=int(batch.labelled.sum()),
            num_images=sum(grid is not None for grid in GRIDS),
        )
        losses.total.backward()
        parts.append(losses)
        start += size
    close(numbers(parts), numbers([whole]))
    close(gradients(model, alignment), wanted)


def test_every_labelled_token_counts_and_none_else() -> None:
    batch = mixed_batch()
    codes = int(batch.code_mask.sum())
    assert codes == 18
    # of a picture also begin, its rows' ends, end, closing; of a row of text all but the first
    assert int(batch.labelled.sum()) == codes + sum(3 + g[0] for g in GRIDS if g is not None) + 9 + 18
    model = language_model("llama")
    alone = [compute_losses(model, cropped(rows_of(batch, [row])), None) for row in range(len(GRIDS))]
    counts = batch.labelled.sum(1)
    mean = (torch.stack([each.ntp for each in alone]) * counts).sum() / counts.sum()
    torch.testing.assert_close(compute_losses(model, batch, None).ntp, mean)


def test_of_a_decoder_labelled_is_predicting() -> None:
    batch = make_batch(Prefix(torch.tensor([[3], [1]])), torch.randint(16, (2, 4)))
    assert torch.equal(batch.labelled, batch.predicting)
    model = toy_decoder()
    whole, alone = compute_losses(model, batch, None), [rows_of(batch, [row]) for row in range(2)]
    halves = [compute_losses(model, part, None, num_tokens=8) for part in alone]
    torch.testing.assert_close(halves[0].ntp + halves[1].ntp, whole.ntp)


def test_text_alone_is_not_aligned() -> None:
    model, alignment = language_model("llama"), aligning()
    text = rows_of(mixed_batch(), [2, 5])
    losses = compute_losses(model, text, alignment)
    assert losses.gva is not None
    assert losses.gva.item() == 0
    torch.testing.assert_close(losses.total, compute_losses(model, text, None).total)
    losses.total.backward()
    assert not any(gradients(alignment.projector, None)[0].flatten())  # type: ignore[arg-type]


def text_decoder(**changes: Any) -> Decoder:
    fields: dict[str, Any] = {"condition": "text", "prefix_length": 4, "text_vocab_size": 20, "rep_token": True}
    return toy_decoder(**fields, **changes, drop_path=0.2).train()


def decoder_batch(rows: int = 4) -> TrainBatch:
    generator = torch.Generator().manual_seed(4)
    features = {
        "teacher": torch.randn(rows, 8, generator=generator),
        "patches": torch.randn(rows, 4, 8, generator=generator),
    }
    codes = torch.randint(16, (rows, 4), generator=generator)
    batch = text_batch([[3]] * rows, codes, prefix_length=4, features=features, rep_token=True)
    return replace(batch, dropout_seeds=torch.arange(rows))


def all_terms(kind: str) -> Alignments:
    """Every target, loss and kind of projector that the batch of a decoder, or the mixed one of a language model, has.

    The mixed one has pictures of several sizes, no patches and no REP token; a decoder is never fed the last token.
    """
    patches = {"encoder": "patches"}
    terms: dict[str, dict[str, Any]] = {target: {"target": target} for target in get_args(Target)}
    terms |= {"patch": {"target": "patch", **patches}, "causal": {"target": "causal", **patches}}
    terms |= {loss: {"loss": loss} for loss in get_args(Loss)}
    terms |= {"patches to patches": {"target": "patch", "loss": "nt-xent", **patches}}
    terms |= {kind: {"projector": kind} for kind in get_args(ProjectorKind)}
    terms |= {"late ones": {"position_power": 2.0}, "balanced": {"balance": Balance(share=0.5)}}
    without = {"legacy-2025-03"} if kind == "decoder" else {"rep", "patch", "causal", "patches to patches", "conv"}
    return Alignments(
        {
            name: Alignment(hidden_size=32, feature_size=8, layer=1, **told)
            for name, told in terms.items()
            if name not in without
        }
    )


class NobodyWaits(TorchDispatchMode):
    """Refuses what would wait for an accelerator: numbers, and lists of places, that follow from a tensor's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), str(func)
        mask = func.overloadpacket is torch.ops.aten.index and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        assert not mask, str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["decoder", "llama", "qwen2", "gemma2"])
def test_a_located_batch_makes_nobody_wait(kind: str) -> None:
    """And is worth the same."""
    model: Painter = text_decoder() if kind == "decoder" else language_model(kind)
    terms = all_terms(kind)
    batch = decoder_batch() if kind == "decoder" else replace(mixed_batch(), dropout_seeds=torch.arange(6))
    found = located(batch, {term.target for _, term in terms.items()})
    told: dict[str, Any] = {"z_weight": Z_WEIGHT, "num_tokens": 99, "num_images": 7}
    compute_losses(model, found, terms, **told)  # what is made once is there
    with NobodyWaits():
        losses = compute_losses(model, found, terms, **told)
    losses.total.backward()
    with NobodyWaits():
        squares = [each.squares() for each in losses.gradients.values()]
    plain = compute_losses(model, batch, terms, **told)
    assert torch.equal(losses.total, plain.total)
    assert losses.aligned.keys() == plain.aligned.keys() == dict(terms.items()).keys()
    assert all(float(own) > 0 and float(other) > 0 for own, other in squares)


def test_places_go_where_their_batch_goes_and_fit_no_other() -> None:
    model, batch = text_decoder(), located(decoder_batch(), {"hybnext"})
    assert batch.places is not None
    moved = batch.changed(lambda part: part.to("meta"))
    assert moved.places is not None
    for name, places in moved.places.items():
        assert isinstance(places, Places)
        assert places.at.is_meta
        assert places.image.is_meta
        assert places.rows.is_meta
        assert places.counts == batch.places[name].counts  # type: ignore[attr-defined]
    rows = replace(decoder_batch(3), places=batch.places)
    with pytest.raises(ValueError, match=r"places of \(4, 8\) for states of \(3, 8\)"):
        compute_losses(model, rows, None)


@pytest.mark.parametrize("kind", ["decoder", "llama", "smollm", "adapters"])
def test_where_nothing_is_learnt_gradients_are_zeros(kind: str) -> None:
    """Of every parameter that is trained, projectors too: no rank waits for one that another has."""
    terms = all_terms(kind)
    model: Painter
    if kind == "decoder":
        model, batch = text_decoder(), decoder_batch(1)
    else:
        lm = toy_lm("llama" if kind == "adapters" else kind, rows=50)
        if kind == "adapters":
            add_lora(lm, LoraSettings(rank=4, dropout=0.1), rows=[20, 21], seed=0)
        model = CausalLM(lm, layout=LAYOUT, grid=(2, 2)).train()
        batch = rows_of(mixed_batch(), [0])
    nothing = replace(batch, labels=torch.full_like(batch.labels, NOTHING), code_mask=torch.zeros_like(batch.code_mask))
    losses = compute_losses(model, nothing, terms, z_weight=Z_WEIGHT, num_tokens=40, num_images=4)
    assert losses.total.item() == losses.ntp.item() == losses.z.item() == 0
    assert {each.item() for each in losses.aligned.values()} == {0}
    losses.total.backward()
    for name, parameter in [*model.named_parameters(), *terms.named_parameters()]:
        if parameter.requires_grad and not (kind == "decoder" and name == "cls_embedding.uncond_embedding"):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    for gradient in losses.gradients.values():
        assert [float(each) for each in gradient.squares()] == [0, 0]


def test_a_weight_of_zero_trains_what_no_alignment_trains() -> None:
    model, batch, alignment = language_model("gemma2"), mixed_batch(), aligning(weight=0.0)
    losses = compute_losses(model, batch, alignment, num_tokens=40, num_images=4)
    losses.total.backward()
    found = gradients(model, None)
    none = compute_losses(model, batch, None, num_tokens=40)
    none.total.backward()
    assert torch.equal(losses.total, none.total)
    assert all(map(torch.equal, found, gradients(model, None)))
    assert losses.gva is not None
    assert losses.gva.item() > 0
    assert not losses.gva.requires_grad


def test_under_autocast_the_loss_is_float32() -> None:
    model, batch = language_model("llama"), mixed_batch()
    exact = compute_losses(model, batch, None, z_weight=Z_WEIGHT)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = compute_losses(model, batch, None, z_weight=Z_WEIGHT)
    narrow.total.backward()
    assert narrow.total.dtype == narrow.z.dtype == torch.float32
    assert narrow.total.item() == pytest.approx(exact.total.item(), rel=2e-2)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
