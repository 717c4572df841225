"""The paper's laws of alignment: which states, how far apart, and whom the gradient reaches."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import arra
from arra.align import Alignment, Projector, TargetSpace
from arra.align.losses import distances, image_means
from arra.data.batches import TrainBatch, text_batch
from arra.errors import ArraError
from arra.models import Decoder, DecoderSettings
from arra.models.head import Head, head_losses
from arra.train.alignment import build_alignment
from arra.train.objective import compute_losses
from arra.train.settings import AlignSettings

LAYERS, WIDTH, FEATURE, CODES = 3, 32, 10, 40
GRID = (2, 3)


def tiny(**changes: Any) -> Decoder:
    """A decoder with every weight alive: at its first weights the head is zero and sends no gradient back."""
    torch.manual_seed(1)
    fields: dict[str, Any] = {"num_layers": LAYERS, "num_heads": 4, "hidden_size": WIDTH, "num_codes": CODES}
    fields |= {"grid": GRID, "condition": "text", "prefix_length": 7, "text_vocab_size": 30}
    fields |= {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
    model = Decoder(DecoderSettings(**{**fields, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def batch_of(prompts: list[list[int]], *, seed: int = 0, prefix_length: int = 7) -> TrainBatch:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CODES, (len(prompts), math.prod(GRID)), generator=generator)
    features = torch.randn(len(prompts), FEATURE, generator=generator)
    return text_batch(prompts, codes, prefix_length=prefix_length, features={"teacher": features})


def aligning(layer: int = 1, **changes: Any) -> Alignment:
    return Alignment(**{"hidden_size": WIDTH, "feature_size": FEATURE, "layer": layer, "seed": 3, **changes})


def cosine_loss(projected: Tensor, target: Tensor, positions: Tensor) -> Tensor:
    """What an alignment without projector makes of its parts: images first, then their mean."""
    image = positions.nonzero()[:, 0]
    each = distances(projected[positions], target[image])
    per_image = image_means(each, image, torch.ones_like(each), len(positions))
    return per_image.sum() / positions.any(1).sum().clamp(min=1)


PROMPTS = [[], [5, 6], [7, 8, 9, 10, 11, 12], [5]]


def plain_loss(projected: Tensor, target: Tensor, positions: Tensor) -> float:
    """The loss written out with loops."""
    losses = []
    for states, wanted, mask in zip(projected.detach().double(), target.double(), positions, strict=True):
        cosines = [float(s @ wanted / (s.norm() * wanted.norm())) for s, on in zip(states, mask, strict=True) if on]
        losses.append(1 - sum(cosines) / len(cosines))
    return sum(losses) / len(losses)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 1e4]), other=st.sampled_from([1e-3, 1.0, 1e4]))
def test_loss_lies_in_0_to_2_and_is_free_of_scale(seed: int, scale: float, other: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    projected, target = torch.randn(4, 5, 6, generator=generator), torch.randn(4, 6, generator=generator)
    positions = torch.rand(4, 5, generator=generator) < 0.6
    positions[:, 2] = True
    loss = cosine_loss(projected, target, positions)
    assert 0 <= loss <= 2
    assert loss.item() == pytest.approx(plain_loss(projected, target, positions), abs=1e-5)
    torch.testing.assert_close(cosine_loss(projected * scale, target * other, positions), loss)
    rows = torch.rand(4, 1, generator=generator) + 0.1  # every image and every state at a scale of its own
    states = torch.rand(4, 5, 1, generator=generator) + 0.1
    torch.testing.assert_close(cosine_loss(projected * states, target * rows, positions), loss)


def test_both_ends_of_the_loss() -> None:
    target = torch.randn(3, 6)
    positions = torch.ones(3, 4, dtype=torch.bool)
    along = target[:, None].expand(-1, 4, -1).contiguous()
    assert cosine_loss(along, target, positions).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(-along, target, positions).item() == pytest.approx(2, abs=1e-6)
    assert cosine_loss(along * 0, target, positions).item() == pytest.approx(1)  # no direction, no angle


def test_images_weigh_the_same_however_many_positions_they_have() -> None:
    projected, target = torch.randn(3, 6, 5), torch.randn(3, 5)
    positions = torch.tensor([[True] * 6, [False] * 5 + [True], [False] * 6])
    alone = [cosine_loss(projected[i : i + 1], target[i : i + 1], positions[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(cosine_loss(projected, target, positions), (alone[0] + alone[1]) / 2)
    assert cosine_loss(projected[2:], target[2:], positions[2:]) == 0


@pytest.mark.parametrize("prefix_length", [7, 9])
def test_the_aligned_states_are_exactly_those_that_predict_the_codes(prefix_length: int) -> None:
    """For several prompt lengths and paddings: moving any other state changes nothing, moving one of these does."""
    batch = batch_of(PROMPTS, prefix_length=prefix_length)
    assert batch.features is not None
    alignment = aligning()
    predicting = batch.predicting
    assert predicting.sum(1).tolist() == [math.prod(GRID)] * len(PROMPTS)
    hidden = torch.randn(*predicting.shape, WIDTH, generator=torch.Generator().manual_seed(5))
    base = alignment(hidden, batch.features["teacher"], predicting)
    for row in range(len(PROMPTS)):
        for position in range(predicting.shape[1]):
            moved = hidden.clone()
            moved[row, position] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(position))
            changed = bool(alignment(moved, batch.features["teacher"], predicting) != base)
            assert changed == (position >= prefix_length - 1) == predicting[row, position]
    chosen = alignment.projector(hidden[:, prefix_length - 1 :])
    assert base.item() == pytest.approx(
        plain_loss(chosen, batch.features["teacher"], torch.ones(chosen.shape[:2])), abs=1e-5
    )


def loss_of(model: Decoder, alignment: Alignment, batch: TrainBatch) -> Tensor:
    found = compute_losses(model, batch, alignment).gva
    assert found is not None
    return found


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_padding_and_batch_mates_change_no_images_loss(layer: int) -> None:
    model, alignment = tiny().eval(), aligning(layer)
    batch = batch_of(PROMPTS)
    assert batch.features is not None
    codes = batch.tokens[:, 7:]
    alone = []
    for row, ids in enumerate(PROMPTS):
        single = text_batch(
            [ids], codes[row : row + 1], prefix_length=7, features={"teacher": batch.features["teacher"][row : row + 1]}
        )
        alone.append(loss_of(model, alignment, single))
        output = model(single.tokens[:, :-1], prefix_mask=single.prefix_mask, capture=(layer,))
        wanted = plain_loss(
            alignment.projector(output.captured[layer]),
            alignment.space(batch.features["teacher"][row : row + 1]),
            single.predicting,
        )
        assert alone[-1].item() == pytest.approx(wanted, abs=1e-5)
    torch.testing.assert_close(loss_of(model, alignment, batch), torch.stack(alone).mean())
    # another content of the padded positions is never seen
    assert batch.prefix_mask is not None
    filled = batch.tokens.clone()
    filled[:, :7][~batch.prefix_mask] = 29
    refilled = TrainBatch(filled, batch.labels, batch.code_mask, batch.prefix_mask, batch.features)
    torch.testing.assert_close(loss_of(model, alignment, refilled), loss_of(model, alignment, batch))


def trained_parts(model: Decoder) -> set[str]:
    """Which parts got a gradient: a layer's number, or the name of what lies outside the layers."""
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return {name.split(".")[1] if name.startswith("layers.") else name.split(".")[0] for name in names}


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_the_gradient_reaches_blocks_up_to_the_layer_and_none_above(layer: int) -> None:
    model, alignment = tiny(), aligning(layer)
    losses = compute_losses(model, batch_of(PROMPTS), alignment)
    assert losses.gva is not None
    losses.gva.backward()
    assert trained_parts(model) == {"cls_embedding", "tok_embeddings", *map(str, range(layer))}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in alignment.parameters())
    model.zero_grad()
    compute_losses(model, batch_of(PROMPTS), None).total.backward()
    assert trained_parts(model) == {"cls_embedding", "tok_embeddings", "norm", "output", *map(str, range(LAYERS))}


