"""Global visual alignment, the paper's method: hidden states that predict codes are pulled towards the image's feature.

    gva = mean over images of (1 - mean over the image's predicting positions of cos(MLP(hidden), feature))

Beside it stand the paper's ablations and its rivals' ideas, on the same hidden states:

    Alignment = which states (positions.py) -> projector.py -> distance (losses.py) <- targets.py <- encoder feature

The room imports torch alone and knows no model and no file; only training imports it, so sampling cannot depend on it.
Legend: B batch, T sequence, D model, F encoder feature, G target feature (after centring and projection), N images,
P positions of an image, M positions of all images, C candidates of a contrast.
Source: ARRA (arXiv 2503.07334), equations 3 to 5 and section 3.3.
"""

from arra.align.alignment import Alignment, Alignments
from arra.align.losses import Loss
from arra.align.positions import Places, Target
from arra.align.projector import Projector, ProjectorKind
from arra.align.schedule import Balance, WeightSchedule
from arra.align.targets import TargetSpace, spatially_normalized

__all__ = [
    "Alignment",
    "Alignments",
    "Balance",
    "Loss",
    "Places",
    "Projector",
    "ProjectorKind",
    "Target",
    "TargetSpace",
    "WeightSchedule",
    "spatially_normalized",
]
