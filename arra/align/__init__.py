"""Global visual alignment, the paper's method: hidden states that predict codes are pulled towards the image's feature.

    gva = mean over images of (1 - mean over the image's predicting positions of cos(MLP(hidden), feature))

The room imports torch alone and knows no model and no file; only training imports it, so sampling cannot depend on it.
Legend: B batch, T sequence, D model, F encoder feature, G target feature (after centring and projection), N images.
Source: ARRA (arXiv 2503.07334), equations 3 to 5 and section 3.3.
"""

from arra.align.alignment import Alignment
from arra.align.losses import cosine_loss
from arra.align.projector import Projector
from arra.align.targets import TargetSpace

__all__ = ["Alignment", "Projector", "TargetSpace", "cosine_loss"]
