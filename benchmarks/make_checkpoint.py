"""Write a cross-encoder checkpoint with seeded random weights.

It replaces weights that cannot be downloaded: same shape, speed, memory and numerics.

    python benchmarks/make_checkpoint.py OUT --family xlm-roberta-large --tokenizer FOLDER

Families are shapes of published rerankers, plus small ones for tests. The tokenizer folder's
files are copied beside the weights.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    # BAAI/bge-reranker-v2-m3 and bge-reranker-large (which has 514 positions)
    "xlm-roberta-large": {
        "model_type": "xlm-roberta",
        "vocab_size": 250002,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 8194,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
    },
    # BAAI/bge-reranker-base
    "xlm-roberta-base": {
        "model_type": "xlm-roberta",
        "vocab_size": 250002,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
    },
    # cross-encoder/ms-marco-MiniLM-L12-v2
    "bert-minilm": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    },
    # Alibaba-NLP/gte-reranker-modernbert-base, with the demo tokenizer's special tokens
    "modernbert-base": {
        "model_type": "modernbert",
        "vocab_size": 50368,
        "hidden_size": 768,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "intermediate_size": 1152,
        "max_position_embeddings": 8192,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "classifier_pooling": "mean",
        "pad_token_id": 0,
        "bos_token_id": 101,
        "cls_token_id": 101,
        "eos_token_id": 102,
        "sep_token_id": 102,
    },
    # cross-encoder/stsb-roberta-base
    "roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
    },
}
WEIGHT_SCALE = 0.64
"""Standard deviation × √fan-in: BERT's 0.02 at a width of 1024. As a constant it keeps narrow test
models as far from linear as wide ones."""

HEAD_STD = 0.2
"""Standard deviation of the head's weights: logits span several units, so that errors show."""


def make_checkpoint(  # noqa: PLR0913 - a script's options
    out: Path,
    shape: dict[str, Any],
    tokenizer: Path | None = None,
    *,
    seed: int = 0,
    labels: int = 1,
    pickle: bool = False,
    max_shard: str | None = None,
) -> Path:
    """Write the checkpoint folder ``out`` and return it.

    Args:
        out: folder to write.
        shape: configuration values, ``model_type`` among them.
        tokenizer: folder whose tokenizer files are copied.
        seed: of the random weights.
        labels: outputs of the head.
        pickle: write ``pytorch_model.bin`` instead of safetensors.
        max_shard: size of a shard such as ``"1MB"``; None writes one file.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), num_labels=labels, **settings)
    config.initializer_range = WEIGHT_SCALE / math.sqrt(config.hidden_size)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if name.startswith("classifier") and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=HEAD_STD)
        elif parameter.ndim == 1:
            # Biases and norms differ from 0 and 1, so that an error in them shows.
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    out.mkdir(parents=True, exist_ok=True)
    if pickle:
        config.architectures = [type(model).__name__]
        config.save_pretrained(out)
        torch.save(model.state_dict(), out / "pytorch_model.bin")
    else:
        model.save_pretrained(out, **({"max_shard_size": max_shard} if max_shard else {}))
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges")):
                shutil.copy(file, out)
    return out


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=sorted(SHAPES), default="xlm-roberta-large")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder to copy it from")
    parser.add_argument("--layers", type=int, help="fewer layers, to compare engines quickly")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shape = dict(SHAPES[arguments.family])
    if arguments.layers:
        shape["num_hidden_layers"] = arguments.layers
    print(make_checkpoint(arguments.out, shape, arguments.tokenizer, seed=arguments.seed))


if __name__ == "__main__":
    main()
