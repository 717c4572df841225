"""Watching measures what it says, beside what autograd says by hand, and leaves everything as it was."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arra.align import Alignments
from arra.align.measures import linear_cka
from arra.data.batches import Features, TrainBatch, text_batch
from arra.data.language import padded_batch
from arra.data.layout import ImageLayout
from arra.models import CausalLM, Decoder, DecoderSettings, Painter
from arra.runs import Run
from arra.train.alignment import build_alignment
from arra.train.loop import Trainer
from arra.train.objective import compute_losses
from arra.train.passes import select
from arra.train.settings import AlignSettings, AlignTerm, TrainSettings
from arra.train.watch import Watcher, every_other, in_bins, only_embeddings_trainable, untouched
from tests.models.toy_lms import toy_lm

WIDTH, FEATURE, CODES, GRID, LAYERS = 32, 6, 40, (4, 5), 2
TEXT = 40


def decoder(**changes: Any) -> Decoder:
    """With every weight alive, and dropout that would be seen."""
    torch.manual_seed(1)
    fields: dict[str, Any] = {"num_layers": LAYERS, "num_heads": 4, "hidden_size": WIDTH, "num_codes": CODES}
    fields |= {"grid": GRID, "condition": "text", "prefix_length": 7, "text_vocab_size": 30}
    model = Decoder(DecoderSettings(**{**fields, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def painter() -> CausalLM:
    fields: dict[str, Any] = {
        "family": "lumina", "bos": 0, "separator": 2, "begin_image": TEXT, "end_image": TEXT + 1, "closing": (2,),
        "new_line": TEXT + 2, "first_size": TEXT + 2, "num_sizes": 8, "first_code": TEXT + 11, "num_codes": CODES,
    }  # fmt: skip
    return CausalLM(toy_lm("llama", rows=TEXT + 20 + CODES), layout=ImageLayout(**fields), grid=GRID)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(count: int, model: Painter, *, seed: int, size: int = FEATURE) -> TrainBatch:
    """Pictures with prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CODES, (count, GRID[0] * GRID[1]), generator=generator)
    prompts = [[5 + (place + n) % 20 for n in range(place % 4)] for place in range(count)]
    features = {"teacher": drawn(count, size, seed=seed)}
    if isinstance(model, Decoder):
        return text_batch(prompts, codes, prefix_length=7, features=features)
    written = [
        model.layout.sequence(ids, each) for ids, each in zip(prompts, codes.unflatten(1, GRID).numpy(), strict=True)
    ]
    return padded_batch(written, features=features)


def features_of(batch: TrainBatch) -> Features:
    assert batch.features is not None
    return batch.features


def watcher(model: Painter, *, count: int = 24, **changes: Any) -> Watcher:
    fields = {"fit": [batch_of(count, model, seed=1)], "score": [batch_of(count, model, seed=2)], **changes}
    return Watcher(**fields)


def aligned(**changes: Any) -> Alignments:
    settings = AlignSettings(**{"layer": 1, "components": 4, **changes})
    return build_alignment(settings, {"teacher": drawn(60, FEATURE, seed=5)}, hidden_size=WIDTH, seed=3)


def rows_of(found: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]


@pytest.fixture(params=["decoder", "painter"])
def model(request: pytest.FixtureRequest) -> Painter:
    return decoder() if request.param == "decoder" else painter()


