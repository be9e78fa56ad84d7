"""What is said of a step's memory before a model is loaded, against what torch allocates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import random_batch

from echelon.models import attention_cpu
from echelon.models.architecture import read_config
from echelon.models.attention_cpu import methods
from echelon.models.description import describe
from echelon.models.families import IN_CACHE_BYTES, native_model
from echelon.models.registry import open_scorer

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 1008
SHAPE = {
    "vocab_size": 200,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": TOKENS,
    "num_labels": 1,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "bert": {},
    "modernbert": dict.fromkeys(("bos_token_id", "cls_token_id"), 1)
    | dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    home, found = tmp_path_factory.mktemp("step_memory"), {}
    for name, own in OWN.items():
        config = transformers.AutoConfig.for_model(name, **SHAPE, **own)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        found[name] = home / name
        model.save_pretrained(found[name])
    return found


def allocated(folder: Path, precision: str, trace: Path) -> int:
    """Most bytes that torch holds for a step of one longest pair, by its own record."""
    scorer = open_scorer(folder, device="cpu", precision=precision, threads=1)
    batch = random_batch([TOKENS], 200, 1, lowest=5)
    scorer.score(batch)
    scorer.release()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profiler:
        scorer.score(batch)
    scorer.close()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    assert len(changes) > 20
    return int(np.cumsum([size for _, size in changes]).max())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OWN)
def test_a_step_takes_no_more_than_is_said(folders, tmp_path, monkeypatch, name, precision):
    """With the usual attention, whichever is the fastest here."""
    monkeypatch.setattr(
        attention_cpu, "fastest_method", lambda dtype, _, size, __: methods(dtype, size)[0]
    )
    said = describe(folders[name]).step_bytes[precision]
    found = allocated(folders[name], precision, tmp_path / "trace.json")
    assert found <= said <= 2 * found + IN_CACHE_BYTES


def test_a_longer_pair_takes_more(folders):
    folder = folders["bert"]
    config = read_config(folder)
    short, long = (
        native_model(folder, config | {"max_position_embeddings": tokens}).step_bytes("fp32")
        for tokens in (500, 1000)
    )
    assert long - IN_CACHE_BYTES == 2 * (short - IN_CACHE_BYTES)
