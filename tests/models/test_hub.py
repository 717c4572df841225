"""Models to and from the hub, without a network: a folder, a cache as huggingface_hub lays it, a fake API."""

import copy
import json
import pickle
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn

from arra.errors import ArraError
from arra.models import load_model
from arra.models.decoder import Decoder
from arra.tokenizers.image import ImageTokenizer
from arra.tokenizers.text import train_text_tokenizer
from arra.tokenizers.vq import VQModel, VQSettings
from tests.models.toys import toy_decoder

decoder = partial(toy_decoder, grid=(2, 3))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    settings = VQSettings(channels=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, num_codes=32, code_dim=4)
    return ImageTokenizer(VQModel(settings), name="mine", weights_hash=None, about={"note": "trained on shapes"})


def same(one: nn.Module, other: nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def cached(files: Path, cache: Path) -> Path:
    """The cache as it is after a download of "me/toy" with these files."""
    home = cache / "models--me--toy"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    shutil.copytree(files, home / "snapshots" / COMMIT)
    return cache


def test_a_decoder_in_a_folder(tmp_path: Path) -> None:
    model = decoder()
    model.about["origin"] = {"source": "c2i_B_256.pt", "entry": "model", "steps": 1234}
    assert model.save_pretrained(tmp_path / "deep" / "out") is None
    folder = tmp_path / "deep" / "out"
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.json", "model.safetensors"}
    again = Decoder.from_pretrained(folder)
    same(again, model)
    assert (again.settings, again.about, again.training) == (model.settings, model.about, False)
    half = Decoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.norm.weight.dtype == torch.bfloat16
    again.save_pretrained(folder)
    same(load_model(folder), model)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license) == ("arra", "unknown")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    for words in ('Decoder.from_pretrained("FOLDER_OR_REPOSITORY")', "| steps | 1234 |", "| imported from | c2i_B_256"):
        assert words in card.text
    assert json.loads((folder / "config.json").read_text()) == {"library_name": "arra", "kind": "llamagen"}


def test_a_text_decoder_brings_its_tokenizer(tmp_path: Path) -> None:
    text = train_text_tokenizer(["a red heart", "a blue heart"])
    model = decoder(condition="text", text_vocab_size=text.vocab_size, prefix_length=8)
    model.text_tokenizer = text
    model.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    codes = torch.zeros(1, 2, 3, dtype=torch.int64)
    assert torch.equal(again.logits(codes, prompts=["red heart"]), model.logits(codes, prompts=["red heart"]))
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "text-to-image"


def test_a_tokenizer_in_a_folder(tmp_path: Path) -> None:
    mine = tokenizer()
    mine.save_pretrained(tmp_path / "out", model_card_kwargs={"license": "mit"})
    names = {"README.md", "config.json", "tokenizer.json", "tokenizer.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    again = ImageTokenizer.from_pretrained(tmp_path / "out")
    same(again.model, mine.model)
    assert (again.name, again.about) == ("mine", {"note": "trained on shapes"})
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "arra")
    assert "codes of 4 dimensions" in card.text


def test_what_is_cached_needs_no_network(tmp_path: Path) -> None:
    """The real client over a cache on disk, local files only."""
    model, mine = decoder(), tokenizer()
    model.save_pretrained(tmp_path / "model")
    mine.save_pretrained(tmp_path / "vq")
    options: dict[str, Any] = {"local_files_only": True}
    same(Decoder.from_pretrained("me/toy", cache_dir=cached(tmp_path / "model", tmp_path / "a"), **options), model)
    same(Decoder.from_pretrained("me/toy", cache_dir=tmp_path / "a", revision=COMMIT, **options), model)
    cache = cached(tmp_path / "vq", tmp_path / "b")
    same(ImageTokenizer.from_pretrained("me/toy", cache_dir=cache, **options).model, mine.model)
    with pytest.raises(ArraError, match="me/toy: neither a folder nor a repository that can be fetched"):
        Decoder.from_pretrained("me/toy", cache_dir=tmp_path / "a", revision="v2", **options)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_repository_of_llamagens_own_mixin(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(grid=(2, 2))
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "config.json").write_text(json.dumps({"n_head": 4, "block_size": 4, "dim": 32, "n_layer": 2}))
    state = dict(model.state_dict())
    if suffix == "bin":
        torch.save(state, repository / "pytorch_model.bin")
    else:
        save_file(state, repository / "model.safetensors")
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(repository)

    monkeypatch.setattr("arra.models.hub.snapshot_download", snapshot_download)
    loaded = Decoder.from_pretrained(
        "them/llamagen", revision="v1", token="secret", cache_dir=tmp_path, resid_dropout=0
    )
    same(loaded, model)
    assert loaded.settings.grid == (2, 2)
    assert (loaded.settings.num_heads, loaded.settings.resid_dropout) == (4, 0)
    for request in asked:
        assert (request["name"], request["revision"], request["token"]) == ("them/llamagen", "v1", "secret")
        assert (request["cache_dir"], request["local_files_only"]) == (tmp_path, False)
    wanted = [pattern for request in asked for pattern in request["allow_patterns"]]
    assert ("pytorch_model.bin" in wanted) == (suffix == "bin")  # pickles are fetched only where nothing else is
    (repository / ("pytorch_model.bin" if suffix == "bin" else "model.safetensors")).unlink()
    with pytest.raises(ArraError, match="name one of its checkpoints with file="):
        Decoder.from_pretrained("them/llamagen")


