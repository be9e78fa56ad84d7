"""Tiny models of every native family, and the scores that transformers gives them in fp32."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from helpers import (
    LIMITS,
    make_toy,
    random_batch,
    reference_logits,
    save_tokenizer,
    vocabulary_of,
)
from language_models import make_language_model

from echelon.models.architecture import read_config
from echelon.models.families import native_model

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import TokenBatch

JINA_NAMES = {
    "attention.output.dense": "mixer.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}

MODERNBERT = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 200,
    "local_attention": 16,
    "num_labels": 1,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}

ENCODERS = ("bert", "roberta", "xlm-roberta")
LANGUAGE_MODELS = {"qwen3": "toy-Qwen3-Reranker", "qwen2": "mxbai-rerank-toy"}
FAMILIES = (*ENCODERS, "jina-v2", "modernbert", *LANGUAGE_MODELS)


@dataclass(frozen=True)
class NativeToy:
    """A tiny model with its tokenizer."""

    family: str
    folder: Path
    plain: Path  # the same for transformers, which reads it without code of the authors
    max_tokens: int

    def batch(self, lengths: list[int], seed: int = 0) -> TokenBatch:
        """Pairs of random ids; a length below 1 counts from the longest."""
        lengths = [n if n > 0 else self.max_tokens + 1 + n for n in lengths]
        types = self.family == "bert"
        return random_batch(lengths, vocabulary_of(self.folder), seed, types=types, lowest=4)

    def reference(self, batch: TokenBatch) -> np.ndarray:
        """Scores by transformers in fp32, every pair alone."""
        if self.family not in LANGUAGE_MODELS:
            return reference_logits(self.plain, batch)
        return _answers(self.plain, batch)


def make_native(home: Path, family: str) -> NativeToy:
    """Save a model of a family below a folder."""
    if family in LANGUAGE_MODELS:
        folder = make_language_model(home / LANGUAGE_MODELS[family], family)
        return NativeToy(family, folder, folder, 400)
    if family == "modernbert":
        folder = save_tokenizer(home / family, "bert")
        own = {"cls_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}  # of the tokenizer
        save_modernbert(folder, vocab_size=vocabulary_of(folder), **own)
        return NativeToy(family, folder, folder, MODERNBERT["max_position_embeddings"])
    kind = "xlm-roberta" if family == "jina-v2" else family
    tokenizer = save_tokenizer(home / f"{family} tokenizer", kind)
    plain = make_toy(home / f"{family} of transformers", kind, tokenizer)
    folder = save_as_jina(plain, home / family) if family == "jina-v2" else plain
    return NativeToy(family, folder, plain, LIMITS[kind])


def _answers(folder: Path, batch: TokenBatch) -> np.ndarray:
    """How much more likely a language model answers yes than no."""
    import torch
    from transformers import AutoModelForCausalLM

    native: Any = native_model(folder, read_config(folder))
    yes, no = native.answers.ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for start, end in pairwise(batch.offsets):
        ids = torch.from_numpy(batch.ids[start:end]).long()[None]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, -1]
        found.append(float(logits[yes] - logits[no]))
    return np.array(found, dtype=np.float32)


def save_as_jina(xlm_roberta: Path, folder: Path) -> Path:
    """Convert an XLM-RoBERTa as jina-reranker-v2's authors convert theirs."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(xlm_roberta, folder)
    tensors, found = load_file(folder / "model.safetensors"), {}
    layers = {int(name.split(".")[3]) for name in tensors if ".encoder.layer." in name}
    for layer in layers:
        old, new = f"roberta.encoder.layer.{layer}", f"roberta.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = [
                tensors.pop(f"{old}.attention.self.{p}.{kind}") for p in ("query", "key", "value")
            ]
            found[f"{new}.mixer.Wqkv.{kind}"] = torch.cat(parts)
            for usual, own in JINA_NAMES.items():
                found[f"{new}.{own}.{kind}"] = tensors.pop(f"{old}.{usual}.{kind}")
    for kind in ("weight", "bias"):
        found[f"roberta.emb_ln.{kind}"] = tensors.pop(f"roberta.embeddings.LayerNorm.{kind}")
    save_file(found | tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    config["auto_map"] = {"AutoModelForSequenceClassification": "jinaai/code--modeling.Code"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_modernbert(folder: Path, *, base: bool = False, **values: Any) -> Path:
    """Save a ModernBERT with random weights, wide enough that pairs differ."""
    import torch
    import transformers

    torch.manual_seed(7)
    config = transformers.ModernBertConfig(**{**MODERNBERT, **values})
    kind = (
        transformers.ModernBertModel if base else transformers.ModernBertForSequenceClassification
    )
    model: Any = kind(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return folder
