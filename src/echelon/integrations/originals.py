"""Arguments and saved settings of the original libraries: renamed and refused keywords, models.

No torch here. A check that fails raises ``InvalidInput``.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import numpy as np

from echelon.errors import (
    EchelonWarning,
    InvalidInput,
    ModelNotFound,
    UnsupportedModel,
)
from echelon.files import MAX_ID, MAX_LIST_BYTES
from echelon.models.architecture import TOKENIZER_CONFIG, labels_of, read_config, read_settings
from echelon.models.description import describe
from echelon.models.hub import DEMO, resolve
from echelon.models.registry import model_prompt
from echelon.models.repositories import choose
from echelon.models.text_settings import TextSettings, read_text_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from echelon.options import Precision

P = ParamSpec("P")
R = TypeVar("R")

PRECISIONS: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""torch's dtype name → Echelon's."""

REFUSED = {
    "trust_remote_code": "Echelon never runs code that comes with a model. Leave it out; the "
    "architectures that transformers itself knows need none.",
    "backend": "Echelon computes with its own torch engine. Leave it out, or stay with "
    "sentence_transformers for ONNX and OpenVINO files.",
    "modules": "Echelon loads whole models. Save yours with save_pretrained and name the folder.",
    "model_card_data": "Model cards are for training. Leave it out.",
    "keep_in_fp32_modules": "Echelon always computes the head in fp32. Leave it out.",
    "pool": "One process uses one device. Start a process for each device and share the pairs "
    "out between them.",
    "chunk_size": "It belongs to multi-process pools, which Echelon has none of. Leave it out.",
    "processing_kwargs": "Use max_length to truncate; the rest is as the tokenizer was saved.",
    "classifier_dropout": "Dropout is for training. Leave it out.",
}
"""Keyword → why Echelon does not support it and what to do instead."""

LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""How transformers reads a model's files: without the hub, and without running code in them."""

PAIR_DIMENSIONS = 2
"""Dimensions of an array of pairs; an array with one dimension is a single pair."""


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let callers use older names of a function's keywords, given as older=today's."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs and new in kwargs:
                    problem = f"is the older name of {new}, which is given too"
                    raise InvalidInput(old, problem, "Give one.")
            today = {names.get(name, name): value for name, value in kwargs.items()}
            return function(*args, **cast("Any", today))

        return call

    return decorate


def refuse(**values: Any) -> None:
    """Refuse unsupported keywords with a value; None, False and empty lists are accepted."""
    for name, value in values.items():
        if value is not None and value is not False and value not in ([], ()):
            raise InvalidInput(name, f"{value!r} cannot be honoured", REFUSED[name])


def take_refused(options: dict[str, Any]) -> None:
    """Take the unsupported keywords out of ``options``; refuse those with a value."""
    refuse(**{name: options.pop(name) for name in sorted(REFUSED.keys() & options.keys())})


def take_idle(options: dict[str, Any], *names: str) -> None:
    """Take keywords out of ``options`` that have no effect in the original; warn."""
    for name in names:
        if name in options:
            options.pop(name)
            warnings.warn(
                f"{name} has no effect, nor has it in sentence-transformers 6. Leave it out.",
                EchelonWarning,
                stacklevel=4,
            )


def only(field: str, values: Mapping[str, Any] | None, *known: str, remedy: str) -> dict[str, Any]:
    """The entries of a dictionary keyword, all of which must be known."""
    given = dict(values or {})
    for name in given:
        if name not in known:
            raise InvalidInput(f"{field}[{name!r}]", "cannot be honoured", remedy)
    return given


