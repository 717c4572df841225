"""Text-image agreement without a language model: is a picture nearest to the reference of its own caption?

Place in the pipeline: after encoders/ made features of generated pictures (queries) and of the reference pictures of
the same captions in the same order (gallery). A second judge may give captions as gallery, in the space that it shares
with pictures.

Letters: N pictures, F features.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from arra.errors import ArraError

_TIE = 1e-9  # cosines closer than this are one value: float64 products of equal vectors differ by rounding alone


def retrieval_ranks(queries: Float[Tensor, "N F"], gallery: Float[Tensor, "N F"]) -> Int[Tensor, "N"]:
    """How many gallery items come before query i's own item i, by centred cosine: 0 is a hit at once, N - 1 the worst.

    Both sets are centred on the mean of the gallery (pooled features share one direction that says nothing), so a rank
    depends on no other query. Ties are counted half-way and rounded up: the own item comes after half of the
    items as near as itself, hence a query that says nothing (all cosines equal) ranks in the middle and never 0.

    Raises: ArraError when there are fewer than two items or a feature is not finite.
    """
    if len(queries) < 2:
        raise ArraError(f"retrieval needs at least 2 pictures to choose from, got {len(queries)}; evaluate on more")
    if not bool(torch.isfinite(queries).all() and torch.isfinite(gallery).all()):
        raise ArraError("retrieval: a feature is not finite; did the training diverge?")
    center = gallery.double().mean(0)
    asked, offered = queries.double() - center, gallery.double() - center
    smallest = 1e-9 * offered.norm(dim=1).max()  # below it a centred row is rounding error, not a direction
    cosines = _unit(asked, smallest) @ _unit(offered, smallest).T  # (N, N)
    own = cosines.diagonal().unsqueeze(1)  # (N, 1)
    nearer = (cosines > own + _TIE).sum(1)
    tied = ((cosines - own).abs() <= _TIE).sum(1) - 1  # without itself
    return nearer + (tied + 1) // 2


def class_ranks(
    pictures: Float[Tensor, "N F"], references: Float[Tensor, "N F"], labels: Int[Tensor, "N"]
) -> Int[Tensor, "N"]:
    """How many other classes come before a picture's own, by centred cosine with the mean of each class's references.

    Raises: ArraError when there is one class alone.
    """
    classes, places = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ArraError("class retrieval needs pictures of at least 2 classes; evaluate on more")
    sums = torch.zeros(len(classes), references.shape[1], dtype=torch.float64).index_add_(
        0, places, references.double()
    )
    means = sums / torch.bincount(places, minlength=len(classes))[:, None]
    center = means.mean(0)
    smallest = 1e-6 * (means - center).norm(dim=1).max()  # features are float32: below it there is no direction
    cosines = _unit(pictures.double() - center, smallest) @ _unit(means - center, smallest).T
    own = cosines.gather(1, places[:, None])
    # a picture that says nothing is as near to all: its own class comes last
    return (cosines >= own - _TIE).sum(1) - 1


def caption_ranks(pictures: Float[Tensor, "N E"], captions: Float[Tensor, "N E"]) -> Int[Tensor, "N"]:
    """For each picture how many other captions fit it at least as well as its own, by the product of unit vectors.

    A caption with the same words has the same vector and counts against the picture only if it fits strictly better.
    """
    scores = pictures @ captions.T
    own = scores.diagonal()[:, None]
    same = (captions[:, None] == captions[None]).all(2)
    return ((scores >= own) & ~same).sum(1)


def recall_at(ranks: Int[Tensor, "N"], k: int) -> float:
    """Share of queries whose own item is among the `k` nearest, in [0, 1]; by chance it is k / N."""
    return float((ranks < k).double().mean())


def _unit(rows: Tensor, smallest: Tensor) -> Tensor:
    """Rows of length one; a row of length up to `smallest` becomes zero, which has cosine 0 with everything."""
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms <= smallest, 0.0, rows / norms.clamp_min(torch.finfo(rows.dtype).tiny))
