"""Any other sequence classifier, run by transformers with padding."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch

from echelon.errors import (
    BadCheckpoint,
    EchelonError,
    EchelonWarning,
    MissingDependency,
    UnsupportedModel,
)
from echelon.files import check_fields
from echelon.models.architecture import CONFIG, OWN_CONFIG, SHAPE, check_ids, labels_of
from echelon.models.base import (
    UNBOUNDED_MAX_TOKENS,
    first_line,
    listed,
    outputs_a_pair,
    pad,
    probe_step,
    rounded_shape,
)
from echelon.models.checkpoint import AGAIN, Checkpoint, wrong_shape
from echelon.models.device import (
    DTYPES,
    device_name,
    half_precision,
    one_at_a_time,
    release_memory,
    run_step,
)
from echelon.models.faults import is_out_of_memory, kind_of
from echelon.types import ModelInfo

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import FloatArray, TokenBatch


MAX_WEIGHTS_A_BYTE = 2
"""Quantized files hold two weights in a byte, usual ones a weight in two bytes or four."""


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
        self._padding_id = config.get("pad_token_id") or 0
        self._vocabulary = _vocabulary(model)
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._check_outputs(folder, len(labels_of(config)))
        self.info = ModelInfo(
            family=config["model_type"],
            device=str(device),
            device_name=device_name(device),
            precision=precision,
            max_tokens=_max_tokens(model),
            padding="rectangular",
            weights_bytes=sum(p.nbytes for p in model.parameters()),
            threads=threads,
            lower_precision=half_precision(device),
        )
        warnings.warn(
            f"{config['model_type']} has no packed encoder in Echelon: it runs through "
            "transformers, with padding, so expect less speed. Scores are the same.",
            EchelonWarning,
            stacklevel=2,
        )

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`."""
        check_ids(batch.ids, self._vocabulary)
        with one_at_a_time(self._device):
            return run_step(lambda: self._logits(batch)[:, self._label])

    def release(self) -> None:
        """Free cached memory of the device."""
        release_memory(self._device)

    def close(self) -> None:
        """Free the weights."""
        self._model = None
        self.release()

    def _logits(self, batch: TokenBatch) -> torch.Tensor:
        logits: torch.Tensor = self._model(**self._inputs(batch)).logits[: len(batch)]
        return logits

    def _check_outputs(self, folder: Path, labels: int) -> None:
        """Compare what the model gives for a pair with what its configuration says."""
        step = probe_step()
        try:
            with torch.inference_mode():
                logits = self._logits(step)
        except Exception as error:  # a model of another kind raises any kind of error
            if kind_of(error) != "other":
                raise
            raise UnsupportedModel(
                f"{folder}: it cannot score a pair ({first_line(error)}). Use a cross-encoder."
            ) from error
        outputs = outputs_a_pair(folder, step, logits)
        if outputs != labels:
            raise BadCheckpoint(
                f"{folder}: the model gives {outputs} outputs a pair, and config.json names "
                f"{labels} labels. {OWN_CONFIG}"
            )

    def _inputs(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        # Metal keeps a graph for each shape.
        shape = rounded_shape(batch) if self._device.type == "mps" else None
        padded = pad(batch, self._padding_id, shape)
        if not self._takes_types:
            del padded["token_type_ids"]
        return {name: torch.from_numpy(array).to(self._device) for name, array in padded.items()}


def _vocabulary(model: Any) -> int | None:
    """Rows of the table of words; None where a family has no such table."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


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
        problem = "This architecture runs through transformers, which is not installed."
        raise MissingDependency(problem, "torch") from error
    try:
        _check_size(folder)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=getattr(torch, DTYPES[precision]),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error, see below
        )
    except (OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise BadCheckpoint(
            f"{folder}: the weights cannot be loaded ({first_line(error)}). {AGAIN}"
        ) from error
    except EchelonError:
        raise
    except Exception as error:  # what config.json says may fail anywhere in transformers
        raise UnsupportedModel(
            f"{folder}: transformers cannot load it as a sequence classifier "
            f"({first_line(error)}). Use a cross-encoder that AutoModelForSequenceClassification "
            "knows; remote code is never run."
        ) from error
    for name, held, implied in sorted(info["mismatched_keys"]):
        raise wrong_shape(folder, name, implied, held)
    if info["missing_keys"]:
        raise BadCheckpoint(
            f"{folder}: the weights lack {listed(info['missing_keys'], 3)}, so scores would be "
            "random. Use a checkpoint that was trained with its classification head."
        )
    return model


def _check_size(folder: Path) -> None:
    """Check the files of weights, and that ``config.json`` describes a model of their size.

    transformers makes every weight that the files lack, so this is asked before it makes any.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # By the names that all families share, since a family may use others in the file.
    # -1 positions are any number of them in some.
    sizes = {name: getattr(config, name, None) for name in SHAPE}
    check_fields(sizes | {"max_position_embeddings": None}, CONFIG)
    with torch.device("meta"):  # shapes alone
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    described = sum(parameter.numel() for parameter in model.parameters())
    held = Checkpoint(folder).size_bytes
    if described > MAX_WEIGHTS_A_BYTE * held:
        raise BadCheckpoint(
            f"{folder}: config.json describes a model of {described:,} weights, and its files hold "
            f"{held:,} bytes. Use the config.json that came with these weights."
        )
