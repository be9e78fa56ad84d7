"""Tiny models, the scores that transformers gives them, texts, and commands to run."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scorers

from echelon.engine import precision_check
from echelon.models.base import FakeScorer
from echelon.tokenization.pairs import Template, encode_pairs
from echelon.types import TokenBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import Truncation

ROOT = Path(__file__).parents[2]

SENTENCES = (
    "The kettle boils on the old stove while rain taps at the kitchen window.",
    "How do I replace the belt of a washing machine without calling a mechanic?",
    "Ferries leave the harbour every forty minutes; tickets are sold on board.",
    "Старый трамвай медленно поднимается по мокрой улице к вокзалу.",
    "Как приготовить борщ, если свёклы осталось совсем мало?",
    "火车站旁边的小饭馆每天早上六点开门,豆浆和油条卖得最好。",
    "如何把旧照片扫描成清晰的电子文件?",
    "القطار الأخير يغادر المحطة عند منتصف الليل ولا ينتظر أحدا.",
    "बारिश के बाद गाँव की सड़क पर बच्चे कागज़ की नाव चलाते हैं।",
    "ร้านกาแฟริมคลองเปิดตั้งแต่เช้าจนถึงค่ำ",
)
"""Six scripts, enough to train tiny tokenizers on."""

SHAPES: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 130,
        "type_vocab_size": 2,
    },
    "roberta": {
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "intermediate_size": 80,
        "max_position_embeddings": 132,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "xlm-roberta": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 112,
        "max_position_embeddings": 102,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
    },
    "distilbert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 130,
    },
    "electra": {
        "hidden_size": 32,
        "embedding_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 130,
    },
    "mpnet": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 132,
        "pad_token_id": 1,
    },
}

WIDE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 16384,
    "max_position_embeddings": 512,
}
"""A step's largest tensor, 64 KiB a token, dwarfs everything else: it alone decides what fits."""

NATIVE = ("bert", "roberta", "xlm-roberta")
GENERIC = ("distilbert", "electra", "mpnet")
LIMITS = {"bert": 130, "roberta": 130, "xlm-roberta": 100}
LIMITS |= {"distilbert": 130, "electra": 130, "mpnet": 130}
"""Tokens a pair may have: positions, minus those before the first token's."""

TOKENIZER_OF = {"distilbert": "bert", "electra": "bert", "mpnet": "roberta"}


def _make_checkpoint() -> Any:
    path = ROOT / "benchmarks" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_checkpoint


make_checkpoint = _make_checkpoint()


def make_toy(out: Path, family: str, tokenizer: Path | None, **settings: Any) -> Path:
    """Write a toy model; ``settings`` change its shape or go to ``make_checkpoint``."""
    own = {k: settings.pop(k) for k in ("labels", "pickle", "max_shard", "seed") if k in settings}
    shape = {"model_type": family, **SHAPES[family], **settings}
    if tokenizer is not None and "vocab_size" not in shape:
        shape["vocab_size"] = vocabulary_of(tokenizer)
    return make_checkpoint(out, shape, tokenizer, **own)


def vocabulary_of(folder: Path) -> int:
    """Ids that a tokenizer folder may give."""
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size())


def save_tokenizer(folder: Path, kind: str) -> Path:
    """Train a small tokenizer of the kind and save it as transformers' own class."""
    from transformers import BertTokenizer, RobertaTokenizer, XLMRobertaTokenizer

    model = json.loads(_train(kind).to_str())["model"]
    if kind == "bert":
        tokenizer: Any = BertTokenizer(vocab=model["vocab"])
    elif kind == "roberta":
        merges = [tuple(merge) for merge in model["merges"]]
        tokenizer = RobertaTokenizer(vocab=model["vocab"], merges=merges)
    else:
        tokenizer = XLMRobertaTokenizer(vocab=[tuple(piece) for piece in model["vocab"]])
    tokenizer.save_pretrained(folder)
    return folder


def _train(kind: str) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    plain = {"vocab_size": 700, "show_progress": False}
    if kind == "bert":
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(special_tokens=names, **plain)
    elif kind == "roberta":
        names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(special_tokens=names, initial_alphabet=alphabet, **plain)
    else:
        names = ["<s>", "<pad>", "</s>", "<unk>"]
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(special_tokens=names, unk_token="<unk>", **plain)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


