"""ONNX graphs: scored, ranked and tuned, also where torch is not installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from helpers import SENTENCES
from onnx import TensorProto, helper
from onnx_graphs import write_graph

from echelon import Reranker
from echelon.errors import BadCheckpoint, InvalidInput, UnsupportedModel
from echelon.models import onnx as onnx_scorer
from echelon.models import registry
from echelon.models.base import DeviceOutOfMemory
from echelon.models.onnx import OnnxScorer, find_graph, graph_precision
from echelon.models.registry import open_scorer

PAIRS = [(SENTENCES[i], SENTENCES[(i * 3 + 1) % 10] * (i % 4 + 1)) for i in range(10)]


@pytest.fixture
def folder(tmp_path, tokenizers):
    """A folder as exporters write it: graph, tokenizer, no configuration."""
    shutil.copytree(tokenizers["bert"], tmp_path / "m")
    write_graph(tmp_path / "m" / "model.onnx")
    return tmp_path / "m"


def test_scores_are_those_of_the_graph_whatever_a_pair_is_padded_with(folder):
    constants = write_graph(folder / "model.onnx")
    with Reranker(folder) as reranker:
        scores = reranker.score(PAIRS)
        alone = [reranker.score([pair])[0] for pair in PAIRS]
        encoded = reranker._encoder.encode(PAIRS, 512, "longest_first")
    batch = encoded.batch(range(len(PAIRS)))
    means = [
        constants["table"][batch.ids[start:end]].mean(axis=0)
        for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    ]
    expected = (np.array(means) @ constants["head"])[:, 0]
    assert np.abs(scores - expected).max() <= 1e-5
    assert np.abs(scores - alone).max() <= 1e-5


def test_info_describes_the_graph(folder):
    scorer = open_scorer(folder, threads=1)
    assert isinstance(scorer, OnnxScorer)
    assert (scorer.info.padding, scorer.info.precision, scorer.info.threads) == (
        "rectangular",
        "fp32",
        1,
    )
    scorer.close()


def test_torch_weights_are_preferred_where_both_are_there(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "both")
    write_graph(tmp_path / "both" / "onnx" / "model.onnx")
    assert find_graph(tmp_path / "both") == tmp_path / "both" / "onnx" / "model.onnx"
    scorer = open_scorer(tmp_path / "both")
    assert not isinstance(scorer, OnnxScorer)
    scorer.close()


def test_a_label_is_chosen_as_elsewhere(folder):
    constants = write_graph(folder / "model.onnx", labels=3)
    config = {"model_type": "bert", "id2label": {"0": "no", "1": "maybe", "2": "yes"}}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    with pytest.raises(InvalidInput, match="0=no, 1=maybe, 2=yes"):
        Reranker(folder)
    with Reranker(folder, label="maybe") as reranker:
        assert reranker.max_length == 128
        (got,) = reranker.score([("a", "b")])
        ids = reranker._encoder.encode([("a", "b")], 128, "longest_first").batch([0]).ids
    assert got == pytest.approx((constants["table"][ids].mean(0) @ constants["head"])[1], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "field"), [({"device": "cuda"}, "device"), ({"precision": "bf16"}, "precision")]
)
def test_what_a_graph_cannot_do_is_refused(folder, options, field):
    with pytest.raises(InvalidInput) as caught:
        Reranker(folder, **options)
    assert caught.value.field == field


def test_a_damaged_graph_and_a_foreign_one_are_named(folder):
    write_graph(folder / "model.onnx", first_input="pixels")
    with pytest.raises(UnsupportedModel, match="input_ids"):
        Reranker(folder)
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:500])
    with pytest.raises(BadCheckpoint, match=r"model\.onnx"):
        Reranker(folder)


def test_memory_errors_of_the_runtime_are_recognised_and_others_pass(folder, monkeypatch):
    scorer = open_scorer(folder)
    from echelon.types import TokenBatch

    batch = TokenBatch(np.array([1, 2], np.int32), None, np.array([0, 2], np.int32))

    class Failing:
        def __init__(self, words):
            self.words = words

        def run(self, *_):
            raise RuntimeError(self.words)

    monkeypatch.setattr(
        scorer, "_session", Failing("Failed to allocate memory for requested buffer")
    )
    with pytest.raises(DeviceOutOfMemory):
        scorer.score(batch)
    monkeypatch.setattr(scorer, "_session", Failing("Invalid rank for input"))
    with pytest.raises(RuntimeError, match="Invalid rank"):
        scorer.score(batch)


def test_int8_graphs_are_told_from_fp32(folder, tmp_path):
    assert graph_precision(folder / "model.onnx") == "fp32"
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "q", [value("x", TensorProto.FLOAT, [2])], [value("y", TensorProto.UINT8, [2])]
    )
    onnx.save(helper.make_model(graph), tmp_path / "q.onnx")
    assert graph_precision(tmp_path / "q.onnx") == "int8"


def test_rank_and_tune_work_without_torch(folder, tmp_path):
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers'):\n    sys.modules[name] = None\n"
        "import echelon\nfrom echelon.cli import main\nmain()"
    )

    def run(*arguments):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    sizes = ("--pairs=4", "--batch-sizes=1,2", "--token-budgets=64", "--time-limit=0.5")
    tuned = run("tune", folder, *sizes, "--json")
    assert tuned.returncode == 0, tuned.stderr
    profile = json.loads(tuned.stdout)
    assert profile["settings"]["precision"] == "fp32"
    assert all(point["status"] == "ok" for point in profile["points"])
    assert any(point["padding_share"] > 0 for point in profile["points"])
    ranked = run(
        "rank", "q", "a", "b", "--model", folder, "--profile", "echelon-profile.json", "--json"
    )
    assert ranked.returncode == 0, ranked.stderr
    assert ranked.stderr == ""
    with Reranker(folder) as reranker:
        expected = reranker.rank("q", ["a", "b"])
    logits = [result["logit"] for result in json.loads(ranked.stdout)["results"]]
    assert logits == pytest.approx([result.logit for result in expected.results], abs=1e-5)


def test_freed_memory_stays_until_it_is_released(folder, monkeypatch):
    done = []
    monkeypatch.setattr(registry, "keep_freed", lambda: done.append("keep"))
    monkeypatch.setattr(onnx_scorer, "give_back", lambda: done.append("give back"))
    scorer = registry.open_scorer(folder)
    assert done == ["keep"]
    scorer.release()
    assert done == ["keep", "give back"]
    scorer.close()
