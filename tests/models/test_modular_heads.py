"""Heads in modules beside a model: the scores of sentence-transformers, and what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from graphs import scorer_of as scorer_of_cards
from helpers import SENTENCES, random_batch, save_tokenizer, vocabulary_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from echelon import Reranker
from echelon.errors import BadCheckpoint, UnsupportedModel
from echelon.models.architecture import read_config
from echelon.models.description import describe
from echelon.models.device import candidate_precisions
from echelon.models.families import native_model
from echelon.models.heads import mean_rows
from echelon.models.registry import open_scorer

if TYPE_CHECKING:
    from pathlib import Path

    from echelon.types import TokenBatch

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 600,
}
TOKENIZERS = {"bert": "bert", "modernbert": "bert", "roberta": "roberta", "xlm-roberta": "xlm"}
VOCABULARY = 150  # ids of random steps; every tokenizer has more
CASES = [(family, pooling) for family in TOKENIZERS for pooling in ("cls", "mean")]
PACKED = [case for case in CASES if case[0] != "modernbert"]
PAIRS = [("rain", text) for text in SENTENCES] + [(SENTENCES[0] * 3, SENTENCES[5] * 4)]


def save_base(folder: Path, family: str) -> Path:
    """A model without a classifier, and its tokenizer."""
    import transformers

    save_tokenizer(folder, TOKENIZERS[family])
    own = transformers.AutoTokenizer.from_pretrained(folder)
    special = {f"{name}_token_id": getattr(own, f"{name}_token_id") for name in ("cls", "sep")}
    shape = {**SHAPE, **special, "vocab_size": vocabulary_of(folder)}
    config = transformers.AutoConfig.for_model(
        family, pad_token_id=own.pad_token_id, local_attention=16, **shape
    )
    torch.manual_seed(7)
    model = transformers.AutoModel.from_config(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return folder


def save_modular(home: Path, family: str, pooling: Any) -> Path:
    """A model as sentence-transformers saves one with a head in modules."""
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.cross_encoder import CrossEncoder
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

    base = Transformer(str(save_base(home / "base", family)))
    torch.manual_seed(1)
    head = [
        Dense(48, 32, activation_function=torch.nn.GELU()),
        LayerNorm(32),
        Dense(32, 40, bias=False),  # its activation is Tanh
        Dense(40, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    for part in head:
        for parameter in part.parameters():
            parameter.data += torch.randn_like(parameter) * 0.2
    model = CrossEncoder(modules=[base, Pooling(48, pooling), *head])
    model.save_pretrained(str(home / "model"))
    return home / "model"


@pytest.fixture(scope="module")
def modular(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    return {case: save_modular(tmp_path_factory.mktemp("modular"), *case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_sentence_transformers(modular, case):
    from sentence_transformers.cross_encoder import CrossEncoder

    original = CrossEncoder(str(modular[case]), device="cpu")
    expected = original.predict(PAIRS, activation_fn=torch.nn.Identity(), convert_to_numpy=True)
    with Reranker(modular[case], device="cpu", precision="fp32", threads=1) as reranker:
        found = reranker.score(PAIRS)
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert reranker.facts.padding == "none"


def by_hand(folder: Path, batch: TokenBatch, pooling: str) -> np.ndarray:
    """Logits of transformers' model and of the modules' weights, each pair alone."""
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    first, norm, second, last = (
        load_file(folder / name / "model.safetensors")
        for name in ("2_Dense", "3_LayerNorm", "4_Dense", "5_Dense")
    )
    found = []
    for start, end in pairwise(batch.offsets):
        ids = torch.from_numpy(batch.ids[start:end]).long()[None]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if batch.type_ids is not None:
            given["token_type_ids"] = torch.from_numpy(batch.type_ids[start:end]).long()[None]
        with torch.inference_mode():
            rows = model(**given).last_hidden_state[0]
            row = rows[0] if pooling == "cls" else rows.sum(0) / len(rows)
            row = torch.nn.functional.gelu(first["linear.weight"] @ row + first["linear.bias"])
            row = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()
            row = torch.tanh(
                second["linear.weight"] @ (row * norm["norm.weight"] + norm["norm.bias"])
            )
            found.append(float(last["linear.weight"] @ row + last["linear.bias"]))
    return np.array(found)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=9), seed=st.integers(0, 2**32 - 1))
def test_any_step_has_the_logits_by_hand(modular, case, lengths, seed):
    family, pooling = case
    batch = random_batch(lengths, VOCABULARY, seed, types=family == "bert", lowest=5)
    expected = by_hand(modular[case], batch, pooling)
    scorer = open_scorer(modular[case], device="cpu", precision="fp32", threads=1)
    np.testing.assert_allclose(scorer.score(batch), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("lengths", [[3, 41, 7, 5, 90, 12, 60, 4, 33, 21], [64]])
def test_graphs_of_a_card_have_the_logits_by_hand(modular, case, lengths):
    """Rows of a graph that belong to no pair hold no numbers; see ``looped``."""
    batch = random_batch(lengths, VOCABULARY, 3, types=case[0] == "bert", lowest=5)
    scorer = scorer_of_cards(modular[case])
    expected = by_hand(modular[case], batch, case[1])
    for _ in range(4):  # as it is, and as a graph
        np.testing.assert_allclose(scorer.score(batch), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.device
def test_lower_precisions_stay_close(modular, case, precision):
    if precision not in candidate_precisions("cpu"):
        pytest.skip(f"this processor is not fast in {precision}")
    batch = random_batch([3, 50, 50, 90, 12, 1], VOCABULARY, 2, types=case[0] == "bert", lowest=5)
    expected = by_hand(modular[case], batch, case[1])
    scorer = open_scorer(modular[case], device="cpu", precision=precision, threads=1)
    found = scorer.score(batch)
    assert np.abs(found - expected).max() < 0.15 * expected.std()
    assert np.abs(found - expected).max() > 0


def test_means_are_of_each_pairs_rows_alone():
    rows = torch.arange(14.0).view(7, 2)
    rows[5:] = torch.nan  # of no pair
    found = mean_rows(rows, torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32))
    np.testing.assert_array_equal(found, [[1, 2], [0, 0], [6, 7], [0, 0]])


@pytest.mark.parametrize("case", CASES)
def test_the_description_counts_the_weights(modular, case):
    folder = modular[case]
    files = [folder / "model.safetensors", *folder.glob("[2-5]_*/model.safetensors")]
    held = {f"{file}:{name}": part for file in files for name, part in load_file(file).items()}
    unused = [name for name in held if ":pooler." in name]
    assert describe(folder).weights == sum(held[n].numel() for n in held if n not in unused)
    assert describe(folder).labels == ("score",)


CHANGES = [
    ("5_Dense", "out_features", 2, "its modules end in 2 numbers"),
    ("2_Dense", "activation_function", "torch.nn.modules.activation.ELU", "is not built"),
    ("2_Dense", "activation_function", "evil.Code", "is not built"),
    ("2_Dense", "use_residual", True, "and a residual is not built"),
    ("1_Pooling", "pooling_mode", "max", "pooling 'max' is not built"),
    ("2_Dense", "module_input_name", "token_embeddings", "from 'token_embeddings' to"),
    ("4_Dense", "module_output_name", "elsewhere", "to 'elsewhere' is not built"),
    ("4_Dense", "module_output_name", "scores", "the last of its modules alone must give"),
    ("5_Dense", "module_output_name", None, "the last of its modules alone must give"),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_modules_that_are_not_built_are_refused(modular, tmp_path, family, change):
    module, field, value, problem = change
    folder = shutil.copytree(modular[family, "cls"], tmp_path / "m")
    path = folder / module / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UnsupportedModel, match=problem):
        native_model(folder, read_config(folder))


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", ""])
def test_a_module_outside_of_the_folder_is_refused(modular, tmp_path, path):
    folder = shutil.copytree(modular["bert", "cls"], tmp_path / "m")
    names = json.loads((folder / "modules.json").read_text())
    names[2]["path"] = path
    (folder / "modules.json").write_text(json.dumps(names))
    with pytest.raises(BadCheckpoint, match="is not the name of a folder"):
        native_model(folder, read_config(folder))


def test_a_chain_of_unknown_modules_is_refused_by_name(modular, tmp_path):
    folder = shutil.copytree(modular["bert", "cls"], tmp_path / "m")
    names = json.loads((folder / "modules.json").read_text())
    names[2]["type"] = "sentence_transformers.models.CNN"
    (folder / "modules.json").write_text(json.dumps(names))
    with pytest.raises(UnsupportedModel, match="its modules are Transformer, Pooling, CNN"):
        native_model(folder, read_config(folder))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_head_for_another_width_is_refused(modular, tmp_path, family):
    folder = shutil.copytree(modular[family, "cls"], tmp_path / "m")
    path = folder / "2_Dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_features": 64}))
    with pytest.raises(BadCheckpoint, match="hidden_size: 48, and 2_Dense beside it takes 64"):
        native_model(folder, read_config(folder))


def test_a_model_without_head_stays_refused(modular, tmp_path):
    folder = shutil.copytree(modular["roberta", "cls"], tmp_path / "m")
    (folder / "modules.json").unlink()
    with pytest.raises(UnsupportedModel, match="RobertaModel has no classification head"):
        native_model(folder, read_config(folder))


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_the_padded_encoder_of_apples_gpus_refuses_a_mean_and_takes_first_tokens(modular, family):
    from echelon.models import encoder_padded
    from echelon.models.architecture import LayerPlan

    def opened(pooling):
        folder = modular[family, pooling]
        shape = native_model(folder, read_config(folder)).shape
        device = torch.device("cpu")
        return encoder_padded.open_native(folder, shape, device, LayerPlan("fp32"), 1, 0)

    with pytest.raises(UnsupportedModel, match=r"the mean of all tokens.*device='cpu'"):
        opened("mean")
    batch = random_batch([9, 40, 3], VOCABULARY, 1, types=family == "bert", lowest=5)
    exact = open_scorer(modular[family, "cls"], device="cpu", precision="fp32").score(batch)
    np.testing.assert_allclose(opened("cls").score(batch), exact, rtol=0, atol=1e-4)
