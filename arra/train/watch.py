"""What hidden states have in common with an encoder's features, layer by layer and position by position.

    held-out batches with features -> Watcher -> rows of measures (metrics.jsonl while training, probe.json afterwards)

Looking changes nothing: weights, gradients, modes and random state are as before. States are pooled as they come, a few
layers at a time, so memory does not grow with pictures x positions x layers. Numbers are computed in float32 or wider.
Legend: B batch, S fed positions, P image positions, D model, F feature, N pictures, M of them scored, K bins.
Source: the measures are those of REPA (arXiv 2410.06940) and of the Platonic Representation Hypothesis (arXiv
2405.07987), see `arra/align/measures.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from arra.align import Alignment, Alignments
from arra.align.measures import (
    Moments,
    Ridge,
    cknna,
    classified,
    fit_ridge,
    fit_shared_ridge,
    linear_cka,
    reading,
)
from arra.align.positions import LEGACY_LAST
from arra.align.targets import on_grid
from arra.data.batches import NOTHING, TrainBatch
from arra.models import Decoder, Painter
from arra.models.head import head_loss
from arra.train.objective import positions_of
from arra.train.passes import move, select

MAX_BINS = 16
"""Runs of positions, in raster order, that a table shows."""
MIN_IMAGES = 16
"""Fewer pictures than this give numbers that say nothing."""
NEIGHBOURS = 10
"""Of CKNNA; REPA's number."""
FIT_POSITIONS = 64
"""Of a picture, that a map of states is fitted on: neighbours say nearly the same."""
GRADIENT_ROWS, GRADIENT_NUMBERS = 8, 2**24
"""Pictures whose graph exists at one time, and states of one layer, rows x positions x width: three of a 7B's."""
POOLED_BYTES = 2**29
"""Pooled states and sums that exist at one time; more layers than fit are looked at in several passes."""


