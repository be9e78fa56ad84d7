"""``FlagEmbedding.FlagReranker`` with Echelon as its engine."""
# The signatures are the original's, so that scripts run unchanged:
# ruff: noqa: PLR0913, PLR0917, FBT001, FBT002

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import echelon.integrations.originals as originals  # noqa: PLR0402 - the package imports this
from echelon.errors import InvalidInput
from echelon.models.device import choose_device, require_torch
from echelon.options import Options, check_pairs
from echelon.reranker import Reranker, sigmoid

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from echelon.types import FloatArray, Pair

DEFAULT_MAX_LENGTH = 512
QUERY_SHARE = (3, 4)
"""Part of ``max_length`` that a query may take if no ``query_max_length`` is given."""

OTHER_NAMES = {
    "device": "Name it devices, as in FlagEmbedding.",
    "max_query_tokens": "Name it query_max_length, as in FlagEmbedding.",
    "truncation": "FlagEmbedding always cuts the passage. Use echelon.Reranker to choose.",
}
"""Echelon options that this class sets itself → what to do instead."""


class FlagReranker:
    """Scores pairs of texts, with the interface of FlagEmbedding 1.4.

    The model is a folder, a hub name or ``demo``. An instruction is put before queries or passages
    by its format, with ``{}`` for the instruction and ``{}`` for the text. A query is cut to
    ``query_max_length`` tokens (None is three quarters of ``max_length``), then the passage so that
    the pair fits. ``use_fp16`` has no effect on the CPU, as in the original. ``trust_remote_code``
    must be false. ``devices`` is one device: ``cpu``, ``cuda``, ``cuda:N``, its number, or a list
    of one; None takes the first GPU if there is. ``batch_size`` is pairs a step; None lets Echelon
    choose, and scores do not depend on it. Both lengths, ``batch_size`` and ``normalize`` (sigmoids
    instead of logits) may be set at any time. Other keywords are options of
    :class:`echelon.options.Options`.

    Raises:
        InvalidInput: a keyword is unknown, wrong or not supported, or the model has several labels
            and no ``label`` is chosen.
        ModelError: the model does not exist, is damaged, or of an unsupported kind.
        OutOfMemory: the weights do not fit.

    Warns:
        EchelonWarning: ``max_length`` is more than the model's limit.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        use_fp16: bool = False,
        query_instruction_for_rerank: str | None = None,
        query_instruction_format: str = "{}{}",
        passage_instruction_for_rerank: str | None = None,
        passage_instruction_format: str = "{}{}",
        trust_remote_code: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        devices: str | int | Sequence[str] | Sequence[int] | None = None,
        batch_size: int | None = None,
        query_max_length: int | None = None,
        max_length: int = DEFAULT_MAX_LENGTH,
        normalize: bool = False,
        **options: Any,
    ) -> None:
        originals.refuse(trust_remote_code=trust_remote_code)
        originals.take_refused(options)
        _refuse_other_names(options)
        options["device"] = _one_device(devices)
        revision = Options.of(**options).revision
        self.query_instruction_for_rerank = query_instruction_for_rerank
        self.query_instruction_format = query_instruction_format
        self.passage_instruction_for_rerank = passage_instruction_for_rerank
        self.passage_instruction_format = passage_instruction_format
        _check_format("query_instruction_format", query_instruction_format)
        _check_format("passage_instruction_format", passage_instruction_format)
        self.batch_size, self.normalize = batch_size, normalize
        self.query_max_length, self.max_length = query_max_length, max_length
        located = originals.locate(model_name_or_path, originals.Storage(revision, cache_dir))
        saved = originals.read_saved(located.path)
        if "precision" not in options:
            options["precision"] = _precision(use_fp16=use_fp16, options=options) or saved.precision
        if saved.texts.default_prompt is not None and saved.instruction == "":
            options.setdefault(
                "instruction", ""
            )  # the original does not know a classifier's prompt
        self._reranker = Reranker(located.model, **{**options, "revision": located.revision})
        if max_length != DEFAULT_MAX_LENGTH:
            originals.capped("max_length", max_length, self._reranker.facts.max_tokens)

    @property
    def use_fp16(self) -> bool:
        """Whether it computes in fp16."""
        return self._reranker.facts.precision == "fp16"

    @property
    def target_devices(self) -> list[str]:
        """The device that computes, as a list of one."""
        return [self._reranker.facts.device]

    def compute_score(
        self,
        sentence_pairs: Sequence[Sequence[str]] | Sequence[str],
        *,
        batch_size: int | None = None,
        query_max_length: int | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        **options: Any,
    ) -> list[float]:
        """Score (query, passage) texts, or one such pair.

        ``batch_size``, ``query_max_length``, ``max_length`` and ``normalize`` replace the
        constructor's for this call. Other keywords are options of one call, see
        :meth:`echelon.Reranker.score_pairs`.

        Returns:
            Scores in input order; for one pair a list of one.

        Raises:
            InvalidInput: no pairs, a pair is not two texts, a query leaves no room, or a keyword is
                wrong.
            OutOfMemory: a pair alone does not fit in memory.
        """
        _refuse_other_names(options)
        pairs = [self._instructed(pair) for pair in check_pairs(_as_pairs(sentence_pairs))]
        asked = self.max_length if max_length is None else max_length
        limit = self._reranker.facts.max_tokens
        overrides = {
            "batch_size": self.batch_size if batch_size is None else batch_size,
            "max_query_tokens": self._query_tokens(query_max_length, asked),
            "max_length": originals.capped("max_length", asked, limit, warn=max_length is not None),
            **options,
        }
        logits = self._logits(pairs, overrides)
        normalized = self.normalize if normalize is None else normalize
        return [float(score) for score in (sigmoid(logits) if normalized else logits)]

    def stop_self_pool(self) -> None:
        """Do nothing: there are no worker processes to stop."""

    def _query_tokens(self, asked: int | None, max_length: int) -> int:
        asked = self.query_max_length if asked is None else asked
        part, whole = QUERY_SHARE
        return max(1, max_length * part // whole) if asked is None else asked

    def _instructed(self, pair: Pair) -> Pair:
        query, passage = pair
        return (
            _joined(self.query_instruction_format, self.query_instruction_for_rerank, query),
            _joined(self.passage_instruction_format, self.passage_instruction_for_rerank, passage),
        )

    def _logits(self, pairs: list[Pair], overrides: dict[str, Any]) -> FloatArray:
        try:
            return self._reranker.score_pairs(pairs, truncation="only_second", **overrides).logits
        except InvalidInput as error:
            if not error.field.endswith("].query"):
                raise
            remedy = "Shorten it, lower query_max_length or raise max_length."
            raise InvalidInput(error.field, error.problem, remedy) from None


def _as_pairs(pairs: Any) -> Any:
    """Pairs, also from a single pair."""
    if isinstance(pairs, list | tuple):
        if not pairs:
            raise InvalidInput("sentence_pairs", "is empty", "Pass at least one pair.")
        if isinstance(pairs[0], str):
            return [pairs]
    return pairs


def _joined(form: str, instruction: str | None, text: str) -> str:
    r"""A text with its instruction; ``\n`` written out in the format is a line break."""
    return text if instruction is None else form.replace("\\n", "\n").format(instruction, text)


def _check_format(field: str, form: str) -> None:
    try:
        form.format("", "")
    except (IndexError, KeyError, ValueError) as error:
        problem = f"{form!r} cannot be filled in ({error!r})"
        raise InvalidInput(field, problem, "Use {} for each of the two texts.") from None


def _one_device(devices: Any) -> str:
    if isinstance(devices, list | tuple):
        if len(devices) != 1:
            problem = f"names {len(devices)} devices, and one process uses one"
            remedy = "Name one; start a process for each and share the pairs out between them."
            raise InvalidInput("devices", problem, remedy)
        devices = devices[0]
    return originals.device_option(devices)


def _precision(*, use_fp16: bool, options: dict[str, Any]) -> str | None:
    """The precision that the caller requests; None keeps the dtype of the weights."""
    if use_fp16:
        require_torch()
        if choose_device(options["device"]).type != "cpu":
            return "fp16"
    return None if options.get("profile") is None else "auto"


def _refuse_other_names(options: dict[str, Any]) -> None:
    for name in OTHER_NAMES.keys() & options.keys():
        raise InvalidInput(name, "is not a keyword of FlagReranker", OTHER_NAMES[name])
