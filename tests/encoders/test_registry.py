"""Names of encoders, where their weights are found, and the hash that a store remembers them by."""

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

import arra
from arra.encoders import (
    SPECS,
    Encoder,
    EncoderChoice,
    check_encoder_name,
    encoder_spec,
    encoder_weights_hash,
    load_encoder,
    open_encoder,
)
from arra.encoders import files as room
from arra.encoders.files import located, main_file, weights_hash
from arra.encoders.settings import Output
from arra.encoders.specs import KNOWN, Kind
from arra.encoders.transformers_vision import FAMILIES
from arra.errors import ArraError
from tests.encoders.toy_vision import TOYS, save_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mae")
    save_toy(TOYS["mae-b16"], place)
    return place


@pytest.fixture
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the hub is asked for; it has the MAE's folder and nothing else."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **told: Any) -> str:
        asked.append({"repo": repo, **told})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_every_spec_is_whole() -> None:
    assert set(SPECS) == set(KNOWN)
    assert next(iter(SPECS)) == "efficientnet-lite0"
    for name, known in KNOWN.items():
        spec = known.spec
        assert spec.name == name
        assert known.kind in get_args(Kind)
        assert spec.output == spec.outputs[0] or spec.output in spec.outputs
        assert set(spec.outputs) <= set(get_args(Output))
        assert "mean" in spec.outputs
        assert "patches" in spec.outputs
        assert ("concat" in spec.outputs) == ("cls" in spec.outputs)
        # this one was published with 6 pixels that its patches leave out
        assert not spec.patch_size or spec.image_size % spec.patch_size == (6 if name == "siglip2-so400m14-384" else 0)
        assert all((spec.family, spec.licence, spec.source, spec.num_layers))
        assert (known.repository is None) == (known.kind in ("efficientnet-lite", "xrv")), name
        assert bool(spec.weights_sha256) == (known.kind == "efficientnet-lite")
        if known.repository is not None:
            assert spec.source == f"huggingface.co/{known.repository}"
    assert len({EncoderChoice(name=name).column for name in SPECS}) == len(SPECS)
    assert set(get_args(Kind)) == {*FAMILIES, "biomedclip", "xrv", "efficientnet-lite"}


def test_the_papers_encoders() -> None:
    """CLIP-L's 768 numbers are projected ones, of CLS; BioMedCLIP's 512 too; MedSAM's 256 are a mean."""
    told = {name: (SPECS[name].output, SPECS[name].feature_size) for name in ("clip-l14", "biomedclip", "medsam")}
    assert told == {"clip-l14": ("projected", 768), "biomedclip": ("projected", 512), "medsam": ("mean", 256)}


