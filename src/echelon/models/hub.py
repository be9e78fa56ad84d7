"""Find a model's folder by name; fetch it from the Hugging Face hub or ModelScope where needed.

``huggingface_hub`` does the transfer and storage, so its cache, mirrors, tokens and offline switch
apply. This module chooses the files, decides when the cached copy is enough, and explains errors.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from echelon.errors import (
    EchelonWarning,
    InvalidInput,
    ModelNotFound,
    StorageError,
    UnsupportedModel,
)
from echelon.files import MAX_BYTES
from echelon.messages import N_, tr
from echelon.models import demo, modelscope
from echelon.models.repositories import SECRETS, choose, complete, described, of_disk, redacted

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMMIT = re.compile(r"[0-9a-f]{40}")
KNOWN_MODEL = "BAAI/bge-reranker-v2-m3"
"""A model that the hub and its mirrors have."""


def fetch(
    repo: str, *, revision: str | None = None, progress: bool = False, weights: bool = True
) -> Path:
    """Fetch a repository's config, tokenizer and, if asked, weights into the hub's cache.

    A commit that is complete in the cache is used without asking the hub. For a branch or tag the
    hub is asked, and the cached copy is used when it does not answer.

    Returns:
        The snapshot's folder, named after its commit.
    """
    pinned = revision is not None and _COMMIT.fullmatch(revision)
    if pinned and (folder := _cached(repo, revision)):
        return folder
    try:
        with _progress_bars(shown=progress):
            return _download(repo, revision, weights=weights)
    except _hub_errors() as error:
        return _fall_back(repo, revision, error)


def _download(repo: str, revision: str | None, *, weights: bool = True) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    timeout_s = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(repo, revision=revision, timeout=timeout_s)
    files = [entry.rfilename for entry in info.siblings or ()]
    wanted = choose(files) if weights else described(sorted(files))
    if not wanted:
        raise UnsupportedModel(
            f"{repo} has no weights in safetensors or PyTorch format, only "
            f"{', '.join(files[:8]) or 'no files at all'}. Name a repository that has them."
        )
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


def _cached(repo: str, revision: str | None) -> Path | None:
    """Find a complete copy in the cache, without network access."""
    from huggingface_hub import snapshot_download

    try:
        # Without patterns the library would also count formats that were never fetched.
        found = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
    except _hub_errors():
        return None
    folder = Path(found)
    return folder if complete([path.name for path in folder.iterdir() if path.exists()]) else None


ACCESS_S = 10.0
"""Seconds for the hub to answer when ``echelon doctor --online`` asks it."""


def access(*, online: bool) -> dict[str, str | bool | None]:
    """The hub's address, whether there is a token, and, if asked ``online``, whether it answers."""
    from huggingface_hub import constants, get_token

    found: dict[str, str | bool | None] = {
        "endpoint": SECRETS.sub("***", constants.ENDPOINT),
        "offline": _offline(),
        "token": get_token() is not None,
        "answers": None,
        "error": None,
    }
    if online and not found["offline"]:
        # In a thread: the look-up of a name has no time limit.
        errors = [f"no answer in {ACCESS_S:g} s"]
        thread = threading.Thread(target=_ask, args=(errors,), daemon=True)
        thread.start()
        thread.join(ACCESS_S)
        found |= {"answers": not errors, "error": errors[0] if errors else None}
    return found


def _ask(errors: list[str]) -> None:
    """Ask the hub for a model; empty ``errors`` if it answers, else put the reason there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(KNOWN_MODEL, timeout=ACCESS_S)
    except RepositoryNotFoundError:
        errors.clear()  # a mirror may lack it
    except _hub_errors() as error:
        errors[:] = [redacted(error)]
    else:
        errors.clear()


def _hub_errors() -> tuple[type[Exception], ...]:
    """The library's own errors and those of its HTTP client."""
    from huggingface_hub.errors import HfHubHTTPError

    # The client was requests, httpx and httpx2 in turn; HfHubHTTPError derives from its error.
    client = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return (*client, OSError, ValueError, RuntimeError)


def _fall_back(repo: str, revision: str | None, error: Exception) -> Path:
    from huggingface_hub import errors

    sure = (errors.RevisionNotFoundError, errors.HFValidationError)
    folder = None if isinstance(error, sure) or of_disk(error) else _cached(repo, revision)
    if folder is None:
        raise _explained(repo, revision, error) from error
    if not _offline():
        warnings.warn(
            f"The hub did not provide {repo} ({type(error).__name__}); using the cached commit "
            f"{folder.name[:12]}. Set HF_HUB_OFFLINE=1 to use the cache only.",
            EchelonWarning,
            stacklevel=2,
        )
    return folder


def _explained(repo: str, revision: str | None, error: Exception) -> ModelNotFound | StorageError:
    from huggingface_hub import errors

    words = {"repo": repo, "revision": revision or tr("the default branch"), "why": redacted(error)}
    if of_disk(error):
        return StorageError(tr(_NO_SPACE, **words))
    messages = {  # a gated repository is also a missing one, so the order matters
        errors.GatedRepoError: _GATED,
        errors.RepositoryNotFoundError: _MISSING,
        errors.RevisionNotFoundError: _NO_REVISION,
        errors.HFValidationError: _BAD_NAME,
    }
    message = _OFFLINE if _offline() else _NO_ANSWER
    message = _BY_STATUS.get(getattr(getattr(error, "response", None), "status_code", 0), message)
    message = next((text for kind, text in messages.items() if isinstance(error, kind)), message)
    return ModelNotFound(tr(message, **words) + _owner_of(repo))


