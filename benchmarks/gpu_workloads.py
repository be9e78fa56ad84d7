"""Texts of known lengths in tokens, and a tokenizer if none is given; for ``gpu.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from make_checkpoint import SHAPES, make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import Pair, TokenBatch

LIMIT = 512
"""Tokens a pair may have in all engines."""

SPECIALS = 4
"""XLM-RoBERTa's: one before the query, two between, one behind."""

QUERY_WORDS = 8
MEAN_TOKENS = 120
SPREAD = 0.6
"""Standard deviation of the logarithm of a length."""

PAIRS_A_QUERY = 16
MAX_WORDS = 2000
TINY = SHAPES["xlm-roberta-large"] | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 514,
}


def build(out: Path, tokenizer: Path | None, *, tiny: bool) -> Path:
    """Write the checkpoint: XLM-RoBERTa-large's shape with random weights, or a tiny one."""
    source = tokenizer or make_tokenizer(out.parent / "tokenizer")
    shape = dict(TINY if tiny else SHAPES["xlm-roberta-large"])
    return make_checkpoint(out, shape, source)


def make_tokenizer(out: Path) -> Path:
    """Train a small Unigram tokenizer on the built-in texts and save it as XLM-RoBERTa's."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import XLMRobertaTokenizer

    from echelon.data import load_texts

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=4000,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    texts = [text for pair in load_texts().pairs for text in pair]
    tokenizer.train_from_iterator(texts, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    XLMRobertaTokenizer(vocab=[tuple(piece) for piece in pieces]).save_pretrained(out)
    return out


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes pairs of given lengths in tokens from words that are one token each."""

    words: tuple[str, ...]
    chance: np.random.Generator

    @classmethod
    def of(cls, folder: Path, seed: int = 0) -> Writer:
        """Find a tokenizer's whole words."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        bare = sorted(
            piece[1:]
            for piece in tokenizer.get_vocab()
            if piece.startswith("▁") and piece[1:].isascii() and piece[1:].isalpha()
        )
        encodings = tokenizer.encode_batch_fast(bare, add_special_tokens=False)
        whole = [w for w, e in zip(bare, encodings, strict=True) if len(e.ids) == 1 and len(w) > 1]
        chance = np.random.default_rng(seed)
        chance.shuffle(whole)
        return cls(tuple(whole[:MAX_WORDS]), chance)

    def text(self, words: int) -> str:
        """A text of random words."""
        return " ".join(self.chance.choice(self.words, size=max(1, words)))

    def pairs(self, lengths: list[int]) -> list[Pair]:
        """Pairs of these lengths in tokens; every 16 share a query."""
        queries = [self.text(QUERY_WORDS) for _ in range(-(-len(lengths) // PAIRS_A_QUERY))]
        return [
            (queries[i // PAIRS_A_QUERY], self.text(length - QUERY_WORDS - SPECIALS))
            for i, length in enumerate(lengths)
        ]

    def mixed(self, count: int) -> list[Pair]:
        """Log-normal lengths, mean 120 and at most 512 tokens."""
        mu = math.log(MEAN_TOKENS) - SPREAD**2 / 2
        drawn = self.chance.lognormal(mu, SPREAD, count)
        shortest = QUERY_WORDS + SPECIALS + 1
        return self.pairs(np.clip(drawn, shortest, LIMIT).astype(int).tolist())


def flop(config: dict[str, Any], lengths: np.ndarray) -> float:
    """Operations that the packed encoder needs for pairs of these lengths.

    The last layer computes keys and values for all tokens, the rest for first tokens only.
    """
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    tokens, pairs = float(lengths.sum()), len(lengths)
    squares = float(np.square(lengths, dtype=np.float64).sum())
    layer = tokens * (8 * hidden**2 + 4 * hidden * wide) + 4 * hidden * squares
    last = tokens * 4 * hidden**2 + pairs * (4 * hidden**2 + 4 * hidden * wide)
    last += 4 * hidden * tokens
    return (config["num_hidden_layers"] - 1) * layer + last + pairs * 2 * hidden**2


def by_query(pairs: list[Pair], logits: np.ndarray) -> list[np.ndarray]:
    """Logits of each query's documents."""
    queries = dict.fromkeys(query for query, _ in pairs)
    return [
        np.array([x for (query, _), x in zip(pairs, logits, strict=True) if query == wanted])
        for wanted in queries
    ]


def one_pair(batch: TokenBatch, index: int) -> dict[str, Any]:
    """A pair of a batch as transformers takes it."""
    import torch

    start, end = batch.offsets[index : index + 2]
    ids = torch.from_numpy(batch.ids[start:end]).long()[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
