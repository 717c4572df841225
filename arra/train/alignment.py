"""From alignment settings and the training features to the alignment term.

Legend: N pictures of the training split, F encoder feature.
"""

from jaxtyping import Float
from torch import Tensor

from arra.align import Alignment, TargetSpace
from arra.errors import ArraError
from arra.train.settings import AlignSettings


def build_alignment(
    settings: AlignSettings, features: Float[Tensor, "N F"], *, hidden_size: int, seed: int
) -> Alignment:
    """The alignment term; its target space is fitted on the training features.

    Raises:
        ArraError: more components than the features have dimensions.
    """
    if settings.components is not None and settings.components > features.shape[1]:
        raise ArraError(f"align.components: {settings.components} of {features.shape[1]} feature dimensions; lower it")
    return Alignment(
        hidden_size=hidden_size,
        feature_size=features.shape[1],
        layer=settings.layer,
        target=settings.target,
        loss=settings.loss,
        weight=settings.weight,
        inner_size=settings.inner_size,
        space=TargetSpace.fit(features, center=settings.center, components=settings.components),
        seed=seed,
    )
