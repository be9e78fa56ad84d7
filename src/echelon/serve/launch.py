"""From a model's name to a service that runs: resolve, read the profile, open the workers."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from echelon.config import Options
from echelon.encode.tokens import PairEncoder
from echelon.fetch.resolve import resolve
from echelon.gate import pass_gate
from echelon.plan.admit import Bounds
from echelon.score.device import usable_cpus
from echelon.score.load import open_scorer, require_model
from echelon.score.worker import ChildWorker
from echelon.serve.service import Service
from echelon.serve.state import Settings
from echelon.tune.profile import (
    Profile,
    apply_profile,
    current_key,
    remember_budget,
    warn_if_stale,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    from echelon.serve.events import Listener


async def launch(
    model: str | os.PathLike[str],
    *,
    workers: int = 1,
    bounds: Bounds | None = None,
    memory_limit_bytes: int | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> Service:
    """Start a service for a model; the caller stops it.

    Args:
        model: hub id, local folder, or ``"demo"``.
        workers: processes that score: one for each GPU, or several that share the CPU's cores.
        bounds: what is taken in at most.
        memory_limit_bytes: a worker that holds more is replaced between steps.
        listener: hears what happens, from any thread.
        **options: see :class:`echelon.config.Options`.

    Raises:
        InvalidInput: an option is unknown or wrong.
        ModelError: the model is not there, damaged, or of an unsupported kind.
        ProfileError: the profile cannot be read.
        OutOfMemory: the weights do not fit.
    """
    asked = Options.of(**options)
    profile = None if asked.profile is None else Profile.load(asked.profile)
    chosen = asked if profile is None else apply_profile(asked, profile)
    settings = settings_of(chosen, workers, bounds, memory_limit_bytes)
    folder = await asyncio.to_thread(
        resolve, model, revision=asked.revision, progress=asked.progress
    )
    require_model(folder.path)  # before anything is opened: a folder that is no model says so
    encoder = await asyncio.to_thread(PairEncoder, folder.path)
    kept = await asyncio.to_thread(pass_gate, folder, chosen, encoder, profile)
    service = Service(
        encoder,
        partial(_make_worker, folder.path, chosen, kept, workers),
        settings,
        listener=listener,
        learned=partial(remember_budget, chosen.profile),
    )
    await service.start()
    if profile is not None:
        key = current_key(folder.name, folder.revision, service.facts)
        warn_if_stale(profile, key, asked.profile)
    return service


def settings_of(
    options: Options, workers: int, bounds: Bounds | None, memory_limit_bytes: int | None
) -> Settings:
    """The settings that options mean for a service."""
    return Settings(
        workers=workers,
        precision=options.precision,
        token_budget=options.token_budget,
        max_pairs=options.batch_size,
        max_length=options.max_length,
        truncation=options.truncation,
        max_query_tokens=options.max_query_tokens,
        allow=options.allow,
        bounds=bounds or Bounds(),
        memory_limit_bytes=memory_limit_bytes,
    )


def _make_worker(
    folder: Path,
    options: Options,
    keep_bf16: list[str],
    workers: int,
    number: int,
    ended: Callable[[], None],
) -> ChildWorker:
    opener = partial(
        open_scorer,
        folder,
        device=device_of(options.device, number, workers),
        threads=threads_of(options.threads, workers),
        label=options.label,
        keep_bf16=keep_bf16,
    )
    return ChildWorker(opener, f"worker {number}", on_end=ended)


def device_of(device: str, number: int, workers: int) -> str:
    """One GPU for each worker, where ``cuda`` is asked for without a number."""
    return f"cuda:{number}" if device == "cuda" and workers > 1 else device


def threads_of(threads: int | None, workers: int) -> int | None:
    """The CPU's cores split among the workers, unless the user said how many each has."""
    return max(1, usable_cpus() // workers) if threads is None and workers > 1 else threads
