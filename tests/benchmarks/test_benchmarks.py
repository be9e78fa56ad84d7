"""The peer benchmark: workloads, the search for a size, merging, targets, Echelon unfolded."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from language_models import make_language_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

sys.path.insert(0, str(ROOT / "benchmarks"))

import peer_engines
import peer_models
import peer_readme
import peer_report
import peer_results
import peer_setup
import peer_turns
import workloads
from peer_results import SPEED, Target

WORDS = [f"w{i}" for i in range(300)]

MACHINE = {"cpu": "new", "usable_cpus": 2, "matrix_features": ["avx512_bf16", "avx2"]}

SEEN = {
    "commit": "c0",
    "command": "python benchmarks/peers.py",
    "versions": {"project": {"torch": "2"}},
}
"""What else a report needs of a part."""


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "?", *WORDS])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return made


@pytest.fixture
def passages():
    questions = [" ".join(WORDS[i : i + 5]) for i in range(250)]
    paragraphs = [" ".join(WORDS[i : i + 70]) for i in range(0, 200, 3)]
    return [
        workloads.Passages(questions[:120], paragraphs),
        workloads.Passages(questions[120:], paragraphs),
    ]


def part(
    workload="mixed", date="1", engines=("echelon bf16", "peer bf16"), times=((1, 2),), **more
):
    return {
        "model": "large",
        "workload": workload,
        "fingerprint": "f",
        "date": date,
        "pairs": 10,
        "flop": 4e9,
        "peaks": {"bf16": {"a": 8.0, "b": 5.0}},
        "machine": MACHINE,
        "engines": {
            name: {
                "precision": name.split()[-1],
                "ours": name.startswith("echelon"),
                "unit": "pairs",
                "size": 8,
                "note": "",
                "environment": "project",
                "memory": {"rss": 1.2e9, "anonymous": 1e9},
            }
            for name in engines
        },
        "turns": [{"seconds": dict(zip(engines, row, strict=True))} for row in times],
        **more,
    }


@pytest.mark.parametrize("name", workloads.NAMES)
def test_workloads_are_the_same_every_time(name, tokenizer, passages):
    first, second = (workloads.build(name, tokenizer, passages) for _ in range(2))
    assert first == second
    assert first.fingerprint == second.fingerprint
    assert len(first.pairs) == len(first.lengths)


def test_mixed_has_the_lengths_of_web_passages(tokenizer, passages):
    mixed = workloads.build("mixed", tokenizer, passages)
    assert sum(mixed.lengths) / len(mixed.lengths) == pytest.approx(120, abs=2)
    assert max(mixed.lengths) <= workloads.MAX_LENGTH
    assert sorted(mixed.lengths) == sorted(workloads.mixed_lengths())
    assert {len(places) for places in mixed.queries()} == {workloads.DOCUMENTS_PER_QUERY}


def test_long_and_realtime_have_exact_lengths(tokenizer, passages):
    assert set(workloads.build("long", tokenizer, passages).lengths) == {512}
    realtime = workloads.build("realtime", tokenizer)
    assert set(realtime.lengths) == {26}
    assert len(realtime.pairs) == 10


def test_copies_of_a_document_are_left_out_of_the_order(tokenizer):
    tutorial = workloads.build("tutorial", tokenizer)
    assert len(tutorial.pairs) == 100
    assert tutorial.queries() == [[0, 1, 2, 3]]


def test_operations_are_those_of_the_large_shape():
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    for length in (25, 128, 512):
        expected = length * (603_979_776 + 98_304 * length)
        assert workloads.flop_of_pair(large, length) == expected


def test_operations_of_modernbert_count_its_gate_and_its_window():
    base = {"model_type": "modernbert", "hidden_size": 768, "intermediate_size": 1152}
    base |= {"num_hidden_layers": 22, "global_attn_every_n_layers": 3, "local_attention": 128}
    for length in (100, 500):
        seen = 8 * length + 14 * min(length, 129)
        expected = length * (2 * 22 * (4 * 768**2 + 3 * 768 * 1152) + 4 * 768 * seen)
        assert workloads.flop_of_pair(base, length) == expected


def test_query_has_documents_of_one_question(tokenizer, passages):
    found = workloads.build("query", tokenizer, passages)
    assert len(found.queries()) == 1
    assert len(found.pairs) == 100
    assert max(found.lengths) < 350


def test_operations_of_a_language_model_count_a_prompt_once(tmp_path):
    folder = make_language_model(tmp_path / "Qwen3-Reranker", "qwen3", max_position_embeddings=900)
    one = workloads.Workload("query", [("rain", "a ferry")], [5])
    same = workloads.Workload("query", [("rain", "a ferry"), ("rain", "a kettle")], [5, 5])
    other = workloads.Workload("query", [("rain", "a ferry"), ("snow", "a kettle")], [5, 5])
    first, shared, apart = (peer_models.flop(folder, work) for work in (one, same, other))
    assert first < shared < 1.5 * first
    assert apart > shared


@pytest.mark.parametrize(("size", "unit"), [(8, "pairs"), (1, "pairs"), (512, "tokens")])
def test_a_sample_stands_for_the_whole(size, unit):
    lengths = workloads.mixed_lengths()
    indices, scale = workloads.sample(lengths, size, unit)
    assert len(set(indices)) == len(indices) < len(lengths)
    taken = sum(lengths[i] for i in indices)
    assert scale * taken == pytest.approx(sum(lengths), rel=0.15)


def test_a_whole_sample_is_everything():
    assert workloads.sample([5, 3, 9], 2, "pairs", share=1.0) == ([0, 1, 2], 1.0)


@pytest.mark.parametrize("best", [1, 4, 8, 16, 64])
def test_climbing_finds_the_best_size(best):
    sizes = (1, 2, 4, 8, 16, 32, 64)
    costs = peer_turns.climb(sizes, 8, lambda size: 1 + abs(sizes.index(size) - sizes.index(best)))
    assert peer_turns.cheapest(costs) == best


def test_climbing_leaves_out_what_is_obviously_worse():
    costs = peer_turns.climb((1, 2, 4, 8, 16, 32), 8, lambda size: abs(size - 8) + 1.0)
    assert set(costs) == {4, 8, 16}


def test_a_new_part_takes_over_what_it_measured():
    old = part(engines=("echelon bf16", "peer bf16", "other bf16"), times=((1, 2, 3),))
    new = part(date="2")
    merged = peer_results.merge([old, part("long")], new)
    assert [p["workload"] for p in merged] == ["mixed", "long", "mixed"]
    assert list(merged[0]["engines"]) == ["echelon bf16", "other bf16"]
    assert peer_results.merge([part()], new) == [new]
    assert peer_results.merge([part(date="2")], new) == [new]
    assert peer_results.merge([part(fingerprint="g")], new) == [new]


def test_engines_that_have_not_run_do_not_take_over():
    waiting = part(engines=("echelon bf16", "peer bf16"), times=())
    waiting["engines"]["peer bf16"]["failure"] = "no"
    assert list(peer_results.finished(waiting)["engines"]) == ["peer bf16"]


def test_ratios_are_paired():
    drifting = part(times=((1.0, 2.0), (10.0, 20.0), (100.0, 200.0)))
    assert peer_results.paired(drifting, "echelon bf16", "peer bf16").median == 2.0
    assert peer_results.rate(drifting, "echelon bf16").median == 1.0
    assert peer_results.paired(drifting, "echelon bf16", "nobody") is None


@pytest.mark.parametrize(
    ("target", "value", "word"),
    [
        (Target("large", "mixed", "echelon bf16", "ratio", "peer bf16", 2.0), 2.0, "met"),
        (Target("large", "mixed", "echelon bf16", "ratio", "peer bf16", 2.1), 2.0, "missed"),
        (Target("large", "mixed", "echelon bf16", "ratio_to_best", "bf16", 1.0), 1.5, "met"),
        (Target("large", "mixed", "echelon bf16", "share_of_peak", "bf16", 60, "%"), 50, "missed"),
        (
            Target("large", "mixed", "echelon bf16", "resident_gb", "", 1.3, "GB", at_most=True),
            1.2,
            "met",
        ),
    ],
)
def test_targets(target, value, word):
    engines = ("echelon bf16", "peer bf16", "close bf16", "other fp32")
    spread, said = peer_results.verdict([part(engines=engines, times=((1, 2, 1.5, 1),))], target)
    assert (spread.median, said) == (pytest.approx(value), word)


def test_every_target_names_engines_that_are_compared():
    names = {engine.name for engine in peer_setup.ENGINES}
    assert {model.reference for model in peer_models.MODELS.values()} <= names
    for model in peer_models.MODELS.values():
        assert all(any(name.startswith(begin) for name in names) for begin in model.engines)
        assert set(model.workloads) <= set(workloads.NAMES)
    for target in peer_results.TARGETS:
        assert target.ours in names
        assert target.against in names | {"fp32", "bf16", "int8", ""}
        assert peer_results.verdict([], target) == (None, "not measured")


def test_failures_are_in_the_report():
    failed = part(**SEEN)
    failed["engines"]["broken int8"] = {
        **failed["engines"]["peer bf16"],
        "precision": "int8",
        "failure": "pip says no",
    }
    text = peer_report.markdown([failed])
    assert "| broken int8 | failed: pip says no |" in text
    assert "| **echelon bf16** | 10.0 [10.0–10.0] (1) | 8 pairs |" in text
    assert text.count("not measured") == len(peer_results.TARGETS) - 3


def test_agreement_is_that_within_queries():
    work = workloads.Workload("mixed", [("q", "a"), ("q", "b"), ("r", "a"), ("r", "b")], [2] * 4)
    task = peer_turns.Task(work, Path(), {})
    found = peer_turns.agreement(task, [1.0, 2.0, 9.0, 8.0], [1.0, 2.5, 3.0, 4.0])
    assert found == {"max_delta": 6.0, "tau": 0.0}


def test_graph_steps_exist():
    source = Path(peer_setup.HERE / "peer_graphs.py").read_text(encoding="utf-8")
    for engine in peer_setup.ENGINES:
        for step in engine.graphs:
            assert f"def {step.replace('-', '_')}(" in source


def test_copies_of_a_pair_are_scored_too(toy, monkeypatch):
    monkeypatch.setattr(peer_engines, "MAX_LENGTH", 64)
    engine = peer_engines.Echelon(toy("bert"), Path(), precision="fp32", unit="tokens")
    pairs = [("a kettle", "an old stove"), ("a kettle", "a ferry")] * 3
    logits = engine.score(pairs, 64)
    assert len(logits) == len(pairs)
    assert len(set(logits.round(4).tolist())) == 2


@pytest.mark.parametrize("file", peer_readme.COLUMNS)
def test_the_readme_says_what_was_measured(file):
    parts = json.loads(peer_readme.RESULTS.read_text(encoding="utf-8"))["parts"]
    text = (ROOT / file).read_text(encoding="utf-8")
    assert peer_readme.table(parts, file) in text
    assert "Echelon int8" in peer_readme.table(parts, file)


def test_a_longer_list_of_features_does_not_make_another_processor():
    longer = MACHINE | {"matrix_features": ["avx512_bf16", "avx512f", "avx2"]}
    new = part(date="2", machine=longer)
    assert peer_results.merge([part()], new) == [new]


def test_slow_engines_run_often_enough_for_the_readme():
    source = (ROOT / "benchmarks/peers.py").read_text(encoding="utf-8")
    (rounds,) = re.findall(r'"--slow-rounds", type=int, default=(\d+)', source)
    assert int(rounds) >= peer_readme.MIN_RUNS


def test_the_table_has_a_block_for_each_processor():
    engines = ("echelon bf16", "peer bf16", "openvino bf16")
    times = ((1, 2, 3),) * 3
    here = [part(name, engines=engines, times=times) for name in ("tutorial", "mixed")]
    old = {"cpu": "old", "usable_cpus": 4, "matrix_features": ["avx2"]}
    there = [part(name, engines=engines[:2], times=((2, 3),) * 3, machine=old) for name in SPEED]
    few = [part(name, engines=("once fp32",), times=((1,),)) for name in SPEED]
    lines = peer_readme.table([*here, *there, *few], "README.md").splitlines()
    assert lines[3:-1] == [
        "| **new, 2 CPUs (AVX-512 bf16, AVX2): bge-reranker-v2-m3's shape** | | | |",
        "| Echelon bf16 | 10.0 | 10.0 |  |",
        "| peer bf16 | 5.00 (2.00 ×) | 5.00 (2.00 ×) |  |",
        "| OpenVINO bf16 | 3.33 (3.00 ×) | 3.33 (3.00 ×) |  |",
        "| **old, 4 CPUs (AVX2): bge-reranker-v2-m3's shape** | | | |",
        "| Echelon bf16 | 5.00 | 5.00 | 5.00 |",
        "| peer bf16 | 3.33 (1.50 ×) | 3.33 (1.50 ×) | 3.33 (1.50 ×) |",
    ]


def test_a_run_leaves_the_results_of_other_processors():
    old = part(machine=MACHINE | {"matrix_features": ["avx2"]}, times=((3, 9),))
    new = part(date="2")
    assert peer_results.merge([old, part()], new) == [old, new]
    report = peer_report.markdown([old | SEEN, new | SEEN])
    assert report.index("## new, 2 CPUs (AVX2)") < report.index("## new, 2 CPUs (AVX-512 bf16")
    assert "| peer bf16 | 1.11 [1.11–1.11] (1)" in report
