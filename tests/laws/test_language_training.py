"""The laws of training for language models: which positions count, and what a row's company may change (nothing)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arra.data.batches import NO_RECORD, NOTHING, Batches, InMemory, TrainBatch, generator
from arra.data.language import LayoutWriter, MixedBatches, PromptConditions, TextRows, joined, padded_batch
from arra.data.layout import ImageLayout
from arra.distributed import joined_ranks
from arra.models import CausalLM
from arra.runs import Run
from arra.stages.language import LoraSettings, add_lora, train_head_rows
from arra.train.alignment import build_alignment
from arra.train.loop import Trainer
from arra.train.objective import compute_losses
from arra.train.passes import select, validation_loss
from arra.train.settings import AlignSettings, ParallelSettings, TrainSettings
from tests.models.toy_lms import toy_lm

TEXT, CODES, GRID, RECORDS, WIDTH = 40, 16, (2, 3), 12, 5
ROWS = TEXT + 20 + CODES


def layout(**changes: Any) -> ImageLayout:
    fields: dict[str, Any] = {
        "family": "lumina", "bos": 0, "separator": 2, "begin_image": TEXT, "end_image": TEXT + 1, "closing": (2,),
        "new_line": TEXT + 2, "first_size": TEXT + 2, "num_sizes": 8, "first_code": TEXT + 11, "num_codes": CODES,
    }  # fmt: skip
    return ImageLayout(**{**fields, **changes})


def painter(family: str = "llama", written: ImageLayout | None = None) -> CausalLM:
    return CausalLM(toy_lm(family, rows=ROWS), layout=written or layout(), grid=GRID)


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def written_batch(prompts: list[list[int] | None], *, seed: int = 0, features: bool = True) -> TrainBatch:
    codes = torch.randint(CODES, (len(prompts), *GRID), generator=chance(seed)).numpy()
    rows = [layout().sequence(ids, each) for ids, each in zip(prompts, codes, strict=True)]
    drawn = {"teacher": torch.randn(len(prompts), WIDTH, generator=chance(seed))}
    return padded_batch(rows, features=drawn if features else None)


PROMPTS = [[5, 6, 7], None, [8], [9, 10, 11, 12, 13, 14]]
ALIGN = AlignSettings(layer=1, components=3)


def alignment_of(settings: AlignSettings = ALIGN) -> Any:
    features = torch.randn(30, WIDTH, generator=chance(9))
    return build_alignment(settings, {"teacher": features}, hidden_size=32, seed=1)


@given(
    lengths=st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=5),
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=5, max_size=5),
    text=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_aligned_are_exactly_the_predictors_of_the_codes(
    lengths: list[int | None], grids: list[tuple[int, int]], text: int
) -> None:
    """In any company: pictures of other shapes, dropped prompts, rows of text behind them."""
    rows = []
    for place, (length, grid) in enumerate(zip(lengths, grids, strict=False)):
        codes = np.random.default_rng(place).integers(0, CODES, grid)
        rows.append(layout().sequence(None if length is None else [3] * length, codes))
    batch = padded_batch(rows)
    if text:
        batch = joined(batch, TextRows(torch.full((text, 7), 4)).batch(torch.arange(text)))
    ids = layout().code_ids()
    followed_by_code = torch.isin(batch.tokens[:, 1:], ids)
    assert torch.equal(batch.predicting, followed_by_code)
    assert torch.equal(batch.code_mask, torch.isin(batch.tokens, ids))
    counts = [height * width for height, width in grids[: len(lengths)]] + [0] * text
    assert batch.predicting.sum(1).tolist() == counts
    assert (batch.labelled | ~batch.predicting).all()


def test_labels_are_the_pictures_turn_and_text_rows_are_all_learnt() -> None:
    batch = joined(written_batch(PROMPTS), TextRows(torch.arange(6)[None] + 3).batch(torch.tensor([0])))
    height, width = GRID
    turn = height * (width + 1) + 5  # begin, two sides, rows with their ends, end, closing
    # the first token of a row without prompt has nothing before it that could predict it
    assert (batch.labels != NOTHING).sum(1).tolist() == [turn, turn, turn, turn, 5]
    assert batch.labelled.sum(1).tolist() == [turn, turn - 1, turn, turn, 5]
    assert batch.features is not None
    assert not batch.features["teacher"][-1].any()


@pytest.mark.parametrize("family", ["llama", "smollm", "gemma2", "gpt2"])
def test_company_changes_no_pictures_losses(family: str) -> None:
    """The terms of a batch, and all gradients, are the means over its rows taken one by one."""
    model, align = painter(family).eval(), alignment_of()
    batch = joined(written_batch(PROMPTS), TextRows(torch.arange(9)[None] + 3).batch(torch.tensor([0])))
    counts: dict[str, Any] = {"num_tokens": int(batch.labelled.sum()), "num_images": 4}
    whole = compute_losses(model, batch, align, z_weight=0.1)
    whole.total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sums = torch.zeros(4)
    for row in range(5):
        alone = select(batch, slice(row, row + 1))
        length = int((batch.labels[row] != NOTHING).nonzero().max()) + 1  # cut off what was padding
        alone = TrainBatch(
            alone.tokens[:, :length], alone.labels[:, :length], alone.code_mask[:, :length], None, alone.features
        )
        found = compute_losses(model, alone, align, z_weight=0.1, **counts)
        found.total.backward()
        assert found.gva is not None
        sums += torch.stack([found.total, found.ntp, found.z, found.gva]).detach()
    assert whole.gva is not None
    torch.testing.assert_close(
        sums, torch.stack([whole.total, whole.ntp, whole.z, whole.gva]).detach(), atol=1e-5, rtol=1e-5
    )
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_alignments_gradient_reaches_its_layer_and_none_above(layer: int) -> None:
    model, align = painter(), alignment_of(AlignSettings(layer=layer))
    losses = compute_losses(model, written_batch(PROMPTS), align)
    assert losses.gva is not None
    losses.gva.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    blocks = {int(name.split(".layers.")[1].split(".")[0]) for name in reached if ".layers." in name}
    assert blocks == set(range(layer))
    assert any("embed_tokens" in name for name in reached)
    assert not any("lm_head" in name or name.endswith("model.norm.weight") for name in reached)


def make_batches(*, features: bool, dropout: float = 0.25, text_rows: int = 0) -> Batches | MixedBatches:
    prompts = [[[3 + row % 7] * (1 + row % 5)] for row in range(RECORDS)]
    codes = torch.randint(CODES, (RECORDS, 6), generator=chance(3))
    stored = {"teacher": torch.randn(RECORDS, WIDTH, generator=chance(4))} if features else None
    batches = Batches(
        conditions=PromptConditions((prompts,), (GRID,), dropout=dropout),
        pictures=InMemory(codes, stored),
        batch_size=6,
        seed=1,
        write=LayoutWriter(layout()),
    )
    if not text_rows:
        return batches
    return MixedBatches(batches, TextRows(3 + (torch.arange(5)[:, None] + torch.arange(8)) % 7), text_rows)


def make_trainer(path: Path, align: AlignSettings | None, *, model: CausalLM | None = None, **changes: Any) -> Trainer:
    fields: dict[str, Any] = {"steps": 6, "batch_size": 6, "warmup_steps": 1, "seed": 1, "checkpoint_every_steps": 2}
    text_rows = changes.pop("text_rows", 0)
    held_out = TextRows(3 + (torch.arange(5, 7)[:, None] + torch.arange(8)) % 7).batch(torch.arange(2))
    return Trainer(
        model=model or painter(),
        alignment=None if align is None else alignment_of(align),
        batches=make_batches(features=align is not None, text_rows=text_rows),
        validation=[written_batch(PROMPTS, features=False)],
        settings=TrainSettings(**{**fields, **changes}),
        run=Run.create(path, "name: toy\n", {"seed": 1}),
        text_validation=[held_out] if text_rows else [],
    )


def state_of(model: CausalLM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trained(path: Path, align: AlignSettings | None, **changes: Any) -> dict[str, Tensor]:
    trainer = make_trainer(path, align, **changes)
    trainer.train()
    return state_of(trainer.model)  # type: ignore[arg-type]


def test_weight_nought_is_no_alignment_and_one_is_some(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", None)
    assert same(plain, trained(tmp_path / "nought", AlignSettings(layer=1, weight=0)))
    assert not same(plain, trained(tmp_path / "aligned", AlignSettings(layer=1)))


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_are_the_whole_batch(size: int, tmp_path: Path) -> None:
    """Rows of different lengths, some of text: what a part weighs is what it has of labels and pictures."""
    whole, parts = (
        make_trainer(tmp_path / name, ALIGN, text_rows=3, z_weight=0.1, micro_batch_size=each)
        for name, each in (("whole", None), ("parts", size))
    )
    losses = [trainer.passes.gradients(trainer.batches.batch(0), step=0).losses for trainer in (whole, parts)]
    batch = whole.batches.batch(0)
    assert not bool(batch.predicting.any(1).all())  # rows of text have no picture
    losses.append(compute_losses(whole.model, batch, whole.alignment, z_weight=0.1))  # the plain means
    for name in ("total", "ntp", "z", "gva"):
        for other in losses[1:]:
            torch.testing.assert_close(getattr(other, name), getattr(losses[0], name), atol=1e-5, rtol=1e-5)
    for name, parameter in parts.parameters.items():
        torch.testing.assert_close(parameter.grad, whole.parameters[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["cosine", "nt-xent", "relational"])
@pytest.mark.parametrize("size", [1, 4])
def test_rows_of_text_are_no_candidates_and_upset_no_balance(size: int, loss: Any, tmp_path: Path) -> None:
    """Whether a part has pictures or not: the contrast is with the batch's pictures, the balance over all parts."""
    settings = AlignSettings(layer=1, loss=loss, balance=0.5, components=3)
    whole, parts, pictures = (
        make_trainer(tmp_path / name, settings, text_rows=rows, micro_batch_size=each)
        for name, each, rows in (("whole", None, 3), ("parts", size, 3), ("pictures", None, 0))
    )
    passed = [trainer.passes.gradients(trainer.batches.batch(0), step=0) for trainer in (whole, parts, pictures)]
    found = [each.losses.gva for each in passed]
    for trainer, each in zip((whole, parts), passed, strict=False):
        trainer.balance({name: value.tolist() for name, value in each.squares.items()})
    assert found[0] is not None
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)
    assert parts.balances()["main"].factor == pytest.approx(whole.balances()["main"].factor, rel=1e-3)
    for name, parameter in parts.parameters.items():
        torch.testing.assert_close(parameter.grad, whole.parameters[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["all", "lora", "head"])
def test_a_resumed_training_ends_in_the_same_weights(part: str, tmp_path: Path) -> None:
    """Checkpoints hold what is trained and nothing of what is not."""
    rows = sorted(layout().image_ids())

    def model() -> CausalLM:
        made = painter("smollm")
        if part == "lora":
            add_lora(made.lm, LoraSettings(rank=2), rows=rows, seed=0)
        elif part == "head":
            train_head_rows(made.lm, rows)
        return made

    uninterrupted = trained(tmp_path / "whole", ALIGN, model=model(), text_rows=2)
    first = make_trainer(tmp_path / "two", ALIGN, model=model(), text_rows=2)
    for _ in range(2):
        first.train_step()
    first.save()
    saved = first.checkpoints.newest()
    assert saved is not None
    if part != "all":
        size = sum(path.stat().st_size for path in saved.path.glob("*.safetensors"))
        assert size < 4 * sum(p.numel() for p in first.model.parameters())
    second = make_trainer(tmp_path / "two", ALIGN, model=model(), text_rows=2)
    second.train()
    assert second.step == 6
    assert same(state_of(second.model), uninterrupted)  # type: ignore[arg-type]
    start = state_of(model())
    moved = {name for name, value in uninterrupted.items() if not torch.equal(value, start[name])}
    trainable = {name for name, p in model().named_parameters() if p.requires_grad}
    assert moved
    assert {name for name in moved if name in dict(model().named_parameters())} <= trainable


@pytest.mark.parametrize("part", ["all", "head"])
@pytest.mark.parametrize("family", ["llama", "smollm"])
def test_sharded_weights_are_trained_as_whole_ones(family: str, part: str, tmp_path: Path) -> None:
    """Where all below the head is frozen, too, and no gradient comes out of the network."""
    found = []
    for kind in ("ddp", "fsdp"):
        model = painter(family)
        if part == "head":
            train_head_rows(model.lm, sorted(layout().image_ids()))
        with joined_ranks(torch.device("cpu"), even_alone=kind == "fsdp"):
            told = ParallelSettings(kind=kind)
            trainer = make_trainer(tmp_path / kind, ALIGN, model=model, text_rows=2, parallel=told, steps=3)
            trainer.train()
            whole = trainer.engine.whole_state()
            if (family, part, kind) == ("smollm", "all", "fsdp"):  # tied: one matrix of two names
                assert whole["lm.lm_head.weight"] is whole["lm.model.embed_tokens.weight"]
            found.append({name: value.clone() for name, value in whole.items()})
    ours, theirs = found
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_the_language_is_watched(tmp_path: Path) -> None:
    """Text loss is logged beside the validation, and falls where text is trained on."""
    trainer = make_trainer(tmp_path / "run", None, text_rows=3, steps=30, learning_rate=3e-3, validate_every_steps=15)
    trainer.train()
    watched = [row["text_loss"] for row in trainer.run.read_metrics() if row["kind"] == "validation"]
    assert len(watched) == 2
    assert watched[1] < watched[0] < 4


def test_validation_counts_codes_and_of_text_every_token() -> None:
    """What else a picture's turn holds is forced when painting, and would make the loss look small."""
    model, pictures = painter().eval(), written_batch(PROMPTS, features=False)
    text = TextRows(3 + torch.arange(16).view(2, 8)).batch(torch.arange(2))
    for batch, counted in ((pictures, pictures.predicting), (text, torch.ones(2, 7, dtype=torch.bool))):
        with torch.no_grad():
            logits = model.lm_head(model(batch.tokens[:, :-1]).last_hidden)[counted]
        expected = torch.nn.functional.cross_entropy(logits, batch.tokens[:, 1:][counted])
        assert validation_loss(model, [batch]) == pytest.approx(expected.item(), abs=1e-5)


def test_rows_of_text_are_no_records() -> None:
    """Whoever names the pictures of a batch meets them in its order, and text behind them."""
    mixed = make_batches(features=False, text_rows=3).batch(0).rows
    pictures = make_batches(features=False).batch(0).rows
    assert mixed is not None
    assert pictures is not None
    assert mixed.tolist() == [*pictures.tolist(), *[NO_RECORD] * 3]


def test_text_rows_depend_on_the_step_alone() -> None:
    batches = make_batches(features=False, text_rows=2)
    first, second = batches.batch(3), batches.batch(3)
    assert torch.equal(first.tokens, second.tokens)
    assert not torch.equal(first.tokens[-2:, :8], batches.batch(4).tokens[-2:, :8])
    places = torch.randint(5, (2,), generator=generator(1, "text", 3))
    assert isinstance(batches, MixedBatches)
    assert torch.equal(first.tokens[-2:, :8], batches.text.ids[places])


def test_cutting_text_loses_only_the_last_row() -> None:
    rows = TextRows.cut([[1, 2, 3], [4, 5, 6, 7]], length=3, between=[9])
    assert rows.ids.tolist() == [[1, 2, 3], [9, 4, 5], [6, 7, 9]]
    own, watched = rows.split(0.1)
    assert (len(own), len(watched)) == (2, 1)
    assert [len(part) for part in rows.split(1.0)] == [1, 2]  # something is always left to train on
    with pytest.raises(ValueError, match="4 tokens fill no row of 9"):
        TextRows.cut([[1, 2, 3]], length=9, between=[9])


def test_dropped_rows_are_the_form_that_sampling_uses() -> None:
    model = painter()
    conditions = PromptConditions(([[[5, 6]]] * RECORDS,), (GRID,), dropout=0.5)
    chances = torch.tensor([[0.4, 1, 0], [0.6, 1, 0]])
    prefix = conditions.take(torch.tensor([0, 1]), chances, chances)
    assert prefix.prompts == (None, [5, 6])
    batch = LayoutWriter(layout())(prefix, torch.zeros(2, 6, dtype=torch.int64))
    null = model.null_condition(model._padded([layout().prefix([5, 6], GRID)], width=9), grid=GRID)
    assert null.prefix_mask is not None
    real = null.tokens[0][null.prefix_mask[0]]
    assert torch.equal(batch.tokens[0, : len(real)], real)
