"""Files of decoders: configurations in both spellings, what is not native, and what is damaged."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from decoders import (
    CPU,
    MODELS,
    VOCABULARY,
    batch_of,
    make_decoder,
    open_decoder,
    scorer_of,
    shape_of,
)

from echelon.errors import BadCheckpoint
from echelon.models.architecture import LayerPlan
from echelon.models.decoder import open_native
from echelon.models.prompts import Answers

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("decoders")
    return {name: make_decoder(home / name, name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_that_are_told_are_those_that_are_loaded(decoders, name):
    """The word table stays mapped; of the head one vector is loaded."""
    shape = shape_of(decoders[name])
    tables = shape.vocabulary * shape.hidden
    assert scorer_of(decoders[name]).info.weights_bytes == 4 * (shape.weights - tables)


def test_ids_beyond_the_vocabulary_are_refused(decoders):
    with pytest.raises(BadCheckpoint, match="embeddings for 150 tokens"):
        scorer_of(decoders["tied"]).score(batch_of([np.array([3, VOCABULARY])]))


def changed(folder: Path, out: Path, **values: Any) -> Path:
    """The folder with another configuration; None removes a field."""
    shutil.copytree(folder, out)
    config = {**json.loads((out / "config.json").read_text()), **values}
    config = {name: value for name, value in config.items() if value is not None}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_both_spellings_of_rotary_positions(decoders, tmp_path):
    folder = decoders["untied"]
    assert shape_of(folder).theta == 1e6
    old = changed(folder, tmp_path / "old", rope_parameters=None, rope_theta=1e6)
    new = {"rope_type": "default", "rope_theta": 1e6}
    new = changed(folder, tmp_path / "new", rope_theta=None, rope_parameters=new)
    assert shape_of(old) == shape_of(new) == shape_of(folder)
    none = changed(folder, tmp_path / "none", rope_theta=None, rope_parameters=None)
    assert shape_of(none).theta == 10_000


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"is_causal": False},
        {"quantization_config": {"quant_method": "gptq"}},
        {"architectures": ["Qwen3Model"]},
    ],
)
def test_what_is_not_native(decoders, tmp_path, values):
    assert shape_of(changed(decoders["tied"], tmp_path / "other", **values)) is None


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide"),
        ({"head_dim": 9}, "head_dim: 9 is odd"),
        ({"num_hidden_layers": None}, "num_hidden_layers: it is missing"),
        ({"head_dim": "10"}, "head_dim: '10' is not a whole number"),
        ({"rope_parameters": {"rope_theta": "high"}}, "rope_theta: 'high' is not"),
        ({"rope_parameters": [1]}, "rope_parameters: .* is not an object"),
    ],
)
def test_damaged_configurations_name_the_field(decoders, tmp_path, values, problem):
    folder = changed(decoders["tied"], tmp_path / "bad", **values)
    with pytest.raises(BadCheckpoint, match=problem):
        shape_of(folder)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_hidden_layers": 2}, r"model\.layers\.2\.\*, beyond"),
        ({"num_hidden_layers": 4}, r"no tensor model\.layers\.3"),
        ({"head_dim": 20}, r"self_attn\.\w_proj\.weight of shape"),
        ({"tie_word_embeddings": False}, r"no tensor lm_head\.weight"),
        ({"vocab_size": 151}, r"embed_tokens\.weight of shape \[151"),
    ],
)
def test_configurations_of_other_weights_are_refused(decoders, tmp_path, values, problem):
    folder = changed(decoders["tied"], tmp_path / "bad", layer_types=None, **values)
    with pytest.raises(BadCheckpoint, match=problem):
        open_decoder(folder)


def test_an_answer_beyond_the_vocabulary_is_refused(decoders):
    folder = decoders["tied"]
    with pytest.raises(BadCheckpoint, match="embeddings for 150 tokens"):
        open_native(
            folder=folder,
            architecture=shape_of(folder),
            device=CPU,
            plan=LayerPlan("fp32"),
            threads=1,
            label=0,
            answers=Answers(3, 9693),
        )
