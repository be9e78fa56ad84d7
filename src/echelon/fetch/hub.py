"""Repository on the Hugging Face hub → folder in the hub's own cache.

All talking and storing is done by ``huggingface_hub``, so its cache, mirrors, tokens and offline
switch count. What is decided here: which files are worth fetching, when the cache will do, and
what an error means to the person who reads it.
"""

from __future__ import annotations

import errno
import re
import warnings
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from echelon.errors import EchelonWarning, ModelNotFound, StorageError, UnsupportedModel

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
_USAGE = ("modules.json", "config_sentence_transformers.json")  # read by echelon.compat
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
