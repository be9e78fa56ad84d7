"""From a model's name to a service that runs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from echelon.models.device import usable_cpus
from echelon.options import Options
from echelon.prepare import prepare, with_profile
from echelon.scheduling.admission import AdmissionLimits
from echelon.score.worker import ChildWorker
from echelon.serve.service import Service
from echelon.serve.state import WEDGE_AFTER_S, Settings
from echelon.tune.fit import CostFit, Prior

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from echelon.prepare import PreparedModel
    from echelon.profile import Profile
    from echelon.scheduling.autoscaling import AutoscalingLimits
    from echelon.score.worker import Worker
    from echelon.serve.events import Listener

    MakeWorker = Callable[[int, Callable[[], None]], Worker]
    Hire = Callable[[PreparedModel, str | os.PathLike[str]], MakeWorker]


async def launch(  # noqa: PLR0913 - how it runs, beside what it serves
    model: str | os.PathLike[str],
    *,
    workers: int = 1,
    bounds: AdmissionLimits | None = None,
    memory_limit_bytes: int | None = None,
    wedge_after_s: float = WEDGE_AFTER_S,
    goal_s: float | None = None,
    fallback_max_length: int | None = None,
    listener: Listener | None = None,
    scaling: AutoscalingLimits | None = None,
    hire: Hire | None = None,
    **options: Any,
) -> Service:
    """Start a service for a model; the caller stops it.

    Args:
        model: hub id, local folder, or ``"demo"``.
        workers: processes that score: one for each GPU, or several that share the CPU's cores.
        bounds: what is taken in at most.
        memory_limit_bytes: a worker that holds more is replaced between steps.
        wedge_after_s: no step is given up before this.
        goal_s: latency goal in seconds; steps are kept below half of it.
        fallback_max_length: tokens that a pair of low priority may have while the queue is long.
        listener: hears what happens, from any thread.
        scaling: when there are more or fewer workers; None means never.
        hire: gives the workers of a model; None takes processes of this machine.
        **options: see :class:`echelon.options.Options`.

    Raises:
        InvalidInput: an option is unknown or wrong.
        ModelError: the model is not there, damaged, or of an unsupported kind.
        ProfileError: the profile cannot be read.
        OutOfMemory: the weights do not fit.
    """
    chosen, profile = with_profile(Options.of(**options))
    settings = replace(
        settings_of(chosen),
        workers=workers,
        bounds=bounds or AdmissionLimits(),
        memory_limit_bytes=memory_limit_bytes,
        wedge_after_s=wedge_after_s,
        goal_s=goal_s,
        fallback_max_length=fallback_max_length,
        scaling=scaling,
    )
    prepared = await asyncio.to_thread(prepare, model, chosen, profile)
    service = Service(
        prepared.encoder,
        partial(_make_worker, prepared, workers) if hire is None else hire(prepared, model),
        settings,
        listener=listener,
        learned=prepared.learned,
        prior=prior_of(profile, chosen, workers),
    )
    await service.start()
    prepared.check_profile(service.facts)
    return service


def settings_of(options: Options) -> Settings:
    """The settings of a service that are options of a library call as well."""
    return Settings(
        precision=options.precision,
        token_budget=options.token_budget,
        max_pairs=options.batch_size,
        max_length=options.max_length,
        truncation=options.truncation,
        max_query_tokens=options.max_query_tokens,
        allow=options.allow,
    )


def prior_of(profile: Profile | None, options: Options, workers: int) -> Prior | None:
    """What steps cost, as the profile knows it.

    Raises:
        ProfileError: its cost model is damaged.
    """
    if profile is None or profile.cost is None:
        return None
    fit = CostFit.from_dict(profile.cost)
    key, device = profile.key, profile.key.device
    alone = workers == 1 or device != "cpu"  # several share the cores
    same = alone and (options.precision, options.threads) == (
        key.precision,
        profile.settings.threads,
    )
    return Prior(fit.coefficients, fit.paid, device, same)


def _make_worker(
    prepared: PreparedModel, workers: int, number: int, ended: Callable[[], None]
) -> ChildWorker:
    options = prepared.options
    opener = prepared.opener(
        device_of(options.device, number, workers), threads_of(options.threads, workers)
    )
    return ChildWorker(opener, f"worker {number}", on_end=ended)


def device_of(device: str, number: int, workers: int) -> str:
    """One GPU for each worker, where ``cuda`` is asked for without a number."""
    return f"cuda:{number}" if device == "cuda" and workers > 1 else device


def threads_of(threads: int | None, workers: int) -> int | None:
    """The CPU's cores split among the workers, unless the user said how many each has."""
    return max(1, usable_cpus() // workers) if threads is None and workers > 1 else threads
