"""Repository on the Hugging Face hub → folder in the hub's own cache.

All talking and storing is done by ``huggingface_hub``, so its cache, mirrors, tokens and offline
switch count. What is decided here: which files are worth fetching, when the cache will do, and
what an error means to the person who reads it.

What the caller called a model → the folder that holds it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from echelon.errors import (
    EchelonWarning,
    InvalidInput,
    ModelNotFound,
    StorageError,
    UnsupportedModel,
)
from echelon.models import demo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_CONFIG = "config.json"
_TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",  # sentencepiece under its many names: tokenizer.model, spm.model, bpe.model
)
_USAGE = ("modules.json", "config_sentence_transformers.json")  # read by echelon.integrations
_WEIGHTS = (  # best first; within a kind one file beats shards
    ("model.safetensors",),
    ("model-[0-9]*-of-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin",),
    ("pytorch_model-[0-9]*-of-*.bin", "pytorch_model.bin.index.json"),
)
_SHARD = re.compile(r"-\d+-of-0*(\d+)\.")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECRETS = re.compile(r"(?<=//)[^/@\s]+(?=@)|hf_\w+")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def fetch(repo: str, *, revision: str | None = None, progress: bool = False) -> Path:
    """Bring a repository's config, tokenizer and weights into the hub's cache.

    A commit that lies complete in the cache is used as it is. A branch or tag is asked for, and
    its cached copy stands in where the hub gives no answer.

    Args:
        repo: ``name`` or ``owner/name``.
        revision: branch, tag or commit; None is the default branch.
        progress: show the hub library's progress bars.

    Returns:
        The snapshot's folder, called after its commit.

    Raises:
        ModelNotFound: no such repository or revision, no access, or no connection and no copy.
        UnsupportedModel: the repository has no weights in safetensors or PyTorch format.
        StorageError: the cache cannot be written.
    """
    pinned = revision is not None and _COMMIT.fullmatch(revision)
    if pinned and (folder := _cached(repo, revision)):
        return folder
    try:
        with _progress_bars(shown=progress):
            return _download(repo, revision)
    except _hub_errors() as error:
        return _fall_back(repo, revision, error)


def choose(files: Iterable[str]) -> list[str]:
    """Pick the files that a reranker needs out of a repository's list; weights of one kind only.

    Returns:
        Their names; empty where there are no weights to use.
    """
    names = sorted(files)
    for kind in _WEIGHTS:
        if weights := _matching(names, kind):
            return [*_matching(names, (_CONFIG, *_TOKENIZER, *_USAGE)), *weights]
    return []


def _matching(names: list[str], patterns: Iterable[str]) -> list[str]:
    # A pattern's * crosses folders, and what lies in a folder is another format of the same model.
    return [n for n in names if "/" not in n and any(fnmatchcase(n, p) for p in patterns)]


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    timeout_s = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(repo, revision=revision, timeout=timeout_s)
    files = [entry.rfilename for entry in info.siblings or ()]
    wanted = choose(files)
    if not wanted:
        raise UnsupportedModel(
            f"{repo} has no weights in safetensors or PyTorch format, only "
            f"{', '.join(files[:8]) or 'no files at all'}. Name a repository that has them."
        )
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


def _cached(repo: str, revision: str | None) -> Path | None:
    """Find a complete copy in the cache, without a network."""
    from huggingface_hub import snapshot_download

    try:
        # No pattern matches no file: whether the copy is complete is for us to say, since the
        # library would count formats that were never wanted.
        found = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
    except _hub_errors():
        return None
    folder = Path(found)
    return folder if _complete([path.name for path in folder.iterdir() if path.exists()]) else None


def _complete(names: list[str]) -> bool:
    chosen = choose(names)
    if _CONFIG not in chosen or not _matching(chosen, _TOKENIZER):
        return False
    totals = [int(match[1]) for name in chosen if (match := _SHARD.search(name))]
    return all(total == len(totals) for total in totals)


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the library may raise: its own errors, and those of the HTTP client under it."""
    from huggingface_hub.errors import HfHubHTTPError

    # The client was requests, then httpx, then httpx2; HfHubHTTPError derives from its root error.
    client = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return (*client, OSError, ValueError, RuntimeError)


def _fall_back(repo: str, revision: str | None, error: Exception) -> Path:
    from huggingface_hub import errors

    sure = (errors.RevisionNotFoundError, errors.HFValidationError)
    folder = None if isinstance(error, sure) or _of_disk(error) else _cached(repo, revision)
    if folder is None:
        raise _explained(repo, revision, error) from error
    if not _offline():
        warnings.warn(
            f"The hub did not hand out {repo} ({type(error).__name__}); using the cached commit "
            f"{folder.name[:12]}. Set HF_HUB_OFFLINE=1 to use the cache without asking.",
            EchelonWarning,
            stacklevel=2,
        )
    return folder


def _explained(repo: str, revision: str | None, error: Exception) -> ModelNotFound | StorageError:
    from huggingface_hub import errors

    told = [  # a gated repository is also a missing one, so the order matters
        (errors.GatedRepoError, _GATED),
        (errors.RepositoryNotFoundError, _MISSING),
        (errors.RevisionNotFoundError, _NO_REVISION),
        (errors.HFValidationError, _BAD_NAME),
    ]
    if _of_disk(error):
        return StorageError(_NO_SPACE.format(repo=repo, why=_redacted(error)))
    message = _OFFLINE if _offline() else _NO_ANSWER
    message = next((text for kind, text in told if isinstance(error, kind)), message)
    return ModelNotFound(
        message.format(repo=repo, revision=revision or "the default branch", why=_redacted(error))
    )


