"""What the caller called a model → the folder that holds it."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from echelon.errors import InvalidInput, ModelNotFound
from echelon.fetch import demo, hub

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
    snapshot = hub.fetch(name, revision=revision, progress=progress)
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
