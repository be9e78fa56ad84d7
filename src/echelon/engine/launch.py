"""From a model's name to all that opening it needs, and to a running service."""

from __future__ import annotations

import asyncio
import logging
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from echelon.engine.card_precision import choose_on_card, require_float8
from echelon.engine.events import WEDGE_AFTER_S, ServiceSettings
from echelon.engine.precision_check import check_precision, scorer_factory
from echelon.engine.score_cache import ScoreCache
from echelon.engine.service import Service
from echelon.engine.worker import ChildWorker
from echelon.errors import EchelonWarning, InvalidInput
from echelon.models.cards import place
from echelon.models.device import processor_of, usable_cpus
from echelon.models.hub import fingerprint, resolve
from echelon.models.registry import (
    check_tokenizer,
    model_prompt,
    precisions_to_compare,
    require_model,
    runs_in,
)
from echelon.models.text_settings import read_text_settings
from echelon.options import Options
from echelon.profile import (
    TUNE_AGAIN,
    Profile,
    apply_profile,
    current_key,
    remember_budget,
    warn_if_stale,
)
from echelon.progress import status
from echelon.scheduling.admission import AdmissionLimits
from echelon.scheduling.fit import CostFit, Prior
from echelon.tokenization.tokenizer import PairEncoder

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from echelon.engine.events import Listener
    from echelon.engine.worker import ScorerFactory, Worker
    from echelon.models.hub import ModelFolder
    from echelon.options import Precision
    from echelon.scheduling.autoscaling import AutoscalingLimits
    from echelon.types import ModelInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model that is ready to be opened."""

    folder: ModelFolder
    options: Options  # the caller's, completed by the profile
    encoder: PairEncoder
    profile: Profile | None
    keep_bf16: list[str]  # layers that int8 leaves in bf16
    by_profile: bool = False  # whether the profile chose the precision, not the caller

    def opener(self, device: str | None = None, threads: int | None = None) -> ScorerFactory:
        """A function that opens the scorer, in this process or another, with these options."""
        own = self.options
        own = replace(own, device=device or own.device, threads=threads or own.threads)
        return scorer_factory(self.folder, own, self.keep_bf16)

    def check_profile(self, info: ModelInfo) -> None:
        """Warn where the profile was measured on something else."""
        if self.profile is not None:
            here = processor_of(info.device)
            key = current_key(self.folder.name, self.folder.revision, info, **here)
            warn_if_stale(self.profile, key, self.options.profile)

    def score_cache(self) -> ScoreCache | None:
        """The score cache that the options ask for."""
        size = self.options.score_cache_bytes
        return ScoreCache(size, partial(fingerprint, self.folder.path)) if size else None

    def learned(self, budget: int | None) -> None:
        """Keep the token budget that memory allows in the profile; None removes it."""
        remember_budget(self.options.profile, budget)


def with_profile(asked: Options) -> tuple[Options, Profile | None]:
    """Complete options that were left open from the profile; raises ProfileError."""
    if asked.profile is None:
        return asked, None
    profile = Profile.load(asked.profile)
    return apply_profile(asked, profile), profile


def open_encoder(folder: ModelFolder, instruction: str | None = None) -> PairEncoder:
    """Read a model's tokenizer and compare it with the model, or raise :class:`ModelError`."""
    require_model(folder.path)  # first, so that a folder without a model is named
    settings = read_text_settings(folder.path)
    encoder = PairEncoder(
        folder.path,
        model_prompt(folder.path),
        settings.default_prompt or None if instruction is None else instruction,
        before_query=settings.default_prompt is not None,
        lower_case=settings.lower_case,
    )
    check_tokenizer(folder.path, encoder.ids)
    return encoder


def prepare(
    model: str | os.PathLike[str], asked: Options, profile: Profile | None
) -> PreparedModel:
    """Find a model, read its tokenizer, and compare with fp32 before a precision's first use.

    That is int8 on CPU, and fp8 and what ``auto`` means on a card.

    Args:
        model: hub id, ``"modelscope:owner/name"``, local folder, or ``"demo"``.
        asked: the caller's options, which the profile completes.
        profile: the profile, if there is one.

    Raises:
        InvalidInput: int8 or fp8 was asked for and does not rank as fp32 does.
        ModelError: the model is missing, damaged, or not supported.
    """
    folder = resolve(model, revision=asked.revision, progress=asked.progress)
    encoder = open_encoder(folder, asked.instruction)
    options = asked
    by_profile = profile is not None and asked.precision == "auto"
    if profile is not None:
        options = apply_profile(asked, profile)
        options = with_precision_there(options, profile, folder) if by_profile else options
    with status("Comparing precisions with fp32", shown=asked.progress) as on_progress:
        try:
            kept = check_precision(folder, options, encoder, profile, on_progress)
            require_float8(folder, options, encoder, on_progress)
        except InvalidInput as error:
            if profile is None or not by_profile:
                raise
            options, kept = _fallen_back(options, profile, folder, str(error)), []
        options = choose_on_card(folder, options, encoder, on_progress)
    if profile is not None and options.precision != apply_profile(asked, profile).precision:
        # The warning named the precision already.
        profile = replace(profile, key=replace(profile.key, precision=options.precision))
    return PreparedModel(folder, options, encoder, profile, kept, by_profile)