_GATED = (
    "{repo} is gated: its owner grants access. Accept its licence on the model's page, then set "
    "HF_TOKEN to a token of that account."
)
_MISSING = (
    "There is no local folder {repo!r} and no such repository on the hub. Check the spelling; if "
    "it is private, set HF_TOKEN to a token that may read it."
)
_NO_REVISION = (
    "{repo} has no revision {revision!r}. Name a branch, tag or commit that its page lists."
)
_BAD_NAME = "{repo!r} is neither a local folder nor a name that the hub allows. Use owner/name."
_OFFLINE = (
    "{repo} at {revision} is not complete in the cache, and HF_HUB_OFFLINE forbids fetching it. "
    "Unset that, or name a local folder."
)
_NO_ANSWER = (
    "{repo} at {revision} could not be fetched, and no complete copy is in the cache ({why}). "
    "Check the connection, the proxy and HF_ENDPOINT, or name a local folder."
)
_NO_SPACE = "{repo} could not be stored ({why}). Make room, or point HF_HOME to another disk."


def _of_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _redacted(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {_SECRETS.sub('***', first_line)}"


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Switch the library's progress bars, and back; a choice made by environment stands."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    shown_before = not are_progress_bars_disabled()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or shown is shown_before:
        yield
        return
    _switch_progress_bars(on=shown)
    try:
        yield
    finally:
        _switch_progress_bars(on=shown_before)


def _switch_progress_bars(*, on: bool) -> None:
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if on:
        enable_progress_bars()
    else:
        disable_progress_bars()


DEMO = "demo"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_WEIGHT_SUFFIXES = {".safetensors", ".bin"}
_FINGERPRINT_DIGITS = 12
_REMEDY = "Give a folder, a hub name such as owner/name, or 'demo'."


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk.

    Attributes:
        path: absolute path of its folder.
        name: what to call it: the hub's name, the folder's own name, or ``demo``.
        revision: what changes when the model does: the hub's commit, a fingerprint of a local
            folder's config and weight files, or the start of the demo model's sha256.
    """

    path: Path
    name: str
    revision: str


def resolve(
    model: str | os.PathLike[str], *, revision: str | None = None, progress: bool = False
) -> ModelFolder:
    """Find a model's folder, fetching it where it is not on this machine yet.

    In this order: the text ``demo`` is the demo model (``./demo`` is a folder of that name), a
    folder that exists is itself, and a text shaped like ``name`` or ``owner/name`` is asked of the
    hub. What the folder holds is not looked at.

    Args:
        model: the name or path; ``~`` is the home folder.
        revision: hub branch, tag or commit; None is the default branch.
        progress: show progress bars on standard error.

    Raises:
        InvalidInput: not a text or path, empty, a file, or a revision of what has none.
        ModelNotFound: no such folder, repository or revision, no access, or no connection.
        UnsupportedModel: the repository holds no weights in safetensors or PyTorch format.
        BadCheckpoint: the demo model arrived damaged.
        StorageError: what was fetched could not be stored.
    """
    name = _checked(model)
    if revision is not None and not revision.strip():
        raise InvalidInput("revision", "it is empty", "Name a branch, tag or commit.")
    if model == DEMO:
        _refuse_revision(revision, "the demo model")
        return ModelFolder(demo.pull(progress=progress), DEMO, demo.REVISION)
    folder = os.path.expanduser(name)  # noqa: PTH111  # Path.expanduser raises for unknown users
    if os.path.isdir(folder):  # noqa: PTH112  # Path.is_dir raises where a name is too long
        _refuse_revision(revision, "a local folder")
        return _local(Path(folder).resolve())
    if os.path.exists(folder):  # noqa: PTH110  # as above
        raise InvalidInput("model", f"{name!r} is a file", "Give the folder that holds it.")
    if not isinstance(model, str) or not _HUB_NAME.fullmatch(name):
        raise ModelNotFound(f"There is no folder {name!r}, and no hub name looks so. {_REMEDY}")
    snapshot = fetch(name, revision=revision, progress=progress)
    return ModelFolder(snapshot, name, snapshot.name)


def _checked(model: object) -> str:
    try:
        name = os.fspath(model)  # type: ignore[call-overload]  # asking is how one finds out
    except TypeError:
        name = None
    if not isinstance(name, str):
        raise InvalidInput("model", f"{model!r} is neither a text nor a path", _REMEDY)
    if not name.strip():
        raise InvalidInput("model", "the name is empty", _REMEDY)
    return name


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise InvalidInput("revision", f"{what} has no revision {revision!r}", "Leave it out.")


def _local(folder: Path) -> ModelFolder:
    try:
        return ModelFolder(folder, folder.name or str(folder), fingerprint(folder))
    except OSError as error:
        raise ModelNotFound(f"{folder} cannot be read ({error}). Check its permissions.") from error


def fingerprint(folder: Path) -> str:
    """Sum up a model folder so that a changed model is noticed without reading its weights.

    Returns:
        A short hash over config.json's bytes and each weight file's name, size and time.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" and path.is_file():
            digest.update(path.read_bytes())
        elif path.suffix in _WEIGHT_SUFFIXES and path.is_file():
            status = path.stat()
            digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:_FINGERPRINT_DIGITS]
