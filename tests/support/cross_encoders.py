"""Pairs for cross-encoders, model folders with changed settings, comparison with an original."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers import words

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-4
QUERY = words(9, 1)
DOCUMENTS = [
    words(4, 2),
    words(30, 3),
    "",
    words(11, 4),
    "Café 🦊 naïve",
    words(90, 5),
    words(4, 2),
]
PAIRS = [(QUERY, document) for document in DOCUMENTS]
PAIRS += [(words(70, 6), words(60, 7)), (words(80, 8), "kettle"), ("", words(5, 9))]
ONE, NO, MANY = PAIRS[0], [], PAIRS


def variant(folder: Path, source: Path, **config: object) -> Path:
    """A copy of a model whose config.json says something more."""
    shutil.copytree(source, folder)
    change(folder / "config.json", **config)
    return folder


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def same(ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    """The same kinds of things with the same numbers in them."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other, tolerance)
        return
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=tolerance, rtol=0)


def same_ranking(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [list(entry) for entry in ours] == [list(entry) for entry in theirs]
    # By text: the original gives equal texts scores that differ in the last digit.
    texts = [[DOCUMENTS[entry["corpus_id"]] for entry in ranking] for ranking in (ours, theirs)]
    assert texts[0] == texts[1]
    for mine, other in zip(ours, theirs, strict=True):
        assert type(mine["score"]) is type(other["score"]) is float
        assert mine["score"] == pytest.approx(other["score"], abs=TOLERANCE)
        assert mine.get("text") == other.get("text")
