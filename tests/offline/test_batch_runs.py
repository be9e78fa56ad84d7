"""Offline jobs over TREC runs, and metrics on judgements."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from helpers import run_command
from offline_jobs import (
    ForgetfulScorer,
    leftovers,
    make_job,
    queries,
    read_lines,
    run_job,
    write_lines,
)

from echelon.engine import launch, precision_check
from echelon.errors import InvalidInput
from echelon.offline import collection, ir_metrics
from echelon.reranker import Reranker

RUN = """\
q1 Q0 d1 1 3.0 bm25
q1 Q0 d2 2 2.0 bm25
q1 Q0 d9 3 1.0 bm25
broken line
q1 Q0 d2 4 0.5 bm25
q1 Q0 d3 5 x bm25
q2 Q0 d3 1 2.5 bm25
q1 Q0 d3 1 2.5 bm25
q3 Q0 d1 1 2.5 bm25
"""


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "topics.tsv").write_text("q1\thow to open a jar\nq2\tferries\nq1\ttwice\nbad\n")
    documents = [{"_id": "d1", "title": "Jars", "text": "tap it"}, {"id": "d2", "contents": "two"}]
    documents += [{"id": "d3", "text": "ferries leave"}, {"id": "d4"}, {"id": "d1", "text": "no"}]
    write_lines(tmp_path / "collection.jsonl", documents)
    (tmp_path / "in.run").write_text(RUN)
    return {
        "topics": str(tmp_path / "topics.tsv"),
        "collection": str(tmp_path / "collection.jsonl"),
    }


def test_a_run_is_reranked_with_texts_of_its_collection(fake, texts, tmp_path):
    job = make_job(fake, tmp_path / "in.run", tmp_path / "out.run", run_tag="mine", **texts)
    run_job(job)
    lines = [line.split() for line in Path(job.output).read_text().splitlines()]
    assert [line[0] for line in lines] == ["q1", "q1", "q2"]
    assert {line[2] for line in lines[:2]} == {"d1", "d2"}
    assert [line[3] for line in lines] == ["1", "2", "1"]
    assert {(line[1], line[5]) for line in lines} == {("Q0", "mine")}
    with Reranker(fake) as reranker:
        pairs = [("how to open a jar", "Jars tap it"), ("how to open a jar", "two")]
        expected = dict(zip(("d1", "d2"), reranker.score(pairs).tolist(), strict=True))
    assert {line[2]: np.float32(line[4]) for line in lines[:2]} == expected
    problems = [
        (p.get("file", "")[-16:], p["line"]) for p in read_lines(f"{job.output}.errors.jsonl")
    ]
    assert [line for file, line in problems if file.endswith("topics.tsv")] == [3, 4]
    assert [line for file, line in problems if file.endswith("collection.jsonl")] == [4, 5]
    assert [line for file, line in problems if not file] == [3, 4, 5, 6, 8, 9]
    assert leftovers(tmp_path) == []
    Path(texts["collection"]).write_text("{}")
    with pytest.raises(InvalidInput, match="collection was"):
        run_job(job)


def test_a_query_of_too_many_lines_is_cut_off_and_reported(fake, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "ROW_DOCUMENTS", 2)
    job = make_job(fake, tmp_path / "in.run", tmp_path / "out.jsonl", **texts)
    run_job(job)
    assert [len(answer["results"]) for answer in read_lines(job.output)] == [2, 1]
    reasons = [problem["reason"] for problem in read_lines(f"{job.output}.errors.jsonl")]
    assert any("began at line 1 and has ended" in reason for reason in reasons)


def test_quality_is_what_ir_measures_says_of_both_files(fake, tmp_path):
    records = [record for record in queries(12, seed=3) if len(record["documents"]) > 2]
    judged = [(r["id"], f"d{n}", n % 3) for r in records[1:] for n in (0, 2, 77)]
    qrels = tmp_path / "qrels"
    qrels.write_text("".join(f"{q} 0 {d} {g}\n" for q, d, g in [*judged, ("other", "d0", 1)]))
    source = write_lines(tmp_path / "in.jsonl", records)
    summary = run_job(make_job(fake, source, tmp_path / "out.run", qrels=str(qrels)))
    assert summary.queries == len(records) - 1
    before = [(r["id"], d["id"], -n) for r in records for n, d in enumerate(r["documents"])]
    lines = [line.split() for line in (tmp_path / "out.run").read_text().splitlines()]
    after = [(line[0], line[2], -int(line[3])) for line in lines]
    names = {"nDCG@10": "nDCG@10", "MRR@10": "RR@10", "recall@10": "R@10", "recall@100": "R@100"}
    measures = [ir_measures.parse_measure(name) for name in names.values()]
    grades = [ir_measures.Qrel(q, d, g) for q, d, g in judged]
    for order, triples in (("before", before), ("after", after)):
        run = [ir_measures.ScoredDoc(q, d, float(s)) for q, d, s in triples]
        expected = ir_measures.calc_aggregate(measures, grades, run)
        for ours, theirs in names.items():
            value = expected[ir_measures.parse_measure(theirs)]
            assert math.isclose(summary.quality[order][ours], value), (order, ours)
    assert summary.quality["before"] != summary.quality["after"]


def test_judgements_that_cannot_be_read_name_their_line(fake, tmp_path):
    (tmp_path / "qrels").write_text("q1 0 d1 1\nq1 0 d1 high\n")
    source = write_lines(tmp_path / "in.jsonl", queries(1))
    with pytest.raises(InvalidInput, match=r"qrels:2 is no judgement.*Each line is"):
        run_job(make_job(fake, source, tmp_path / "out.jsonl", qrels=str(tmp_path / "qrels")))


@pytest.fixture
def batch(fake, tmp_path, monkeypatch, capsys):
    """``echelon batch --compare precision`` over three queries and a bad row; int8 is refused."""

    def opener(_, *, precision, **__):
        if precision == "int8":
            raise InvalidInput("precision", "int8 ranks differently here", "Use bf16.")
        return ForgetfulScorer(
            max_tokens=130, precision="fp32" if precision == "auto" else precision
        )

    monkeypatch.setattr(precision_check, "open_scorer", opener)
    monkeypatch.setattr(ir_metrics, "candidate_precisions", lambda _: ["fp32", "bf16", "int8"])
    monkeypatch.setattr(launch, "check_precision", lambda *_: [])
    source = write_lines(tmp_path / "in.jsonl", [*queries(3, documents=3), {"query": 1}])
    (tmp_path / "qrels").write_text("q0 0 d0 1\nq1 0 d1 1\nq2 0 d1 2\n")
    command = ["batch", source, "-o", tmp_path / "out.jsonl", "--model", fake]
    command += ["--qrels", tmp_path / "qrels", "--compare", "precision"]
    return partial(run_command, capsys, monkeypatch, *command)


def test_the_command_prints_a_summary(batch):
    code, out, err = batch()
    assert (code, out) == (9, "")
    for text in ("Quality on", "nDCG@10", "Precisions on your", "bf16", "pairs of 3 rows"):
        assert text in err
    assert "int8 was refused: precision: int8 ranks differently here" in err
    assert "Error: 1 row could not be scored: " in err


def test_the_summary_is_in_the_asked_language(batch, monkeypatch):
    monkeypatch.setenv("ECHELON_LANG", "zh")
    code, out, err = batch()
    assert (code, out) == (9, "")
    for text in (
        "3 行中的 5 个文档对",
        "3 个已标注查询上的质量",
        "之前",
        "int8 被拒绝",
        "1 行无法打分",
    ):
        assert text in err
    assert not re.search("pairs|row|Quality|Before|refused|Metric|judge", err)
