"""Results of precision checks, kept beside the downloaded models. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from echelon.errors import ProfileError, StorageError
from echelon.models.demo import home
from echelon.models.kernels import kernels
from echelon.profile import ProfileKey, read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

STORE = "precision_checks"  # folder of stored results


def stored_row(key: ProfileKey) -> dict[str, Any] | None:
    """The row of an earlier check of the key's precision; None where there is none."""
    try:
        content = read_json(_path_of(key))
        return dict(content[key.precision]) if content["key"] == asdict(key) else None
    except (ProfileError, KeyError, TypeError, ValueError):
        return None


def store_row(key: ProfileKey, row: dict[str, Any]) -> None:
    """Store a row; where that fails, the next process measures again."""
    path = _path_of(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": asdict(key), key.precision: row})
    except (OSError, StorageError) as error:
        logger.warning("The comparison of %s with fp32 cannot be stored: %s", key.precision, error)


def _path_of(key: ProfileKey) -> Path:
    """The stored result's file; the kernels and torch round differently, so they are in the key."""
    text = json.dumps([asdict(key), kernels() is not None], sort_keys=True)
    return home() / STORE / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