def precision_of(field: str, dtype: object) -> Precision | None:
    """Echelon's name of a torch dtype or of its name; None for None and ``auto``."""
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in PRECISIONS:
        raise InvalidInput(field, f"{dtype!r} is unknown", f"Use {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


def device_option(device: object) -> str:
    """The ``device`` option for a device as torch names it; None is ``auto``."""
    if device is None:
        return "auto"
    if isinstance(device, int) and not isinstance(device, bool):
        return f"cuda:{device}"
    return str(device)


def capped(field: str, value: object, limit: int, *, warn: bool = True) -> int:
    """A length limit, reduced to the model's with a warning.

    The originals accept a larger one and fail inside the model on the first long text.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput(field, f"{value!r} is not a positive whole number", "Give 1 or more.")
    if value > limit and warn:
        warnings.warn(
            f"{field}: the model reads {limit} tokens at most, so {limit} is used instead of "
            f"{value}. Ask for {limit} or fewer.",
            EchelonWarning,
            stacklevel=3,
        )
    return min(value, limit)


def precision_argument(model_kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]) -> Any:
    """The ``precision`` option from either argument; None if neither names it."""
    remedy = (
        "Echelon loads weights and computes attention its own way, with the same results. Leave "
        "the entry out; the device is set by device=."
    )
    given = only("model_kwargs", model_kwargs, "dtype", "torch_dtype", remedy=remedy)
    named = {name for name, dtype in given.items() if dtype is not None}
    if len(named) + ("precision" in options) > 1:
        raise InvalidInput("precision", "is named more than once", "Name one of dtype, precision.")
    for name in named:
        return precision_of(f"model_kwargs[{name!r}]", given[name])
    return options.get("precision")


def length_argument(max_length: int | None, processor_kwargs: Mapping[str, Any] | None) -> Any:
    """The length limit, by either of its names; None if neither is given."""
    remedy = "Echelon uses the tokenizer as it was saved. Leave the entry out."
    given = only("processor_kwargs", processor_kwargs, "model_max_length", remedy=remedy)
    return given.get("model_max_length") if max_length is None else max_length


def check_num_labels(
    num_labels: int | None, config_kwargs: Mapping[str, Any] | None, saved_labels: int
) -> None:
    """Refuse another number of labels than the model was saved with."""
    remedy = "Echelon scores a model as it was saved. Leave the entry out."
    given = only("config_kwargs", config_kwargs, "num_labels", remedy=remedy)
    count = given.get("num_labels") if num_labels is None else num_labels
    if count is not None and count != saved_labels:
        problem = f"{count!r} asked for, and the model was trained with {saved_labels}"
        remedy = "Leave it out; a new head must be trained with sentence_transformers first."
        raise InvalidInput("num_labels", problem, remedy)


def is_single(inputs: object) -> bool:
    """Whether the inputs are one pair; its result is a scalar."""
    if isinstance(inputs, np.ndarray):
        return inputs.ndim < PAIR_DIMENSIONS and inputs.size > 0
    return isinstance(inputs, list | tuple) and len(inputs) > 0 and isinstance(inputs[0], str)


def as_pairs(inputs: Any, *, single: bool) -> list[Any]:
    """Inputs as a list of pairs."""
    if not _is_series(inputs):
        raise InvalidInput("inputs", f"is {type(inputs).__name__}", "Pass pairs of two texts.")
    listed = inputs.tolist() if isinstance(inputs, np.ndarray) else inputs
    return [listed] if single else list(listed)


def as_documents(documents: Any) -> list[Any]:
    """Documents as a list."""
    if not _is_series(documents):
        problem = f"is {type(documents).__name__}, not a list"
        raise InvalidInput("documents", problem, "Pass a list of texts.")
    return list(documents)


def _is_series(values: object) -> bool:
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | dict)


@dataclass(frozen=True, slots=True)
class Located:
    """A model that is on this machine."""

    path: Path  # its folder
    model: str  # its name for :class:`echelon.Reranker`
    revision: str | None  # its commit; None where it has none


@dataclass(frozen=True, slots=True)
class Storage:
    """Where and how to look for a model on the hub."""

    revision: str | None = None  # branch, tag or commit
    cache: str | os.PathLike[str] | None = None  # the cache folder; None is the hub's own
    offline: bool = False  # never connect to the hub
    token: str | bool | None = None  # as ``huggingface_hub`` takes it


def locate(model: object, storage: Storage, *, owner: str | None = None) -> Located:
    """Find a model, fetch it if needed; ``owner`` is put before a hub name that has none."""
    if not isinstance(model, str | os.PathLike):
        raise InvalidInput("model_name_or_path", f"is {model!r}", "Give a folder or a hub name.")
    name = os.fspath(model)
    if name == DEMO or Path(name).expanduser().is_dir():
        found = resolve(name, revision=storage.revision)
        return Located(found.path, name, None)
    if owner is not None and "/" not in name:
        name = f"{owner}/{name}"
    if storage == Storage(storage.revision):  # Echelon's own way to fetch a model is enough
        found = resolve(name, revision=storage.revision)
        # With the commit, the reranker opens it without a second request to the hub.
        return Located(found.path, name, found.revision)
    path = _snapshot(name, storage)
    return Located(path, str(path), None)


def _snapshot(repo: str, storage: Storage) -> Path:
    """Fetch a repository with the caller's cache folder, token and offline switch."""
    from huggingface_hub import HfApi, snapshot_download

    files: list[str] = []  # offline: all cached files; a missing one shows when the model is opened
    try:
        if not storage.offline:
            info = HfApi(token=storage.token).model_info(repo, revision=storage.revision)
            files = choose(entry.rfilename for entry in info.siblings or ())
        folder = snapshot_download(
            repo,
            revision=storage.revision,
            cache_dir=None if storage.cache is None else Path(storage.cache),
            local_files_only=storage.offline,
            token=storage.token,
            allow_patterns=files,
        )
    except Exception as error:  # the error types of the hub's HTTP client keep changing
        raise ModelNotFound(
            f"{repo} could not be fetched ({type(error).__name__}). Check name, revision, token "
            "and connection; with local_files_only, fetch it once without."
        ) from error
    if not files and not storage.offline:
        raise UnsupportedModel(
            f"{repo} has no weights in safetensors or PyTorch format. Name one that has."
        )
    return Path(folder)


@dataclass(frozen=True, slots=True)
class SavedSettings:
    """Settings saved with a model."""

    labels: tuple[str, ...]  # names of the head's outputs
    precision: Precision  # what the weights are stored in; both originals compute in it by default
    max_length: int | None  # the tokenizer's limit; None if it states none
    activations: tuple[str, ...] = ()  # dotted paths of functions, the preferred one first
    texts: TextSettings = field(default_factory=TextSettings)
    reads_instruction: bool = False  # the engine puts a prompt to its place
    instruction: str | None = ""  # for a prompt that is empty: what the model's authors ask


def read_saved(folder: Path) -> SavedSettings:
    """Read the settings in a model folder, or raise :class:`ModelError`."""
    config = read_config(folder)
    texts = read_text_settings(folder)
    dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    tokenizer = folder / "tokenizer_config.json"
    limit = texts.max_tokens
    if limit is None and tokenizer.is_file():
        limit = read_settings(tokenizer, TOKENIZER_CONFIG, MAX_LIST_BYTES).get("model_max_length")
    candidates = (texts.activation, _activation_in(config))
    prompt = model_prompt(folder)
    return SavedSettings(
        labels=describe(folder).labels or labels_of(config),
        precision=PRECISIONS.get(dtype, "fp32"),
        max_length=None if limit is None else int(min(limit, MAX_ID)),
        activations=tuple(path for path in candidates if isinstance(path, str)),
        texts=texts,
        reads_instruction=texts.default_prompt is not None
        or (prompt is not None and prompt.around_instruction is not None),
        instruction=prompt.instruction if prompt else "",
    )


def _activation_in(config: dict[str, Any]) -> Any:
    """The activation's path, where version 4 and 5 saved it or earlier ones did."""
    newer = config.get("sentence_transformers")
    if isinstance(newer, dict) and "activation_fn" in newer:
        return newer["activation_fn"]
    return config.get("sbert_ce_default_activation_function")
