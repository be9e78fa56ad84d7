"""jina-reranker-v2's checkpoints: the scores of the same XLM-RoBERTa under its usual names."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from helpers import SENTENCES
from native_models import save_as_jina

from echelon import Reranker
from echelon.errors import BadCheckpoint

PAIRS = [("rain", text) for text in SENTENCES]


@pytest.fixture(scope="module")
def jina(toy, tmp_path_factory):
    """The toy XLM-RoBERTa, converted as the authors convert theirs."""
    return save_as_jina(toy("xlm-roberta"), tmp_path_factory.mktemp("jina") / "jina")


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
