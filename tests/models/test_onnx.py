"""ONNX graphs: scored, ranked and tuned, also where torch is not installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from helpers import SENTENCES, random_batch
from onnx import TensorProto, helper
from onnx_graphs import write_graph

from echelon import Reranker
from echelon.errors import BadCheckpoint, InvalidInput, ModelError, UnsupportedModel
from echelon.models import onnx as onnx_scorer
from echelon.models import registry
from echelon.models.base import DeviceOutOfMemory
from echelon.models.onnx import OnnxScorer, find_graph, graph_precision
from echelon.models.onnx_file import table_rows
from echelon.models.registry import check_tokenizer, open_scorer
from echelon.types import TokenBatch, TokenIds

PAIRS = [(SENTENCES[i], SENTENCES[(i * 3 + 1) % 10] * (i % 4 + 1)) for i in range(10)]


@pytest.fixture
def folder(tmp_path, tokenizers):
    """A folder as exporters write it: graph, tokenizer, no configuration."""
    shutil.copytree(tokenizers["bert"], tmp_path / "m")
    write_graph(tmp_path / "m" / "model.onnx")
    return tmp_path / "m"


def configure(folder, **fields):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **fields}))


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
    names = {"0": "no", "1": "maybe", "2": "yes"}
    configure(folder, id2label=names, max_position_embeddings=128)
    with pytest.raises(InvalidInput, match="0=no, 1=maybe, 2=yes"):
        Reranker(folder)
    with Reranker(folder, label="maybe") as reranker:
        assert reranker.max_length == 128
        (got,) = reranker.score([("a", "b")])
        ids = reranker._encoder.encode([("a", "b")], 128, "longest_first").batch([0]).ids
    assert got == pytest.approx((constants["table"][ids].mean(0) @ constants["head"])[1], abs=1e-5)


def test_without_a_configuration_the_graph_says_how_many_outputs_there_are(folder):
    constants = write_graph(folder / "model.onnx", labels=2)
    with pytest.raises(InvalidInput, match=r"2 labels \(0, 1\) and none was chosen.*--label"):
        Reranker(folder)
    with Reranker(folder, label=1) as reranker:
        (got,) = reranker.score([("a", "b")])
        ids = reranker._encoder.encode([("a", "b")], 512, "longest_first").batch([0]).ids
    assert got == pytest.approx((constants["table"][ids].mean(0) @ constants["head"])[1], abs=1e-5)


@pytest.mark.parametrize(("outputs", "said"), [(2, 1), (1, 2), (3, 2)])
def test_a_configuration_of_other_labels_is_refused(folder, outputs, said):
    write_graph(folder / "model.onnx", labels=outputs)
    configure(folder, num_labels=said)
    with pytest.raises(BadCheckpoint, match=f"{outputs} outputs a pair.*names {said} labels"):
        open_scorer(folder, label=0)


NAMES = ("input_ids", "attention_mask")


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ({"inputs": (*NAMES, "position_ids", "beam")}, "attention_mask, beam, input_ids, posit"),
        ({"inputs": ("input_ids", "marks")}, "its inputs are input_ids, marks;"),
        (
            {"kinds": {NAMES[1]: TensorProto.FLOAT}},
            r"attention_mask tensor\(float\) is not of whole",
        ),
        ({"axes": (1, "tokens")}, "it cannot score a pair.*axes of any length"),
        ({"axes": ("n", 128)}, "it cannot score a pair.*axes of any length"),
        ({"outputs": ("rows",)}, r"for 2 pairs it gives float32 of shape \[2, 2, 8\]"),
        ({"outputs": ("means", "rows")}, "its outputs are means, rows, and none is called logits"),
    ],
)
def test_a_graph_that_is_no_classifier_of_pairs_is_refused(folder, graph, words):
    write_graph(folder / "model.onnx", **graph)
    with pytest.raises(ModelError, match=words):
        open_scorer(folder)


@pytest.mark.parametrize("place", ["../outside", "/etc/passwd", "link"])
def test_tensors_outside_of_the_folder_are_refused(folder, place):
    (folder.parent / "outside").write_bytes(bytes(99))
    (folder / "link").symlink_to(folder.parent / "outside")
    model = onnx.load(folder / "model.onnx")
    (head,) = (t for t in model.graph.initializer if t.name == "head")
    head.ClearField("raw_data")
    head.data_location = TensorProto.EXTERNAL
    head.external_data.add(key="location", value=place)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadCheckpoint, match="ONNX Runtime cannot load it"):
        open_scorer(folder)


def test_inputs_of_32_bits_and_outputs_beside_the_logits(folder):
    batch = random_batch([7, 3], 3000, seed=1)
    expected = open_scorer(folder).score(batch)
    write_graph(
        folder / "model.onnx",
        kinds=dict.fromkeys(NAMES, TensorProto.INT32),
        outputs=("means", "logits"),
    )
    np.testing.assert_allclose(open_scorer(folder).score(batch), expected, rtol=0, atol=1e-6)


def test_tables_of_a_graph_are_compared_with_tokenizer_and_configuration(folder):
    write_graph(folder / "model.onnx", positions=64)
    assert table_rows(folder / "model.onnx") == (3000, 64)
    assert open_scorer(folder).info.max_tokens == 64
    configure(folder, max_position_embeddings=128)
    with pytest.raises(BadCheckpoint, match=r"has 64 rows, and config\.json says.*128"):
        open_scorer(folder)
    configure(folder, pad_token_id=3000)
    with pytest.raises(BadCheckpoint, match="cannot score a pair"):
        open_scorer(folder)
    check_tokenizer(folder, TokenIds(2999, {}))
    with pytest.raises(BadCheckpoint, match=r"gave id 3000.*embeddings for 3000 tokens"):
        check_tokenizer(folder, TokenIds(3000, {}))


@pytest.mark.parametrize(
    ("options", "field"), [({"device": "cuda"}, "device"), ({"precision": "bf16"}, "precision")]
)
def test_what_a_graph_cannot_do_is_refused(folder, options, field):
    with pytest.raises(InvalidInput) as caught:
        Reranker(folder, **options)
    assert caught.value.field == field


def test_a_damaged_graph_and_a_foreign_one_are_named(folder):
    write_graph(folder / "model.onnx", inputs=("pixels", "attention_mask"))
    with pytest.raises(UnsupportedModel, match="its inputs are attention_mask, pixels;"):
        Reranker(folder)
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:500])
    with pytest.raises(BadCheckpoint, match=r"model\.onnx"):
        Reranker(folder)


def test_memory_errors_of_the_runtime_are_recognised_and_others_pass(folder, monkeypatch):
    scorer = open_scorer(folder)
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
    assert len(profile["points"]) == 3  # how many of them are measured depends on the machine
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
