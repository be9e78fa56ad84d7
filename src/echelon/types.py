"""Plain data that crosses packages: requests, steps, scores, rankings, reports. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from echelon.errors import check_positive

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

    IntArray = npt.NDArray[np.int32]
    FloatArray = npt.NDArray[np.float32]

Clock = Callable[[], float]
"""Seconds from an arbitrary start, never going back. Code that needs the time is given a clock."""

monotonic: Clock = time.perf_counter

Pair = tuple[str, str]
"""(query, document)."""

Priority = Literal["high", "normal", "low"]
"""A request's share of the device."""

Truncation = Literal["longest_first", "only_second"]
"""Which text of a pair that is too long loses tokens: the longer one, or only the document."""

Side = Literal["left", "right"]
"""The side from which tokens are removed."""

Padding = Literal["none", "rectangular"]
"""How a scorer pads a step: not at all, or every pair to the length of the longest."""


@dataclass(frozen=True, slots=True)
class Chunking:
    """How long documents are split: tokens read and chunks scored of each; None is all."""

    max_tokens: int | None = None
    max_chunks: int | None = None

    def __post_init__(self) -> None:
        check_positive(max_tokens_per_doc=self.max_tokens, max_chunks_per_doc=self.max_chunks)


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """Pairs to score, and what their caller asks for. None leaves a value to the service."""

    pairs: Sequence[Pair]  # (query, document) texts
    deadline: float | None = None  # time of the service's clock after which the answer is useless
    priority: Priority = "normal"
    max_length: int | None = None  # tokens of a pair
    truncation: Truncation | None = None
    max_query_tokens: int | None = None  # tokens kept of a query
    # split longer documents into chunks; a document's score is its best chunk's
    chunking: Chunking | None = None
    refuse_truncation: bool = False  # refuse pairs that would lose tokens
    side: Side | None = None  # side from which tokens are removed; None is the model's own
    instruction: str | None = None  # what the model is asked to judge; None is its own
    fresh: bool = False  # score every pair, also those whose scores are cached