def with_precision_there(options: Options, profile: Profile, folder: ModelFolder) -> Options:
    """Options in another precision where the profile's does not exist or is slow on this machine.

    Warns, once it differs, with :class:`EchelonWarning`. Only for a precision that the profile
    chose; what a caller asks for is never replaced.
    """
    wanted = options.precision
    if runs_in(folder.path, options.device, wanted):
        return options
    # Without a row the user chose it for tuning: only int8 and fp8 do not work everywhere.
    if wanted not in {"int8", "fp8"} and profile.precision_row(wanted) is None:
        return options
    return _fallen_back(options, profile, folder, f"this machine has no fast {wanted}")


def _fallen_back(options: Options, profile: Profile, folder: ModelFolder, reason: str) -> Options:
    """The fastest other precision that passed when the profile was measured; warns."""
    exact, *others = precisions_to_compare(folder.path, options.device)
    passed = {row["precision"] for row in profile.precisions if row.get("passed")}
    usable = [exact, *(one for one in others if one in passed - {options.precision})]
    warnings.warn(
        f"{options.profile} chooses {options.precision}, but {reason}. {usable[-1]} is used. "
        f"{TUNE_AGAIN}",
        EchelonWarning,
        stacklevel=4,
    )
    return replace(options, precision=cast("Precision", usable[-1]))


_SHARED = ("precision", "token_budget", "max_length", "truncation", "max_query_tokens", "allow")
"""Options of a library call that are also settings of a service, under the same name."""

if TYPE_CHECKING:
    MakeWorker = Callable[[int, Callable[[], None]], Worker]
    WorkerFactory = Callable[[PreparedModel, str | os.PathLike[str]], MakeWorker]


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
    worker_factory: WorkerFactory | None = None,
    **options: Any,
) -> Service:
    """Start a service for a model; the caller stops it.

    Args:
        model: hub id, ``"modelscope:owner/name"``, local folder, or ``"demo"``.
        workers: processes that score. They take the cards in turn, or share the CPU's cores.
        bounds: limits of admission.
        memory_limit_bytes: a worker that holds more is replaced between steps.
        wedge_after_s: seconds without an answer before a worker is killed, at the earliest.
        goal_s: latency goal in seconds; steps are kept below half of it.
        fallback_max_length: tokens of a pair of low priority while the queue is long.
        listener: receives events, from any thread.
        scaling: limits of autoscaling; None keeps the number of workers.
        worker_factory: makes the workers of a model; None starts processes on this machine.
        **options: see :class:`echelon.options.Options`.

    Raises:
        InvalidInput: an option is unknown or wrong.
        ModelError: the model is missing, damaged, or not supported.
        ProfileError, OutOfMemory: the profile cannot be read; the weights do not fit.
    """
    asked = Options.of(**options)
    chosen, profile = with_profile(asked)
    settings = ServiceSettings(
        **{name: getattr(chosen, name) for name in _SHARED},
        max_pairs=chosen.batch_size,
        workers=workers,
        bounds=bounds or AdmissionLimits(),
        memory_limit_bytes=memory_limit_bytes,
        wedge_after_s=wedge_after_s,
        goal_s=goal_s,
        fallback_max_length=fallback_max_length,
        scaling=scaling,
    )
    prepared = await asyncio.to_thread(prepare, model, asked, profile)
    service = Service(
        prepared.encoder,
        worker_factory(prepared, model) if worker_factory else partial(_worker, prepared, workers),
        replace(settings, precision=prepared.options.precision),
        listener=listener,
        learned=prepared.learned,
        prior=prior_of(profile, prepared.options, workers),
        scores=prepared.score_cache(),
    )
    await service.start()
    prepared.check_profile(service.info)
    return service


def prior_of(profile: Profile | None, options: Options, workers: int) -> Prior | None:
    """The profile's cost model of steps.

    Raises:
        ProfileError: its cost model is damaged.
    """
    if profile is None or profile.cost is None:
        return None
    fit = CostFit.from_dict(profile.cost)
    key, device = profile.key, profile.key.device
    alone = workers == 1 or device != "cpu"  # on a CPU several workers share the cores
    tuned = (key.precision, profile.settings.threads)
    if fit.note is not None:
        logger.warning("%s The server learns the times of its own steps.", fit.note)
    # An imprecise model says nothing of whether the machine has changed.
    same = alone and (options.precision, options.threads) == tuned and fit.note is None
    return Prior(fit.coefficients, fit.padding, device, same)


def _worker(
    prepared: PreparedModel, workers: int, number: int, ended: Callable[[], None]
) -> ChildWorker:
    placed = place(prepared.options.device, number)
    opener = prepared.opener(placed.device, threads_of(prepared.options.threads, workers))
    return ChildWorker(opener, f"worker {number}", on_end=ended, environment=placed.environment)


def threads_of(threads: int | None, workers: int) -> int | None:
    """The CPU's cores divided among the workers, unless the user set the threads of each."""
    return max(1, usable_cpus() // workers) if threads is None and workers > 1 else threads
