"""Fixtures: cards made of shims where there is no real one, and tiny models of every family."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import TYPE_CHECKING

import pytest
import shim_card
from native_models import make_native

from echelon.engine import check_store
from echelon.models.registry import open_scorer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from native_models import NativeToy
    from shim_card.machine import Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    """One card made of shims, as the newest ones but one are."""
    with shim_card.cards() as here:
        yield here


@pytest.fixture
def card() -> Iterator[Machine | None]:
    """A real card (None), or one made of shims."""
    with shim_card.real_or_shim() as here:
        yield here


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], NativeToy]:
    """The tiny model of a native family, made when first asked for."""
    home = tmp_path_factory.mktemp("native")
    return lru_cache(maxsize=None)(lambda family: make_native(home, family))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where precision checks of this test are stored."""
    monkeypatch.setattr(check_store, "home", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def opened() -> Iterator[Callable[..., object]]:
    """Opens scorers on the card and closes them."""
    with contextlib.ExitStack() as stack:

        def open_on_card(folder, precision, device="cuda"):
            scorer = open_scorer(folder, device=device, precision=precision)
            stack.callback(scorer.close)
            return scorer

        yield open_on_card