def test_features_get_no_gradient() -> None:
    batch = batch_of(PROMPTS)
    assert batch.features is not None
    features = batch.features["teacher"].requires_grad_()
    hidden = torch.randn(*batch.predicting.shape, WIDTH)
    space = TargetSpace.fit(torch.randn(20, FEATURE), components=4)
    loss = aligning(space=space)(hidden.requires_grad_(), features, batch.predicting)
    loss.backward()
    assert features.grad is None
    assert hidden.grad is not None


def test_the_terms_add_up() -> None:
    model, batch = tiny(), batch_of(PROMPTS)
    both = compute_losses(model, batch, aligning(weight=0.5), z_weight=0.25)
    assert both.gva is not None
    torch.testing.assert_close(both.total, both.ntp + 0.5 * both.gva + 0.25 * both.z)
    none = compute_losses(model, batch, None)
    assert none.gva is None
    assert torch.equal(none.total, none.ntp)
    torch.testing.assert_close(none.ntp, both.ntp)
    torch.testing.assert_close(none.z, both.z)
    unaligned = compute_losses(model, TrainBatch(batch.tokens, batch.labels, batch.code_mask, batch.prefix_mask), None)
    torch.testing.assert_close(unaligned.total, none.total)


def test_the_z_loss_leaves_the_alignment_as_it_is() -> None:
    model, batch = tiny(), batch_of(PROMPTS)
    found = [compute_losses(model, batch, aligning(), z_weight=weight) for weight in (0.0, 1e-4, 10.0)]
    assert found[0].gva is not None
    for other in found[1:]:
        assert other.gva is not None
        assert torch.equal(other.gva, found[0].gva)
        assert not torch.equal(other.total, found[0].total)


