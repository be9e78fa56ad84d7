"""Model folder to scorer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echelon.score.architecture import (
    choose_label,
    labels_of,
    native_architecture,
    read_config,
    require_head,
)
from echelon.score.device import (
    choose_device,
    choose_precision,
    is_out_of_memory,
    require_torch,
    set_threads,
)

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.score.base import Scorer


def open_scorer(
    folder: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    label: str | int | None = None,
) -> Scorer:
    """Load the model in ``folder``.

    Args:
        folder: ``config.json`` and weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        threads: CPU threads; None is what the process may use.
        label: which output of a head with several to score.

    Raises:
        ModelError: it is not there, damaged, or of an unsupported kind.
        InvalidInput: the device is not there, or a label must be chosen.
        OutOfMemory: the weights do not fit.
    """
    require_torch()
    config = read_config(folder)
    require_head(folder, config)
    chosen_label = choose_label(labels_of(config), label)
    chosen = choose_device(device)
    precision = choose_precision(precision, chosen)
    used = set_threads(threads, chosen)
    try:
        architecture = native_architecture(folder, config)
        if architecture is None:
            from echelon.score.generic import GenericScorer

            return GenericScorer(folder, config, chosen, precision, used, chosen_label)
        from echelon.score.checkpoint import Checkpoint
        from echelon.score.native import open_native

        checkpoint = Checkpoint(folder)
        return open_native(checkpoint, architecture, chosen, precision, used, chosen_label)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = str(error)
    raise weights_do_not_fit(folder, str(chosen), precision, failed)


def weights_do_not_fit(folder: Path, device: str, precision: str, reason: str) -> Exception:
    """The error for a model that is larger than the memory."""
    from echelon.errors import OutOfMemory

    return OutOfMemory(
        f"{folder}: the weights do not fit on {device} in {precision} "
        f"({reason.splitlines()[0] if reason else 'out of memory'}). "
        "Free memory, choose a lower precision, another device or a smaller model."
    )
