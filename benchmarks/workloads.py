"""What the benchmarks score: the same pairs for every engine. Pure, but for reading files.

Nothing is drawn at random while measuring: the same tokenizer and passages give the same pairs.
Lengths are tokens of a pair as the model sees it, special tokens included.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Pair = tuple[str, str]

QUERY = "Which river flows through Vienna?"
DOCUMENTS = (
    "The Danube is the second longest river in Europe and flows straight through Vienna.",
    "Vienna has very many old coffee houses today.",
    "A river carries water from the hills down to the sea for many miles.",
    "Bread is baked from flour, water and some salt.",
)
MAX_LENGTH = 512
NAMES = ("tutorial", "mixed", "long", "realtime", "query")

TUTORIAL_PAIRS = 100
MIXED_PAIRS, MIXED_MEAN, MIXED_SIGMA = 200, 120.0, 0.6
LONG_PAIRS = 40
QUERY_DOCUMENTS, LONGEST_OF_QUERY = 100, 300
REALTIME_PAIRS, REALTIME_TOKENS = 10, 26
DOCUMENTS_PER_QUERY = 10
SHORTEST_DOCUMENT = 8
"""Tokens a document keeps at least, whatever the length drawn for its pair."""


class Passages(NamedTuple):
    """Texts of one language: questions, and paragraphs to cut documents from."""

    questions: list[str]
    paragraphs: list[str]


@dataclass(frozen=True, slots=True)
class Workload:
    """Pairs to score, and how long each is.

    Attributes:
        name: one of :data:`NAMES`.
        pairs: (query, document) texts.
        lengths: tokens of each pair, truncated to :data:`MAX_LENGTH`.
    """

    name: str
    pairs: list[Pair]
    lengths: list[int]

    @property
    def fingerprint(self) -> str:
        """Changes with the texts and with their tokens."""
        content = json.dumps([self.pairs, self.lengths], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def queries(self) -> list[list[int]]:
        """Per query, where its distinct documents stand: ties of copies say nothing of order."""
        places: dict[str, dict[str, int]] = {}
        for index, (query, document) in enumerate(self.pairs):
            places.setdefault(query, {}).setdefault(document, index)
        return [list(documents.values()) for documents in places.values()]

    def flop(self, config: dict[str, Any]) -> float:
        """Useful floating-point operations of the whole workload, see :func:`flop_of_pair`."""
        return sum(flop_of_pair(config, length) for length in self.lengths)


def flop_of_pair(config: dict[str, Any], length: int) -> float:
    """Operations of an encoder for one pair without padding; look-ups cost nothing.

    A token and layer: four hidden × hidden products, two hidden × intermediate (three with a gate),
    and two attention products over the tokens it sees; a multiplication and an addition count as
    two.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layers, gated = config["num_hidden_layers"], config.get("model_type") == "modernbert"
    seen = layers * length
    if gated:
        wide = math.ceil(layers / config["global_attn_every_n_layers"])
        seen = wide * length + (layers - wide) * min(length, config["local_attention"] + 1)
    products = 4 * hidden**2 + (3 if gated else 2) * hidden * inner
    return float(length * (2 * layers * products + 4 * hidden * seen))


def tutorial(count: int = TUTORIAL_PAIRS) -> list[Pair]:
    """``count`` pairs: the question with the four sentences in turn."""
    return [(QUERY, DOCUMENTS[i % len(DOCUMENTS)]) for i in range(count)]


def mixed_lengths(count: int = MIXED_PAIRS, seed: int = 0) -> list[int]:
    """Log-normal lengths, as web passages have: the quantiles themselves, shuffled."""
    normal = NormalDist(math.log(MIXED_MEAN) - MIXED_SIGMA**2 / 2, MIXED_SIGMA)
    drawn = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    lengths = [min(round(length), MAX_LENGTH) for length in drawn]
    random.Random(seed).shuffle(lengths)
    return lengths


def read_passages(folder: Path, languages: Sequence[str] | None = None) -> list[Passages]:
    """Questions and paragraphs of each language, from SQuAD-like files ``*.LANGUAGE.json``."""
    files = sorted(folder.glob("*.json"))
    chosen = [f for f in files if languages is None or f.suffixes[-2].lstrip(".") in languages]
    if not chosen:
        raise FileNotFoundError(f"{folder}: no *.LANGUAGE.json for {languages or 'any language'}")
    return [_passages(json.loads(file.read_text(encoding="utf-8"))) for file in chosen]


