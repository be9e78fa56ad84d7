"""gte's multilingual rerankers against a plain forward pass, written here from their rules."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import SENTENCES, random_batch, save_tokenizer, split, vocabulary_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional

from echelon import Reranker
from echelon.errors import BadCheckpoint
from echelon.models.architecture import read_config
from echelon.models.description import describe
from echelon.models.device import candidate_precisions
from echelon.models.families import native_model
from echelon.models.registry import open_scorer
from echelon.tokenization.tokenizer import PairEncoder

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import TokenBatch

CONFIG = {
    "architectures": ["NewForSequenceClassification"],
    "auto_map": {"AutoModelForSequenceClassification": "Alibaba-NLP/new-impl--modeling.Code"},
    "model_type": "new",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 88,
    "max_position_embeddings": 300,
    "type_vocab_size": 1,
    "hidden_act": "gelu",
    "layer_norm_type": "layer_norm",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "rope",
    "rope_theta": 20000,
    "rope_scaling": {"type": "ntk", "factor": 8.0},
    "pack_qkv": True,
    "id2label": {"0": "LABEL_0"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multilingual": {},
    "two segments": {"type_vocab_size": 2, "rope_scaling": None},
    "no segments": {"type_vocab_size": 0, "num_attention_heads": 4},
    "labels": {"id2label": {"0": "no", "1": "yes"}, "num_hidden_layers": 1},
}
LABEL = {"labels": 1}
LENGTHS = [1, 3, 9, 40, 40, 77, 300, 12, 31]


def save(folder: Path, **changes: Any) -> Path:
    save_tokenizer(folder, "xlm")
    config = {**CONFIG, "vocab_size": vocabulary_of(folder), **changes}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    shapes = {"embeddings.word_embeddings.weight": (config["vocab_size"], hidden)}
    if config["type_vocab_size"]:
        types = config["type_vocab_size"]
        shapes["embeddings.token_type_embeddings.weight"] = (types, hidden)
    linears = {"pooler.dense": (hidden, hidden)}
    norms = ["embeddings.LayerNorm"]
    for index in range(config["num_hidden_layers"]):
        root = f"encoder.layer.{index}"
        linears |= {
            f"{root}.attention.qkv_proj": (3 * hidden, hidden),
            f"{root}.attention.o_proj": (hidden, hidden),
            f"{root}.mlp.down_proj": (hidden, wide),
        }
        shapes[f"{root}.mlp.up_gate_proj.weight"] = (2 * wide, hidden)
        norms += [f"{root}.attn_ln", f"{root}.mlp_ln"]
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{name}.{kind}": (hidden,) for name in norms for kind in ("weight", "bias")}
    named = {f"new.{name}": shape for name, shape in shapes.items()}
    labels = len(config["id2label"])
    named |= {"classifier.weight": (labels, hidden), "classifier.bias": (labels,)}
    torch.manual_seed(11)
    tensors = {name: torch.randn(shape) * 0.15 for name, shape in named.items()}
    for name in norms:
        tensors[f"new.{name}.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("gte")
    return {name: save(home / name.replace(" ", "-"), **v) for name, v in VARIANTS.items()}


class Plain:
    """The forward pass of one pair, in double precision and without anything clever."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        held = load_file(folder / "model.safetensors")
        self.tensors = {name.removeprefix("new."): part.double() for name, part in held.items()}

    def linear(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        product = rows @ self.tensors[f"{name}.weight"].T
        return product + self.tensors.get(f"{name}.bias", 0)

    def norm(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        centred = rows - rows.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + self.config["layer_norm_eps"]).sqrt()
        return centred / spread * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def turned(self, heads: torch.Tensor) -> torch.Tensor:
        """Coordinates i and i + d/2 of a head turn together, by position × frequency i."""
        size = heads.shape[-1]
        factor = (self.config["rope_scaling"] or {"factor": 1.0})["factor"]
        turned = heads.clone()
        for i in range(size // 2):
            base = (self.config["rope_theta"] * factor) ** (2 * i / size)
            angles = torch.arange(len(heads)).double() / base / factor ** (2 / size)
            cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
            one, two = heads[..., i], heads[..., i + size // 2]
            turned[..., i] = one * cosine - two * sine
            turned[..., i + size // 2] = two * cosine + one * sine
        return turned

    def attention(self, root: str, rows: torch.Tensor) -> torch.Tensor:
        heads = self.config["num_attention_heads"]
        parts = self.linear(f"{root}.qkv_proj", rows).chunk(3, -1)
        query, key, value = (part.view(len(rows), heads, -1) for part in parts)
        query, key = self.turned(query), self.turned(key)
        weights = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", weights.softmax(-1), value)
        return self.linear(f"{root}.o_proj", mixed.reshape(len(rows), -1))

    def logits(self, ids: np.ndarray, types: np.ndarray | None) -> torch.Tensor:
        rows = self.tensors["embeddings.word_embeddings.weight"][torch.from_numpy(ids).long()]
        segments = self.config["type_vocab_size"]
        if segments:
            chosen = np.zeros_like(ids) if types is None or segments < 2 else types
            table = self.tensors["embeddings.token_type_embeddings.weight"]
            rows = rows + table[torch.from_numpy(chosen).long()]
        rows = self.norm("embeddings.LayerNorm", rows)
        for index in range(self.config["num_hidden_layers"]):
            root = f"encoder.layer.{index}"
            rows = self.norm(f"{root}.attn_ln", rows + self.attention(f"{root}.attention", rows))
            up, gate = self.linear(f"{root}.mlp.up_gate_proj", rows).chunk(2, -1)
            added = self.linear(f"{root}.mlp.down_proj", functional.gelu(gate) * up)
            rows = self.norm(f"{root}.mlp_ln", rows + added)
        return self.linear("classifier", torch.tanh(self.linear("pooler.dense", rows[0])))


def expected_of(folder: Path, batch: TokenBatch, label: int = 0) -> np.ndarray:
    plain, types = Plain(folder), batch.type_ids
    return np.array(
        [
            float(plain.logits(batch.ids[a:b], None if types is None else types[a:b])[label])
            for a, b in pairwise(batch.offsets)
        ]
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_plain_pass(folders, name):
    label = LABEL.get(name, 0)
    batch = random_batch(LENGTHS, 150, 2, types=name == "two segments", lowest=1)
    expected = expected_of(folders[name], batch, label)
    assert expected.std() > 0.1
    scorer = open_scorer(folders[name], device="cpu", precision="fp32", threads=1, label=label)
    np.testing.assert_allclose(scorer.score(batch), expected, rtol=0, atol=1e-4)
    assert scorer.info.padding == "none"


@settings(max_examples=15)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=12), st.integers(0, 2**16))
def test_a_pairs_logit_does_not_depend_on_the_others(folders, lengths, seed):
    batch = random_batch(lengths, 150, seed, lowest=1)
    scorer = open_scorer(folders["multilingual"], device="cpu", precision="fp32", threads=1)
    alone = [scorer.score(split(batch, index))[0] for index in range(len(batch))]
    np.testing.assert_allclose(scorer.score(batch), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.device
def test_lower_precisions_stay_close(folders, precision):
    if precision not in candidate_precisions("cpu"):
        pytest.skip(f"this processor is not fast in {precision}")
    batch = random_batch(LENGTHS, 150, 2, lowest=1)
    expected = expected_of(folders["multilingual"], batch)
    scorer = open_scorer(folders["multilingual"], device="cpu", precision=precision, threads=1)
    found = scorer.score(batch)
    assert 0 < np.abs(found - expected).max() < 0.15 * expected.std()


def test_texts_are_scored(folders):
    pairs = [("rain", text) for text in SENTENCES]
    with Reranker(folders["multilingual"], device="cpu", precision="fp32", threads=1) as reranker:
        found = reranker.score(pairs)
    encoded = PairEncoder(folders["multilingual"]).encode(pairs, 300, "longest_first")
    batch = encoded.batch(range(len(pairs)))
    np.testing.assert_allclose(
        found, expected_of(folders["multilingual"], batch), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_description_counts_the_weights(folders, name):
    held = load_file(folders[name] / "model.safetensors").values()
    found = describe(folders[name])
    assert found.weights == sum(part.numel() for part in held)
    assert (found.family, found.max_tokens) == ("gte", 300)


def changed(folder: Path, out: Path, **values: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text()) | values
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    "values",
    [
        {"position_embedding_type": "absolute"},
        {"layer_norm_type": "rms_norm"},
        {"logn_attention_scale": True},
        {"pack_qkv": False},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.5}},
        {"hidden_act": "mish"},
    ],
)
def test_what_is_not_built_is_not_native(folders, tmp_path, values):
    folder = changed(folders["multilingual"], tmp_path / "m", **values)
    assert native_model(folder, read_config(folder)) is None


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_attention_heads": 3}, "hidden_size: 64 does not give num_attention_heads=3"),
        ({"rope_scaling": {"type": "ntk", "factor": 0.5}}, "factor: 0.5 is not"),
        ({"rope_scaling": 8}, "rope_scaling: 8 is not an object"),
        ({"num_hidden_layers": 2}, "beyond config.json's num_hidden_layers=2"),
        ({"intermediate_size": 90}, "mlp.*_proj.weight of shape"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folders, tmp_path, values, problem):
    folder = changed(folders["multilingual"], tmp_path / "m", **values)
    with pytest.raises(BadCheckpoint, match=problem):
        open_scorer(folder, device="cpu", precision="fp32")
