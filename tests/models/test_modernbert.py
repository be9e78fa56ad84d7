"""ModernBERT: equal to transformers on every length, pooling and spelling; bad files."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import BadCheckpoint
from echelon.models.architecture import read_config
from echelon.models.description import describe
from echelon.models.families import native_model
from echelon.models.registry import open_scorer
from echelon.types import TokenBatch

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = {
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
LENGTHS = (1, 3, 8, 9, 10, 16, 17, 18, 25, 31, 32, 32, 33, 33, 64, 100, 200, 33, 2)
"""The window reaches 8 tokens to either side; blocks have 16, pairs of up to 32 are one block."""

VARIANTS: dict[str, dict[str, Any]] = {
    "cls": {},
    "mean": {"classifier_pooling": "mean"},
    "biases": {
        "attention_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
        "classifier_bias": True,
        "classifier_pooling": "mean",
    },
    "kernel": {"hidden_size": 64, "num_attention_heads": 2},  # heads as compiled kernels take them
    "five": {"num_hidden_layers": 5, "hidden_activation": "gelu_new", "num_labels": 3},
}


def save(folder: Path, **values: Any) -> Path:
    import torch
    import transformers

    torch.manual_seed(7)
    model = transformers.ModernBertForSequenceClassification(
        transformers.ModernBertConfig(**{**SHAPE, **values})
    )
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("modernbert")
    return {name: save(home / name, **values) for name, values in VARIANTS.items()}


def step_of(lengths: tuple[int, ...] | list[int], seed: int = 0) -> TokenBatch:
    random = np.random.default_rng(seed)
    ids = random.integers(4, 300, sum(lengths)).astype(np.int32)
    return TokenBatch(ids, None, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def pairs_of(batch: TokenBatch) -> list[Any]:
    import torch

    bounds = zip(batch.offsets, batch.offsets[1:], strict=False)
    return [torch.from_numpy(batch.ids[a:b]).long()[None] for a, b in bounds]


def reference(folder: Path, batch: TokenBatch, label: int = 0) -> np.ndarray:
    """Logits of transformers in fp32, each pair alone."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return np.array([float(model(ids).logits[0, label]) for ids in pairs_of(batch)])


def scores(folder: Path, batch: TokenBatch, precision: str = "fp32", label: int = 0) -> np.ndarray:
    scorer = open_scorer(folder, device="cpu", precision=precision, threads=1, label=label)
    found = scorer.score(batch)
    scorer.close()
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(folders, name):
    label = 1 if name == "five" else 0
    batch = step_of(LENGTHS)
    expected = reference(folders[name], batch, label)
    assert expected.std() > 0.1
    np.testing.assert_allclose(scores(folders[name], batch, label=label), expected, atol=1e-4)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 2**16))
def test_a_pairs_logit_does_not_depend_on_the_others(folders, lengths, seed):
    batch = step_of(lengths, seed)
    scorer = open_scorer(folders["mean"], device="cpu", precision="fp32", threads=1)
    together = scorer.score(batch)
    for place, (start, end) in enumerate(zip(batch.offsets, batch.offsets[1:], strict=False)):
        alone = TokenBatch(batch.ids[start:end], None, np.array([0, end - start], np.int32))
        np.testing.assert_allclose(scorer.score(alone)[0], together[place], atol=1e-5)


@pytest.mark.parametrize("name", ["mean", "kernel"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.device
def test_lower_precisions_stay_close(folders, name, precision):
    from echelon.models.device import candidate_precisions

    if precision not in candidate_precisions("cpu"):
        pytest.skip(f"this processor is not fast in {precision}")
    batch = step_of(LENGTHS)
    expected = reference(folders[name], batch)
    found = scores(folders[name], batch, precision)
    assert np.abs(found - expected).max() < 0.1 * expected.std()


@pytest.mark.parametrize("newer", [False, True])
def test_both_spellings_of_the_configuration_are_read(folders, tmp_path, newer):
    folder = shutil.copytree(folders["cls"], tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("layer_types", "rope_parameters", "global_attn_every_n_layers"):
        config.pop(name, None)
    if newer:
        kinds = ["full_attention", "sliding_attention"] * 2
        thetas = {"full_attention": 5000.0, "sliding_attention": 300.0}
        rotary = {k: {"rope_type": "default", "rope_theta": v} for k, v in thetas.items()}
        config |= {"layer_types": kinds, "rope_parameters": rotary}
    else:
        config |= {"global_attn_every_n_layers": 2}
        config |= {"global_rope_theta": 5000.0, "local_rope_theta": 300.0}
    path.write_text(json.dumps(config))
    batch = step_of(LENGTHS)
    found = scores(folder, batch)
    np.testing.assert_allclose(found, reference(folder, batch), atol=1e-4)
    assert np.abs(found - scores(folders["cls"], batch)).max() > 0.01


def test_the_description_counts_the_weights(folders):
    from safetensors.torch import load_file

    for folder in folders.values():
        held = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
        assert describe(folder).weights == held
        assert describe(folder).max_tokens == 200


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_attention_heads": 5}, "hidden_size: 48 does not give num_attention_heads=5"),
        ({"layer_types": ["full_attention"]}, "layer_types: does not name"),
        ({"classifier_pooling": "max"}, "classifier_pooling: 'max' is not cls or mean"),
        ({"local_attention": 0}, "local_attention: 0 is not"),
        ({"rope_parameters": {"full_attention": {"rope_theta": -1}}}, "rope_theta: -1 is not"),
        ({"num_hidden_layers": 3, "layer_types": None}, "beyond config.json's num_hidden_layers=3"),
        ({"intermediate_size": 81}, "mlp.W. of shape|mlp.W..weight of shape"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folders, tmp_path, change, problem):
    folder = shutil.copytree(folders["cls"], tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadCheckpoint, match=problem):
        open_scorer(folder, device="cpu", precision="fp32")


def test_scaled_rotary_positions_run_through_transformers(folders, tmp_path):
    folder = shutil.copytree(folders["cls"], tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 2.0}
    path.write_text(json.dumps(config))
    assert native_model(folder, read_config(folder)) is None


@pytest.mark.parametrize("lengths", [(150, 400), (400, 150), (20, 150, 400, 150)])
def test_local_attention_of_a_pair_does_not_depend_on_the_others(monkeypatch, lengths):
    """Where the fastest method differs between lengths, as it may on other processors."""
    from echelon.models import attention_cpu
    from echelon.models.attention_cpu import AttentionLayout
    from echelon.models.local_attention import LocalAttention

    has_kernel = "kernel" in attention_cpu.methods(torch.bfloat16, 64)
    ways = {512: "fused", 128: "kernel" if has_kernel else "products", 32: "products"}
    monkeypatch.setattr(attention_cpu, "fastest_method", lambda *kind: ways[kind[-1]])
    torch.manual_seed(0)

    def attend(rows, lengths):
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        layout = AttentionLayout.of(offsets)
        return LocalAttention(layout, 64, torch.device("cpu"), torch.bfloat16)(*rows.unbind(1))

    rows = torch.randn(sum(lengths), 3, 2, 64).bfloat16()
    together = attend(rows, lengths)
    start = 0
    for length in lengths:
        alone = attend(rows[start : start + length], (length,))
        assert torch.equal(together[start : start + length], alone)
        start += length