@dataclass
class Measured:
    """All that was measured."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """One for each encoder and layer, then one for each alignment term and layer that its gradient reaches."""
    maps: dict[str, list[list[float]]] = field(default_factory=dict)
    """(h, w) lists by `ENCODER or TERM/LAYER/MEASURE`, at full resolution."""
    each: dict[tuple[str, int], Float[Tensor, " M"]] = field(default_factory=dict)
    """By encoder and layer: of every scored picture, the mean cosine of the fitted linear projector."""


@dataclass(frozen=True)
class Watcher:
    """Measures a model on pictures that it is not trained on; maps are fitted on `fit` and scored on `score`."""

    fit: Sequence[TrainBatch]
    score: Sequence[TrainBatch]
    """With features, as all pictures of one grid."""
    layers: tuple[int, ...] | None = None
    """Those to look at; None is all, 0 (the embeddings) to the last."""
    bands: frozenset[str] = frozenset()
    """Encoders whose several vectors are of a picture's bands and not of its patches."""
    classes: Int[Tensor, " N"] | None = None
    """Class numbers of the pictures, `fit` and then `score`, where a linear classifier is to tell them; -1 of none. Of
    each class every other picture is held out."""
    neighbours: int = NEIGHBOURS
    gradient_images: int = 64
    """Scored pictures whose gradients are taken, at most."""
    pooled_bytes: int = POOLED_BYTES

    def __call__(self, model: Painter, alignment: Alignments | None, step: int) -> list[dict[str, Any]]:
        """The rows, as `Trainer.watcher` wants them."""
        return self.measure(model, alignment).rows

    def measure(self, model: Painter, alignment: Alignments | None = None) -> Measured:
        """Everything; model and alignment stay as they are.

        Raises:
            ValueError: a layer that the model has not, batches without features, or of several grids.
        """
        num_layers = count_layers(model)
        layers = tuple(range(num_layers + 1)) if self.layers is None else self.layers
        if odd := [layer for layer in layers if not 0 <= layer <= num_layers]:
            raise ValueError(f"layer {odd[0]} is outside 0..{num_layers}")
        grids = {batch.grid or model.settings.grid for batch in (*self.fit, *self.score)}
        if len(grids) != 1:
            raise ValueError(f"pictures of {len(grids)} grids; one is needed, so that positions mean the same")
        (grid,) = grids
        found, readers = Measured(), dict[tuple[str, int], tuple[Ridge, Tensor]]()
        with untouched(model, alignment):
            for part in self._groups(model, layers, grid):
                self._look(model, part, grid, found, readers)
            if alignment is not None:
                self._distances(model, alignment, layers, grid, found)
            self._gradients(model, alignment, layers, grid, found, readers)
        found.rows.sort(key=lambda row: ("term" in row, row.get("term", row["encoder"]), row["layer"]))
        return found

    def _groups(self, model: Painter, layers: Sequence[int], grid: tuple[int, int]) -> Iterator[tuple[int, ...]]:
        """Layers that are looked at in one pass."""
        features = self.fit[0].features
        if not features:
            raise ValueError("batches without features; nothing to compare the states with")
        sizes = [tuple(batch.tokens.shape) for batch in (*self.fit, *self.score)]
        width, bins = model.hidden_size, min(MAX_BINS, grid[0] * grid[1])
        pooled = 4 * width * bins * sum(rows for rows, _ in sizes)
        captured = 4 * width * max(rows * length for rows, length in sizes)
        sums = sum(2 * 8 * width * (width + each.shape[-1]) for each in features.values())
        count = max(1, self.pooled_bytes // (pooled + captured + sums))
        for start in range(0, len(layers), count):
            yield tuple(layers[start : start + count])

    @torch.no_grad()
    def _look(
        self,
        model: Painter,
        layers: tuple[int, ...],
        grid: tuple[int, int],
        found: Measured,
        readers: dict[tuple[str, int], tuple[Ridge, Tensor]],
    ) -> None:
        """Nothing; likeness and readability of these layers are in `found`, the fitted projectors in `readers`."""
        size = grid[0] * grid[1]
        pooled: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        seen: dict[str, list[Tensor]] = {}
        sums: dict[tuple[str, int], tuple[Moments, Moments]] = {}
        offset = 0
        for batch, states in self._states(model, self.fit, layers):
            kept = _fit_positions(len(batch.tokens), size, offset).to(wide_device(model))
            for name, targets in self._targets(batch, grid, wide_device(model)).items():
                seen.setdefault(name, []).append(in_bins(targets).cpu() if targets.shape[1] > 1 else targets.cpu())
                chosen = _taken(targets.expand(-1, size, -1), kept)
                for layer in layers:
                    halves = sums.setdefault((name, layer), (Moments(), Moments()))
                    for half, moments in enumerate(halves):
                        own = _taken(states[layer], kept)[half::2]
                        if len(own):
                            moments.add(own.flatten(0, 1), chosen[half::2].flatten(0, 1))
            for layer in layers:
                pooled[layer].append(in_bins(states[layer]).cpu())
            offset += len(batch.tokens)
        num_fit = offset
        means = {name: torch.cat(parts).mean((0, 1)) for name, parts in seen.items()}
        for (name, layer), halves in sums.items():
            readers[name, layer] = fit_shared_ridge(*halves), means[name].to(wide_device(model))
        cosines: dict[tuple[str, int], list[Tensor]] = {}
        for batch, states in self._states(model, self.score, layers):
            for name, targets in self._targets(batch, grid, wide_device(model)).items():
                seen[name].append(in_bins(targets).cpu() if targets.shape[1] > 1 else targets.cpu())
                for layer in layers:
                    cosine = 1 - _linear_distance(states[layer], targets, *readers[name, layer])
                    cosines.setdefault((name, layer), []).append(cosine.cpu())
            for layer in layers:
                pooled[layer].append(in_bins(states[layer]).cpu())
        for name, parts in seen.items():
            targets = torch.cat(parts)
            for layer in layers:
                row = self._row(torch.cat(pooled[layer]), targets, num_fit, size)
                each = torch.cat(cosines[name, layer])  # (M, P)
                row["linear_cosine"] = float(each.mean())
                row["positions"]["linear_cosine"] = _numbers(in_bins(each.mean(0)[None, :, None])[0, :, 0])
                found.maps[f"{name}/{layer}/linear_cosine"] = _map(each.mean(0), grid)
                found.each[name, layer] = each.mean(1)
                found.rows.append({"encoder": name, "layer": layer, **row})

    def _row(self, states: Tensor, targets: Tensor, num_fit: int, size: int) -> dict[str, Any]:
        """Measures of pooled states (N, K, D) beside features (N, 1 or K, F)."""
        shares = torch.bincount(_bin_of(size), minlength=states.shape[1]).to(states) / size  # bins differ by a position
        whole, whole_targets = (states * shares[:, None]).sum(1), _whole(targets, shares)
        k = min(self.neighbours, len(states) - 1)
        row: dict[str, Any] = {
            "images": len(states),
            "cka": linear_cka(whole, whole_targets),
            "cknna": cknna(whole, whole_targets, k=k),
        }
        row |= _probed(whole, whole_targets, num_fit)
        by_position: dict[str, list[float]] = {}
        for place in range(states.shape[1]):
            own, other = states[:, place], targets[:, place if targets.shape[1] > 1 else 0]
            measured = {"cka": linear_cka(own, other), "cknna": cknna(own, other, k=k), **_probed(own, other, num_fit)}
            for name, value in measured.items():
                by_position.setdefault(name, []).append(round(value, 5))
        if self.classes is not None:
            own, held_out = every_other(self.classes)
            accuracy, majority = classified(whole[own], self.classes[own], whole[held_out], self.classes[held_out])
            row |= {"class_accuracy": accuracy, "class_majority": majority}
        return {**row, "positions": by_position}

    def _states(
        self, model: Painter, batches: Sequence[TrainBatch], layers: tuple[int, ...]
    ) -> Iterator[tuple[TrainBatch, dict[int, Float[Tensor, "B P D"]]]]:
        """Every batch on the model's device, with its states that predict codes."""
        for batch in batches:
            batch = move(batch, model)
            captured = model(batch.tokens[:, :-1], **batch.inputs(), capture=layers).captured
            own = {layer: predicting_states(captured[layer], batch.predicting) for layer in layers}
            yield batch, {layer: states.to(wide_device(model)) for layer, states in own.items()}

    def _targets(
        self, batch: TrainBatch, grid: tuple[int, int], device: torch.device
    ) -> dict[str, Float[Tensor, "B P F"]]:
        """What each encoder says: of the picture (B, 1, F), or for every position (B, P, F)."""
        if not batch.features:
            raise ValueError("batches without features; nothing to compare the states with")
        found, size = {}, grid[0] * grid[1]
        for name, features in batch.features.items():
            features = features.float().to(device)
            if features.dim() == 2:
                found[name] = features[:, None]
            elif name in self.bands:
                band = torch.arange(size, device=features.device) * features.shape[1] // size
                found[name] = features[:, band]
            else:
                found[name] = on_grid(features, grid)
        return found

    @torch.no_grad()
    def _distances(
        self, model: Painter, alignment: Alignments, layers: Sequence[int], grid: tuple[int, int], found: Measured
    ) -> None:
        """Nothing; `found` has the distance of every trained term, at its layer."""
        terms = {name: term for name, term in alignment.items() if _can_measure(term, self.score[0])}
        each: dict[str, list[Tensor]] = {}
        for batch in self.score:
            batch = move(batch, model)
            captured = _forward(model, batch, terms, [term.layer for term in terms.values()]).captured
            for name, term in terms.items():
                hidden = captured[term.layer].float()
                distance = term.each(hidden, *_told(term, batch, hidden), grid=grid)
                each.setdefault(name, []).append(distance.float().cpu())
        for name, term in terms.items():
            means = torch.cat([part.mean(1) for part in each[name]])
            row: dict[str, Any] = {"term": name, "encoder": term.encoder, "layer": term.layer, "loss": term.loss}
            row |= {"images": len(means), "distance": float(means.mean())}
            if term.loss == "cosine":
                row["cosine"] = 1 - row["distance"]
            row["positions"] = {}
            sizes = {part.shape[1] for part in each[name]}
            if len(sizes) == 1:  # a published window may cover padding, which differs from batch to batch
                distances = torch.cat(each[name]).mean(0)
                key, values = ("cosine", 1 - distances) if term.loss == "cosine" else ("distance", distances)
                row["positions"][key] = _numbers(in_bins(values[None, :, None])[0, :, 0])
                if sizes == {grid[0] * grid[1]}:
                    found.maps[f"{name}/{term.layer}/{key}"] = _map(values, grid)
            found.rows.append(row)

    def _gradients(
        self,
        model: Painter,
        alignment: Alignments | None,
        layers: Sequence[int],
        grid: tuple[int, int],
        found: Measured,
        readers: Mapping[tuple[str, int], tuple[Ridge, Tensor]],
    ) -> None:
        """Nothing; rows have the gradients' norms and angles: of a fitted linear projector, and of trained terms."""
        terms = {} if alignment is None else dict(alignment.items())
        terms = {name: term for name, term in terms.items() if _can_measure(term, self.score[0])}
        wanted = sorted({*layers, *(term.layer for term in terms.values())})
        angles: dict[tuple[str, str, int], Angle] = {}
        for part in self._gradient_parts(model.hidden_size):
            batch = move(part, model)
            with only_embeddings_trainable(model, alignment), torch.enable_grad():
                output = _forward(model, batch, terms, wanted)
                states = {layer: output.captured[layer] for layer in wanted}
                ntp = dict(
                    zip(wanted, _grad(next_token_sum(model, output.last_hidden, batch), states, wanted), strict=True)
                )
                for name, term in terms.items():
                    hidden = states[term.layer]
                    told = _told(term, batch, hidden)
                    loss = term(hidden, *told, grid=grid) * told[1].any(1).sum()
                    below = [layer for layer in wanted if layer <= term.layer]
                    for layer, gradient in zip(below, _grad(loss, states, below), strict=True):
                        angle = angles.setdefault(("term", name, layer), Angle())
                        angle.add(ntp[layer], gradient, batch.predicting)
                for name, targets in self._targets(batch, grid, wide_device(model)).items():
                    for layer in layers:
                        leaf = states[layer].detach().float().to(wide_device(model)).requires_grad_()
                        own = predicting_states(leaf, batch.predicting.to(leaf.device))
                        loss = _linear_distance(own, targets, *readers[name, layer]).mean(1).sum()
                        (gradient,) = torch.autograd.grad(loss, leaf)
                        angle = angles.setdefault(("encoder", name, layer), Angle())
                        angle.add(ntp[layer], gradient, batch.predicting)
        for (kind, name, layer), angle in angles.items():
            if kind == "encoder":
                row = next(r for r in found.rows if "term" not in r and (r["encoder"], r["layer"]) == (name, layer))
            else:
                row = next((r for r in found.rows if r.get("term") == name and r["layer"] == layer), {})
                if not row:
                    row |= {"term": name, "encoder": terms[name].encoder, "layer": layer, "positions": {}}
                    found.rows.append(row)
            row |= angle.row()
            cosines = in_bins_of_sums(angle)
            row["positions"]["gradient_cosine"] = _numbers(cosines)
            found.maps[f"{name}/{layer}/gradient_cosine"] = _map(angle.by_position(), grid)

    def _gradient_parts(self, width: int) -> Iterator[TrainBatch]:
        left = self.gradient_images
        for batch in self.score:
            rows = max(1, min(GRADIENT_ROWS, GRADIENT_NUMBERS // (width * batch.tokens.shape[1])))
            for start in range(0, min(len(batch.tokens), left), rows):
                yield select(batch, slice(start, min(start + rows, left)))
            left -= min(len(batch.tokens), left)
            if not left:
                return


@dataclass
class Angle:
    """Sums from which the norms of two gradients, and the angle between them, are told."""

    count: int = 0
    products: Float[Tensor, "3"] = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """Of the two with each other, the first and the second with itself."""
    places: Float[Tensor, "3 P"] | None = None
    """The same at every image position."""

    def add(
        self, first: Float[Tensor, "B S D"], second: Float[Tensor, "B S D"], predicting: Bool[Tensor, "B _"]
    ) -> None:
        """Nothing; the pictures are counted in."""
        place = torch.device("cpu") if first.device.type == "mps" else first.device
        a, b = (each.to(place).double() for each in (first, second))
        each = torch.stack([(a * b).sum(2), a.square().sum(2), b.square().sum(2)])  # (3, B, S)
        self.count += len(a)
        self.products = self.products + each.sum((1, 2)).cpu()
        places = predicting_states(each.permute(1, 2, 0), predicting.to(place)).sum(0).T.cpu()  # (3, P)
        self.places = places if self.places is None else self.places + places

    def row(self) -> dict[str, float]:
        """Root-mean-square norms over pictures, each of its own mean loss, and the cosine of the angle."""
        _, ntp, gva = self.products.tolist()
        return {
            "ntp_norm": (ntp / self.count) ** 0.5,
            "gva_norm": (gva / self.count) ** 0.5,
            "gradient_cosine": float(_cosine(self.products)),
        }

    def by_position(self) -> Float[Tensor, " P"]:
        """The cosine of the angle at every image position; 0 where one of the gradients is nought."""
        assert self.places is not None
        return _cosine(self.places)


def in_bins_of_sums(angle: Angle) -> Float[Tensor, " K"]:
    """The cosine of the angle in every run of positions."""
    assert angle.places is not None
    return _cosine(in_bins(angle.places.T[None])[0].T)


def _cosine(products: Float[Tensor, "3 *P"]) -> Float[Tensor, "*P"]:
    length = (products[1] * products[2]).sqrt()
    return torch.where(length > 0, products[0] / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0)


@contextmanager
def untouched(model: Painter, alignment: Alignments | None) -> Iterator[None]:
    """A block in which both are in eval mode, without autocast; modes, gradients and random state come back."""
    parts = [model, *([] if alignment is None else [alignment])]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    gradients = [(parameter, parameter.grad) for part in parts for parameter in part.parameters()]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.autocast(model.device.type, enabled=False):
            for part in parts:
                part.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def only_embeddings_trainable(model: Painter, alignment: Alignments | None) -> Iterator[None]:
    """A block in which gradients are taken of states alone, also where the embeddings are frozen."""
    parts = [model, *([] if alignment is None else [alignment])]
    flags = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for module in _embeddings(model):
            for parameter in module.parameters():
                if parameter.is_floating_point():  # quantised weights are integers
                    parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _embeddings(model: Painter) -> list[nn.Module]:
    if isinstance(model, Decoder):
        return [model.tok_embeddings, model.cls_embedding]
    found: nn.Module = model.lm.get_input_embeddings()  # type: ignore[operator]
    return [found]


def every_other(classes: Int[Tensor, " N"]) -> tuple[Int[Tensor, " A"], Int[Tensor, " B"]]:
    """The places of every other picture of each class, and of the rest; pictures of no class are in neither."""
    members = [(classes == number).nonzero()[:, 0] for number in classes[classes >= 0].unique()]
    return tuple(torch.cat([places[first::2] for places in members]) for first in (0, 1))  # type: ignore[return-value]


def wide_device(model: Painter) -> torch.device:
    """Where float64 can be computed: the model's device, but not Apple's."""
    return torch.device("cpu") if model.device.type == "mps" else model.device


def count_layers(model: Painter) -> int:
    """Blocks of a model."""
    return model.settings.num_layers if isinstance(model, Decoder) else model.num_layers


def predicting_states(hidden: Float[Tensor, "B S D"], predicting: Bool[Tensor, "B _"]) -> Float[Tensor, "B P D"]:
    """The states that predict codes, in float32 or wider; wherever a row's codes stand."""
    own = hidden[:, : predicting.shape[1]][predicting]  # a target may have asked for the last token's state too
    return own.to(torch.promote_types(hidden.dtype, torch.float32)).unflatten(0, (len(hidden), -1))


def in_bins(values: Float[Tensor, "B P D"]) -> Float[Tensor, "B K D"]:
    """Means over at most `MAX_BINS` runs of positions in raster order."""
    size = values.shape[1]
    place = _bin_of(size)
    weights = F.one_hot(place, min(MAX_BINS, size)).to(values)  # (P, K)
    return torch.einsum("bpd,pk->bkd", values, weights / weights.sum(0))


def _bin_of(size: int) -> Int[Tensor, " P"]:
    return torch.arange(size) * min(MAX_BINS, size) // size


def next_token_sum(model: Painter, last_hidden: Float[Tensor, "B S D"], batch: TrainBatch) -> Float[Tensor, ""]:
    """The sum over rows of each row's mean next-token loss, so that a row's gradient is that of its own mean."""
    labels = batch.labels[:, 1:]
    labelled = labels != NOTHING
    shares = (labelled / labelled.sum(1, keepdim=True).clamp(min=1))[labelled].float()
    hidden = last_hidden[:, : labels.shape[1]][labelled]
    return head_loss(hidden, model.lm_head, labels[labelled], shares=shares)[0]


def _forward(model: Painter, batch: TrainBatch, terms: Mapping[str, Alignment], layers: Sequence[int]) -> Any:
    """The model's output with these layers; of whole sequences where a term looks at the last token's state."""
    whole = any(term.target == LEGACY_LAST for term in terms.values())
    tokens = batch.tokens if whole else batch.tokens[:, :-1]
    return model(tokens, **batch.inputs(), capture=tuple(sorted(set(layers))))


def _can_measure(term: Alignment, batch: TrainBatch) -> bool:
    return batch.features is not None and term.encoder in batch.features


def _told(term: Alignment, batch: TrainBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Features and positions that a term is called with."""
    assert batch.features is not None
    return batch.features[term.encoder].float(), positions_of(batch, term.target)[:, : hidden.shape[1]]


def _grad(loss: Tensor, states: Mapping[int, Tensor], layers: Sequence[int]) -> tuple[Tensor, ...]:
    """Gradients with respect to the states of some layers; nought where the loss does not depend on one."""
    return torch.autograd.grad(
        loss, [states[layer] for layer in layers], retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _linear_distance(
    states: Float[Tensor, "B P D"], targets: Float[Tensor, "B _ F"], reader: Ridge, mean: Float[Tensor, " F"]
) -> Float[Tensor, "B P"]:
    """1 - cosine of what a linear projector reads at every position and the centred feature."""
    return 1 - F.cosine_similarity(reader(states) - mean, targets - mean, dim=2)


def _probed(states: Tensor, targets: Tensor, num_fit: int) -> dict[str, float]:
    """How well the second half's features are read from its states, by a ridge fitted on the first half."""
    ridge = fit_ridge(states[:num_fit], targets[:num_fit])
    score = reading(ridge(states[num_fit:]), targets[num_fit:], mean=targets[:num_fit].mean(0))
    return {"probe_cosine": score.cosine, "probe_r2": score.r2}


def _whole(targets: Float[Tensor, "N _ F"], shares: Float[Tensor, " K"]) -> Float[Tensor, "N F"]:
    return targets[:, 0] if targets.shape[1] == 1 else (targets * shares[:, None]).sum(1)


def _fit_positions(count: int, size: int, offset: int) -> Int[Tensor, "B Q"]:
    """Evenly spaced positions of every picture, shifted from one picture to the next; all where there are few."""
    chosen = torch.arange(min(FIT_POSITIONS, size)) * size // min(FIT_POSITIONS, size)
    return (chosen + offset + torch.arange(count)[:, None]) % size


def _taken(values: Float[Tensor, "B P D"], places: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q D"]:
    return values.gather(1, places[:, :, None].expand(-1, -1, values.shape[2]))


def _numbers(values: Float[Tensor, " K"]) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def _map(values: Float[Tensor, " P"], grid: tuple[int, int]) -> list[list[float]]:
    return [_numbers(row) for row in values.unflatten(0, grid)]
