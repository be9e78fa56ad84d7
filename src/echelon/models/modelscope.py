"""Fetch a model from ModelScope, through ModelScope's own package.

That package does the transfer and storage, so its cache (``MODELSCOPE_CACHE``) and endpoint apply.
``HF_HUB_OFFLINE`` forbids these downloads too: it is the one switch that Echelon's users set.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from echelon.errors import (
    EchelonWarning,
    MissingDependency,
    ModelNotFound,
    StorageError,
    UnsupportedModel,
)
from echelon.models.repositories import choose, complete, described, of_disk, redacted

PREFIX = "modelscope:"
_NAME = re.compile(PREFIX + r"(\w[\w.-]*/\w[\w.-]*)(?:@([^\s@]+))?", re.ASCII)
_MAIN = "master"
"""ModelScope's default branch."""


def parse(name: str) -> tuple[str, str | None]:
    """Repository and revision of ``modelscope:owner/name[@revision]``, or raise ModelNotFound."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ModelNotFound(
            f"{name!r} is no name on ModelScope. Use {PREFIX}owner/name[@revision]."
        )
    return found[1], found[2]


def fetch(repo: str, revision: str | None, *, offline: bool, weights: bool = True) -> Path:
    """Fetch a repository's config, tokenizer and, if asked, weights; or find them in the cache.

    ModelScope is asked each time, and the cached copy is used when it does not answer.

    Raises:
        MissingDependency: the package ``modelscope`` is not installed.
        ModelNotFound: no such repository or revision, or no answer and no copy in the cache.
        UnsupportedModel: the repository holds no weights in safetensors or PyTorch format.
        StorageError: the files could not be stored.
    """
    _require_package()
    if offline:
        if folder := _cached(repo, revision):
            return folder
        raise ModelNotFound(
            f"{repo} is not complete in ModelScope's cache, and HF_HUB_OFFLINE forbids a download. "
            "Unset that, or name a local folder."
        )
    try:
        return _download(repo, revision, weights=weights)
    except UnsupportedModel:
        raise
    except Exception as error:  # noqa: BLE001 - the package's errors have no common root
        return _fall_back(repo, revision, error)


def _require_package() -> None:
    try:
        import modelscope  # noqa: F401 - the import is the check
    except ImportError as error:
        raise MissingDependency(
            "A model of ModelScope needs the package modelscope.", "modelscope"
        ) from error


def _download(repo: str, revision: str | None, *, weights: bool) -> Path:
    from modelscope import snapshot_download
    from modelscope.hub.api import HubApi

    listed = HubApi().get_model_files(repo, revision=revision or _MAIN, recursive=True)
    files = sorted(entry["Path"] for entry in listed)
    wanted = choose(files) if weights else described(files)
    if not wanted:
        raise UnsupportedModel(
            f"{repo} on ModelScope has no weights in safetensors or PyTorch format, only "
            f"{', '.join(files[:8]) or 'no files at all'}. Name a repository that has them."
        )
    return Path(snapshot_download(repo, revision=revision or _MAIN, allow_patterns=wanted))


def _cached(repo: str, revision: str | None) -> Path | None:
    """Find a complete copy in the cache, without network access."""
    from modelscope import snapshot_download

    try:
        found = snapshot_download(repo, revision=revision or _MAIN, local_files_only=True)
    except Exception:  # noqa: BLE001 - as above: it is not there
        return None
    folder = Path(found)
    return folder if complete([path.name for path in folder.iterdir()]) else None


def _fall_back(repo: str, revision: str | None, error: Exception) -> Path:
    if of_disk(error):
        raise StorageError(
            f"{repo} could not be stored ({redacted(error)}). Free disk space, or set "
            "MODELSCOPE_CACHE to another disk."
        ) from error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == _NOT_FOUND or type(error).__name__ == "NotExistError":
        raise ModelNotFound(
            f"ModelScope has no {repo} at {revision or _MAIN} ({redacted(error)}). Check the "
            "spelling; if it is private, log in with: modelscope login"
        ) from error
    folder = _cached(repo, revision)
    if folder is None:
        raise ModelNotFound(
            f"{repo} could not be fetched from ModelScope, and no complete copy is in its cache "
            f"({redacted(error)}). Check the connection and the proxy, or name a local folder."
        ) from error
    warnings.warn(
        f"ModelScope did not provide {repo} ({type(error).__name__}); using the cached copy in "
        f"{folder}. Set HF_HUB_OFFLINE=1 to use the cache only.",
        EchelonWarning,
        stacklevel=2,
    )
    return folder


_NOT_FOUND = 404
