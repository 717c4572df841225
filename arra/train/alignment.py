"""From alignment settings and the training features to the alignment terms.

Legend: N pictures of the training split, F encoder feature, P patches or bands.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from arra.align import Alignment, Alignments, Balance, Projector, TargetSpace, WeightSchedule, spatially_normalized
from arra.errors import ArraError
from arra.train.settings import AlignSettings, AlignTerm


def build_alignment(
    settings: AlignSettings, features: Mapping[str, Tensor], *, hidden_size: int, seed: int
) -> Alignments:
    """The alignment terms; their target spaces are fitted on the training features of each teacher.

    The main term's projector starts from `seed`, each further one's from a number of its own.

    Raises:
        ArraError: more components than the features have dimensions, or features that do not fit the target.
    """
    terms = {}
    for place, (name, term) in enumerate(settings.terms().items()):
        where = "align" if place == 0 else f"align.more.{name}"
        found = features[term.encoder]
        check_features(term, tuple(found.shape[1:]), where=where)
        terms[name] = Alignment(
            hidden_size=hidden_size,
            feature_size=found.shape[-1],
            layer=term.layer,
            target=term.target,
            loss=term.loss,
            weight=term.weight,
            projector=term.projector,
            inner_size=term.inner_size,
            space=_space(term, found),
            encoder=term.encoder,
            temperature=term.temperature,
            spatial_norm=term.spatial_norm,
            position_power=term.position_power,
            schedule=WeightSchedule(term.warmup_steps, term.decay, term.stop_step),
            balance=None if term.balance is None else Balance(term.balance),
            seed=seed + 7919 * place,
        )
    return Alignments(terms)


def empty_projectors(settings: AlignSettings, sizes: Mapping[str, int], *, hidden_size: int) -> tuple[Projector, ...]:
    """The projectors of all terms, for teachers of these feature sizes, without memory (device meta)."""
    with torch.device("meta"):
        return tuple(
            Projector(
                hidden_size, term.components or sizes[term.encoder], kind=term.projector, inner_size=term.inner_size
            )
            for term in settings.terms().values()
        )


def check_features(term: AlignTerm, shape: tuple[int, ...], *, where: str) -> None:
    """Nothing.

    Raises:
        ArraError: the features of a picture, of this shape, are not what the term aligns with.
    """
    if term.components is not None and term.components > shape[-1]:
        raise ArraError(f"{where}.components: {term.components} of {shape[-1]} feature dimensions; lower it")
    wanted = {"patch": "output: patches", "causal": "bands: 4"}.get(term.target)
    if (len(shape) == 2) != (wanted is not None):
        told = f"{shape[0]} vectors a picture" if len(shape) == 2 else "one vector a picture"
        raise ArraError(
            f"{where}.target: '{term.target}' does not fit the features of '{term.encoder}', {told}; "
            + (f"give that encoder {wanted}" if wanted else "choose an encoder of whole pictures")
        )
    if term.target == "patch" and round(shape[0] ** 0.5) ** 2 != shape[0]:
        raise ArraError(f"{where}.encoder: '{term.encoder}' has {shape[0]} patches a picture, which make no square")


def _space(term: AlignTerm, features: Float[Tensor, "N F"] | Float[Tensor, "N P F"]) -> TargetSpace:
    if term.spatial_norm is not None:
        features = spatially_normalized(features, term.spatial_norm)
    return TargetSpace.fit(features.flatten(0, -2), center=term.center, components=term.components, whiten=term.whiten)