def snapshot(model: Painter, alignment: Alignments) -> dict[str, Any]:
    parts = {"model": model, "alignment": alignment}
    return {
        "weights": {f"{n}.{k}": v.clone() for n, part in parts.items() for k, v in part.state_dict().items()},
        "gradients": {
            f"{n}.{k}": None if p.grad is None else p.grad.clone()
            for n, part in parts.items()
            for k, p in part.named_parameters()
        },
        "flags": [p.requires_grad for part in parts.values() for p in part.parameters()],
        "modes": [module.training for part in parts.values() for module in part.modules()],
        "random": torch.random.get_rng_state(),
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return bool(one == two)


def test_looking_changes_nothing(model: Painter):
    """Weights, gradients, what is frozen, modes module by module, and random state."""
    alignment = aligned()
    model.train()
    next(iter(model.children())).eval()
    first, *rest = model.parameters()
    first.requires_grad_(False)
    rest[0].grad = torch.ones_like(rest[0])
    next(alignment.parameters()).grad = torch.zeros_like(next(alignment.parameters()))
    torch.manual_seed(4)
    before = snapshot(model, alignment)
    rows = watcher(model)(model, alignment, 3)
    assert len(rows) == (LAYERS + 1) + 2  # all layers, and the term at the layers that its gradient reaches
    after = snapshot(model, alignment)
    assert all(same(before[key], after[key]) for key in before), [
        key for key in before if not same(before[key], after[key])
    ]
    assert watcher(model)(model, alignment, 3) == rows


def test_modes_and_flags_come_back_after_an_error(model: Painter):
    alignment = aligned()
    model.train()
    before = snapshot(model, alignment)

    def fail() -> None:
        with untouched(model, alignment), only_embeddings_trainable(model, alignment):
            torch.rand(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert same(before, snapshot(model, alignment))


def told(model: Painter, batch: TrainBatch, layer: int) -> Tensor:
    """Mean state of a layer over the predicting positions."""
    model.eval()
    with torch.no_grad():
        states = model(batch.tokens[:, :-1], **batch.inputs(), capture=(layer,)).captured[layer]
    return torch.stack([own[on].mean(0) for own, on in zip(states, batch.predicting, strict=True)])


def test_features_that_stand_in_the_states_are_read(model: Painter):
    """Features that are a turned copy of layer 2's states are wholly alike there, and read; drawn ones are not."""
    base = watcher(model, count=100)
    turn = torch.linalg.qr(drawn(WIDTH, WIDTH, seed=8))[0]
    parts = [
        [
            replace(batch, features={"own": told(model, batch, 2) @ turn, "drawn": drawn(100, 5, seed=n)})
            for batch in side
        ]
        for n, side in enumerate((base.fit, base.score))
    ]
    rows = Watcher(fit=parts[0], score=parts[1], gradient_images=2)(model, None, 0)
    (own,) = rows_of(rows, encoder="own", layer=2)
    assert own["images"] == 200
    assert own["cka"] == pytest.approx(1, abs=1e-5)
    assert own["cknna"] == pytest.approx(1, abs=1e-5)
    assert own["probe_cosine"] > 0.999
    assert own["probe_r2"] > 0.999
    (below,) = rows_of(rows, encoder="own", layer=0)
    assert below["probe_cosine"] < own["probe_cosine"]
    for row in rows_of(rows, encoder="drawn"):
        assert abs(row["cka"]) < 0.15
        assert abs(row["probe_cosine"]) < 0.2
        assert abs(row["linear_cosine"]) < 0.2
        assert {len(values) for values in row["positions"].values()} == {16}


def test_pooled_likeness_is_that_of_all_states_at_once(model: Painter):
    """Pooling batch by batch and bin by bin loses nothing, though bins differ in size."""
    looking = watcher(model)
    batches = [*looking.fit, *looking.score]
    states = torch.cat([told(model, batch, 1) for batch in batches])
    features = torch.cat([features_of(batch)["teacher"] for batch in batches])
    (row,) = rows_of(looking(model, None, 0), layer=1)
    assert row["cka"] == pytest.approx(linear_cka(states, features), abs=1e-6)


def test_passes_and_batches_make_no_difference(model: Painter):
    alignment, looking = aligned(), watcher(model)
    expected = looking(model, alignment, 0)
    few = replace(looking, pooled_bytes=1)(model, alignment, 0)
    assert few == expected
    cut = [
        [select(side[0], slice(start, start + 6)) for start in range(0, 24, 6)] for side in (looking.fit, looking.score)
    ]
    for row, other in zip(expected, Watcher(fit=cut[0], score=cut[1])(model, alignment, 0), strict=True):
        for key, value in row.items():
            if isinstance(value, float):
                assert other[key] == pytest.approx(value, abs=2e-4), key


def test_a_terms_cosine_is_its_loss(model: Painter):
    alignment, looking = aligned(), watcher(model)
    found = looking.measure(model, alignment)
    (row,) = rows_of(found.rows, term="main", layer=1)
    model.eval()
    with torch.no_grad():
        losses = compute_losses(model, looking.score[0], alignment)
    assert losses.gva is not None
    assert row["cosine"] == pytest.approx(1 - float(losses.gva), abs=1e-5)
    assert torch.tensor(found.maps["main/1/cosine"]).mean() == pytest.approx(row["cosine"], abs=1e-4)
    assert len(found.maps["main/1/cosine"]) == GRID[0]
    sizes = torch.bincount(torch.arange(20) * 16 // 20).float()
    binned = torch.tensor(row["positions"]["cosine"])
    assert float((binned * sizes).sum() / 20) == pytest.approx(row["cosine"], abs=1e-4)


def test_gradients_are_those_of_autograd(model: Painter):
    """Of each picture's own mean losses, by hand, picture by picture."""
    alignment, looking = aligned(layer=2), watcher(model, count=16)
    rows = looking(model, alignment, 0)
    model.eval()
    (term,) = [term for _, term in alignment.items()]
    first, second = (dict[int, list[tuple[Tensor, Tensor]]]({0: [], 1: [], 2: []}) for _ in range(2))
    for place in range(16):
        one = select(looking.score[0], slice(place, place + 1))
        output = model(one.tokens[:, :-1], **one.inputs(), capture=(0, 1, 2))
        labels = one.labels[:, 1:]
        logits = model.lm_head(output.last_hidden)[labels != -100]
        ntp = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
        gva = term(output.captured[2], features_of(one)["teacher"], one.predicting)
        for losses, total in ((first, ntp), (second, gva)):
            for layer, gradient in enumerate(
                torch.autograd.grad(total, list(output.captured.values()), retain_graph=True)
            ):
                losses[layer].append((gradient, one.predicting))
    for layer in range(3):
        (row,) = rows_of(rows, term="main", layer=layer)
        a = torch.cat([gradient.flatten() for gradient, _ in first[layer]]).double()
        b = torch.cat([gradient.flatten() for gradient, _ in second[layer]]).double()
        assert row["ntp_norm"] == pytest.approx(float(a.norm()) / 4, rel=1e-4)
        assert row["gva_norm"] == pytest.approx(float(b.norm()) / 4, rel=1e-4)
        assert row["gradient_cosine"] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-5)
        start = torch.stack([g[0][on[0]][:2] for g, on in first[layer]]).double()
        aimed = torch.stack([g[0][on[0]][:2] for g, on in second[layer]]).double()
        expected = float((start * aimed).sum() / (start.norm() * aimed.norm()))
        assert row["positions"]["gradient_cosine"][0] == pytest.approx(expected, abs=1e-4)
    (unaligned,) = rows_of(watcher(model, count=16)(model, None, 0), encoder="teacher", layer=2)
    assert unaligned["ntp_norm"] == pytest.approx(row["ntp_norm"], rel=1e-5)
    assert unaligned["gva_norm"] > 0


def test_frozen_embeddings_do_not_hide_gradients(model: Painter):
    expected = watcher(model)(model, None, 0)
    model.requires_grad_(False)
    assert watcher(model)(model, None, 0) == expected


def test_patches_and_bands_have_a_target_for_every_position():
    """Those of patches lie on the grid, those of bands in runs of rows."""
    model, looking = decoder(), watcher(decoder())
    sides = []
    for side in (looking.fit, looking.score):
        (batch,) = side
        features = {"patches": drawn(24, 9, FEATURE, seed=3), "bands": drawn(24, 4, FEATURE, seed=4)}
        sides.append([replace(batch, features=features)])
    looking = Watcher(fit=sides[0], score=sides[1], bands=frozenset({"bands"}))
    term = AlignTerm(target="patch", encoder="patches", components=4)
    settings = AlignSettings(target="causal", encoder="bands", components=4, more={"patch": term})
    alignment = build_alignment(settings, features_of(sides[0][0]), hidden_size=WIDTH, seed=3)
    found = looking.measure(model, alignment)
    assert len(rows_of(found.rows, encoder="patches")) == LAYERS + 1 + 2
    for name, row in {
        "main": rows_of(found.rows, term="main", layer=1)[0],
        "patch": rows_of(found.rows, term="patch", layer=1)[0],
    }.items():
        assert -1 <= row["cosine"] <= 1
        assert f"{name}/1/cosine" in found.maps


def test_classes_are_told_where_states_tell_them():
    """By prompts of two kinds; pictures of no class are left out, and both halves have both kinds."""
    model, looking = decoder(), watcher(decoder(), count=40)
    classes = torch.arange(80) % 4 // 2
    classes[:8] = -1
    own, held_out = every_other(classes)
    assert len(own) == len(held_out) == 36
    assert sorted([*own.tolist(), *held_out.tolist()]) == list(range(8, 80))
    assert classes[own].bincount().tolist() == classes[held_out].bincount().tolist() == [18, 18]
    rows = replace(looking, classes=classes)(model, None, 0)
    assert max(row["class_accuracy"] for row in rows) > 0.7  # prompts of 0, 1 against 2, 3 words
    assert {row["class_majority"] for row in rows} == {0.5}


def test_what_cannot_be_measured_is_refused():
    model = decoder()
    with pytest.raises(ValueError, match=r"layer 3 is outside 0\.\.2"):
        watcher(model, layers=(3,))(model, None, 0)
    bare = [replace(batch_of(8, model, seed=1), features=None)]
    with pytest.raises(ValueError, match="without features"):
        watcher(model, fit=bare)(model, None, 0)
    other = [replace(batch_of(8, model, seed=1), grid=(2, 10))]
    with pytest.raises(ValueError, match="2 grids"):
        watcher(model, fit=other)(model, None, 0)


def test_bins_are_means_of_runs():
    values = torch.arange(40.0)[None, :, None]
    binned = in_bins(values)[0, :, 0]
    assert len(binned) == 16
    assert binned[0] == pytest.approx(1.0)  # positions 0, 1 and 2
    assert in_bins(values[:, :5]).shape == (1, 5, 1)


@pytest.mark.parametrize("kind", ["decoder", "painter"])
def test_every_terms_distance_is_its_loss(kind: str):
    """Whatever it aligns, and how far apart it finds things."""
    more = {
        "at": AlignTerm(target="at", loss="mse", layer=2),
        "window": AlignTerm(target="legacy-2025-11"),
        "contrast": AlignTerm(loss="nt-xent"),
        "related": AlignTerm(loss="relational"),
    }
    model: Painter
    if kind == "decoder":
        more["single"] = AlignTerm(target="rep", layer=2)
        model = decoder(rep_token=True)
        codes = torch.randint(0, CODES, (48, GRID[0] * GRID[1]), generator=torch.Generator().manual_seed(3))
        prompts = [[5 + n % 20] * (n % 4) for n in range(48)]
        features = {"teacher": drawn(48, FEATURE, seed=3)}
        whole = text_batch(prompts, codes, prefix_length=7, features=features, rep_token=True)
    else:
        more["single"] = AlignTerm(target="legacy-2025-03", layer=2)  # looks at the state of the very last token
        model = painter()
        whole = batch_of(48, model, seed=3)
    fit, score = select(whole, slice(0, 24)), select(whole, slice(24, 48))
    alignment = aligned(more=more)
    rows = Watcher(fit=[fit], score=[score])(model, alignment, 0)
    model.eval()
    with torch.no_grad():
        losses = compute_losses(model, score, alignment)
    for name, term in alignment.items():
        (row,) = [row for row in rows_of(rows, term=name) if "distance" in row]
        assert row["layer"] == term.layer
        assert row["distance"] == pytest.approx(float(losses.aligned[name]), abs=1e-5), name
        assert ("cosine" in row) == (term.loss == "cosine")
        assert [each["layer"] for each in rows_of(rows, term=name)] == list(range(term.layer + 1))
    assert len(rows_of(rows, term="single", layer=2)[0]["positions"]["cosine"]) == 1


def test_a_watched_training_ends_in_the_same_weights(tmp_path: Path):
    """Bit for bit, with dropout, and its rows stand in the metrics."""
    ends = []
    for name in ("plain", "watched"):
        model, alignment = decoder(), aligned()
        settings = TrainSettings(
            steps=3, batch_size=8, warmup_steps=1, watch_every_steps=2 if name == "watched" else None, device="cpu"
        )
        trainer = Trainer(
            model=model,
            alignment=alignment,
            batches=Fixed(batch_of(8, model, seed=7)),
            validation=[],
            settings=settings,
            run=Run.create(tmp_path / name, "name: tiny\n", {"seed": 1}),
            watcher=watcher(model, count=16),
        )
        trainer.train()
        ends.append({**model.state_dict(), **alignment.state_dict()})
        rows = [row for row in trainer.run.read_metrics() if row["kind"] == "watch"]
        assert sorted({row["step"] for row in rows}) == ([2, 3] if name == "watched" else [])
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@dataclass(frozen=True)
class Fixed:
    """The same batch at every step."""

    one: TrainBatch

    def batch(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> TrainBatch:
        return self.one
