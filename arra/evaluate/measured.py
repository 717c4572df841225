"""One number of a set of pictures with what every picture adds to it: what intervals and comparisons are made of.

Legend: N pictures.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float64


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A value that is the mean of per-picture values.

    Where the statistic is of the whole set (a distance between distributions), a picture's value is the statistic plus
    its influence: the derivative with respect to the picture's weight. Influences sum to zero.
    """

    value: float
    per_picture: Float64[np.ndarray, "N"] = field(repr=False)
    of: Literal["generated", "reference"] = "generated"
    """Whose pictures `per_picture` is about; recall and coverage are shares of the reference."""
