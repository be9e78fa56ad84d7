"""Weights on disk: one safetensors file, shards with an index, or a weights-only pickle.

Nothing is read ahead. Every :meth:`Checkpoint.read` maps the file anew and returns views of the
mapping, so pages are given back as soon as the caller has converted and dropped them: loading a
model never needs much more memory than the loaded model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from echelon.errors import BadCheckpoint, ModelNotFound
from echelon.score.device import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

AGAIN = "Download the model again."


class Checkpoint:
    """Named tensors of a model folder.

    Args:
        folder: model folder.

    Raises:
        ModelNotFound: no weights in it.
        BadCheckpoint: weights that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _files_of(folder)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Map tensors of known names and shapes.

        Args:
            shapes: the shape that ``config.json`` implies for each wanted tensor.

        Raises:
            BadCheckpoint: one is missing, has another shape, or cannot be read.
        """
        tensors: dict[str, torch.Tensor] = {}
        for file in {self._file(name) for name in shapes}:
            wanted = [name for name in shapes if self._files[name] == file]
            tensors.update(_map(file, wanted))
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise BadCheckpoint(
                    f"{self.folder}: config.json implies {name} of shape {list(shape)}, the "
                    f"weights hold {list(tensors[name].shape)}. Use the config.json that came "
                    "with these weights."
                )
        return tensors

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise BadCheckpoint(
                f"{self.folder}: the weights hold no tensor {name}, which config.json implies. "
                "Use the config.json that came with these weights, or a cross-encoder checkpoint."
            )
        return self._files[name]


def _files_of(folder: Path) -> dict[str, Path]:
    for single, index, suffix in (
        ("model.safetensors", "model.safetensors.index.json", "safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", "bin"),
    ):
        if (folder / single).is_file():
            return dict.fromkeys(_names(folder / single, suffix), folder / single)
        if (folder / index).is_file():
            return _shards(folder / index)
    raise ModelNotFound(
        f"{folder}: no weights there (looked for model.safetensors and pytorch_model.bin, whole "
        "or in shards with an index). Give the folder that holds them, or a hub id."
    )


def _shards(index: Path) -> dict[str, Path]:
    try:
        content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        files = {name: index.parent / file for name, file in content["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadCheckpoint(f"{index}: not a readable shard index ({error}). {AGAIN}") from error
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise BadCheckpoint(f"{index.parent}: shard {file.name} is missing. {AGAIN}")
    return files


def _names(file: Path, suffix: str) -> list[str]:
    if suffix == "bin":
        return list(_unpickle(file))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{file}: damaged or cut short ({error}). {AGAIN}") from error


def _map(file: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    if file.suffix == ".bin":
        tensors = _unpickle(file)
        missing = [name for name in names if name not in tensors]
        if missing:
            raise BadCheckpoint(f"{file}: the index promises {missing[0]}, not there. {AGAIN}")
        return {name: tensors[name] for name in names}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{file}: damaged or cut short ({error}). {AGAIN}") from error


def _unpickle(file: Path) -> dict[str, torch.Tensor]:
    """Read a pickle that may hold tensors only; anything executable in it is refused."""
    import torch

    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # what a damaged pickle raises is without end
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadCheckpoint(
            f"{file}: not a readable weights-only checkpoint ({reason}). {AGAIN}"
        ) from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{file}: holds no named tensors. {AGAIN}")
    return content


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"
