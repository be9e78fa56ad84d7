"""Tiny decoders with random weights, their scores by transformers, and steps for them."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from echelon.models import qwen
from echelon.models.architecture import LayerPlan, read_config
from echelon.models.decoder import open_native
from echelon.models.device import set_threads
from echelon.models.prompts import Answers
from echelon.types import TokenBatch

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
LIMIT, VOCABULARY = 400, 150
ANSWERS = Answers(11, 7)
ODD = {
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LIMIT,
}
"""Six heads of ten are not the 40 of the hidden width."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Qwen3ForCausalLM", {"head_dim": 10, "tie_word_embeddings": True}),
    "untied": ("Qwen3ForCausalLM", {"head_dim": 10, "attention_bias": True, "rope_theta": 1e6}),
    "classifier": (
        "Qwen3ForSequenceClassification",
        {"head_dim": 10, "num_labels": 3, "pad_token_id": 0},
    ),
    "qwen2": ("Qwen2ForCausalLM", {"hidden_size": 48, "tie_word_embeddings": True}),
    "deep": (
        "Qwen3ForCausalLM",
        {"head_dim": 128, "num_hidden_layers": 12, "hidden_size": 96, "intermediate_size": 128},
    ),
    "one layer": ("Qwen3ForCausalLM", {"head_dim": 10, "num_hidden_layers": 1}),
}
LABEL = 1


def make_decoder(folder: Path, name: str, max_shard: str = "1GB", **changes: Any) -> Path:
    """Save a decoder with random weights, wide enough that pairs differ."""
    import transformers

    kind, own = MODELS[name]
    shape = {**ODD, **own, **changes}
    config = transformers.AutoConfig.for_model(kind[:5].lower(), **shape)
    torch.manual_seed(5)
    model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.08
    model.save_pretrained(folder, max_shard_size=max_shard)
    return folder


def shape_of(folder: Path) -> Any:
    return qwen.read(folder, read_config(folder))


def open_decoder(folder: Path, precision: str = "fp32", **plan: Any) -> Any:
    shape = shape_of(folder)
    return open_native(
        folder=folder,
        architecture=shape,
        device=CPU,
        plan=LayerPlan(precision, **plan),
        threads=set_threads(1, CPU),  # more lose time where cores are busy
        label=LABEL if shape.classifies else 0,
        answers=None if shape.classifies else ANSWERS,
    )


@lru_cache(maxsize=16)
def scorer_of(folder: Path, precision: str = "fp32") -> Any:
    return open_decoder(folder, precision)


@lru_cache(maxsize=8)
def reference_model(folder: Path) -> Any:
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


def reference(folder: Path, batch: TokenBatch) -> np.ndarray:
    """Scores by transformers, every pair alone."""
    found = []
    for start, end in pairwise(batch.offsets):
        ids = torch.from_numpy(batch.ids[start:end]).long()[None]
        with torch.inference_mode():
            logits = reference_model(folder)(input_ids=ids).logits[0].double()
        yes, no = ANSWERS.ids
        found.append(logits[LABEL] if logits.ndim == 1 else logits[-1, yes] - logits[-1, no])
    return np.array(found, dtype=np.float64)


def batch_of(texts: list[np.ndarray]) -> TokenBatch:
    offsets = np.concatenate(([0], np.cumsum([len(text) for text in texts]))).astype(np.int32)
    return TokenBatch(np.concatenate(texts).astype(np.int32), None, offsets)


def random_ids(chance: np.random.Generator, count: int) -> np.ndarray:
    return chance.integers(1, VOCABULARY, count)


def query_batch(seed: int, queries: int, lengths: list[int], query: int = 60) -> TokenBatch:
    """Documents of some queries in turn; all queries begin with the same 30 tokens."""
    chance = np.random.default_rng(seed)
    start = random_ids(chance, 30)
    asked = [np.concatenate((start, random_ids(chance, query))) for _ in range(queries)]
    return batch_of(
        [
            np.concatenate((asked[at % queries], random_ids(chance, length)))
            for at, length in enumerate(lengths)
        ]
    )
