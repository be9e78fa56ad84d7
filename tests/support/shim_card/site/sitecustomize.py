"""Read by every Python that starts with this folder on its path: gives torch its shim cards."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from typing import Any


class _AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports torch as usual, then lets it see the cards."""

    def __init__(self) -> None:
        self._usual: Any = None

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch" or self._usual is not None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            self._usual, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self._usual.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._usual
        self._usual.exec_module(module)
        import shim_card

        shim_card.stay()


if os.environ.get("ECHELON_TEST_CARDS"):
    sys.meta_path.insert(0, _AfterTorch())
