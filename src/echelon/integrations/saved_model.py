"""Find a model as the original libraries name it, and read the settings saved with it. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.errors import BadCheckpoint, InvalidInput, ModelNotFound, UnsupportedModel
from echelon.integrations.keywords import PRECISIONS
from echelon.models.architecture import labels_of, read_config
from echelon.models.hub import DEMO, choose, resolve

if TYPE_CHECKING:
    from echelon.options import Precision


@dataclass(frozen=True, slots=True)
class Located:
    """A model that is on this machine."""

    path: Path  # its folder
    model: str  # its name for :class:`echelon.Reranker`
    revision: str | None  # its commit; None where it has none


@dataclass(frozen=True, slots=True)
class Storage:
    """Where and how to look for a model on the hub."""

    revision: str | None = None  # branch, tag or commit
    cache: str | os.PathLike[str] | None = None  # the cache folder; None is the hub's own
    offline: bool = False  # never connect to the hub
    token: str | bool | None = None  # as ``huggingface_hub`` takes it

    @property
    def is_default(self) -> bool:
        """Whether Echelon's own way to fetch a model is enough."""
        return self.cache is None and self.token is None and not self.offline


def locate(model: object, storage: Storage, *, owner: str | None = None) -> Located:
    """Find a model, fetch it if needed; ``owner`` is put before a hub name that has none.

    Raises:
        InvalidInput: not a text or path.
        ModelNotFound: no such model, no access or no connection.
        UnsupportedModel: no weights that Echelon can read.
    """
    if not isinstance(model, str | os.PathLike):
        raise InvalidInput("model_name_or_path", f"is {model!r}", "Give a folder or a hub name.")
    name = os.fspath(model)
    if name == DEMO or Path(name).expanduser().is_dir():
        found = resolve(name, revision=storage.revision)
        return Located(found.path, name, None)
    if owner is not None and "/" not in name:
        name = f"{owner}/{name}"
    if storage.is_default:
        found = resolve(name, revision=storage.revision)
        # With the commit, the reranker opens it without a second request to the hub.
        return Located(found.path, name, found.revision)
    path = _snapshot(name, storage)
    return Located(path, str(path), None)


def _snapshot(repo: str, storage: Storage) -> Path:
    """Fetch a repository with the caller's cache folder, token and offline switch."""
    from huggingface_hub import HfApi, snapshot_download

    files: list[str] = []  # offline: all cached files; a missing one shows when the model is opened
    try:
        if not storage.offline:
            info = HfApi(token=storage.token).model_info(repo, revision=storage.revision)
            files = choose(entry.rfilename for entry in info.siblings or ())
        folder = snapshot_download(
            repo,
            revision=storage.revision,
            cache_dir=None if storage.cache is None else Path(storage.cache),
            local_files_only=storage.offline,
            token=storage.token,
            allow_patterns=files,
        )
    except Exception as error:  # the error types of the hub's HTTP client keep changing
        raise ModelNotFound(
            f"{repo} could not be fetched ({type(error).__name__}). Check name, revision, token "
            "and connection; with local_files_only, fetch it once without."
        ) from error
    if not files and not storage.offline:
        raise UnsupportedModel(
            f"{repo} has no weights in safetensors or PyTorch format. Name one that has."
        )
    return Path(folder)


@dataclass(frozen=True, slots=True)
class SavedSettings:
    """Settings saved with a model."""

    labels: tuple[str, ...]  # names of the head's outputs
    precision: Precision  # what the weights are stored in; both originals compute in it by default
    max_length: int | None  # the tokenizer's limit; None if it states none
    activations: tuple[str, ...] = ()  # dotted paths of functions, the preferred one first
    prompts: dict[str, str] = field(default_factory=dict)  # name → text put before queries
    default_prompt_name: str | None = None  # the prompt to use when none is named


def read_saved(folder: Path) -> SavedSettings:
    """Read the settings in a model folder.

    Raises:
        ModelNotFound: no model there.
        BadCheckpoint: a file that cannot be read.
        UnsupportedModel: modules besides the transformer, which Echelon would not run.
    """
    config = read_config(folder)
    settings = _sentence_transformers_settings(folder)
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    limit = _read_json(folder / "tokenizer_config.json").get("model_max_length")
    candidates = (settings.get("activation_fn"), _activation_in(config))
    return SavedSettings(
        labels=labels_of(config),
        precision=PRECISIONS.get(dtype, "fp32"),
        max_length=int(limit) if isinstance(limit, int | float) else None,
        activations=tuple(path for path in candidates if isinstance(path, str)),
        prompts={name: text or "" for name, text in (settings.get("prompts") or {}).items()},
        default_prompt_name=settings.get("default_prompt_name"),
    )


def _sentence_transformers_settings(folder: Path) -> dict[str, Any]:
    """Settings of a folder that sentence-transformers saved as a chain of modules."""
    modules = _read_json(folder / "modules.json", list)
    if not modules:
        return {}
    if len(modules) > 1 or modules[0].get("path"):
        raise UnsupportedModel(
            f"{folder / 'modules.json'}: lists modules besides the transformer, and Echelon would "
            "not run them. Stay with sentence_transformers for this model."
        )
    settings: dict[str, Any] = _read_json(folder / "config_sentence_transformers.json")
    return settings


def _activation_in(config: dict[str, Any]) -> Any:
    """The activation's path, where version 4 and 5 saved it or earlier ones did."""
    newer = config.get("sentence_transformers")
    if isinstance(newer, dict) and "activation_fn" in newer:
        return newer["activation_fn"]
    return config.get("sbert_ce_default_activation_function")


def _read_json(path: Path, kind: type = dict) -> Any:
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"{path}: not JSON ({error}). Download the model again.") from error
    if not isinstance(content, kind):
        raise BadCheckpoint(f"{path}: not a JSON {kind.__name__}. Download the model again.")
    return content