def test_names() -> None:
    assert encoder_spec("clip-l14") is SPECS["clip-l14"]
    for ask in (check_encoder_name, encoder_spec, arra.load_encoder, encoder_weights_hash, open_encoder):
        with pytest.raises(ArraError, match="encoder 'resnet': unknown; known are efficientnet-lite0, ") as caught:
            ask("resnet")
        assert str(caught.value).endswith("timm:ARCHITECTURE, open_clip:ARCHITECTURE, python:MODULE:NAME")
    with pytest.raises(ArraError, match="encoder 'clip-l': unknown; known are clip-b32, clip-b16, clip-l14, clip-"):
        check_encoder_name("clip-l")
    for name in ("timm:", "timm", ":x", "hf:x", ""):
        with pytest.raises(ArraError, match="unknown"):
            check_encoder_name(name)
    with pytest.raises(ArraError, match="encoder timm:resnet18: what it is like is known once it is loaded"):
        encoder_spec("timm:resnet18")


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("timm:resnet18", "timm_vision", "load_timm"),
        ("open_clip:ViT-B-32", "open_clip_vision", "load_open_clip"),
        ("biomedclip", "open_clip_vision", "load_biomedclip"),
        ("xrv-densenet121", "xrv", "load_xrv"),
        ("python:my.module:encoder", "python_object", "load_python"),
        ("dinov2-b14", "transformers_vision", "load_transformers_vision"),
    ],
)
def test_each_name_has_its_loader(name: str, module: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which gets the whole name and all that was told."""
    stand_in = ModuleType(module)
    given: list[Any] = []
    encoder = load_encoder("efficientnet-lite0")

    def load(*told: Any, **named: Any) -> Encoder:
        given.append((told, named))
        return encoder

    setattr(stand_in, function, load)
    monkeypatch.setitem(sys.modules, f"arra.encoders.{module}", stand_in)
    assert open_encoder(EncoderChoice(name=name, weights="there", image_size=64), device="meta") is encoder
    assert given == [((name,), {"weights": "there", "device": "meta", "image_size": 64})]


def test_a_choice_is_opened_at_its_size(folder: Path) -> None:
    encoder = open_encoder(EncoderChoice(name="mae-b16", weights=str(folder), image_size=48))
    assert isinstance(encoder, Encoder)
    assert encoder.spec.image_size == 48
    assert encoder.encode(torch.zeros(1, 30, 20, 3, dtype=torch.uint8), aggregate="patches").shape == (1, 36, 32)


def test_the_hash_is_that_of_the_loaded_encoder(folder: Path) -> None:
    file = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for place in (folder, folder / "model.safetensors"):
        choice = EncoderChoice(name="mae-b16", weights=str(place))
        assert encoder_weights_hash(choice) == open_encoder(choice).weights_hash == file
    assert open_encoder(choice).spec.weights_sha256 == file
    assert encoder_weights_hash("efficientnet-lite1") == SPECS["efficientnet-lite1"].weights_sha256
    assert load_encoder("efficientnet-lite1").weights_hash == SPECS["efficientnet-lite1"].weights_sha256


def test_a_hash_is_taken_once_and_again_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, times = tmp_path / "w.safetensors", room.file_hash, []

    def counted(file: Path) -> str:
        times.append(file)
        return real(file)

    monkeypatch.setattr(room, "file_hash", counted)
    path.write_bytes(b"one")
    first = weights_hash(path)
    assert weights_hash(path) == first == hashlib.sha256(b"one").hexdigest()
    assert len(times) == 1
    path.write_bytes(b"other")
    assert weights_hash(path) == hashlib.sha256(b"other").hexdigest()


def test_the_hash_of_several_files_knows_each(tmp_path: Path) -> None:
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "a.safetensors").write_bytes(b"a")
    with pytest.raises(ArraError, match=r"shards missing: b\.safetensors"):
        weights_hash(tmp_path)
    found = []
    for content in (b"b", b"c3"):
        (tmp_path / "b.safetensors").write_bytes(content)
        found.append(weights_hash(tmp_path))
    assert found[0] != found[1]


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    """No pickle where there is another; one file by any name; never a guess among several."""
    with pytest.raises(ArraError, match=r"no weights in it; expected one of model\.safetensors"):
        main_file(tmp_path)
    (tmp_path / "mine.pth").touch()
    assert main_file(tmp_path).name == "mine.pth"
    (tmp_path / "other.pth").touch()
    with pytest.raises(ArraError, match=r"several files of weights: mine\.pth, other\.pth; name one of them"):
        main_file(tmp_path)
    for name in ("pytorch_model.bin", "open_clip_model.safetensors", "model.safetensors"):
        (tmp_path / name).touch()
        assert main_file(tmp_path).name == name
    assert main_file(tmp_path / "mine.pth") == tmp_path / "mine.pth"


def test_a_repository_is_fetched_without_code(cache: list[dict[str, Any]], folder: Path) -> None:
    """Configuration and safetensors at the top, and the revision that was asked for; the table knows the repository."""
    assert located("org/name@v1.0", name="mae-b16") == folder
    assert cache == [
        {
            "repo": "org/name",
            "revision": "v1.0",
            "local_files_only": False,
            "allow_patterns": ["*.json", "*.safetensors"],
            "ignore_patterns": ["*/*"],
        }
    ]
    encoder = load_encoder("mae-b16")
    assert (cache[-1]["repo"], cache[-1]["revision"]) == ("facebook/vit-mae-base", None)
    assert encoder_weights_hash("mae-b16") == encoder.weights_hash
    assert cache[-1]["local_files_only"] is True  # asking for a hash fetches nothing
    assert encoder_weights_hash(EncoderChoice(name="mae-b16", weights="me/mae@abc")) == encoder.weights_hash
    assert (cache[-1]["repo"], cache[-1]["revision"]) == ("me/mae", "abc")


def test_pickles_are_fetched_only_where_there_is_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot_download(repo: str, **told: Any) -> str:
        asked.append(told["allow_patterns"])
        if "*.bin" in told["allow_patterns"]:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert located("org/name", name="clip-l14") == tmp_path
    assert asked == [["*.json", "*.safetensors"], ["*.json", "*.bin"]]
    assert located("org/name", name="clip-l14") == tmp_path
    assert len(asked) == 3


def test_a_repository_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **told: str(tmp_path))
    with pytest.raises(ArraError, match=r"encoder clip-l14: org/name holds none of model\.safetensors"):
        located("org/name", name="clip-l14")


def test_a_path_comes_before_a_repository(
    cache: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert located("org/name", name="mae-b16") == Path("org/name")
    assert not cache


@pytest.mark.parametrize(
    "weights", ["nothing", "a/b/c", "../secret/x", "org/..", "/none/such", "org/name@", "org/na me", "~/x"]
)
def test_what_is_neither(cache: list[dict[str, Any]], weights: str) -> None:
    with pytest.raises(ArraError, match="no such file or folder; expected the weights of encoder mae-b16, or"):
        located(weights, name="mae-b16")
    assert not cache


class Gated(errors.GatedRepoError):
    def __init__(self) -> None:  # the library's own wants a response of the network
        Exception.__init__(self, "gated")


def failures() -> list[tuple[Exception, str]]:
    return [
        (errors.LocalEntryNotFoundError("no network"), "org/name could not be fetched, and is not in the hub's cache"),
        (errors.OfflineModeIsEnabled("offline"), r"org/name cannot be fetched \(offline\); check its name"),
        (errors.HFValidationError("bad name"), r"cannot be fetched \(bad name\)"),
        (Gated(), "org/name is gated; accept its licence on huggingface.co/org/name, log in with: hf auth login"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ]


@pytest.mark.parametrize(("error", "expected"), failures())
def test_failures_of_the_hub_are_one_line(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo: str, **told: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ArraError, match=expected) as caught:
        located("org/name", name="mae-b16")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("encoder mae-b16: ")
    assert "hf download org/name --local-dir FOLDER" in str(caught.value) or isinstance(error, Gated)


def test_weights_that_were_never_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client, on an empty cache: nothing is asked of the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArraError, match="encoder dinov2-b14: facebook/dinov2-base has not been fetched yet") as caught:
        encoder_weights_hash("dinov2-b14")
    assert "hf download facebook/dinov2-base --local-dir FOLDER, then set weights to the folder" in str(caught.value)
