"""Models to and from a hub of models: `from_pretrained`, `save_pretrained`, `push_to_hub` in our own format.

`FromHub` is what decoders and image tokenizers share; a repository holds the files of a saved folder, a README.md that
says what it is and how to open it, and a small config.json, by whose requests the hub counts downloads.
"""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from arra.errors import ArraError
from arra.runs import atomic_write, writing

FILES = (
    "config.json",
    "model.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer.safetensors",
)
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")

T = TypeVar("T", bound="FromHub")


@dataclass(frozen=True)
class Description:
    """What a model card says."""

    kind: str
    title: str
    pipeline_tag: str
    facts: list[tuple[str, str]]
    usage: str
    """Python code; `{repo}` stands for the repository."""
    licence: str | None = None


class FromHub(ModelHubMixin):
    """The hub's side of a model: subclasses write, read and describe a folder."""

    def _write_folder(self, folder: Path) -> None:
        """Nothing; the folder holds the model in arra's format."""
        raise NotImplementedError

    @classmethod
    def _read_folder(cls: type[T], folder: Path, **options: Any) -> T:
        """The model of a folder, in arra's format or as LlamaGen's own mixin writes it."""
        raise NotImplementedError

    @classmethod
    def _read_file(cls: type[T], file: Path, **options: Any) -> T:
        """The model of one of LlamaGen's checkpoints."""
        raise NotImplementedError

    def _describe(self) -> Description:
        """What the card is to say."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        file: str | None = None,
        **options: Any,
    ) -> T:
        """The model of a folder or of a repository on the hub, from the cache where it is there.

        A repository is in arra's format or in that of LlamaGen's mixin; `file` names one of LlamaGen's checkpoints in
        it instead. `options` are those of `load_model` or `load_tokenizer`.
        Raises: ArraError when it cannot be fetched or holds no such model.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir():
            return cls._read_file(Path(name) / file, **options) if file else cls._read_folder(Path(name), **options)
        wanted: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "token": token,
            "local_files_only": local_files_only,
        }
        try:
            path = Path(hf_hub_download(name, file, **wanted)) if file is not None else _snapshot(name, wanted)
        except (OSError, EntryNotFoundError, HFValidationError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArraError(
                f"{name}: neither a folder nor a repository that can be fetched ({reason}); check the name, revision, "
                "token and connection"
            ) from error
        return cls._read_folder(path, **options) if file is None else cls._read_file(path, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Nothing, or the commit's address with `push_to_hub=True`; the folder is what a repository would hold."""
        with writing(save_directory):
            return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any) -> str:
        """The address of the commit; `model_card_kwargs={"license": "mit"}` states a licence in the card.

        Other options are those of `huggingface_hub.ModelHubMixin.push_to_hub`: token, private, branch, create_pr, ...
        """
        told = {"repo_id": repo_id, **(model_card_kwargs or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=told, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        self._write_folder(save_directory)
        pointer = {"library_name": "arra", "kind": self._describe().kind}
        atomic_write(save_directory / "config.json", json.dumps(pointer, indent=2) + "\n")

    def generate_model_card(
        self, *, repo_id: str = "FOLDER_OR_REPOSITORY", license: str | None = None, **ignored: Any
    ) -> ModelCard:
        """The README.md: what the model is, where it comes from, how to open it."""
        return model_card(self._describe(), repo=repo_id, licence=license)


def model_card(about: Description, *, repo: str, library: str = "arra", licence: str | None = None) -> ModelCard:
    """The README.md of a model's repository; `library` is what opens it."""
    data = ModelCardData(
        library_name=library,
        license=licence or about.licence or "unknown",
        pipeline_tag=about.pipeline_tag,
        tags=["arra", "autoregressive", about.kind],
    )
    lines = "\n".join(f"| {what} | {value} |" for what, value in about.facts)
    usage = about.usage.format(repo=repo)
    text = f"# {about.title}\n\n| | |\n|---|---|\n{lines}\n\n```python\n{usage}\n```\n"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def register_with_transformers() -> None:
    """Nothing; `AutoModelForCausalLM.from_pretrained` opens what `arra export RUN OUT --to hf` made of decoders.

    Raises: ArraError where `transformers` is missing.
    """
    try:
        import_module("arra.models.transformers_decoder")
    except ImportError as error:
        raise ArraError(
            f"transformers: cannot be imported ({error}); pip install 'arra[llm]' -c constraints.txt"
        ) from error


def _snapshot(name: str, wanted: dict[str, Any]) -> Path:
    folder = Path(snapshot_download(name, allow_patterns=list(FILES), **wanted))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(name, allow_patterns=list(PICKLED_FILES), **wanted))
        if not any(folder.glob("*.bin")):
            raise ArraError(
                f"{name}: the repository holds no model in arra's or the hub mixin's layout; "
                "name one of its checkpoints with file="
            )
    return folder


def origin_facts(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the card about imported weights."""
    origin = about.get("origin")
    if not isinstance(origin, dict):
        return []
    rows = {"imported from": origin.get("source"), "weights taken": origin.get("entry"), "steps": origin.get("steps")}
    return [(what, str(value)) for what, value in rows.items() if value not in (None, "")]


class DecoderFromHub(FromHub):
    """The hub's side of a decoder."""

    def _write_folder(self, folder: Path) -> None:
        from arra.models import save_model

        save_model(self, folder)  # type: ignore[arg-type]

    @classmethod
    def _read_folder(cls: type[T], folder: Path, **options: Any) -> T:
        from arra.models import load_model

        return load_model(folder, **options)  # type: ignore[return-value]

    @classmethod
    def _read_file(cls: type[T], file: Path, **options: Any) -> T:
        from arra.models import load_model

        return load_model("llamagen", weights=file, **options)  # type: ignore[return-value]

    def _describe(self) -> Description:
        from arra.models.llamagen import describe_decoder

        return describe_decoder(self)  # type: ignore[arg-type]
