"""Every native family on the card beside the CPU in fp32, which the tests hold to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_engines import free

if TYPE_CHECKING:
    from echelon.types import FloatArray
    from gpu_bench import Bench

VOCABULARY = 500
LENGTHS = (3, 17, 17, 40, 64, 96, 129, 200, 11, 77, 33, 150)
PRECISIONS = ("fp32", "fp16", "bf16", "fp8")

ENCODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 260,
    "num_labels": 1,
}
SPECIAL = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
DECODER = ENCODER | {"num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0}

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "BERT": ("bert", ENCODER, {}),
    "RoBERTa": ("roberta", ENCODER, {}),
    "XLM-RoBERTa": ("xlm-roberta", ENCODER, {}),
    "ModernBERT": ("modernbert", ENCODER | SPECIAL | {"local_attention": 32}, {}),
    "Qwen3": ("qwen3", DECODER, {}),
    "Qwen2": ("qwen2", DECODER, {}),
    "bidirectional Llama": (
        "llama",
        DECODER,
        {
            "model_type": "llama_bidirec",
            "architectures": ["LlamaBidirectionalForSequenceClassification"],
        },
    ),
}
"""Family → type of transformers, shape, and what its own ``config.json`` says otherwise."""


def families(bench: Bench) -> list[dict[str, Any]]:
    """Largest differences and rank agreement of each family in each precision of the card."""
    with TemporaryDirectory() as home:
        return [row for name in MODELS for row in _rows(bench, name, Path(home))]


def _rows(bench: Bench, name: str, home: Path) -> list[dict[str, Any]]:
    from echelon.models.registry import open_scorer

    folder = checkpoint(name, home)
    batch = _batch()
    exact = _scores(open_scorer(folder, device="cpu", precision="fp32"), batch)
    rows: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        row: dict[str, Any] = {"family": name, "precision": precision}
        try:
            found = _scores(open_scorer(folder, device=bench.device, precision=precision), batch)
            row |= _compared(exact, found)
        except Exception as error:  # noqa: BLE001 - one failure must not hide the others
            row["failed"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        free(bench.device)
        rows.append(row)
    return rows


def checkpoint(name: str, home: Path) -> Path:
    """A small model of a family with random weights, wide enough that pairs differ."""
    import torch
    import transformers

    kind, shape, own = MODELS[name]
    folder = home / f"toy-rerank-{kind}"
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **shape)
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    if own:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | own), "utf-8")
    return folder


def _batch() -> Any:
    from echelon.types import TokenBatch

    chance = np.random.default_rng(3)
    ids = chance.integers(5, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    offsets = np.concatenate(([0], np.cumsum(LENGTHS))).astype(np.int32)
    return TokenBatch(ids, np.zeros_like(ids), offsets)


def _scores(scorer: Any, batch: Any) -> FloatArray:
    """Scores of two steps of the same pairs: the second may run as a graph."""
    try:
        scorer.score(batch)
        found: FloatArray = scorer.score(batch)
    finally:
        scorer.close()
    return found


def _compared(exact: FloatArray, found: FloatArray) -> dict[str, float]:
    from echelon.engine.agreement import kendall_tau

    return {
        "max_delta": float(np.abs(found - exact).max()),
        "deviation": float(exact.std()),
        "tau": kendall_tau(exact, found),
    }
