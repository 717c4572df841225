"""The laws of alignment for every target, projector and loss: which states, how far, whom the gradient reaches."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arra.align as align
import arra.train.settings as train_settings
from arra.align import Alignment, Alignments, Balance, Projector, TargetSpace, WeightSchedule, spatially_normalized
from arra.align.alignment import MAIN
from arra.align.losses import distances
from arra.align.positions import BY_POSITION, legacy_window
from arra.align.schedule import position_shares
from arra.align.targets import on_grid
from arra.data.batches import Batches, InMemory, TrainBatch, text_batch
from arra.data.conditions import TextConditions
from arra.errors import ArraError
from arra.models import Decoder, DecoderSettings
from arra.runs import Run
from arra.train.alignment import build_alignment, empty_projectors
from arra.train.loop import Trainer
from arra.train.objective import compute_losses, positions_of
from arra.train.settings import AlignSettings, AlignTerm, TrainSettings

LAYERS, WIDTH, FEATURE, CODES, PREFIX = 3, 32, 10, 40, 7
GRID = (2, 3)
P = math.prod(GRID)
TARGETS = ("hybnext", "at", "rep", "patch", "causal", "legacy-2025-11", "legacy-2025-03")
LOSSES = ("cosine", "mse", "nt-xent", "relational")
PROJECTORS = ("mlp", "linear", "max-pool", "avg-pool", "conv")
SHAPES = {"patch": (9, FEATURE), "causal": (2, FEATURE)}


def fits(target: str, projector: str, loss: str) -> bool:
    if projector == "conv" and target not in ("hybnext", "patch", "causal"):
        return False
    return not (target == "causal" and loss in ("nt-xent", "relational"))


COMBINATIONS = [each for each in product(TARGETS, PROJECTORS, LOSSES) if fits(*each)]


def covering(wanted: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Combinations in which every two choices that fit together meet, for laws that need a whole model."""
    found: list[tuple[str, str, str]] = []
    met: set[frozenset[str]] = set()
    places = {word: place for words in (TARGETS, PROJECTORS, LOSSES) for place, word in enumerate(words)}
    for each in sorted(wanted, key=lambda each: sum(places[word] for word in each) % len(LOSSES)):
        pairs = set(map(frozenset, combinations(each, 2)))
        if not pairs <= met:
            found, met = [*found, each], met | pairs
    return found


PAIRWISE = covering(COMBINATIONS)
ALONE = [each for each in COMBINATIONS if each[0] != "legacy-2025-11" and (each[0] == "patch" or each[2] in LOSSES[:2])]
"""The loss of a picture does not depend on the others: not the window of the padded batch, nor contrasts among them."""
PROMPTS = [[], [5, 6], [7, 8, 9, 10, 11], [5]]