def build(name: str, tokenizer: Any, passages: Sequence[Passages] = ()) -> Workload:
    """Build a workload for a model.

    Args:
        name: one of :data:`NAMES`.
        tokenizer: the model's, a ``tokenizers.Tokenizer``.
        passages: texts for mixed and long, one entry a language; languages take turns.
    """
    if name == "tutorial":
        pairs = tutorial()
    elif name == "realtime":
        words = " ".join(DOCUMENTS).split()
        texts = [" ".join(words[i:] + words[:i]) for i in range(REALTIME_PAIRS)]
        pairs = [(QUERY, fit(tokenizer, QUERY, text, REALTIME_TOKENS)) for text in texts]
    elif name == "query":
        targets = [min(n, LONGEST_OF_QUERY) for n in mixed_lengths(QUERY_DOCUMENTS)]
        cut = list(_cut(tokenizer, passages, targets))
        pairs = [(cut[0][0], document) for _, document in cut]
    else:
        targets = [MAX_LENGTH] * LONG_PAIRS if name == "long" else mixed_lengths()
        pairs = list(_cut(tokenizer, passages, targets))
    counts = [min(count_tokens(tokenizer, pair), MAX_LENGTH) for pair in pairs]
    return Workload(name, pairs, counts)


def count_tokens(tokenizer: Any, pair: Pair) -> int:
    """Tokens of a pair, special tokens included, without truncation."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return len(tokenizer.encode(*pair).ids)


def fit(tokenizer: Any, query: str, text: str, target: int) -> str:
    """The beginning of ``text`` that makes a pair of at least ``target`` tokens, barely.

    A cut inside a word can change how it splits, so the length is counted again after cutting;
    for a target of :data:`MAX_LENGTH` truncation then gives exactly that.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    room = max(target - count_tokens(tokenizer, (query, "")), SHORTEST_DOCUMENT)
    ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
    for kept in range(room, len(ends) + 1):
        cut = text[: ends[kept - 1]]
        if count_tokens(tokenizer, (query, cut)) >= target:
            return cut
    return text


def sample(
    lengths: Sequence[int], size: int, unit: str, share: float = 0.2
) -> tuple[list[int], float]:
    """Pairs that stand for all: those of a part of the steps that a sorted run would take.

    Whole steps, spread over the lengths, so that padding is that of the real run.

    Args:
        lengths: of the pairs.
        size: pairs or tokens a step.
        unit: ``pairs`` or ``tokens``.
        share: of the steps, at least.

    Returns:
        Indices of pairs, and by how much a full run costs more than they do.
    """
    steps = _steps(lengths, size, unit)
    if share >= 1:
        return list(range(len(lengths))), 1.0
    full = steps[:-1] or steps  # the last one may be partial, and its speed another
    wanted = math.ceil(share * len(full))
    taken = [full[int((i + 0.5) * len(full) / wanted)] for i in range(wanted)]
    whole = sum(_cost(lengths, step, unit) for step in steps)
    scale = whole / sum(_cost(lengths, step, unit) for step in taken)
    return [index for step in taken for index in step], scale


def _steps(lengths: Sequence[int], size: int, unit: str) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    steps: list[list[int]] = [[]]
    for index in order:
        full = len(steps[-1]) if unit == "pairs" else sum(lengths[i] for i in steps[-1])
        more = 1 if unit == "pairs" else lengths[index]
        if steps[-1] and full + more > size:
            steps.append([])
        steps[-1].append(index)
    return steps


def _cost(lengths: Sequence[int], step: list[int], unit: str) -> int:
    if unit == "pairs":
        return max(lengths[i] for i in step) * len(step)
    return sum(lengths[i] for i in step)


def _cut(tokenizer: Any, passages: Sequence[Passages], targets: Sequence[int]) -> Iterator[Pair]:
    """Pairs of the target lengths: several documents a query, languages in turn."""
    starts = range(0, len(targets), DOCUMENTS_PER_QUERY)
    for number, (start, language) in enumerate(zip(starts, cycle(passages), strict=False)):
        turn = number // len(passages)
        query = language.questions[turn * DOCUMENTS_PER_QUERY % len(language.questions)]
        for offset, target in enumerate(targets[start : start + DOCUMENTS_PER_QUERY]):
            first = turn * DOCUMENTS_PER_QUERY + offset
            text = _enough(tokenizer, language.paragraphs, first, target)
            yield query, fit(tokenizer, query, text, target)


def _enough(tokenizer: Any, paragraphs: list[str], first: int, target: int) -> str:
    """Paragraphs joined from the ``first`` on until they hold more than ``target`` tokens."""
    joined = ""
    around = islice(cycle(paragraphs), first % len(paragraphs), None)
    while count_tokens(tokenizer, ("", joined)) < target + SHORTEST_DOCUMENT:
        joined = f"{joined} {next(around)}".strip()
    return joined


def _passages(content: dict[str, Any]) -> Passages:
    found = [paragraph for article in content["data"] for paragraph in article["paragraphs"]]
    questions = [asked["question"] for paragraph in found for asked in paragraph["qas"]]
    contexts = [" ".join(paragraph["context"].split()).lstrip("\ufeff ") for paragraph in found]
    return Passages(questions, contexts)
