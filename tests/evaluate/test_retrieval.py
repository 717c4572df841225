"""Laws of the retrieval ranks."""

import pytest
import torch

from arra.errors import ArraError
from arra.evaluate.retrieval import class_ranks, recall_at, retrieval_ranks


def features(num: int, num_features: int, *, seed: int) -> torch.Tensor:
    return torch.randn(num, num_features, generator=torch.Generator().manual_seed(seed)) + 3.0


def test_identity_ranks_first() -> None:
    gallery = features(30, 16, seed=0)
    ranks = retrieval_ranks(gallery, gallery)
    assert ranks.tolist() == [0] * 30
    assert recall_at(ranks, 1) == 1.0


def test_the_opposite_ranks_last() -> None:
    gallery = features(30, 2, seed=0)
    opposite = 2 * gallery.mean(0) - gallery
    assert retrieval_ranks(opposite, gallery).tolist() == [29] * 30


@pytest.mark.parametrize("constant", ["zero", "mean", "any"])
def test_a_constant_query_does_not_win(constant: str) -> None:
    gallery = features(21, 8, seed=0)
    query = {"zero": torch.zeros(8), "mean": gallery.mean(0), "any": features(1, 8, seed=1)[0]}[constant]
    ranks = retrieval_ranks(query.expand(21, 8), gallery)
    assert recall_at(ranks, 1) <= 1 / 21
    assert float(ranks.double().mean()) == pytest.approx(10, abs=0.01)


def test_a_constant_gallery_ties_everything() -> None:
    ranks = retrieval_ranks(features(4, 8, seed=0), torch.ones(4, 8))
    assert ranks.tolist() == [2] * 4  # half of three others, rounded up


def test_copies_in_the_gallery_share_the_place() -> None:
    gallery = features(10, 6, seed=0)
    gallery[7] = gallery[2]
    ranks = retrieval_ranks(gallery, gallery)
    assert ranks[2] == ranks[7] == 1
    assert ranks.sum() == 2


def test_scale_and_a_common_shift_do_not_matter() -> None:
    queries, gallery = features(30, 16, seed=0), features(30, 16, seed=1)
    moved = retrieval_ranks(4 * queries + 1, 4 * gallery + 1)
    assert (moved == retrieval_ranks(queries, gallery)).all()


def test_rank_of_a_query_depends_on_no_other_query() -> None:
    queries, gallery = features(30, 16, seed=0), features(30, 16, seed=1)
    others = queries.clone()
    others[1:] = features(29, 16, seed=2) * 100
    assert retrieval_ranks(others, gallery)[0] == retrieval_ranks(queries, gallery)[0]


def test_order_follows_the_pictures() -> None:
    queries, gallery = features(30, 16, seed=0), features(30, 16, seed=1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert (retrieval_ranks(queries[order], gallery[order]) == retrieval_ranks(queries, gallery)[order]).all()


def test_unrelated_features_are_at_chance() -> None:
    ranks = retrieval_ranks(features(2000, 16, seed=0), features(2000, 16, seed=1))
    assert recall_at(ranks, 200) == pytest.approx(0.1, abs=0.03)


def test_recall_counts_ranks_below_k() -> None:
    ranks = torch.tensor([0, 1, 9, 10])
    assert [recall_at(ranks, k) for k in (1, 2, 10, 11)] == [0.25, 0.5, 0.75, 1.0]


def test_what_cannot_be_ranked_is_said() -> None:
    with pytest.raises(ArraError, match="at least 2"):
        retrieval_ranks(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ArraError, match="not finite"):
        retrieval_ranks(torch.full((3, 3), torch.inf), torch.ones(3, 3))


def test_class_ranks_count_the_classes_that_are_nearer():
    references = torch.tensor([[4.0, 0.1], [4.0, -0.1], [-2.0, 3.0], [-2.0, 3.2], [-2.0, -3.0], [-2.1, -3.0]])
    labels = torch.tensor([7, 7, 2, 2, 5, 5])
    assert class_ranks(references, references, labels).tolist() == [0] * 6
    swapped = references[[2, 3, 0, 1, 4, 5]]
    assert class_ranks(swapped, references, labels)[:4].min() > 0
    # order and number of a class's pictures change nothing
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    assert class_ranks(swapped[order], references[order], labels[order]).equal(
        class_ranks(swapped, references, labels)[order]
    )
    # a picture that says nothing ranks last, not first
    nothing = torch.stack([references[labels == kind].mean(0) for kind in (2, 5, 7)]).mean(0).expand(6, 2)
    assert class_ranks(nothing, references, labels).tolist() == [2] * 6
    with pytest.raises(ArraError, match="at least 2 classes"):
        class_ranks(references[:2], references[:2], labels[:2])