def tiny(**changes: Any) -> Decoder:
    """A decoder with every weight alive, and the token of target `rep`."""
    torch.manual_seed(1)
    fields: dict[str, Any] = {"num_layers": LAYERS, "num_heads": 4, "hidden_size": WIDTH, "num_codes": CODES}
    fields |= {"grid": GRID, "condition": "text", "prefix_length": PREFIX, "text_vocab_size": 30, "rep_token": True}
    fields |= {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
    model = Decoder(DecoderSettings(**{**fields, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def features_of(target: str, count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPES.get(target, (FEATURE,)), generator=torch.Generator().manual_seed(seed))


def batch_of(target: str, prompts: list[list[int]] = PROMPTS, *, prefix_length: int = PREFIX) -> TrainBatch:
    """A batch whose last prefix position is the token of target `rep`."""
    codes = torch.randint(0, CODES, (len(prompts), P), generator=torch.Generator().manual_seed(4))
    features = {"teacher": features_of(target, len(prompts))}
    plain = text_batch(prompts, codes, prefix_length=prefix_length, features=features)
    rep = torch.zeros_like(plain.code_mask)
    rep[:, prefix_length - 1] = True
    return replace(plain, rep_mask=rep)


def term_of(target: str, projector: str = "mlp", loss: str = "cosine", **changes: Any) -> Alignment:
    told: dict[str, Any] = {"target": target, "projector": projector, "loss": loss, "layer": 1, "seed": 3}
    return Alignment(hidden_size=WIDTH, feature_size=FEATURE, **(told | changes))


def gva_of(model: Decoder, term: Alignment, batch: TrainBatch, **told: Any) -> Tensor:
    found = compute_losses(model, batch, term, **told).gva
    assert found is not None
    return found


WANTED = {
    "hybnext": range(PREFIX - 1, PREFIX + P - 1),
    "patch": range(PREFIX - 1, PREFIX + P - 1),
    "causal": range(PREFIX - 1, PREFIX + P - 1),
    "at": range(PREFIX, PREFIX + P),
    "rep": [PREFIX - 1],
    "legacy-2025-11": range(PREFIX + P - 1),
    "legacy-2025-03": [PREFIX + P - 1],
}
"""Places in the whole sequence; the last code's own state is never fed but by the release of March 2025."""


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_has_its_states(target: str) -> None:
    """Moving the state of any other position changes nothing, moving one of these does."""
    batch, term = batch_of(target), term_of(target)
    positions = positions_of(batch, term.target)
    assert [row.nonzero()[:, 0].tolist() for row in positions] == [list(WANTED[target])] * len(PROMPTS)
    assert batch.features is not None
    hidden = torch.randn(len(PROMPTS), positions.shape[1], WIDTH, generator=torch.Generator().manual_seed(5))
    base = term(hidden, batch.features["teacher"], positions, grid=GRID)
    for position in range(positions.shape[1]):
        moved = hidden.clone()
        moved[1, position] += 1
        changed = bool(term(moved, batch.features["teacher"], positions, grid=GRID) != base)
        assert changed == (position in WANTED[target]), position


@pytest.mark.parametrize(("target", "projector", "loss"), COMBINATIONS)
def test_the_loss_is_the_formula(target: str, projector: str, loss: str) -> None:
    """Written out with loops, for every state."""
    term, batch = term_of(target, projector, loss, temperature=0.3), batch_of(target)
    assert batch.features is not None
    features = batch.features["teacher"]
    positions = positions_of(batch, term.target)
    hidden = torch.randn(len(PROMPTS), positions.shape[1], WIDTH, generator=torch.Generator().manual_seed(6))
    losses = []
    for row in range(len(PROMPTS)):
        states = hidden[row][positions[row]]
        projected = plain_projection(term.projector, states).double()
        targets = plain_targets(target, features[row], len(states)).double()
        everything = targets if target == "patch" else features.double()
        each = []
        for state, wanted in zip(projected, targets, strict=True):
            if loss == "mse":
                each.append(((state - wanted) ** 2).mean())
            elif loss == "cosine":
                each.append(1 - torch.cosine_similarity(state, wanted, dim=0))
            else:
                cosines = torch.stack([torch.cosine_similarity(state, other, dim=0) for other in everything])
                theirs = torch.stack([torch.cosine_similarity(wanted, other, dim=0) for other in everything])
                own = torch.cosine_similarity(state, wanted, dim=0)
                if loss == "relational":
                    each.append(((cosines - theirs) ** 2).mean())
                else:
                    each.append((cosines / 0.3).exp().sum().log() - own / 0.3)
        losses.append(torch.stack(each).mean())
    found = term(hidden, features, positions, grid=GRID)
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4, abs=1e-5)
    highest = {"cosine": 2, "relational": 4}.get(loss, math.inf)
    assert 0 <= found <= highest
    spread = term.each(hidden, features, positions, grid=GRID)
    assert spread.shape == (len(PROMPTS), len(WANTED[target]))
    assert spread.mean().item() == pytest.approx(found.item(), rel=1e-5)


def plain_projection(projector: Projector, states: Tensor) -> Tensor:
    weights = dict(projector.state_dict())
    if projector.kind.endswith("pool"):  # each output is the mean, or the greatest, of its share of the channels
        edges = [(i * WIDTH // FEATURE, -(-(i + 1) * WIDTH // FEATURE)) for i in range(FEATURE)]
        pooled = [states[:, start:stop].mean(1) for start, stop in edges]
        if projector.kind == "max-pool":
            pooled = [states[:, start:stop].amax(1) for start, stop in edges]
        return torch.stack(pooled, 1)
    if projector.kind == "conv":
        found = torch.zeros(P, FEATURE)
        for place in range(P):
            row, column = divmod(place, GRID[1])
            total = weights["first.bias"].clone()
            for i, j in product((-1, 0, 1), repeat=2):
                if 0 <= row + i < GRID[0] and 0 <= column + j < GRID[1]:
                    total += weights["first.weight"][:, :, i + 1, j + 1] @ states[(row + i) * GRID[1] + column + j]
            found[place] = total
        return found
    inner = states @ weights["first.weight"].T + weights["first.bias"]
    if projector.kind == "linear":
        return inner
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return inner @ weights["second.weight"].T + weights["second.bias"]


def plain_targets(target: str, feature: Tensor, count: int) -> Tensor:
    if target == "causal":  # of two bands the first half of the codes has the first
        return torch.stack([feature[0]] * (count // 2) + [feature[1]] * (count // 2))
    if target == "patch":  # 3 x 3 patches at the places of 2 x 3 codes
        return on_grid(feature[None], GRID)[0]
    return feature.expand(count, -1)


@pytest.mark.parametrize("loss", ["cosine", "nt-xent", "relational"])
def test_losses_of_directions_are_free_of_scale(loss: Any) -> None:
    chance = torch.Generator().manual_seed(0)
    projected, target, others = (torch.randn(5, 6, generator=chance) for _ in range(3))
    base = distances(projected, target, loss=loss, candidates=others)
    scaled = distances(projected * 7, target * 0.1, loss=loss, candidates=others * 100)
    torch.testing.assert_close(base, scaled)


def test_a_candidate_that_is_the_target_is_no_negative() -> None:
    """So that the same picture twice in a batch does not push its states away from its own feature."""
    chance = torch.Generator().manual_seed(0)
    projected, target = torch.randn(2, 6, generator=chance), torch.randn(1, 6, generator=chance).expand(2, 6)
    other = torch.randn(1, 6, generator=chance)
    alone = distances(projected, target, loss="nt-xent", candidates=other)
    twice = distances(projected, target, loss="nt-xent", candidates=torch.cat([target, other, target]))
    torch.testing.assert_close(alone, twice)
    assert (distances(projected, target, loss="nt-xent", candidates=target) == 0).all()


@pytest.mark.parametrize(("target", "projector", "loss"), [each for each in COMBINATIONS if each[1] in ("mlp", "conv")])
def test_rows_without_states_count_for_nothing(target: str, projector: str, loss: str) -> None:
    """Rows of text: their features are of no picture, neither a target nor a candidate, wherever they stand."""
    batch, term = batch_of(target), term_of(target, projector, loss, position_power=1.0)
    assert batch.features is not None
    features, positions = batch.features["teacher"], positions_of(batch, term.target).clone()
    positions[[0, 2]] = False
    hidden = torch.randn(*positions.shape, WIDTH, generator=torch.Generator().manual_seed(5))
    found = term(hidden, features, positions, grid=GRID)
    pictures = [1, 3]
    torch.testing.assert_close(found, term(hidden[pictures], features[pictures], positions[pictures], grid=GRID))
    none = torch.zeros_like(positions)
    empty = term(hidden.requires_grad_(), features, none, grid=GRID)
    assert empty.item() == 0
    (gradient,) = torch.autograd.grad(empty, hidden)  # what measures gradients of parts finds nought here
    assert not gradient.any()


@pytest.mark.parametrize("loss", ["nt-xent", "relational"])
def test_a_picture_alone_knows_itself_among_the_candidates(loss: Any) -> None:
    """Also where the target space rounds a row differently in a batch of another size."""
    chance = torch.Generator().manual_seed(0)
    features = torch.randn(33, 300, generator=chance) + 2
    space = TargetSpace.fit(features, components=7, whiten=True)
    term = Alignment(hidden_size=WIDTH, feature_size=300, space=space, loss=loss)
    hidden, positions = torch.randn(33, 2, WIDTH, generator=chance), torch.ones(33, 2, dtype=torch.bool)
    whole = term.each(hidden, features, positions)
    for row in range(33):
        own = slice(row, row + 1)
        alone = term.each(hidden[own], features[own], positions[own], candidates=features)
        torch.testing.assert_close(alone, whole[own], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_float32_under_autocast(loss: Any) -> None:
    """What narrows is the projector; targets, cosines and distances are those of full precision."""
    chance = torch.Generator().manual_seed(2)
    projected, target, others = (torch.randn(5, 40, generator=chance) for _ in range(3))
    space = TargetSpace.fit(torch.randn(50, 40, generator=chance), components=12)
    plain = distances(projected, target, loss=loss, candidates=others), space(target)
    with torch.autocast("cpu", torch.bfloat16):
        narrowed = distances(projected, target, loss=loss, candidates=others), space(target)
    assert all(map(torch.equal, plain, narrowed))


@pytest.mark.parametrize(("target", "projector", "loss"), PAIRWISE)
def test_the_gradient_reaches_blocks_up_to_the_layer_and_none_above(target: str, projector: str, loss: str) -> None:
    for layer in (0, 2):
        model, term = tiny(), term_of(target, projector, loss, layer=layer)
        gva_of(model, term, batch_of(target)).backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        blocks = {int(name.split(".")[1]) for name in reached if name.startswith("layers.")}
        assert blocks == set(range(layer)), layer
        assert not {name.split(".")[0] for name in reached} & {"norm", "output"}
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


@pytest.mark.parametrize(("target", "projector", "loss"), PAIRWISE)
def test_the_z_loss_leaves_the_alignment_and_zero_weight_leaves_the_model(
    target: str, projector: str, loss: str
) -> None:
    model, batch = tiny(), batch_of(target)
    found = [gva_of(model, term_of(target, projector, loss), batch, z_weight=weight) for weight in (0.0, 10.0)]
    assert torch.equal(*found)
    losses = compute_losses(model, batch, term_of(target, projector, loss, weight=0.0))
    plain = compute_losses(model, batch, None)
    assert losses.gva is not None
    assert not losses.gva.requires_grad
    assert torch.equal(losses.gva, found[0])
    if target != "legacy-2025-03":  # which feeds the last token too, so that products have another shape
        assert torch.equal(losses.total, plain.total)
    torch.testing.assert_close(losses.total, plain.total)


PIECES = [[0], [1, 2], [3]]


@pytest.mark.parametrize(("target", "projector", "loss"), PAIRWISE)
def test_parts_add_up_to_the_whole(target: str, projector: str, loss: str) -> None:
    """The contrast of a part is with the whole batch's features, so gradients are the same in any micro-batch."""
    model, term, batch = tiny(), term_of(target, projector, loss), batch_of(target)
    whole = compute_losses(model, batch, term)
    whole.total.backward()
    wanted = [p.grad.clone() for p in (*model.parameters(), *term.parameters()) if p.grad is not None]
    model.zero_grad()
    term.zero_grad()
    total = 0.0
    for piece in PIECES:
        part = batch.changed(lambda each, piece=piece: each[piece])  # type: ignore[misc]
        told: dict[str, Any] = {"num_tokens": int(batch.labelled.sum()), "num_images": len(PROMPTS)}
        losses = compute_losses(model, part, term, candidates=batch.features, **told)
        losses.total.backward()
        total += losses.total.item()
    assert total == pytest.approx(whole.total.item(), rel=1e-5)
    found = [p.grad for p in (*model.parameters(), *term.parameters()) if p.grad is not None]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("target", "projector", "loss"), covering(ALONE))
def test_padding_and_batch_mates_change_no_images_loss(target: str, projector: str, loss: str) -> None:
    model, term = tiny().eval(), term_of(target, projector, loss)
    whole = gva_of(model, term, batch_of(target))
    alone = []
    for row, ids in enumerate(PROMPTS):
        full = batch_of(target)
        assert full.features is not None
        prefix = PREFIX
        codes = full.tokens[row : row + 1, prefix:]
        single = text_batch(
            [ids], codes, prefix_length=prefix, features={"teacher": full.features["teacher"][row, None]}
        )
        alone.append(gva_of(model, term, replace(single, rep_mask=full.rep_mask[row, None])))  # type: ignore[index]
    torch.testing.assert_close(torch.stack(alone).mean(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_projectors_have_their_own_random_numbers(projector: Any) -> None:
    before = torch.get_rng_state()
    one, same, other = (Projector(WIDTH, 6, kind=projector, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    if not projector.endswith("pool"):
        assert not any(
            map(
                torch.equal,
                [p for p in one.parameters() if p.dim() > 1],
                [p for p in other.parameters() if p.dim() > 1],
            )
        )
    else:
        assert not list(one.parameters())


def test_what_does_not_go_together_is_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"target": "rep", "projector": "conv"}, "a convolution needs a state for every code"),
        ({"target": "causal", "loss": "nt-xent"}, "compares whole pictures or patches"),
        ({"target": "hybnext", "spatial_norm": 0.6}, "spatial_norm is of patches"),
    ]
    for told, message in refused:
        with pytest.raises(ValueError, match=message):
            term_of(**told)
    refused = [
        ({"target": "rep", "projector": "conv"}, "projector: conv needs a state for every code"),
        ({"projector": "linear", "inner_size": 8}, "inner_size: projector 'linear' has no inner layer"),
        ({"target": "causal", "loss": "relational"}, "loss: relational compares whole pictures"),
        ({"spatial_norm": 0.6}, "spatial_norm: is of patches, and target 'hybnext' has none"),
        ({"whiten": True, "center": False}, "whiten: is of centred features"),
    ]
    for told, message in refused:
        with pytest.raises(ValueError, match=message):
            AlignTerm(**told)
    with pytest.raises(ValueError, match="more: 'main' is no name for a term"):
        AlignSettings(more={"main": AlignTerm()})
    with pytest.raises(ValueError, match="target 'rep' needs sequences with its token"):
        compute_losses(tiny(), replace(batch_of("rep"), rep_mask=None), term_of("rep"))
    for target, shape, message in (
        (
            "patch",
            (20, FEATURE),
            r"align\.target: 'patch' does not fit .* one vector a picture; give that encoder output",
        ),
        (
            "hybnext",
            (20, 9, FEATURE),
            r"align\.target: 'hybnext' does not fit .* 9 vectors a picture; choose an encoder",
        ),
        ("patch", (20, 8, FEATURE), r"align\.encoder: 'teacher' has 8 patches a picture, which make no square"),
        ("causal", (20, FEATURE), r"align\.target: 'causal' does not fit .* give that encoder bands"),
    ):
        with pytest.raises(ArraError, match=message):
            build_alignment(AlignSettings(target=target), {"teacher": torch.randn(shape)}, hidden_size=WIDTH, seed=0)


# Several terms at once


def weight_of(term: Alignment) -> Tensor:
    return term.projector.state_dict()["first.weight"]


def test_terms_add_up_and_have_projectors_of_their_own() -> None:
    model, batch = tiny(), batch_of("hybnext")
    assert batch.features is not None
    features = {**batch.features, "fine": features_of("patch", len(PROMPTS), seed=2)}
    batch = replace(batch, features=features)
    settings = AlignSettings(
        weight=0.5,
        more={
            "patches": AlignTerm(target="patch", encoder="fine", layer=2, weight=0.25, projector="conv"),
            "token": AlignTerm(target="rep", loss="mse", layer=3, weight=2.0),
        },
    )
    terms = build_alignment(settings, features, hidden_size=WIDTH, seed=1)
    assert terms.layers == (1, 2, 3)
    assert [name for name, _ in terms.items()] == [MAIN, "patches", "token"]
    losses = compute_losses(model, batch, terms)
    alone = {name: gva_of(model, term, batch) for name, term in terms.items()}
    for name, value in alone.items():
        assert torch.equal(losses.aligned[name], value)
    wanted = losses.ntp + 0.5 * alone[MAIN] + 0.25 * alone["patches"] + 2.0 * alone["token"]
    torch.testing.assert_close(losses.total, wanted)
    first = weight_of(terms[MAIN])
    again = build_alignment(AlignSettings(), features, hidden_size=WIDTH, seed=1)
    assert torch.equal(first, weight_of(again[MAIN]))
    assert not torch.equal(first, weight_of(terms["token"]))
    sizes = {"teacher": FEATURE, "fine": FEATURE}
    empty = empty_projectors(settings, sizes, hidden_size=WIDTH)
    assert [[p.shape for p in one.parameters()] for one in empty] == [
        [p.shape for p in term.parameters()] for _, term in terms.items()
    ]
    left_out = compute_losses(model, batch, terms, weights={MAIN: 0.5, "patches": 0.0, "token": 2.0})
    assert set(left_out.aligned) == {MAIN, "token"}


# Target spaces


def test_whitened_features_have_equal_variances() -> None:
    chance = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 6, generator=chance) @ torch.randn(6, 6, generator=chance) + 5
    for components in (None, 4):
        found = TargetSpace.fit(features, whiten=True, components=components)(features)
        covariance = torch.cov(found.T, correction=0)
        torch.testing.assert_close(covariance, torch.diag(covariance.diag()), atol=1e-3, rtol=0)
        assert (covariance.diag() <= 1).all()
        assert covariance[0, 0] > 0.99
    flat = torch.cat([features, torch.zeros(4000, 1)], 1)  # a direction without variance is not blown up
    assert TargetSpace.fit(flat, whiten=True)(flat)[:, -1].abs().max() < 1e-3
    still = TargetSpace.fit(torch.ones(3, 6), whiten=True, components=2)(torch.ones(1, 6))
    assert torch.equal(still, torch.zeros(1, 2))  # pictures of one feature give no endless numbers
    with pytest.raises(ValueError, match="whitening is of centred features"):
        TargetSpace.fit(features, whiten=True, center=False)


def test_spatial_normalisation_is_of_each_picture_and_channel() -> None:
    patches = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0)) * 5 + 2
    whole = spatially_normalized(patches, 1.0)
    torch.testing.assert_close(whole.mean(1), torch.zeros(3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std(1, correction=0), torch.ones(3, 4), atol=1e-4, rtol=0)
    some = spatially_normalized(patches, 0.6)
    torch.testing.assert_close(
        some - whole,
        (0.4 * patches.mean(1, keepdim=True) / patches.std(1, correction=0, keepdim=True)).expand(3, 9, 4),
        atol=1e-4,
        rtol=1e-4,
    )
    settings = AlignSettings(target="patch", spatial_norm=0.6, components=3)
    term = build_alignment(settings, {"teacher": patches}, hidden_size=WIDTH, seed=0)[MAIN]
    fitted = TargetSpace.fit(some.flatten(0, 1), components=3)
    torch.testing.assert_close(term.space(some), fitted(some))


def test_patches_go_to_the_places_of_the_codes() -> None:
    maps = torch.arange(16.0).view(1, 16, 1).repeat(1, 1, 2)
    assert on_grid(maps, (4, 4)) is maps
    finer = on_grid(torch.tensor([0.0, 1, 2, 3]).view(1, 4, 1), (4, 4))[0, :, 0].view(4, 4)
    assert (finer.diff(dim=1) >= 0).all()
    assert (finer.diff(dim=0) >= 0).all()
    assert finer[0, 0] == 0
    assert finer[-1, -1] == 3
    coarse = on_grid(maps, (2, 2))[0, :, 0]
    assert coarse.mean().item() == pytest.approx(7.5)
    assert (coarse.diff() > 0).all()
    with pytest.raises(ValueError, match="8 patches make no square"):
        on_grid(torch.zeros(1, 8, 2), (2, 4))


# Schedules


def test_no_patch_is_skipped_where_there_are_more_than_codes() -> None:
    for place in range(64):
        lit = torch.zeros(1, 64, 1)
        lit[0, place] = 1
        assert on_grid(lit, GRID).sum() > 0, place


def test_schedules_are_the_formulas() -> None:
    plain = WeightSchedule()
    assert [plain.factor(step, steps=5) for step in range(6)] == [1, 1, 1, 1, 1, 0]
    warm = WeightSchedule(warmup_steps=4)
    assert [warm.factor(step, steps=9) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    linear = WeightSchedule(decay="linear", stop_step=4)
    assert [linear.factor(step, steps=9) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    cosine = WeightSchedule(warmup_steps=2, decay="cosine")
    found = [cosine.factor(step, steps=10) for step in range(10)]
    assert found[:2] == [0.5, 1]
    assert found[6] == pytest.approx(0.5)
    assert found[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert WeightSchedule(stop_step=3).factor(3, steps=10) == 0


def test_position_weights_have_mean_one_and_rise() -> None:
    assert position_shares(4, 0.0) == [1, 1, 1, 1]
    assert position_shares(4, 1.0) == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert position_shares(3, 2.0) == pytest.approx([3 / 14, 12 / 14, 27 / 14])
    model, batch = tiny(), batch_of("hybnext")
    plain, rising = (term_of("hybnext", position_power=power) for power in (0.0, 2.0))
    assert batch.features is not None
    hidden = model(batch.tokens[:, :-1], prefix_mask=batch.prefix_mask, capture=(1,)).captured[1]
    each = plain.each(hidden, batch.features["teacher"], batch.predicting)
    assert each.shape == (len(PROMPTS), P)
    wanted = (each * torch.tensor(position_shares(P, 2.0))).mean()
    torch.testing.assert_close(gva_of(model, rising, batch), wanted)


RECORDS, STEPS = 12, 8


def make_trainer(path: Path, align: AlignSettings | None, **changes: Any) -> Trainer:
    chance = torch.Generator().manual_seed(3)
    features = {"teacher": torch.randn(RECORDS, FEATURE, generator=chance)}
    pictures = InMemory(torch.randint(0, CODES, (RECORDS, P), generator=chance), features)
    conditions = TextConditions([[[2 + row]] for row in range(RECORDS)], 4)
    fields: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "warmup_steps": 2, "seed": 1, "log_every_steps": 1}
    model = tiny(rep_token=False, prefix_length=4)
    return Trainer(
        model=model,
        alignment=None if align is None else build_alignment(align, features, hidden_size=WIDTH, seed=1),
        batches=Batches(conditions, pictures, batch_size=4, seed=1),
        validation=[],
        settings=TrainSettings(**{**fields, **changes}),
        run=Run.create(path, "name: tiny\n", {"seed": 1}),
    )


def weights_of(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.parameters.values()]


def trained(path: Path, align: AlignSettings | None) -> list[Tensor]:
    """The weights after three steps."""
    trainer = make_trainer(path, align)
    for _ in range(3):
        trainer.train_step()
    return weights_of(trainer)


@pytest.fixture(scope="module")
def unaligned(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return trained(tmp_path_factory.mktemp("unaligned") / "run", None)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_weight_zero_trains_the_baseline_bit_for_bit(
    loss: Any, projector: Any, unaligned: list[Tensor], tmp_path: Path
) -> None:
    zero, aligned = (
        trained(tmp_path / str(weight), AlignSettings(loss=loss, projector=projector, weight=weight))
        for weight in (0.0, 1.0)
    )
    assert all(map(torch.equal, unaligned, zero))
    assert not all(map(torch.equal, unaligned, aligned))


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_train_the_same_model(loss: Any, tmp_path: Path) -> None:
    settings = AlignSettings(loss=loss, balance=0.5)
    whole, parts = (make_trainer(tmp_path / str(m), settings, micro_batch_size=m) for m in (None, 1))
    for _ in range(4):
        one, other = whole.train_step(), parts.train_step()
        assert one is not None
        assert other is not None
        assert one.aligned["main"] == pytest.approx(other.aligned["main"], rel=1e-4)
    for name, balance in whole.balances().items():
        assert balance.factor == pytest.approx(parts.balances()[name].factor, rel=1e-3)
    torch.testing.assert_close(weights_of(whole), weights_of(parts), rtol=1e-3, atol=1e-4)


def test_a_stopped_term_is_left_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", AlignSettings(stop_step=3, warmup_steps=2))
    found = [trainer.train_step() for _ in range(5)]
    assert [each is not None and not each.aligned for each in found] == [False] * 3 + [True] * 2
    rows = list(metrics(trainer, tmp_path / "logged", AlignSettings(stop_step=3, warmup_steps=2)))
    assert [row["align_weight"] for row in rows] == [0.5, 1, 1, 0, 0, 0, 0, 0]
    assert [row["gva_loss"] is None for row in rows] == [False] * 3 + [True] * 5


def metrics(trainer: Trainer, path: Path, settings: AlignSettings) -> Iterator[dict[str, Any]]:
    other = make_trainer(path, settings)
    other.train()
    yield from (row for row in other.run.read_metrics() if row["kind"] == "train")


def test_the_balance_is_measured_where_the_gradient_enters(tmp_path: Path) -> None:
    """The factor after a step is the share times the ratio of both gradients' norms at the states, by autograd."""
    settings = AlignSettings(balance=0.25, layer=2)
    trainer = make_trainer(tmp_path / "run", settings)
    assert trainer.alignment is not None
    term = trainer.alignment[MAIN]
    batch = trainer.batches.batch(0)
    output = trainer.model(batch.tokens[:, :-1], **batch.inputs(), capture=(2,))
    states = output.captured[2]
    assert batch.features is not None
    (own,) = torch.autograd.grad(term(states, batch.features["teacher"], batch.predicting), states, retain_graph=True)
    logits = trainer.model.head(output.last_hidden[batch.predicting])
    (other,) = torch.autograd.grad(F.cross_entropy(logits, batch.labels[:, 1:][batch.predicting]), states)
    assert term.weight_at(0, steps=STEPS) == 1
    trainer.train_step()
    assert term.weight_at(1, steps=STEPS) == pytest.approx((0.25 * other.norm() / own.norm()).item(), rel=1e-3)


def test_a_step_without_gradient_on_one_side_upsets_no_balance(tmp_path: Path) -> None:
    """A head of zeros, as every fresh decoder has it, sends nothing into the states of the first step."""
    balance = Balance(0.5)
    for aligned, other in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        balance.update(aligned=aligned, other=other)
        assert balance == Balance(0.5)
    trainer = make_trainer(tmp_path / "run", AlignSettings(balance=0.5))
    assert isinstance(trainer.model, Decoder)
    torch.nn.init.zeros_(trainer.model.output.weight)
    trainer.train()
    rows = [row for row in trainer.run.read_metrics() if row["kind"] == "train"]
    assert [row["align_weight"] for row in rows[:2]] == [1, 1]
    assert all(row["align_weight"] > 0 and row["gva_loss"] is not None for row in rows)
    for row in rows:  # the weight that is told is the one that was trained with
        assert row["loss"] == pytest.approx(row["ntp_loss"] + row["align_weight"] * row["gva_loss"], rel=1e-5)


def test_the_balance_is_an_average_that_a_resumed_run_goes_on_with(tmp_path: Path) -> None:
    balance = Balance(0.5, decay=0.9)
    assert balance.factor == 1
    balance.update(aligned=4.0, other=16.0)
    assert balance.factor == pytest.approx(0.5 * 2)
    balance.update(aligned=1.0, other=36.0)
    assert balance.factor == pytest.approx(0.5 * (0.9 * 2 + 6) / 1.9)
    balance.update(aligned=0.0, other=1.0)
    assert balance.factor <= Balance.LIMIT
    settings = AlignSettings(balance=0.3)
    whole = make_trainer(tmp_path / "whole", settings, checkpoint_every_steps=3)
    whole.train()
    first = make_trainer(tmp_path / "run", settings, checkpoint_every_steps=3)
    for _ in range(3):
        first.train_step()
    first.save()
    second = make_trainer(tmp_path / "run", settings, checkpoint_every_steps=3)
    second.train()
    assert all(map(torch.equal, weights_of(whole), weights_of(second)))
    assert whole.balances()[MAIN] == second.balances()[MAIN]


# The published windows, by name


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    with np.load(Path(__file__).parent.parent / "golden" / "arra" / "align.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files if stored[key].dtype.kind != "U"}


PUBLISHED = {
    "head_real_window": ("legacy-2025-11", -1025),
    "head_toy_window": ("legacy-2025-11", -17),
    "head_window_longer_than_sequence": ("legacy-2025-11", -1025),
    "march2025_last_position": ("legacy-2025-03", -1025),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_releases_by_name(case: str, released: dict[str, Tensor]) -> None:
    """Loss and gradients of the released code, the window found by the target's name in the padded batch."""
    target, start = PUBLISHED[case]
    hidden, feature = released[f"{case}/hidden"].requires_grad_(), released[f"{case}/target"]
    term = Alignment(hidden_size=hidden.shape[2], feature_size=feature.shape[1], target=target)  # type: ignore[arg-type]
    term.projector.load_state_dict(
        {
            f"{ours}.{kind}": released[f"adaptor.layers.{theirs}.{kind}"]
            for ours, theirs in (("first", 0), ("second", 2))
            for kind in ("weight", "bias")
        }
    )
    shape = (hidden.shape[0], hidden.shape[1])
    window = legacy_window(term.target, shape, start=start)
    if start == -1025:
        tokens, labels = released[f"{case}/input_ids"], released[f"{case}/labels"]
        batch = TrainBatch(tokens, labels, labels >= 0, None)
        assert torch.equal(positions_of(batch, term.target), window)
    loss = term(hidden, feature, window)
    assert loss.item() == pytest.approx(released[f"{case}/loss"].item(), abs=1e-5)
    loss.backward()
    torch.testing.assert_close(hidden.grad, released[f"{case}/grad_hidden"], rtol=1e-3, atol=1e-7)
    for name, parameter in term.projector.named_parameters():
        theirs = {"first": "layers.0", "second": "layers.2"}[name.split(".")[0]]
        wanted = released[f"{case}/grad_adaptor.{theirs}.{name.split('.')[1]}"]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6)


def test_settings_and_terms_know_the_same_words() -> None:
    for name, module in (("Target", align.positions), ("Loss", align.losses), ("ProjectorKind", align.projector)):
        assert getattr(train_settings, name) == getattr(module, name)
    assert train_settings.Decay == align.schedule.Decay
    assert (train_settings.ON_GRID, train_settings.CONTRASTING) == (align.positions.ON_GRID, align.losses.CONTRASTING)
    assert train_settings.MAIN == MAIN


def test_one_term_alone_is_the_main_one() -> None:
    term = term_of("hybnext")
    found = Alignments.of(term)
    assert found is not None
    assert found.items() == [(MAIN, term)]
    assert Alignments.of(None) is None
    assert Alignments.of(found) is found
    assert set(BY_POSITION) == {"patch", "causal"}