def _owner_of(repo: str) -> str:
    """A hint for a name without its owner, as people quote it."""
    if "/" in repo:
        return ""
    owner = next((o for part, o in _OWNERS.items() if repo.lower().startswith(part)), None)
    words = "owner/name" if owner is None else f"{owner}/{repo}"
    return tr(" Names on the hub begin with their owner: did you mean {name}?", name=words)


_OWNERS = {
    "bge-reranker": "BAAI",
    "gte-": "Alibaba-NLP",
    "jina-reranker": "jinaai",
    "ms-marco-": "cross-encoder",
    "mxbai-rerank": "mixedbread-ai",
}
"""Owners of well-known rerankers, by how the names of their models begin."""

_GATED = N_(
    "{repo} is gated: its owner grants access. Accept its licence on the model's page, then set "
    "HF_TOKEN to a token of that account."
)
_MISSING = N_(
    "There is no local folder {repo!r} and no such repository on the hub. Check the spelling; if "
    "it is private, set HF_TOKEN to a token that may read it."
)
_NO_REVISION = N_(
    "{repo} has no revision {revision!r}. Name a branch, tag or commit that its page lists."
)
_BAD_NAME = N_("{repo!r} is neither a local folder nor a valid hub name. Use owner/name.")
_BY_STATUS = {
    401: N_("The hub refused the token ({why}). Set HF_TOKEN to a valid one, or unset it."),
    403: N_(
        "The hub does not give {repo} to this account ({why}). Accept its licence on the model's "
        "page, and set HF_TOKEN to a token that may read it."
    ),
    404: N_("A file of {repo} is not on the hub ({why}). Check the name, or HF_ENDPOINT's mirror."),
}
"""Explanations of what the hub answers, where the library has no error for it."""
_OFFLINE = N_(
    "{repo} at {revision} is not complete in the cache, and HF_HUB_OFFLINE forbids a download. "
    "Unset that, or name a local folder."
)
_NO_ANSWER = N_(
    "{repo} at {revision} could not be fetched, and no complete copy is in the cache ({why}). "
    "Check the connection, the proxy and HF_ENDPOINT, or name a local folder."
)
_NO_SPACE = N_(
    "{repo} could not be stored ({why}). Free disk space, or set HF_HOME to another disk."
)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Switch the library's progress bars on or off for a while; an environment setting wins."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown_before = not are_progress_bars_disabled()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or shown is shown_before:
        yield
        return
    switches = {True: enable_progress_bars, False: disable_progress_bars}
    switches[shown]()
    try:
        yield
    finally:
        switches[shown_before]()


DEMO = "demo"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_WEIGHT_SUFFIXES = {".safetensors", ".bin"}
_FINGERPRINT_DIGITS = 12
_REMEDY = "Give a folder, a hub name such as owner/name, modelscope:owner/name, or 'demo'."


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk.

    The revision is the hub's commit, a fingerprint of the config and weight files of a local folder
    or of a model of ModelScope, or the first digits of the demo model's sha256.
    """

    path: Path  # absolute
    name: str  # the hub's name, ``modelscope:…``, the folder's own name, or ``demo``
    revision: str


def resolve(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    progress: bool = False,
    weights: bool = True,
) -> ModelFolder:
    """Find a model's folder; fetch it if it is not on this machine, its weights only if asked.

    Tried in this order: ``demo`` is the demo model (``./demo`` is a folder of that name); an
    existing folder (``~`` is the home folder) is used as it is; ``modelscope:owner/name`` with or
    without ``@revision`` is looked up on ModelScope; ``name`` or ``owner/name`` on the hub.

    Raises:
        InvalidInput: no text or path, empty, a file, or a revision of a model that has none.
        ModelNotFound: no such folder, repository or revision, no access, or no connection.
        UnsupportedModel: the repository holds no weights in safetensors or PyTorch format.
        BadCheckpoint: the demo model's files are damaged.
        StorageError: the files could not be stored.
        MissingDependency: the package of ModelScope is needed and not installed.
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
    if isinstance(model, str) and model.startswith(modelscope.PREFIX):
        return _of_modelscope(model, revision, weights=weights)
    if not isinstance(model, str) or not _HUB_NAME.fullmatch(name):
        raise ModelNotFound(f"There is no folder {name!r}, and it is no hub name. {_REMEDY}")
    snapshot = fetch(name, revision=revision, progress=progress, weights=weights)
    return ModelFolder(snapshot, name, snapshot.name)


def _of_modelscope(name: str, revision: str | None, *, weights: bool) -> ModelFolder:
    repo, named = modelscope.parse(name)
    if named and revision and named != revision:
        problem = f"{name} names another one than {revision!r}"
        raise InvalidInput("revision", problem, "Give one of them.")
    chosen = named or revision
    folder = modelscope.fetch(repo, chosen, offline=_offline(), weights=weights)
    full = f"{modelscope.PREFIX}{repo}" + (f"@{chosen}" if chosen else "")
    return replace(_local(folder.resolve()), name=full)


def _checked(model: object) -> str:
    try:
        name = os.fspath(model)  # type: ignore[call-overload]  # the call is the check
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
    """Short hash of config.json and of each weight file's name, size and time."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" and path.is_file():
            with path.open("rb") as file:
                digest.update(file.read(MAX_BYTES))  # a longer one is refused
        elif path.suffix in _WEIGHT_SUFFIXES and path.is_file():
            status = path.stat()
            digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:_FINGERPRINT_DIGITS]
