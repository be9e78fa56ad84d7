"""Small random cross-encoders that Echelon and the originals load alike, and texts for them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
FAMILIES = ("bert", "roberta", "xlm-roberta")
LIMIT = 64
"""Tokens that every small model reads."""

QUERY = "how many people live in berlin"
DOCUMENTS = [
    "berlin had a population of three million people",
    "the quick brown fox jumps over the lazy dog",
    "",
    "a city is a place where many people live, work and drink coffee",
    "berlin",
    "Überall in der Stadt gibt es Cafés; naïve façades, 東京 and emoji 🦊!",
    "the lazy dog sleeps " * 12 + "while the quick fox runs over the river",
    "how many people live in berlin",
    "berlin",
]
PAIRS = [(QUERY, document) for document in DOCUMENTS] + [
    ("where does the fox sleep " * 9, "the fox sleeps over the river"),
    ("where does the fox sleep " * 9, "the lazy dog drinks coffee in the city " * 9),
    ("", "a document without a question"),
]
CORPUS = [text for pair in PAIRS for text in pair]


def checkpoint(folder: Path, family: str, *, labels: int = 1, **config: object) -> Path:
    """Write a model of a family, with a tokenizer of the family's kind; config is added to."""
    path = ROOT / "benchmarks" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = _TOKENIZERS[family]()
    tokenizer.save_pretrained(folder)
    roberta = family != "bert"
    shape = {
        "model_type": family,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": LIMIT + 2 if roberta else LIMIT,
        "type_vocab_size": 1 if roberta else 2,
        "pad_token_id": 1 if roberta else 0,
    }
    module.make_checkpoint(folder, shape, labels=labels)
    if config:
        change_json(folder / "config.json", **config)
    return folder


def change_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | values))


def _bert() -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    pad, unk, cls, sep, mask = specials
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
    )


def _roberta() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=_ROBERTA_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_roberta_specials(tokenizer)


def _xlm_roberta() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=_ROBERTA_SPECIALS, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_roberta_specials(tokenizer)


_ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def _with_roberta_specials(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    bos, pad, eos, unk, mask = _ROBERTA_SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        pad_token=pad,
        eos_token=eos,
        unk_token=unk,
        cls_token=bos,
        sep_token=eos,
        mask_token=mask,
        model_max_length=LIMIT,  # published ones of this family state it, as positions do not
        model_input_names=["input_ids", "attention_mask"],
    )


_TOKENIZERS = {"bert": _bert, "roberta": _roberta, "xlm-roberta": _xlm_roberta}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_are_worth_comparing(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = checkpoint(tmp_path, family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = tokenizer(PAIRS, padding=True, truncation=True, max_length=LIMIT, return_tensors="pt")
    logits = model(**encoded).logits.detach().numpy()[:, 0]

    assert len({len(tokenizer(*pair)["input_ids"]) for pair in PAIRS}) > 6
    assert max(len(tokenizer(*pair)["input_ids"]) for pair in PAIRS) > LIMIT
    assert np.ptp(logits) > 0.1


def test_importing_loads_no_heavy_library() -> None:
    code = (
        "import sys, echelon.compat; "
        "from echelon.compat import CrossEncoder, FlagReranker; "
        "print(sorted({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_only_the_two_classes_are_offered() -> None:
    import echelon.compat

    with pytest.raises(AttributeError, match="FlagLLMReranker"):
        _ = echelon.compat.FlagLLMReranker
