"""The models that engines are compared on: folders, made once, and what is measured with each."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from make_checkpoint import SHAPES, make_checkpoint
from workloads import MAX_LENGTH, NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workloads import Workload

CACHE = Path.home() / ".cache" / "echelon-bench"

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizer divides texts."""

CHAT = (
    "{% set task = 'Given a web search query, retrieve relevant passages that answer the query' %}"
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {{ task }}\n<Query>: {{ QUERY }}\n<Document>: {{ DOCUMENT }}"
    "<|im_end|>\n<|im_start|>assistant\n{{ '<think>\n\n</think>\n\n' }}"
)
"""The prompt of Qwen3-Reranker's authors as a chat template of sentence-transformers."""

QWEN3 = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
"""Qwen3-0.6B but for its vocabulary, of which a pair reads one row a token."""

VOCABULARY = 8_000


@dataclass(frozen=True, slots=True)
class Model:
    """A model, and what is measured with it.

    Attributes:
        title: what it is.
        make: writes its folder, from the tokenizer that the caller names.
        workloads: of :data:`workloads.NAMES`.
        reference: the engine whose scores are right.
        engines: how the names of the engines that run it begin; empty for all.
        languages: of the texts; None for all.
        own_tokenizer: it needs none of the caller's.
    """

    title: str
    make: Callable[[Path, int | None], Path]
    workloads: tuple[str, ...] = tuple(name for name in NAMES if name != "query")
    reference: str = "transformers fp32"
    engines: tuple[str, ...] = ()
    languages: Sequence[str] | None = ("en",)
    own_tokenizer: bool = True


def large(tokenizer: Path, layers: int | None) -> Path:
    """XLM-R-large's shape with seeded weights."""
    shape = dict(SHAPES["xlm-roberta-large"])
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    name = f"xlm-roberta-large-{shape['num_hidden_layers']}"
    return _once(name, lambda out: make_checkpoint(out, shape, tokenizer))


def demo(_tokenizer: Path, _layers: int | None) -> Path:
    """The demo model, with trained weights."""
    from echelon.models.demo import pull

    return pull()


def modernbert(_tokenizer: Path, layers: int | None) -> Path:
    """ModernBERT-base's shape with seeded weights and the demo model's tokenizer."""
    shape = dict(SHAPES["modernbert-base"])
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]

    def make(out: Path) -> None:
        make_checkpoint(out, shape, demo(out, None))
        path = out / "tokenizer_config.json"
        settings = json.loads(path.read_text("utf-8"))
        # As that of ModernBERT, which reads no token types.
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192}
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        path.write_text(json.dumps(settings), "utf-8")

    return _once(f"modernbert-base-{shape['num_hidden_layers']}", make)


def qwen3(_tokenizer: Path, layers: int | None) -> Path:
    """Qwen3-Reranker-0.6B's shape as sentence-transformers saves it, with a small vocabulary."""
    count = layers or QWEN3["num_hidden_layers"]

    def make(out: Path) -> None:
        import torch
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.cross_encoder import CrossEncoder
        from sentence_transformers.cross_encoder.modules import LogitScore
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        config: Any = Qwen3Config(**QWEN3 | {"num_hidden_layers": count}, vocab_size=VOCABULARY)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            Qwen3ForCausalLM(config).save_pretrained(scratch)
            vocabulary = _qwen_tokenizer(Path(scratch))
            layered = Transformer(
                scratch,
                transformer_task="text-generation",
                processor_kwargs={"chat_template": _chat()},
                model_kwargs={"dtype": "float32"},
            )
            score = LogitScore(vocabulary["yes"], vocabulary["no"])
            CrossEncoder(modules=[layered, score], device="cpu").save_pretrained(str(out))

    return _once(f"Qwen3-Reranker-{count}", make)


def _chat() -> str:
    """The template with the messages' contents in their places."""
    of = "(messages | selectattr('role', 'eq', '{}') | map(attribute='content') | first)"
    return CHAT.replace("QUERY", of.format("query")).replace("DOCUMENT", of.format("document"))


def _qwen_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level tokenizer as Qwen's, trained on Echelon's own texts; its vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    from echelon.data import load_texts

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 10, show_progress=False, initial_alphabet=ByteLevel.alphabet()
    )
    texts = [text for pair in load_texts().sample(2000) for text in pair]
    tokenizer.train_from_iterator([*texts, *["yes no\nyes\nno"] * 500, CHAT], trainer)
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in control])
    tokenizer.add_tokens([AddedToken(text) for text in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": control[0], "eos_token": control[2], "model_max_length": 8192}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is there whole or not at all."""
    out = CACHE / "models" / name
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.parent))
        try:
            make(scratch)
            scratch.rename(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return out


def flop(folder: Path, workload: Workload) -> float:
    """Useful operations of a workload; of a language model, each common beginning counts once."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config["model_type"] != "qwen3":
        return workload.flop(config)
    from echelon.models.prefixes import lay_out
    from echelon.models.registry import model_prompt
    from echelon.tokenization.tokenizer import PairEncoder

    encoder, count = PairEncoder(folder, model_prompt(folder)), len(workload.pairs)
    batch = encoder.encode(workload.pairs, MAX_LENGTH, "only_second").batch(range(count))
    seen = lay_out(np.split(batch.ids, batch.offsets[1:-1]), [0] * count).positions + 1
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = (size * config[f"num_{of}_heads"] for of in ("attention", "key_value"))
    products = hidden * (2 * queries + 2 * keys + 3 * config["intermediate_size"])
    per_layer = 2 * products * len(seen) + 4 * queries * float(seen.sum())
    return config["num_hidden_layers"] * per_layer


_SENTENCE_TRANSFORMERS = ("sentence-transformers fp32", "sentence-transformers bf16")

MODELS = {
    "large": Model(
        "XLM-RoBERTa-large (the shape of bge-reranker-v2-m3), seeded random weights",
        large,
        languages=None,
        own_tokenizer=False,
    ),
    "demo": Model("ms-marco-MiniLM-L-12-v2, the demo model", demo),
    "modernbert": Model(
        "ModernBERT-base (the shape of gte-reranker-modernbert-base), seeded random weights",
        modernbert,
        ("tutorial", "mixed"),
    ),
    "qwen3": Model(
        "Qwen3-Reranker-0.6B's shape with a vocabulary of its own, seeded random weights",
        qwen3,
        ("tutorial", "query"),
        "sentence-transformers fp32",
        ("echelon fp32", "echelon bf16", *_SENTENCE_TRANSFORMERS),
    ),
}
"""In the order of the report."""
