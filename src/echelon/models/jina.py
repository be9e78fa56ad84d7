"""Checkpoints of jina-reranker-v2: XLM-RoBERTa with other names of tensors. None of its code runs.

Queries, keys and values are one tensor there, layers are ``layers``, and norms are numbered.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from echelon.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

MARK = "roberta.encoder.layers.0.mixer.Wqkv.weight"
"""A tensor that only these checkpoints have."""

LAYER = re.compile(r"roberta\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")

PARTS = {
    "attention.output.dense": "mixer.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}
"""Usual names in a layer → names here."""

PROJECTIONS = ("query", "key", "value")  # in their order in the fused tensor


class JinaCheckpoint(Checkpoint):
    """The tensors under the usual names of XLM-RoBERTa."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors; of a layer's, the usual beginning."""
        usual = (
            name.replace("roberta.encoder.layers.", "roberta.encoder.layer.")
            for name in self._files
        )
        return frozenset(usual)

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Map tensors by their usual names; see :meth:`Checkpoint.read`."""
        places = {name: _stored(name) for name in shapes}
        stored = {}
        for name, shape in shapes.items():
            own, third = places[name]
            stored[own] = shape if third is None else (3 * shape[0], *shape[1:])
        tensors = super().read(stored)
        return {
            name: tensors[own] if third is None else tensors[own].chunk(3)[third]
            for name, (own, third) in places.items()
        }


def encoder_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint of an encoder in either naming."""
    found = Checkpoint(folder)
    return JinaCheckpoint(folder) if MARK in found.names else found


def _stored(name: str) -> tuple[str, int | None]:
    """The name of a tensor here, and which third of it is meant; None is the whole."""
    if name.startswith("roberta.embeddings.LayerNorm."):
        return name.replace("roberta.embeddings.LayerNorm.", "roberta.emb_ln."), None
    match = LAYER.fullmatch(name)
    if match is None:
        return name, None
    index, part, kind = match.groups()
    root = f"roberta.encoder.layers.{index}"
    if part in PARTS:
        return f"{root}.{PARTS[part]}.{kind}", None
    projection = part.removeprefix("attention.self.")
    return f"{root}.mixer.Wqkv.{kind}", PROJECTIONS.index(projection)