@dataclass(frozen=True, slots=True)
class Prompt:
    """The words around a query and a document that a language model judges.

    Its parts are tokenized apart; each begins where the tokenizer begins a token, so the ids are
    those of the whole. Only the prefix, the suffix and what is between may hold control tokens.
    """

    prefix: str
    instruction: str | None  # the model's own; None where it was trained without one
    # left out where there is no instruction; None where the model reads none
    around_instruction: tuple[str, str] | None
    around_query: tuple[str, str]
    between: str
    before_document: str
    suffix: tuple[str, ...]
    # tokens that the score is read of: relevant, and irrelevant if its logit is taken off; None for
    # a classifier
    answers: tuple[str, ...] | None
    max_tokens: int  # of a pair, by the model's authors
    query_share: float | None = None  # part of a pair that a query is cut to; None refuses it
    causal: bool = True  # no token sees a later one, so that pairs of a query share its work
    strips: bool = False  # its authors take white space off both ends of query and document
    temperature: float = 1.0  # divides the logit


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One step's input: flat token ids and where each pair begins."""

    ids: IntArray  # int32 [tokens], the pairs' token ids one after another
    # int32 [tokens] segment ids, or None where the model has none to tell apart
    type_ids: IntArray | None
    offsets: IntArray  # int32 [pairs + 1]; pair i is ``ids[offsets[i]:offsets[i + 1]]``

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """int32 [pairs], tokens of each pair."""
        lengths: IntArray = self.offsets[1:] - self.offsets[:-1]
        return lengths


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The ids that a tokenizer gives, for a comparison with its model."""

    largest: int
    special: dict[str, int]  # of ``pad``, ``cls`` and ``sep``, as far as its settings name them


@dataclass(frozen=True, slots=True)
class LadderStep:
    """One action of the OOM ladder."""

    rung: str  # as in :mod:`echelon.scheduling.oom_policy`
    detail: str  # what changed, in words with units
    remedy: str  # how the user can avoid it next time


@dataclass(frozen=True, slots=True)
class RunReport:
    """How a call was scored.

    Attributes:
        pairs: pairs asked for.
        scored: distinct pairs that went through the model.
        tokens: useful tokens scored.
        cost_tokens: tokens computed, padding included.
        steps: forward passes.
        ladder: actions of the OOM ladder, in order.
        cached: distinct pairs whose scores were cached.
    """

    pairs: int = 0
    scored: int = 0
    tokens: int = 0
    cost_tokens: int = 0
    steps: int = 0
    ladder: tuple[LadderStep, ...] = ()
    cached: int = 0

    @classmethod
    def of(cls, parts: Iterable[RunReport]) -> RunReport:
        """The report of a call that was scored in parts."""
        parts = list(parts)
        counts = ("pairs", "scored", "tokens", "cost_tokens", "steps", "cached")
        sums = {name: sum(getattr(part, name) for part in parts) for name in counts}
        return cls(**sums, ladder=tuple(step for part in parts for step in part.ladder))

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that was padding, 0 to 1."""
        return 1.0 - self.tokens / self.cost_tokens if self.cost_tokens else 0.0


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Scores of one call, in input order.

    Attributes:
        logits: float32 [pairs], the model's raw outputs.
        truncated_tokens: int32 [pairs], tokens each pair lost to ``max_length``; at least these
            for texts above 16,384 characters, which are read only as far as needed.
        report: how they were computed.
    """

    logits: FloatArray
    truncated_tokens: IntArray
    report: RunReport


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """One document of a ranking.

    Attributes:
        index: its position in the caller's list.
        score: sigmoid of the logit, 0 to 1.
        logit: the model's raw output; the ranking is sorted by it.
        truncated_tokens: tokens it lost to ``max_length``, at least these above 16,384 characters;
            0 means that nothing was lost.
    """

    index: int
    score: float
    logit: float
    document: str
    truncated_tokens: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents of one query, at most ``top_n``, best first; equal logits keep input order."""

    query: str
    results: tuple[RankedDocument, ...]
    report: RunReport = field(default_factory=RunReport)


@dataclass(frozen=True, slots=True)
class Timings:
    """Times of a served request, in seconds."""

    tokenise_s: float = 0.0  # tokenizing, including the wait for a thread
    queue_s: float = 0.0  # from joining the queue to the start of the first step with a pair of it
    compute_s: float = 0.0  # steps that held its pairs, also those shared with other requests
    total_s: float = 0.0  # from arrival to answer


@dataclass(frozen=True, slots=True)
class Answer:
    """A served request."""

    # float32 [pairs], raw logits in input order; of a document in chunks, the best
    logits: FloatArray
    truncated_tokens: IntArray  # int32 [pairs], as in :class:`ScoredPairs`
    tokens: int  # tokens of all its pairs, or chunks, as the model saw them
    cost_tokens: int  # its share of the tokens that its steps computed, padding included
    timings: Timings
    # pairs of each step that held pairs of it, other requests' included
    batch_sizes: tuple[int, ...] = ()
    ladder: tuple[LadderStep, ...] = ()
    # tokens to which its pairs were cut because the queue was long, or None
    fallback: int | None = None
    cached: int = 0  # documents whose scores were cached


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A scorer's model, device and limits."""

    family: str  # architecture, such as ``xlm-roberta``
    device: str  # ``cpu`` or ``cuda:N``
    device_name: str  # the processor's or card's own name
    precision: str  # ``fp32``, ``bf16``, ``fp16`` or ``int8``
    max_tokens: int  # longest pair the model's positions allow, special tokens included
    padding: Padding  # with ``rectangular`` a step costs its longest pair × its pairs
    weights_bytes: int  # memory of the loaded weights, memory-mapped tables left out
    threads: int  # CPU threads a forward pass uses; 0 on other devices
    # level of the compiled kernels that it uses, or ``off``; None where it has no use for them
    kernels: str | None = None
    lower_precision: str = "bf16"  # below fp32: the half-width one that the device multiplies
