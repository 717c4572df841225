"""Protocols are data that other rooms read: names that exist, numbers of the papers, teachers never alone."""

import pytest

from arra.encoders import SPECS
from arra.errors import ArraError
from arra.evaluate.card import ENOUGH_IMAGES, METRICS
from arra.evaluate.protocols import PROTOCOLS, Protocol, find_protocol

EVERY = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
DISTANCES = {"fid", "fd", "sfid", "kid_x1000", "cmmd", "precision", "recall", "density", "coverage"}


@EVERY
def test_metrics_and_spaces_are_known(protocol: Protocol) -> None:
    assert set(protocol.metrics) <= set(METRICS)
    assert set(protocol.spaces) <= {"inception", *SPECS}
    assert find_protocol(protocol.name) is protocol
    pairs = [(measure.metric, measure.space) for measure in protocol.measures]
    assert len(set(pairs)) == len(pairs)
    assert {measure.space for measure in protocol.measures if measure.metric in ("fid", "sfid")} <= {"inception"}
    assert "inception" not in {measure.space for measure in protocol.measures if measure.metric == "fd"}


@EVERY
def test_a_biased_distance_never_stands_alone(protocol: Protocol) -> None:
    if protocol.num_images is None or protocol.num_images >= ENOUGH_IMAGES:
        return
    for measure in protocol.measures:
        if measure.metric in ("fid", "fd"):
            assert "kid_x1000" in {other.metric for other in protocol.measures if other.space == measure.space}


@EVERY
def test_the_teachers_space_never_stands_alone(protocol: Protocol) -> None:
    family = None if protocol.teacher is None else SPECS[protocol.teacher].family
    others = {m.space for m in protocol.measures if m.metric in DISTANCES}
    assert any(space == "inception" or SPECS[str(space)].family != family for space in others)


def test_what_the_papers_say() -> None:
    in_paper = {
        name: [(measure.metric, measure.space) for measure in protocol.measures if measure.in_paper]
        for name, protocol in PROTOCOLS.items()
    }
    assert in_paper["mimic-cxr"] == [
        ("fd", "xrv-densenet121"), ("inception_score", "inception"), ("ms_ssim", None), ("clip_score", "biomedclip"),
    ]  # fmt: skip
    assert in_paper["deepeyenet"] == [("fid", "inception"), ("ms_ssim", None), ("clip_score", "biomedclip")]
    assert in_paper["imagenet-256"] == [("fid", "inception"), ("inception_score", "inception")]
    adm = PROTOCOLS["imagenet-256"]
    assert (adm.num_images, adm.per_class, adm.image_size, adm.k) == (50_000, 50, 256, 3)
    assert (adm.is_split, adm.num_reference) == (5000, 10_000)
    assert (PROTOCOLS["mimic-cxr"].num_images, PROTOCOLS["deepeyenet"].num_images) == (1000, 1089)


def test_a_name_that_is_nearly_right() -> None:
    with pytest.raises(ArraError, match=r"^protocol 'imagenet256': unknown; did you mean 'imagenet-256'\? known are"):
        find_protocol("imagenet256")
    with pytest.raises(ArraError, match=r"^protocol 'zzz': unknown; known are mimic-cxr, "):
        find_protocol("zzz")
