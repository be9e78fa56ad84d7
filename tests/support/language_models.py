"""Tiny language models that rerank: a tokenizer as Qwen's, and random weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from helpers import SENTENCES, vocabulary_of

from echelon.models.prompts import MXBAI_RERANK_V2, QWEN3_RERANKER

if TYPE_CHECKING:
    from pathlib import Path

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 72,
        "max_position_embeddings": 400,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "hidden_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "intermediate_size": 80,
        "max_position_embeddings": 400,
        "tie_word_embeddings": True,
    },
}


def save_qwen_tokenizer(folder: Path) -> Path:
    """Train a byte-level tokenizer with Qwen's pattern and control tokens, and save it."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words = [QWEN3_RERANKER.prefix, MXBAI_RERANK_V2.suffix[1], *["yes no 1 0 yes\nno\nYes\n"] * 40]
    tokenizer.train_from_iterator([*SENTENCES * 4, *words], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": CONTROL[0], "eos_token": CONTROL[2], "model_max_length": 400}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def make_language_model(folder: Path, model_type: str, seed: int = 3, **settings: Any) -> Path:
    """Save a language model with random weights, and its tokenizer.

    ``architecture`` in the settings is a class of transformers, such as
    ``Qwen3ForSequenceClassification``; the default is the causal language model.
    """
    import torch
    import transformers

    save_qwen_tokenizer(folder)
    name = settings.pop("architecture", f"{model_type.title()}ForCausalLM")
    shape = {**SHAPES[model_type], "vocab_size": vocabulary_of(folder), **settings}
    config: Any = transformers.AutoConfig.for_model(model_type, **shape)
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():  # wider than usual, so that documents differ
        parameter.data += torch.randn_like(parameter) * 0.08
    model.save_pretrained(folder)
    return folder
