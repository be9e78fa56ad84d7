"""What a model folder says about its own use: activation, prompts, length, precision. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from echelon.compat.keywords import PRECISIONS
from echelon.errors import BadCheckpoint, UnsupportedModel
from echelon.models.architecture import labels_of, read_config

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.options import Precision


@dataclass(frozen=True, slots=True)
class Saved:
    """Settings saved with a model.

    Attributes:
        labels: names of the head's outputs.
        precision: what the weights are stored in; both originals compute in that by default.
        max_length: the tokenizer's limit; None if it states none.
        activations: dotted paths of activation functions, the one to prefer first.
        prompts: name → text put before queries.
        default_prompt_name: the prompt to use when none is named.
    """

    labels: tuple[str, ...]
    precision: Precision
    max_length: int | None
    activations: tuple[str, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


def read_saved(folder: Path) -> Saved:
    """Read a model folder's settings.

    Raises:
        ModelNotFound: no model there.
        BadCheckpoint: a file that cannot be read.
        UnsupportedModel: parts beside the transformer, which would not be run.
    """
    config = read_config(folder)
    usage = _usage(folder)
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    limit = _read_json(folder / "tokenizer_config.json").get("model_max_length")
    candidates = (usage.get("activation_fn"), _activation_in(config))
    return Saved(
        labels=labels_of(config),
        precision=PRECISIONS.get(dtype, "fp32"),
        max_length=int(limit) if isinstance(limit, int | float) else None,
        activations=tuple(path for path in candidates if isinstance(path, str)),
        prompts={name: text or "" for name, text in (usage.get("prompts") or {}).items()},
        default_prompt_name=usage.get("default_prompt_name"),
    )


def _usage(folder: Path) -> dict[str, Any]:
    """Settings of a folder that sentence-transformers saved as a chain of modules."""
    modules = _read_json(folder / "modules.json", list)
    if not modules:
        return {}
    if len(modules) > 1 or modules[0].get("path"):
        raise UnsupportedModel(
            f"{folder / 'modules.json'}: lists more than one transformer in this folder, and "
            "Echelon would not run the rest. Stay with sentence_transformers for this model."
        )
    usage: dict[str, Any] = _read_json(folder / "config_sentence_transformers.json")
    return usage


def _activation_in(config: dict[str, Any]) -> Any:
    """Where versions 4 and 5 saved it, else where earlier ones did."""
    newer = config.get("sentence_transformers")
    if isinstance(newer, dict) and "activation_fn" in newer:
        return newer["activation_fn"]
    return config.get("sbert_ce_default_activation_function")


def _read_json(path: Path, kind: type = dict) -> Any:
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"{path}: not JSON ({error}). Download the model again.") from error
    if not isinstance(content, kind):
        raise BadCheckpoint(f"{path}: not a JSON {kind.__name__}. Download the model again.")
    return content
