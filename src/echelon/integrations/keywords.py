"""Keywords of the originals: which have an older name, which cannot be honoured, and why.

Pure: tables and checks, no model and no torch.

Which model is meant, in the words of the originals, and where it is stored.
"""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from echelon.errors import EchelonWarning, InvalidInput, ModelNotFound, UnsupportedModel
from echelon.models.hub import DEMO, choose, resolve

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
"""Keyword → why it cannot be honoured and what to do instead."""


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function be called by the older names of its keywords.

    Args:
        **names: older name → today's.

    Raises:
        InvalidInput: on a call that gives both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(*args, **cast("Any", _by_new_names(kwargs, names)))

        return call

    return decorate


def _by_new_names(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    for old, new in names.items():
        if old in values and new in values:
            raise InvalidInput(old, f"is the older name of {new}, which is given too", "Give one.")
    return {names.get(name, name): value for name, value in values.items()}


def refuse(**values: Any) -> None:
    """Refuse keywords that ask for something; None, False and empty ones ask for nothing.

    Raises:
        InvalidInput: names the first that asks, and the remedy.
    """
    for name, value in values.items():
        if value is not None and value is not False and value not in ([], ()):
            raise InvalidInput(name, f"{value!r} cannot be honoured", REFUSED[name])


def take_refused(options: dict[str, Any]) -> None:
    """Take the refusable keywords out of ``options``.

    Raises:
        InvalidInput: as in :func:`refuse`.
    """
    refuse(**{name: options.pop(name) for name in sorted(REFUSED.keys() & options.keys())})


def take_idle(options: dict[str, Any], *names: str) -> None:
    """Take keywords out of ``options`` that do nothing in the original either.

    Warns:
        EchelonWarning: names each one.
    """
    for name in names:
        if name in options:
            options.pop(name)
            warnings.warn(
                f"{name} has no effect, nor has it in sentence-transformers 6. Leave it out.",
                EchelonWarning,
                stacklevel=4,
            )


def only(field: str, values: Mapping[str, Any] | None, *known: str, remedy: str) -> dict[str, Any]:
    """The entries of a dictionary keyword, all of which must be known.

    Raises:
        InvalidInput: an entry that Echelon cannot honour.
    """
    given = dict(values or {})
    for name in given:
        if name not in known:
            raise InvalidInput(f"{field}[{name!r}]", "cannot be honoured", remedy)
    return given


def precision_of(field: str, dtype: object) -> Precision | None:
    """Echelon's name of a torch dtype or its name; None for None and ``auto``.

    Raises:
        InvalidInput: a dtype that Echelon does not compute in.
    """
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in PRECISIONS:
        raise InvalidInput(field, f"{dtype!r} is unknown", f"Use {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


def device_option(device: object) -> str:
    """The ``device`` option for what torch calls a device; None is ``auto``."""
    if device is None:
        return "auto"
    if isinstance(device, int) and not isinstance(device, bool):
        return f"cuda:{device}"
    return str(device)


def capped(field: str, asked: object, limit: int, *, warn: bool = True) -> int:
    """A length limit, brought down to what the model can read.

    The originals accept more and fail inside the model on the first text that uses it.

    Raises:
        InvalidInput: not a positive whole number.

    Warns:
        EchelonWarning: it was brought down.
    """
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise InvalidInput(field, f"{asked!r} is not a positive whole number", "Give 1 or more.")
    if asked > limit and warn:
        warnings.warn(
            f"{field}: the model reads {limit} tokens at most, so {limit} is used instead of "
            f"{asked}. Ask for {limit} or fewer.",
            EchelonWarning,
            stacklevel=3,
        )
    return min(asked, limit)


@dataclass(frozen=True, slots=True)
class Located:
    """A model that is on this machine now.

    Attributes:
        path: its folder.
        model: what to call it for :class:`echelon.Reranker`.
        revision: its commit; None where it has none.
    """

    path: Path
    model: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class Storage:
    """Where and how to look for a model on the hub.

    Attributes:
        revision: branch, tag or commit.
        cache: the cache folder; None is the hub's own.
        offline: never ask the hub.
        token: as ``huggingface_hub`` takes it.
    """

    revision: str | None = None
    cache: str | os.PathLike[str] | None = None
    offline: bool = False
    token: str | bool | None = None

    @property
    def is_usual(self) -> bool:
        """Whether Echelon's own way of fetching will do."""
        return self.cache is None and self.token is None and not self.offline


def locate(model: object, storage: Storage, *, owner: str | None = None) -> Located:
    """Find a model, fetching it where needed.

    Args:
        model: folder, hub name or ``demo``.
        storage: where to look.
        owner: whose a hub name without an owner is.

    Raises:
        InvalidInput: not a text or path.
        ModelNotFound: not there.
        UnsupportedModel: no weights that Echelon can read.
    """
    if not isinstance(model, str | os.PathLike):
        raise InvalidInput("model_name_or_path", f"is {model!r}", "Give a folder or a hub name.")
    name = os.fspath(model)
    if name == DEMO or Path(name).expanduser().is_dir():
        found = resolve(name, revision=storage.revision)
        return Located(found.path, name, None)
    if owner is not None and "/" not in name:
        name = f"{owner}/{name}"
    if storage.is_usual:
        found = resolve(name, revision=storage.revision)
        # The commit, so that opening it asks the hub nothing a second time.
        return Located(found.path, name, found.revision)
    path = _snapshot(name, storage)
    return Located(path, str(path), None)


def _snapshot(repo: str, storage: Storage) -> Path:
    """Find or fetch a repository where the caller said."""
    from huggingface_hub import HfApi, snapshot_download

    files: list[str] = []  # offline: whatever is there; what is missing shows when it is opened
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
    except Exception as error:  # the hub's HTTP client, and with it its errors, keeps changing
        raise ModelNotFound(
            f"{repo} is not to be had ({type(error).__name__}). Check name, revision, token and "
            "connection; with local_files_only, fetch it once without."
        ) from error
    if not files and not storage.offline:
        raise UnsupportedModel(
            f"{repo} has no weights in safetensors or PyTorch format. Name one that has."
        )
    return Path(folder)
