"""The levels of the compiled kernels that are tested here, and how to compute by one of them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from remote_kernels import MACHINE, build_hook, remote

from echelon.models import attention_cpu, causal_attention, kernel_calls
from echelon.models.kernels import OPERATIONS, Kernels, load, possible

TESTED = list(build_hook().LEVELS[MACHINE]) if MACHINE else possible()
"""The levels that are tested here."""


@contextmanager
def use(level: str | None):
    """All operations by the kernels of a level, or by torch."""
    found = None
    if level is not None:
        library = remote(level) if MACHINE else load(level)
        found = Kernels(level, library, OPERATIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_calls, "kernels", lambda: found)
        patch.setattr(attention_cpu, "kernels", lambda: found)
        patch.setattr(causal_attention, "has_amx", lambda: False)
        attention_cpu.fastest_method.cache_clear()
        yield
    attention_cpu.fastest_method.cache_clear()
