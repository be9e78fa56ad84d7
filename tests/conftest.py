"""Fixtures: tiny models of every family, made once a session, and the real demo model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis
import pytest

from helpers import SHAPES, TOKENIZER_OF, make_toy, save_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# A slow machine is no failure: no test looks at the clock.
hypothesis.settings.register_profile("echelon", deadline=None, print_blob=True)
hypothesis.settings.load_profile("echelon")


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a trained tokenizer each: bert, roberta, xlm-roberta."""
    home = tmp_path_factory.mktemp("tokenizers")
    return {kind: save_tokenizer(home / kind, kind) for kind in ("bert", "roberta", "xlm-roberta")}


@pytest.fixture(scope="session")
def toy(
    tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Path]
) -> Callable[[str], Path]:
    """The toy model folder of a family, made when first asked for."""
    home = tmp_path_factory.mktemp("toys")

    def folder(family: str) -> Path:
        assert family in SHAPES
        if not (home / family).exists():
            make_toy(home / family, family, tokenizers[TOKENIZER_OF.get(family, family)])
        return home / family

    return folder


@pytest.fixture(scope="session")
def bert(toy: Callable[[str], Path]) -> Path:
    """The toy BERT, for tests that need any model."""
    return toy("bert")


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model, fetched on first use and kept in Echelon's own cache."""
    from echelon.fetch import demo

    return demo.pull()
