"""How a worker on another machine opens the model that the server was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.models.hub import DEMO, resolve
from echelon.models.registry import open_scorer

if TYPE_CHECKING:
    import os

    from echelon.engine.launch import PreparedModel
    from echelon.models.base import Scorer
    from echelon.models.hub import ModelFolder


@dataclass(frozen=True, slots=True)
class Abroad:
    """Opens a model where it runs, fetching it where it is not there yet.

    Attributes:
        model: hub id, a folder that every machine has, or ``"demo"``.
        revision: the hub's commit, so that all workers have the same; else None.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads of the forward pass.
        label: which output of a head with several labels to score.
        keep_bf16: layers that int8 leaves in bf16, as the gate found.
    """

    model: str
    revision: str | None
    device: str
    threads: int
    label: str | int | None
    keep_bf16: tuple[str, ...]

    def __call__(self, *, precision: str) -> Scorer:
        """Open the model in a precision.

        Raises:
            ModelError: it is not there, damaged, or of an unsupported kind.
        """
        return open_scorer(
            resolve(self.model, revision=self.revision).path,
            device=self.device,
            precision=precision,
            threads=self.threads,
            label=self.label,
            keep_bf16=list(self.keep_bf16),
        )


def place_of(folder: ModelFolder, model: str | os.PathLike[str]) -> tuple[str, str | None]:
    """What other machines have to resolve to have the same model: its name and revision."""
    if model == DEMO:
        return DEMO, None
    if folder.path.name == folder.revision:  # a snapshot of the hub's is named by its commit
        return str(model), folder.revision
    return str(folder.path), None


def abroad(prepared: PreparedModel, model: str | os.PathLike[str], cpus: float) -> Abroad:
    """What opens a prepared model on a worker that has so many CPUs."""
    options = prepared.options
    name, revision = place_of(prepared.folder, model)
    return Abroad(
        model=name,
        revision=revision,
        device=options.device,
        threads=options.threads or max(1, int(cpus)),
        label=options.label,
        keep_bf16=tuple(prepared.keep_bf16),
    )
