"""Pairs at the models' own limits of 8,192 tokens, against transformers in fp32 on the same ids."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from decoders import batch_of, make_decoder, open_decoder, random_ids, reference
from helpers import random_batch

from echelon.models.registry import open_scorer

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 8192


@pytest.fixture(scope="module", params=["cls", "mean"])
def modernbert(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its window, bases of positions and order of layers are those of the published models."""
    import transformers

    config = transformers.ModernBertConfig(
        vocab_size=150,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=1,
        num_labels=1,
        classifier_pooling=request.param,
        **dict.fromkeys(("pad_token_id", "cls_token_id", "bos_token_id"), 0),
        **dict.fromkeys(("sep_token_id", "eos_token_id"), 1),
    )
    assert (config.local_attention, config.max_position_embeddings) == (128, LIMIT)
    torch.manual_seed(9)
    model = transformers.ModernBertForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.15
    folder = tmp_path_factory.mktemp("modernbert")
    model.save_pretrained(folder)
    return folder


def logits_of(folder: Path, batch: Any) -> np.ndarray:
    """Logits of transformers, each pair alone."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    found = []
    for start, end in pairwise(batch.offsets):
        with torch.inference_mode():
            found.append(float(model(torch.from_numpy(batch.ids[start:end]).long()[None]).logits))
    return np.array(found)


def test_modernbert_at_its_limit(modernbert):
    batch = random_batch([5, 129, LIMIT, 128, 257, 64, 1025], 150, 4, lowest=2)
    scorer = open_scorer(modernbert, device="cpu", precision="fp32", threads=1)
    found, expected = scorer.score(batch), logits_of(modernbert, batch)
    spread = scorer.score(random_batch([30] * 40, 150, 3, lowest=2)).std()
    assert spread > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * spread)


@pytest.mark.parametrize("name", ["tied", "qwen2"])
def test_decoders_at_the_limit_of_the_authors(tmp_path, name):
    folder = make_decoder(tmp_path, name, max_position_embeddings=LIMIT, num_hidden_layers=2)
    chance = np.random.default_rng(4)
    query = random_ids(chance, 200)
    texts = [np.concatenate((query, random_ids(chance, n))) for n in (LIMIT - 200, 700, 7)]
    batch = batch_of(texts)
    expected, scorer = reference(folder, batch), open_decoder(folder)
    spread = scorer.score(batch_of([random_ids(chance, 30) for _ in range(40)])).std()
    for _ in range(2):  # with a new and with a cached query
        np.testing.assert_allclose(scorer.score(batch), expected, rtol=0, atol=1e-3 * spread)
