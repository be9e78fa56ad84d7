"""Fixtures: cards made of shims, and tiny models of every family."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import shim_card

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim_card.machine import Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    """One card with everything that the newest ones have."""
    with shim_card.cards() as here:
        yield here
