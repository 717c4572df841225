"""What the paper's tables, and papers like it, measure: named sets of measurements, as data.

    --protocol NAME --> find_protocol --> Protocol --> arra.stages (opens sets and spaces, measures)

A protocol says what is compared with what, how many pictures that takes, and where it cannot be what a paper did,
because the paper does not say or because the way it did it is a known mistake.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from arra.errors import ArraError
from arra.evaluate.sets import Filter

INCEPTION, XRV, RAD_DINO, DINOV2, CLIP, CLIP_336 = (
    "inception", "xrv-densenet121", "rad-dino", "dinov2-l14", "clip-l14", "clip-l14-336",
)  # fmt: skip
BIOMEDCLIP = "biomedclip"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of a protocol."""

    metric: str
    """A name of `arra.evaluate.card.METRICS`."""
    space: str | None = None
    """The network in whose vectors it is measured, its pair of towers for CLIP-Scores; None where pixels are."""
    in_paper: bool = False
    """Whether the paper's table has it; the others say what that table does not."""
    note: str | None = None
    """What a reader of the number must know, for its row of the card."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured, and how, under one name."""

    name: str
    use: str
    """What it is for, in a few words."""
    measures: tuple[Measure, ...]
    num_images: int | None = None
    """Pictures that the numbers are told for; None takes all there are."""
    per_class: int | None = None
    """Pictures of every class, where classes are asked for."""
    image_size: int | None = None
    """Pixels a side that both sets are brought to; None leaves pictures as they are."""
    filter: Filter = "bicubic"
    """Of Pillow, for that."""
    split: str | None = None
    """Of a store, whose prompts are painted and whose pictures are the reference."""
    reference: str
    """In words: what the pictures are compared with."""
    num_reference: int | None = None
    """Pictures of the reference that precision and recall compare with; None takes all."""
    k: int = 5
    """Nearest neighbours of precision, recall, density, coverage."""
    is_split: int | None = None
    """Pictures in each split of the Inception Score; None takes all together, which is the least biased."""
    teacher: str | None = None
    """The encoder that the paper aligns its models to: numbers of its space are marked, and never alone."""
    prefix: str = ""
    """Stands before every prompt that a CLIP-Score compares with."""
    differs: tuple[str, ...] = ()
    """What the paper leaves unsaid or does otherwise, a sentence each."""
    sources: tuple[str, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, each once."""
        return tuple(dict.fromkeys(measure.metric for measure in self.measures))

    @property
    def spaces(self) -> tuple[str, ...]:
        """Names of all networks, each once."""
        return tuple(dict.fromkeys(measure.space for measure in self.measures if measure.space is not None))


def _in(space: str | None, *metrics: str, in_paper: bool = False, note: str | None = None) -> tuple[Measure, ...]:
    return tuple(Measure(metric=metric, space=space, in_paper=in_paper, note=note) for metric in metrics)


_NEIGHBOURS = ("precision", "recall", "density", "coverage")
_TEACHER = "BioMedCLIP is also what the paper's models are aligned to"

_MIMIC = Protocol(
    name="mimic-cxr",
    use="the paper's tables 1 to 3 and 5 on chest X-rays",
    measures=(
        *_in(XRV, "fd", in_paper=True, note="the paper calls it FID"),
        *_in(
            INCEPTION, "inception_score", in_paper=True, note="Inception knows no X-rays; it tells variety of texture"
        ),
        *_in(None, "ms_ssim", in_paper=True, note="with the real picture of the same prompt"),
        *_in(BIOMEDCLIP, "clip_score", in_paper=True, note=_TEACHER),
        *_in(XRV, "kid_x1000"),
        *_in(RAD_DINO, "fd", "kid_x1000", *_NEIGHBOURS),
        *_in(XRV, "findings_auroc"),
        *_in(RAD_DINO, "copied"),
        *_in(None, "ms_ssim_within"),
    ),
    num_images=1000,
    split="test",
    reference="the real pictures of the same 1,000 test records",
    teacher=BIOMEDCLIP,
    differs=(
        "The paper does not say which 1,000 test pairs it takes; here they are those with the smallest hashes of their "
        "ids, the same for everyone.",
        "It does not say which layer of XRV's DenseNet-121, which of its weights, or what is compared with what; here "
        "the 1,024 pooled features of densenet121-res224-all, generated against real test pictures.",
        "A Fréchet distance over 1,000 pictures in 1,024 dimensions is mostly bias: its numbers compare with others of "
        "the same count alone, and KID stands beside it.",
        "It does not say the network of its Inception Score, nor the splits; here Inception V3, all pictures together.",
        "It does not say the window, the scales or the data range of MS-SSIM; here torchmetrics' defaults on [0, 1].",
        "Its CLIP-Score is in the space of its own teacher; distances in RAD-DINO and findings in XRV stand beside it.",
    ),
    sources=("paper, section 4.3 and appendix 3", "torchxrayvision", "huggingface.co/microsoft/rad-dino"),
)

_DEEPEYENET = Protocol(
    name="deepeyenet",
    use="the paper's table 5 on retinal pictures",
    measures=(
        *_in(INCEPTION, "fid", in_paper=True),
        *_in(None, "ms_ssim", in_paper=True, note="with the real picture of the same prompt"),
        *_in(BIOMEDCLIP, "clip_score", in_paper=True, note=_TEACHER),
        *_in(INCEPTION, "kid_x1000"),
        *_in(DINOV2, "fd", "kid_x1000", *_NEIGHBOURS, "copied"),
        *_in(None, "ms_ssim_within"),
    ),
    num_images=1089,
    split="test",
    reference="the real pictures of the same 1,089 test records",
    teacher=BIOMEDCLIP,
    differs=(
        "The paper does not say which 1,089 test pairs it takes; here they are those with the smallest hashes of their "
        "names.",
        "It names an Inception V3 trained on ImageNet, not whose; here the one of the FID's reference code "
        "(TensorFlow, 2015), for torchvision's gives other numbers.",
        "1,089 pictures do not span 2,048 dimensions: the distance is mostly bias, and KID stands beside it.",
        "Its CLIP-Score is in the space of its own teacher; distances in DINOv2 stand beside it.",
    ),
    sources=("paper, section 4.3 and appendix 3", "Heusel et al. 2017, arXiv 1706.08500"),
)

_IMAGENET = Protocol(
    name="imagenet-256",
    use="the paper's table 4 on ImageNet, LlamaGen's tables: the ADM evaluation",
    measures=(
        *_in(INCEPTION, "fid", "inception_score", in_paper=True),
        *_in(INCEPTION, "sfid", "precision", "recall", note="in LlamaGen's tables, not in the paper's"),
        *_in(INCEPTION, "fid_infinity", "kid_x1000"),
    ),
    num_images=50_000,
    per_class=50,
    image_size=256,
    reference="VIRTUAL_imagenet256_labeled.npz: statistics of the training pictures, and 10,000 of them",
    num_reference=10_000,
    k=3,
    is_split=5000,
    differs=(
        "Classes are balanced, 50 pictures of each; LlamaGen draws them at random, and the paper does not say.",
        "LlamaGen brings 384 pixels to 256 with torch's bicubic, which does not average over the pixels it drops; here "
        "Pillow's does. The card says what was done.",
        "The Inception Score is the mean over runs of 5,000 pictures in the set's order, as ADM computes it; classes "
        "in turn put all of them into every run.",
        "Precision and recall have 10,000 reference pictures; ADM too. KID compares with these same 10,000.",
        "The paper measures at guidance 2.0 alone, where IS fell as FID fell; compare at guidance 1 and at each "
        "model's own best too.",
        "Not val_imagenet.npz: 50,000 validation pictures are the reference of a tokenizer's rFID and give about 6 in "
        "place of 5.46.",
    ),
    sources=(
        "openai/guided-diffusion, evaluations/evaluator.py and README.md",
        "FoundationVision/LlamaGen, evaluations/c2i and autoregressive/sample/sample_c2i_ddp.py",
        "paper, table 4 and appendix 7",
    ),
)  # fmt: skip

_LAION = Protocol(
    name="laion-coco",
    use="the paper's table 4 on captions of LAION-COCO",
    measures=(
        *_in(INCEPTION, "fid", in_paper=True),
        *_in("clip-b32", "clip_score", in_paper=True, note="the paper does not say which CLIP; LlamaGen's is ViT-B/32"),
        *_in(CLIP, "clip_score", note="CLIP-L is what the paper says its models are aligned to"),
        *_in("clip-b32", "clip_score_x100"),
        *_in(INCEPTION, "kid_x1000"),
        *_in(DINOV2, "fd", "fd_infinity", "kid_x1000", *_NEIGHBOURS),
        *_in(CLIP_336, "cmmd"),
    ),
    num_images=10_000,
    image_size=256,
    split="test",
    reference="the real pictures of the same 10,000 test records",
    teacher=CLIP,
    differs=(
        "The paper names 10,000 test pairs without a list, no reference set, no resizing and no CLIP model; here FID "
        "is against the real pictures of the prompts painted.",
        "Its CLIP-Scores near 0.25 are raw cosines; 0.25 is 25 on the scale of clip_score_x100.",
        "It does not say whether a text stood before the prompts; LlamaGen's script writes `A photo depicts`. Here "
        "nothing stands there.",
        "clip-l14 and clip-l14-336 are of the teacher's family; Inception and DINOv2 stand beside them.",
    ),
    sources=("paper, table 4 and appendix 7", "FoundationVision/LlamaGen, evaluations/t2i"),
)  # fmt: skip

_GENERAL = Protocol(
    name="general",
    use="your own pictures, as one would measure them today",
    measures=(
        *_in(DINOV2, "fd", "fd_infinity", "kid_x1000", *_NEIGHBOURS, "copied"),
        *_in(INCEPTION, "fid", "kid_x1000"),
        *_in(CLIP_336, "cmmd"),
        *_in(CLIP, "clip_score", "clip_score_x100"),
        *_in(None, "ms_ssim_within"),
    ),
    split="test",
    reference="real pictures that no model was trained on",
    sources=(
        "Stein et al. 2023, arXiv 2306.04675 (DINOv2 in place of Inception)",
        "Jayasumana et al. 2024, arXiv 2401.09603 (CMMD)",
        "Naeem et al. 2020, arXiv 2002.09797 (density and coverage)",
        "Bińkowski et al. 2018, arXiv 1801.01401 (KID)",
    ),
)

PROTOCOLS: Mapping[str, Protocol] = {each.name: each for each in (_MIMIC, _DEEPEYENET, _IMAGENET, _LAION, _GENERAL)}


def find_protocol(name: str) -> Protocol:
    """The protocol.

    Raises:
        ArraError: there is none of this name.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ArraError(f"protocol '{name}': unknown; {hint}known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
