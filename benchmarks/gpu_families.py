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
PRECISIONS = {"fp32": 0.001, "fp16": 0.02, "bf16": 0.15, "fp8": 0.9}
"""And how far a score may be from fp32's on the CPU, in deviations of the scores: some four times,
in fp8 twice, what operators on a CPU give that round as a card's do."""

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

GTE = ENCODER | {
    "model_type": "new",
    "architectures": ["NewForSequenceClassification"],
    "vocab_size": VOCABULARY,
    "type_vocab_size": 1,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "rope_theta": 20000,
    "rope_scaling": {"type": "ntk", "factor": 8.0},
    "id2label": {"0": "LABEL_0"},
}
"""transformers has no such model: its tensors are written here."""

FAMILIES = (*MODELS, "gte")


def families(bench: Bench) -> list[dict[str, Any]]:
    """Largest differences and rank agreement of each family in each precision of the card."""
    with TemporaryDirectory() as home:
        return [row for name in FAMILIES for row in _rows(bench, name, Path(home))]


def _rows(bench: Bench, name: str, home: Path) -> list[dict[str, Any]]:
    from echelon.errors import InvalidInput
    from echelon.models.registry import open_scorer

    folder = checkpoint(name, home)
    batch = _batch()
    exact = _scores(open_scorer(folder, device="cpu", precision="fp32"), batch)
    rows: list[dict[str, Any]] = []
    for precision, allowance in PRECISIONS.items():
        row: dict[str, Any] = {"family": name, "precision": precision}
        try:
            found = _scores(open_scorer(folder, device=bench.device, precision=precision), batch)
            row |= _compared(exact, found)
            if not row["max_delta"] <= allowance * row["deviation"]:
                row["failed"] = f"it differs by {row['max_delta']:.1e} of {row['deviation']:.1e}"
        except InvalidInput as error:
            row["skipped"] = str(error).partition("\n")[0]  # what this device does not have
        except Exception as error:  # noqa: BLE001 - one failure must not hide the others
            row["failed"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        free(bench.device)
        rows.append(row)
    return rows


def checkpoint(name: str, home: Path) -> Path:
    """A small model of a family with random weights, wide enough that pairs differ."""
    import torch
    import transformers

    if name == "gte":
        return _gte(home / "toy-rerank-gte")
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


def _gte(folder: Path) -> Path:
    """A small gte with random weights."""
    import torch
    from safetensors.torch import save_file

    hidden, wide = GTE["hidden_size"], GTE["intermediate_size"]
    shapes = {
        "new.embeddings.word_embeddings.weight": (VOCABULARY, hidden),
        "new.embeddings.token_type_embeddings.weight": (GTE["type_vocab_size"], hidden),
    }
    linears = {"new.pooler.dense": (hidden, hidden), "classifier": (1, hidden)}
    norms = ["new.embeddings.LayerNorm"]
    for root in (f"new.encoder.layer.{index}" for index in range(GTE["num_hidden_layers"])):
        linears[f"{root}.attention.qkv_proj"] = (3 * hidden, hidden)
        linears[f"{root}.attention.o_proj"] = (hidden, hidden)
        linears[f"{root}.mlp.down_proj"] = (hidden, wide)
        shapes[f"{root}.mlp.up_gate_proj.weight"] = (2 * wide, hidden)
        norms += [f"{root}.attn_ln", f"{root}.mlp_ln"]
    for linear, shape in linears.items():
        shapes |= {f"{linear}.weight": shape, f"{linear}.bias": shape[:1]}
    shapes |= {f"{norm}.{kind}": (hidden,) for norm in norms for kind in ("weight", "bias")}
    torch.manual_seed(11)
    tensors = {key: torch.randn(shape) * 0.1 for key, shape in shapes.items()}
    for norm in norms:
        tensors[f"{norm}.weight"] += 1
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(GTE), "utf-8")
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
