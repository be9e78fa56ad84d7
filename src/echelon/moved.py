"""Import paths of earlier versions, which still work.

``from echelon.compat import CrossEncoder`` imports the module that now holds the class. Scripts,
saved Haystack pipelines and Ray Serve files use these paths.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

MOVED = {
    "echelon.compat": "echelon.integrations",
    "echelon.adapters": "echelon.integrations",
    "echelon.adapters.haystack": "echelon.integrations.haystack",
    "echelon.adapters.langchain": "echelon.integrations.langchain",
    "echelon.adapters.llamaindex": "echelon.integrations.llamaindex",
    "echelon.scale": "echelon.integrations.ray",
    "echelon.scale.serve": "echelon.integrations.ray.serve",
}
"""Old path to new path."""


class MovedModule:
    """Finds a module under its old path, and loads the module of the new path.

    It extends no class of :mod:`importlib.abc`, whose import loads sixty more modules.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec; None for a path that has not moved."""
        del path, target
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]  # no importlib.abc

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python create the module."""
        del spec

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new path in the place of the old one."""
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def install() -> None:
    """Make the old paths importable; a second call does nothing."""
    if not any(isinstance(finder, MovedModule) for finder in sys.meta_path):
        sys.meta_path.append(MovedModule())
