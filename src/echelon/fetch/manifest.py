"""A finished folder vouches for its files: sizes, hashes and times, checked cheaply."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NAME = "manifest.json"


def write(folder: Path, recipe: str) -> None:
    """Write down every file of a flat folder.

    Args:
        folder: the finished folder.
        recipe: what it was made by; a folder made by another one is not intact.

    Raises:
        OSError: a file cannot be read or the manifest not written.
    """
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "mtime_ns": path.stat().st_mtime_ns,
        }
        for path in sorted(folder.iterdir())
    }
    text = json.dumps({"recipe": recipe, "files": files}, indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def intact(folder: Path, recipe: str) -> bool:
    """Tell whether a folder is whole: all files there, of their size, and unchanged.

    A file with the time that was written down is taken to be what it was; any other is hashed.
    """
    try:
        facts = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return facts["recipe"] == recipe and all(
            _unchanged(folder / name, entry) for name, entry in facts["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # a manifest that cannot be read vouches for nothing


def _unchanged(path: Path, entry: dict[str, object]) -> bool:
    status = path.stat()
    if status.st_size != entry["bytes"]:
        return False
    return status.st_mtime_ns == entry["mtime_ns"] or _sha256(path) == entry["sha256"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
