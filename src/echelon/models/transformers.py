"""Any other sequence classifier, run by transformers with padding."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch

from echelon.errors import BadCheckpoint, EchelonWarning, MissingDependency, UnsupportedModel
from echelon.models.base import UNBOUNDED_MAX_TOKENS, pad
from echelon.models.device import DTYPES, device_name, is_out_of_memory, release_memory, run_step
from echelon.types import ModelInfo

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import FloatArray, TokenBatch


class GenericScorer:
    """A :class:`~echelon.models.base.Scorer` around ``AutoModelForSequenceClassification``."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        device: torch.device,
        precision: str,
        threads: int,
        label: int,
    ) -> None:
        model = _load(folder, precision).to(device).eval()
        self._model: Any = model
        self._device = device
        self._label = label
        self._padding_id = int(config.get("pad_token_id") or 0)
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self.info = ModelInfo(
            family=config["model_type"],
            device=str(device),
            device_name=device_name(device),
            precision=precision,
            max_tokens=_max_tokens(model),
            padding="rectangular",
            weights_bytes=sum(p.nbytes for p in model.parameters()),
            threads=threads,
        )
        warnings.warn(
            f"{config['model_type']} has no packed encoder in Echelon: it runs through "
            "transformers, with padding, so expect less speed. Scores are the same.",
            EchelonWarning,
            stacklevel=2,
        )

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`."""
        return run_step(lambda: self._model(**self._inputs(batch)).logits[:, self._label])

    def release(self) -> None:
        """Free cached memory of the device."""
        release_memory(self._device)

    def close(self) -> None:
        """Free the weights."""
        self._model = None
        self.release()

    def _inputs(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        padded = pad(batch, self._padding_id)
        if not self._takes_types:
            del padded["token_type_ids"]
        return {name: torch.from_numpy(array).to(self._device) for name, array in padded.items()}


def _max_tokens(model: Any) -> int:
    """Longest pair: rows of the position table, without those up to its padding row."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, torch.nn.Embedding):
            padding = part.padding_idx
            return part.num_embeddings - (0 if padding is None else padding + 1)
    return int(getattr(model.config, "max_position_embeddings", None) or UNBOUNDED_MAX_TOKENS)


def _load(folder: Path, precision: str) -> Any:
    try:
        from transformers import AutoModelForSequenceClassification
    except ImportError as error:
        raise MissingDependency(
            "This architecture runs through transformers, which is not installed. "
            "Install it with: pip install 'echelon-rerank[torch]'"
        ) from error
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=getattr(torch, DTYPES[precision]),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModel(
            f"{folder}: transformers cannot load it as a sequence classifier ({error}). "
            "Use a cross-encoder that AutoModelForSequenceClassification knows; "
            "remote code is never run."
        ) from error
    except (OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise BadCheckpoint(f"{folder}: the weights cannot be loaded ({error}).") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise BadCheckpoint(
            f"{folder}: the weights lack {missing}, so scores would be random. "
            "Use a checkpoint that was trained with its classification head."
        )
    return model