def test_weight_zero_measures_and_sends_nothing() -> None:
    model, alignment, batch = tiny(), aligning(weight=0.0), batch_of(PROMPTS)
    losses = compute_losses(model, batch, alignment)
    assert losses.gva is not None
    assert not losses.gva.requires_grad
    assert torch.equal(losses.total, compute_losses(model, batch, None).total)
    torch.testing.assert_close(losses.gva, loss_of(model, aligning(weight=1.0), batch))
    losses.total.backward()
    assert all(parameter.grad is None for parameter in alignment.parameters())


def test_the_projector_has_its_own_random_numbers() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    alignment = aligning(seed=5)
    alignment(torch.ones(1, 4, WIDTH), torch.ones(1, FEATURE), torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again, other = aligning(seed=5), aligning(seed=6)
    pairs = list(zip(alignment.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(one, same) for one, same, _ in pairs)
    assert not all(torch.equal(one, another) for one, _, another in pairs)
    assert not any(isinstance(module, torch.nn.Dropout) for module in alignment.modules())


def test_the_projector_is_two_layers() -> None:
    projector = Projector(WIDTH, 6, inner_size=20, seed=0)
    shapes = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    assert shapes == {
        "first.weight": (20, WIDTH),
        "first.bias": (20,),
        "second.weight": (6, 20),
        "second.bias": (6,),
    }
    assert Projector(WIDTH, 6).state_dict()["first.weight"].shape == (6, WIDTH)
    hidden, values = torch.randn(3, WIDTH), projector.state_dict()
    inner = hidden @ values["first.weight"].T + values["first.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    torch.testing.assert_close(projector(hidden), inner @ values["second.weight"].T + values["second.bias"])


FEATURES = torch.randn(200, FEATURE, generator=torch.Generator().manual_seed(0)) @ torch.diag(
    torch.tensor([9.0, 5, 3, 2, 1.5, 1, 0.8, 0.5, 0.3, 0.1])
) + torch.linspace(3, 5, FEATURE)


def test_the_raw_space_is_the_features() -> None:
    space = TargetSpace.fit(FEATURES, center=False)
    assert torch.equal(space(FEATURES), FEATURES)
    assert (space.size, space.axes) == (FEATURE, None)
    assert torch.equal(aligning().space(FEATURES), FEATURES)


def test_centring_takes_out_the_common_direction() -> None:
    space = TargetSpace.fit(FEATURES)
    assert torch.equal(space(FEATURES), FEATURES - FEATURES.mean(0))
    assert space.explained(FEATURES) == pytest.approx(1)
    raw, centred = (torch.nn.functional.normalize(x, dim=1) for x in (FEATURES, space(FEATURES)))
    assert (raw @ raw.T).mean() > 0.5
    assert abs((centred @ centred.T).mean()) < 0.05


@pytest.mark.parametrize("components", [1, 4, FEATURE])
@pytest.mark.parametrize("center", [True, False])
def test_principal_axes(components: int, center: bool) -> None:
    """Orthonormal, the ones of a plain singular value decomposition, and their share of the variance is told."""
    space = TargetSpace.fit(FEATURES, center=center, components=components)
    assert space.axes is not None
    assert space.size == components
    torch.testing.assert_close(space.axes.T @ space.axes, torch.eye(components), atol=1e-5, rtol=0)
    shifted = (FEATURES - FEATURES.mean(0) if center else FEATURES).double().numpy()
    _, values, rows = np.linalg.svd(shifted, full_matrices=False)
    np.testing.assert_allclose(np.abs((rows[:components] * space.axes.T.numpy()).sum(1)), 1, atol=1e-4)
    kept = (values[:components] ** 2).sum() / (values**2).sum()
    assert space.explained(FEATURES) == pytest.approx(kept, abs=1e-4)
    if components == FEATURE:  # a rotation changes no angle
        assert space.explained(FEATURES) == pytest.approx(1, abs=1e-5)


def test_axes_have_a_sign() -> None:
    """The largest entry of every axis is positive, so that one set of features has one set of axes, in any order."""
    space = TargetSpace.fit(FEATURES, components=5)
    shuffled = TargetSpace.fit(FEATURES[torch.randperm(200)], components=5)
    assert space.axes is not None
    assert shuffled.axes is not None
    torch.testing.assert_close(shuffled.axes, space.axes, atol=1e-4, rtol=1e-4)
    largest = space.axes.gather(0, space.axes.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    with pytest.raises(ValueError, match="11 components of 10 dimensions"):
        TargetSpace.fit(FEATURES, components=11)


def test_alignment_from_settings() -> None:
    alignment = build_alignment(
        AlignSettings(components=4, layer=2, weight=0.5), {"teacher": FEATURES}, hidden_size=WIDTH, seed=1
    )["main"]
    assert (alignment.layer, alignment.weight, alignment.space.size) == (2, 0.5, 4)
    assert alignment.projector.state_dict()["first.weight"].shape == (4, WIDTH)
    fitted = TargetSpace.fit(FEATURES, components=4)
    assert torch.equal(alignment.space(FEATURES), fitted(FEATURES))
    with pytest.raises(ArraError, match=r"align\.components: 11 of 10 feature dimensions; lower it"):
        build_alignment(AlignSettings(components=11), {"teacher": FEATURES}, hidden_size=WIDTH, seed=1)
    assert arra.Alignment is Alignment


def test_the_space_moves_with_the_module() -> None:
    """To another device as to another dtype; it is no weight and is not saved."""
    space = TargetSpace.fit(FEATURES, components=4)
    alignment = aligning(space=space).double()
    assert alignment.space.mean.dtype == torch.float64
    hidden, on = torch.randn(2, 3, WIDTH, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    assert alignment(hidden, FEATURES[:2].double(), on).dtype == torch.float64
    assert set(alignment.state_dict()) == {
        f"projector.{n}.{k}" for n in ("first", "second") for k in ("weight", "bias")
    }
    moved = alignment.to("meta")
    assert moved.space.mean.device.type == "meta"
    assert moved.space.axes is not None
    assert moved.space.axes.device.type == "meta"


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    with np.load(Path(__file__).parent.parent / "golden" / "arra" / "align.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files if stored[key].dtype.kind != "U"}


WINDOWS = {
    "head_real_window": slice(55, 1079),
    "head_toy_window": slice(13, 29),
    "head_window_longer_than_sequence": slice(0, 39),
    "march2025_last_position": slice(29, 30),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_projector_and_loss_of_the_released_code(case: str, released: dict[str, Tensor]) -> None:
    hidden, target = released[f"{case}/hidden"].requires_grad_(), released[f"{case}/target"]
    projector = Projector(hidden.shape[2], target.shape[1])
    names = {"first": "layers.0", "second": "layers.2"}
    theirs = {f"{ours}.{kind}": f"adaptor.{names[ours]}.{kind}" for ours in names for kind in ("weight", "bias")}
    projector.load_state_dict({ours: released[name] for ours, name in theirs.items()})
    projected = projector(hidden)
    torch.testing.assert_close(projected, released[f"{case}/projected"], atol=1e-5, rtol=1e-5)
    positions = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    positions[:, WINDOWS[case]] = True
    loss = cosine_loss(projected, target, positions)
    assert loss.item() == pytest.approx(released[f"{case}/loss"].item(), abs=1e-5)
    hidden.grad = None
    loss.backward()
    torch.testing.assert_close(hidden.grad, released[f"{case}/grad_hidden"], rtol=1e-3, atol=1e-7)
    for name, parameter in projector.named_parameters():
        wanted = released[f"{case}/grad_{theirs[name]}"]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", list(WINDOWS)[:3])
def test_z_loss_of_the_released_code(case: str, released: dict[str, Tensor]) -> None:
    labels, logits = released[f"{case}/labels"][:, 1:], released[f"{case}/logits"][:, :-1]
    # their labels are ids of a vocabulary wider than the logits kept, so only the log-partition is compared
    hidden = logits[labels >= 0]
    _, z_each = head_losses(hidden, Head(torch.eye(hidden.shape[1])), torch.zeros(len(hidden), dtype=torch.int64))
    assert z_each.mean().item() == pytest.approx(released[f"{case}/z_loss"].item(), abs=1e-4)


def test_the_target_chooses_the_states() -> None:
    model, batch = tiny().eval(), batch_of(PROMPTS)
    assert batch.features is not None
    holding = batch.code_mask[:, :-1]
    assert holding.sum(1).tolist() == [math.prod(GRID) - 1] * len(PROMPTS)  # the last code is not fed
    found = {}
    for target, positions in (("hybnext", batch.predicting), ("at", holding)):
        alignment = Alignment(hidden_size=WIDTH, feature_size=FEATURE, layer=1, target=target)  # type: ignore[arg-type]
        hidden = model(batch.tokens[:, :-1], prefix_mask=batch.prefix_mask, capture=(1,)).captured[1]
        wanted = plain_loss(alignment.projector(hidden), alignment.space(batch.features["teacher"]), positions)
        found[target] = loss_of(model, alignment, batch).item()
        assert found[target] == pytest.approx(wanted, abs=1e-5)
    assert found["at"] != found["hybnext"]