def test_llamagens_own_tokenizer_repository(tmp_path: Path) -> None:
    mine = tokenizer()
    state = dict(mine.model.state_dict()) | {"quantize.codebook_used": torch.zeros(65536)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"codebook_size": 32, "encoder_ch_mult": [1, 2]}))
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    same(loaded.model, mine.model)
    assert loaded.about["origin"]["dropped"] == "quantize.codebook_used"
    (tmp_path / "config.json").write_text(json.dumps({"codebook_l2_norm": False}))
    with pytest.raises(ArraError, match="codebook_l2_norm is false"):
        ImageTokenizer.from_pretrained(tmp_path)


def test_one_checkpoint_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mine = decoder(grid=(16, 16)), tokenizer()
    torch.save({"model": dict(model.state_dict())}, tmp_path / "c2i_tiny_256.pt")
    torch.save({"model": dict(mine.model.state_dict())}, tmp_path / "vq.pt")

    def hf_hub_download(name: str, file: str, **options: Any) -> str:
        assert name == "them/llamagen"
        return str(tmp_path / file)

    monkeypatch.setattr("arra.models.hub.hf_hub_download", hf_hub_download)
    loaded = Decoder.from_pretrained("them/llamagen", file="c2i_tiny_256.pt", num_heads=4)
    same(loaded, model)
    assert loaded.about["origin"]["told"] == {"grid": "the file's name", "num_heads": "given"}
    same(ImageTokenizer.from_pretrained("them/llamagen", file="vq.pt").model, mine.model)
    same(ImageTokenizer.from_pretrained(tmp_path, file="vq.pt").model, mine.model)


@dataclass
class FakeApi:
    """What `push_to_hub` asks of the hub, remembered."""

    token: str | None = None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def create_repo(self, **options: Any) -> SimpleNamespace:
        self.calls.append(("create_repo", options))
        return SimpleNamespace(repo_id=options["repo_id"])

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload_folder", options))
        folder = Path(options["folder_path"])
        self.files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return "https://hub/commit/1"


@pytest.mark.parametrize("kind", ["decoder", "tokenizer"])
def test_push(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeApi()

    def login(token: str | None = None) -> FakeApi:
        api.token = token
        return api

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", login)
    model = decoder() if kind == "decoder" else tokenizer()
    told = {"license": "apache-2.0"}
    address = model.push_to_hub("me/toy", token="secret", private=True, branch="dev", model_card_kwargs=told)
    assert (address, api.token) == ("https://hub/commit/1", "secret")
    (_, created), (_, uploaded) = api.calls
    assert created == {"repo_id": "me/toy", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["revision"]) == ("me/toy", "dev")
    (tmp_path / "pulled").mkdir()
    for name, content in api.files.items():
        (tmp_path / "pulled" / name).write_bytes(content)
    same(Decoder.from_pretrained(tmp_path / "pulled"), model) if isinstance(model, Decoder) else same(
        ImageTokenizer.from_pretrained(tmp_path / "pulled").model, model.model
    )
    card = ModelCard(api.files["README.md"].decode())
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert 'from_pretrained("me/toy")' in card.text


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "nowhere", "a/b/c"):
        with pytest.raises(ArraError, match=f"{name}: neither a folder nor a repository that can be fetched") as caught:
            Decoder.from_pretrained(name, cache_dir=tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ArraError, match=r"hub's repository: Decoder\.from_pretrained"):
        load_model("nobody/nothing")
    with pytest.raises(ArraError, match=r"no model\.json in it"):
        Decoder.from_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ArraError, match="is a file, expected a folder"):
        decoder().save_pretrained(tmp_path / "file")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ArraError, match="no checkpoint in it"):
        Decoder.from_pretrained(tmp_path)
    save_file(dict(decoder().state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(ArraError, match=r"config\.json: not valid JSON"):
        Decoder.from_pretrained(tmp_path)


def test_the_mixin_costs_the_module_nothing() -> None:
    """Copies and pickles as before, and no configuration of the mixin's own."""
    model = decoder()
    same(copy.deepcopy(model), model)
    same(pickle.loads(pickle.dumps(model)), model)
    assert model._hub_mixin_config is None
