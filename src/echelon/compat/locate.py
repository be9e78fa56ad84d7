"""Which model is meant, in the words of the originals, and where it is stored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from echelon.errors import InvalidInput, ModelNotFound, UnsupportedModel
from echelon.models.hub import DEMO, choose, resolve


@dataclass(frozen=True, slots=True)
class Located:
    """A model that is on this machine now.

    Attributes:
        path: its folder.
        model: what to call it for :class:`echelon.Reranker`.
        revision: its commit; None where it has none.
    """

    path: Path
    model: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class Storage:
    """Where and how to look for a model on the hub.

    Attributes:
        revision: branch, tag or commit.
        cache: the cache folder; None is the hub's own.
        offline: never ask the hub.
        token: as ``huggingface_hub`` takes it.
    """

    revision: str | None = None
    cache: str | os.PathLike[str] | None = None
    offline: bool = False
    token: str | bool | None = None

    @property
    def is_usual(self) -> bool:
        """Whether Echelon's own way of fetching will do."""
        return self.cache is None and self.token is None and not self.offline


def locate(model: object, storage: Storage, *, owner: str | None = None) -> Located:
    """Find a model, fetching it where needed.

    Args:
        model: folder, hub name or ``demo``.
        storage: where to look.
        owner: whose a hub name without an owner is.

    Raises:
        InvalidInput: not a text or path.
        ModelNotFound: not there.
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
    if storage.is_usual:
        found = resolve(name, revision=storage.revision)
        # The commit, so that opening it asks the hub nothing a second time.
        return Located(found.path, name, found.revision)
    path = _snapshot(name, storage)
    return Located(path, str(path), None)


def _snapshot(repo: str, storage: Storage) -> Path:
    """Find or fetch a repository where the caller said."""
    from huggingface_hub import HfApi, snapshot_download

    files: list[str] = []  # offline: whatever is there; what is missing shows when it is opened
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
    except Exception as error:  # the hub's HTTP client, and with it its errors, keeps changing
        raise ModelNotFound(
            f"{repo} is not to be had ({type(error).__name__}). Check name, revision, token and "
            "connection; with local_files_only, fetch it once without."
        ) from error
    if not files and not storage.offline:
        raise UnsupportedModel(
            f"{repo} has no weights in safetensors or PyTorch format. Name one that has."
        )
    return Path(folder)