@lru_cache(maxsize=16)
def reference_model(folder: Path) -> Any:
    """The model as transformers loads it, in fp32."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def reference_logits(folder: Path, batch: TokenBatch, label: int = 0) -> np.ndarray:
    """Logits of transformers in fp32: every pair alone, so nothing is ever padded."""
    import torch

    model = reference_model(folder)
    takes_types = model.config.model_type in {"bert", "electra"}
    logits = []
    for start, end in pairwise(batch.offsets):
        ids = torch.from_numpy(batch.ids[start:end]).long()[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if takes_types and batch.type_ids is not None:
            inputs["token_type_ids"] = torch.from_numpy(batch.type_ids[start:end]).long()[None]
        with torch.inference_mode():
            logits.append(float(model(**inputs).logits[0, label]))
    return np.array(logits, dtype=np.float32)


def random_batch(
    lengths: Iterable[int], vocabulary: int, seed: int, *, types: bool = False, lowest: int = 0
) -> TokenBatch:
    """Pairs of random ids; special tokens and padding ids among them unless ``lowest`` bars them.

    With ``types`` each pair's second part, of random length, is segment 1.
    """
    chance = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(list(lengths)))).astype(np.int32)
    ids = chance.integers(lowest, vocabulary, offsets[-1]).astype(np.int32)
    segments = None
    if types:
        segments = np.zeros(len(ids), dtype=np.int32)
        for start, end in pairwise(offsets):
            segments[chance.integers(start, end) : end] = 1
    return TokenBatch(ids, segments, offsets)


def split(batch: TokenBatch, index: int) -> TokenBatch:
    """One pair of a batch, alone."""
    start, end = batch.offsets[index : index + 2]
    types = None if batch.type_ids is None else batch.type_ids[start:end]
    return TokenBatch(batch.ids[start:end], types, np.array([0, end - start], dtype=np.int32))


TEMPLATE = Template((1,), (2,), (2,), None)
"""A template for tests that need no tokenizer: three special tokens."""


def pairs_of(
    lengths: Sequence[int],
    max_length: int = 10_000,
    truncation: Truncation = "longest_first",
    query: int = 1,
) -> EncodedPairs:
    """Encoded pairs of the given total lengths, each with ids of its own."""
    queries = [np.full(query, 7, dtype=np.int32)] * len(lengths)
    documents = [
        np.arange(length - query - TEMPLATE.specials, dtype=np.int32) + 100 * index
        for index, length in enumerate(lengths)
    ]
    return encode_pairs(TEMPLATE, queries, documents, max_length, truncation)


class PatientScorer(FakeScorer):
    """A fake scorer that fails the test if the OOM ladder never ends."""

    releases = 0

    def release(self) -> None:
        super().release()
        self.releases += 1
        assert self.releases < 1000, "the OOM ladder has no end"


def offer(monkeypatch: pytest.MonkeyPatch, *precisions: str) -> None:
    """Replace every model by fake scorers that have these precisions on any processor."""
    monkeypatch.setattr("echelon.models.registry.candidate_precisions", lambda _: list(precisions))
    monkeypatch.setattr(precision_check, "open_scorer", scorers.anywhere)


def run_python(
    code: str, *arguments: object, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter; its output is text."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def words(count: int, seed: int = 0) -> str:
    """Text of ``count`` words from the sentences."""
    chance = random.Random(seed)
    vocabulary = " ".join(SENTENCES).split()
    return " ".join(chance.choice(vocabulary) for _ in range(count))


def readme_code(word: str, readme: str) -> str:
    """The Python block of a README that holds the word."""
    page = (ROOT / readme).read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if word in block]
    return code


READMES = ("README.md", "README.zh.md")
ROUTER = ("Bananas are yellow.", "Hold the power button of the router for ten seconds.")
"""Documents; the second answers the question of the READMEs."""


def run_command(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """``echelon`` in this process: (exit code, output, error output)."""
    from echelon import cli

    monkeypatch.setattr(sys, "argv", ["echelon", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err
