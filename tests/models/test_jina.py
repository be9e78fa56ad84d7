"""jina-reranker-v2's checkpoints: the scores of the same XLM-RoBERTa under its usual names."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from helpers import SENTENCES
from safetensors.torch import load_file, save_file

from echelon import Reranker
from echelon.errors import BadCheckpoint

NAMES = {
    "attention.output.dense": "mixer.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}
PAIRS = [("rain", text) for text in SENTENCES]


@pytest.fixture(scope="module")
def jina(toy, tmp_path_factory):
    """The toy XLM-RoBERTa, converted as the authors convert theirs."""
    import torch

    folder = tmp_path_factory.mktemp("jina") / "jina"
    shutil.copytree(toy("xlm-roberta"), folder)
    tensors, found = load_file(folder / "model.safetensors"), {}
    layers = {int(name.split(".")[3]) for name in tensors if ".encoder.layer." in name}
    for layer in layers:
        old, new = f"roberta.encoder.layer.{layer}", f"roberta.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = [
                tensors.pop(f"{old}.attention.self.{p}.{kind}") for p in ("query", "key", "value")
            ]
            found[f"{new}.mixer.Wqkv.{kind}"] = torch.cat(parts)
            for usual, own in NAMES.items():
                found[f"{new}.{own}.{kind}"] = tensors.pop(f"{old}.{usual}.{kind}")
    for kind in ("weight", "bias"):
        found[f"roberta.emb_ln.{kind}"] = tensors.pop(f"roberta.embeddings.LayerNorm.{kind}")
    save_file(found | tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    config["auto_map"] = {"AutoModelForSequenceClassification": "jinaai/code--modeling.Code"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_are_those_of_the_usual_names(toy, jina, precision):
    with Reranker(toy("xlm-roberta"), device="cpu", precision=precision, threads=1) as usual:
        expected = usual.score(PAIRS)
    with Reranker(jina, device="cpu", precision=precision, threads=1) as reranker:
        np.testing.assert_array_equal(reranker.score(PAIRS), expected)


def test_a_checkpoint_with_more_layers_than_its_configuration_is_refused(jina, tmp_path):
    folder = shutil.copytree(jina, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"beyond config\.json's num_hidden_layers=1"):
        Reranker(folder)
