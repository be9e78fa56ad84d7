"""The registry of native families, and what is said of a model before it is loaded."""

from __future__ import annotations

import json

import pytest

from echelon.errors import UnsupportedModel
from echelon.models.architecture import read_config
from echelon.models.description import describe
from echelon.models.families import FAMILIES, native_model
from echelon.models.registry import open_scorer


def write_config(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return folder


def test_no_model_type_belongs_to_two_families():
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(types) == len(set(types))
    assert all(family.known for family in FAMILIES)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_the_weights_that_are_told_are_those_that_are_loaded(toy, family):
    folder = toy(family)
    found = describe(folder)
    scorer = open_scorer(folder, device="cpu", precision="fp32", threads=1)
    assert found.runs == "native"
    assert found.max_tokens == scorer.info.max_tokens
    shape = native_model(folder, read_config(folder)).shape
    tables = (shape.vocabulary + shape.table_positions + shape.segments) * shape.hidden
    # Tables are mapped, and only one of the head's labels is loaded.
    unused = (len(shape.labels) - 1) * (shape.hidden + 1)
    assert 4 * (found.weights - tables - unused) == scorer.info.weights_bytes
    assert found.weights_bytes["bf16"] == 2 * found.weights
    scorer.close()


def test_a_model_of_no_native_family_says_how_it_runs(toy):
    found = describe(toy("electra"))
    assert (found.runs, found.family, found.weights_bytes) == ("transformers", None, {})
    assert "no native electra" in found.reason


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("BertModel", "BertModel has no classification head"),
        ("Qwen3ForCausalLM", "is a language model, and its name does not say"),
    ],
)
def test_a_model_that_cannot_score_says_why(tmp_path, architecture, reason):
    model_type = "bert" if architecture.startswith("Bert") else "qwen3"
    folder = write_config(tmp_path / "m", model_type=model_type, architectures=[architecture])
    with pytest.raises(UnsupportedModel, match=reason):
        native_model(folder, read_config(folder))
    found = describe(folder)
    assert found.runs == "no"
    assert reason in found.reason
