"""What a file job reads and writes: formats, bad rows, runs, judgements, the command."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import ir_measures
import numpy as np
import pyarrow as pa
import pytest
from helpers import run_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs_kit import Frugal, do, job_of, leftovers, queries, read_lines, write_lines
from pyarrow import parquet

from echelon.call import sigmoid
from echelon.engine import launch, precision_check
from echelon.errors import InvalidInput
from echelon.offline import collection, ir_metrics, streams
from echelon.offline.progress import EtaEstimate
from echelon.offline.readers import Columns, JsonLinesReader
from echelon.offline.rows import ResumePoint
from echelon.offline.scoring import windows
from echelon.offline.writers import shortest
from echelon.reranker import Reranker

BAD_LINES = {
    b"not json": "not JSON",
    b"[" * 100_000: "not JSON",
    b"\xff": "not UTF-8",
    b"[]": "is a list, not an object",
    b'{"documents": []}': "query is missing",
    b'{"query": "q"}': "documents is missing",
    b'{"query": "q", "documents": "d"}': "documents is a string, not a list",
    b'{"query": "q", "documents": [null]}': "documents[0] is missing",
    b'{"query": "q", "documents": ["a", {"id": 1}]}': "documents[1].text is missing",
    b'{"query": "q", "documents": [{"text": "a", "id": 1.5}]}': "documents[0].id is a number",
    b'{"query": "q", "id": true, "documents": []}': "id is a truth value",
    b'{"query": "\\ud800", "documents": []}': "half a surrogate pair",
}


def test_results_are_those_of_the_reranker_in_rank_order(fake, tmp_path):
    records = queries(30)
    records[3]["documents"] = ["same", "same", "other"]
    output = tmp_path / "out.jsonl"
    summary = do(job_of(fake, write_lines(tmp_path / "in.jsonl", records), output))
    answers = read_lines(output)
    assert [answer["id"] for answer in answers] == [record["id"] for record in records]
    with Reranker(fake) as reranker:
        for record, answer in zip(records, answers, strict=True):
            texts = [d if isinstance(d, str) else d["text"] for d in record["documents"]]
            expected = reranker.rank(record["query"], texts).results
            got = answer["results"]
            assert [r["index"] for r in got] == [r.index for r in expected]
            assert [np.float32(r["logit"]) for r in got] == [r.logit for r in expected]
            assert [r["score"] for r in got] == [r.score for r in expected]
            named = [d["id"] if isinstance(d, dict) else None for d in record["documents"]]
            assert [r.get("id") for r in got] == [named[r["index"]] for r in got]
    assert summary.counts.pairs == sum(len(record["documents"]) for record in records)
    assert not Path(f"{output}.errors.jsonl").exists()


def test_bad_rows_go_to_their_own_file_and_the_rest_is_scored(fake, tmp_path):
    good = json.dumps({"id": 7, "query": "q", "documents": ["d"]}).encode()
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + b"\r\n".join([*BAD_LINES, good]))
    summary = do(job_of(fake, source, output))
    assert [answer["id"] for answer in read_lines(output)] == [7, 7]
    problems = read_lines(f"{output}.errors.jsonl")
    assert [problem["line"] for problem in problems] == list(range(3, 3 + len(BAD_LINES)))
    for problem, reason in zip(problems, BAD_LINES.values(), strict=True):
        assert reason in problem["reason"]
    assert summary.counts.bad == len(BAD_LINES)
    with pytest.raises(InvalidInput, match=r"in\.jsonl:3: the line is not JSON"):
        do(job_of(fake, source, tmp_path / "strict.jsonl", strict=True))


def test_a_line_that_is_too_long_is_passed_over(monkeypatch, tmp_path):
    short = json.dumps({"query": "q", "documents": []}).encode() + b"\n"
    path = tmp_path / "in.jsonl"
    path.write_bytes(short + b"x" * 500 + b"\n" + short)
    reader = JsonLinesReader(str(path))
    monkeypatch.setattr(reader._lines, "_limit", 100)
    found = [item for entry in reader for item in entry]
    reader.close()
    assert [type(item).__name__ for item in found] == ["Row", "BadRow", "Row"]
    assert "longer than 64 MiB" in found[1].reason
    assert found[2].line == 3


def test_a_query_without_room_for_documents_is_a_bad_row(fake, tmp_path):
    records = [*queries(3), {"id": "long", "query": "the " * 300, "documents": ["a", "b"]}]
    job = job_of(fake, write_lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl")
    object.__setattr__(job.options, "truncation", "only_second")
    do(job)
    assert [answer["id"] for answer in read_lines(job.output)] == ["q0", "q1", "q2"]
    (problem,) = read_lines(f"{job.output}.errors.jsonl")
    assert problem["line"] == 4
    assert "leave no room for the document" in problem["reason"]


PAIRS = [("ein Weg", 'sagt "so"\nund so', "d1"), ("q,2", "plain", "d2"), ("", "x", "")]


def table(path, pairs=PAIRS):
    names = ["what", "text", "doc"]
    if path.suffix == ".parquet":
        columns = {name: [pair[i] for pair in pairs] for i, name in enumerate(names)}
        parquet.write_table(pa.table(columns), path)
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows([names, *pairs])
        else:
            flat = [[field.replace("\n", " ") for field in row] for row in [names, *pairs]]
            file.writelines("\t".join(row) + "\n" for row in flat)
    return path


COLUMNS = Columns("what", "text", document_id="doc")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_pairs_in_tables(fake, tmp_path, suffix):
    source = table(tmp_path / f"in{suffix}")
    job = job_of(fake, source, tmp_path / "out.jsonl", columns=COLUMNS)
    do(job)
    records = read_lines(job.output)
    assert [record["document_id"] for record in records] == ["d1", "d2", ""]
    assert [record["line"] for record in records] == {
        ".csv": [2, 4, 5], ".tsv": [2, 3, 4], ".parquet": [1, 2, 3]
    }[suffix]  # fmt: skip
    with Reranker(fake) as reranker:
        texts = [(q, d.replace("\n", " ") if suffix == ".tsv" else d) for q, d, _ in PAIRS]
        logits = reranker.score(texts)
    assert [np.float32(record["logit"]) for record in records] == logits.tolist()
    do(job_of(fake, source, tmp_path / "out.parquet", columns=COLUMNS))
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["logit"] for row in rows] == logits.tolist()
    assert [row["score"] for row in rows] == sigmoid(logits).tolist()


def test_bad_rows_of_tables(fake, tmp_path):
    source = tmp_path / "in.csv"
    source.write_bytes(b'query,document\na,b\na\n\xff,b\n"a"x,b\nc,d\n')
    job = job_of(fake, source, tmp_path / "out.jsonl")
    do(job)
    assert [record["line"] for record in read_lines(job.output)] == [2, 6]
    problems = {p["line"]: p["reason"] for p in read_lines(f"{job.output}.errors.jsonl")}
    assert problems.keys() == {3, 4, 5}
    assert problems[3] == "the row has 1 fields, the header 2"
    assert problems[4] == "query is not UTF-8 (byte 0xff)"
    binary = pa.array([b"ok", b"\xff", None]).cast(pa.binary()).view(pa.string())
    parquet.write_table(
        pa.table({"query": ["a", "b", "c"], "document": binary}), tmp_path / "in.parquet"
    )
    job = job_of(fake, tmp_path / "in.parquet", tmp_path / "out2.jsonl")
    do(job)
    reasons = [problem["reason"] for problem in read_lines(f"{job.output}.errors.jsonl")]
    assert reasons == ["document is not UTF-8 (byte 0xff)", "document is missing"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"columns": Columns("nothing")}, "--query-column: there is no column 'nothing'"),
        ({"output_format": "trec"}, "--output-format: the input is pairs"),
        ({"top_n": 3}, "--top-n"),
        ({"qrels": "q"}, "--qrels"),
        ({"topics": "t", "input_format": "csv"}, "--topics"),
        ({"input_format": "trec"}, "--topics: is missing"),
        ({"run_tag": "a b"}, "--run-tag"),
        ({"input_format": "parquet"}, "cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path, more, named):
    source = table(tmp_path / "in.csv", [])
    with pytest.raises(InvalidInput, match=named):
        do(
            job_of(
                "demo-that-is-not-there",
                source,
                tmp_path / "out.jsonl",
                **{"columns": COLUMNS, **more},
            )
        )
    assert not (tmp_path / "out.jsonl").exists()


def test_damaged_compression_is_an_error_not_an_end(fake, tmp_path):
    whole = gzip.compress("".join(json.dumps(r) + "\n" for r in queries(50)).encode())
    zstd = pa.Codec("zstd").compress(gzip.decompress(whole), asbytes=True)
    for suffix, data in ((".gz", whole), (".zst", zstd)):
        source = tmp_path / f"in.jsonl{suffix}"
        source.write_bytes(data[: len(data) // 2])
        with pytest.raises(InvalidInput, match="cannot be read"):
            do(job_of(fake, source, tmp_path / f"out{suffix}.jsonl"))
        source.write_bytes(data)
        do(job_of(fake, source, tmp_path / f"out{suffix}.jsonl", restart=True))
        assert len(read_lines(tmp_path / f"out{suffix}.jsonl")) == 50


def test_an_empty_input_gives_an_empty_output(fake, tmp_path):
    (tmp_path / "in.jsonl").touch()
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.run"):
        do(job_of(fake, tmp_path / "in.jsonl", tmp_path / name))
    assert (tmp_path / "a.jsonl").read_bytes() == b""
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == b""
    assert parquet.read_table(tmp_path / "a.parquet").num_rows == 0


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 200), st.integers(0, 60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_file_read_from_a_mark_is_cut_as_the_whole_is(tmp_path, sizes, full, at):
    lines = [json.dumps({"query": "q", "documents": ["d" * 9] * n} if n else n) for n in sizes]
    path = tmp_path / "in.jsonl"
    path.write_text("\n\n".join(lines))

    def cut(mark=None):
        reader = JsonLinesReader(str(path))
        if mark is not None:
            reader.skip_to(mark)
        found = [(w.rows, w.bad, w.end) for w in windows(reader, full, 100)]
        reader.close()
        return found

    whole = cut()
    assert sum(len(good) + len(bad) for good, bad, _ in whole) == len(sizes)
    if whole:
        place = at % len(whole)
        assert cut(whole[place][2]) == whole[place + 1 :]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_digits_lead_back_to_the_same_logit(value):
    logit = np.float32(value)
    told = json.loads(json.dumps(shortest(logit)))
    assert np.float32(told) == logit
    assert shortest(np.float32(4.1)) == 4.1


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
def shelf(tmp_path):
    (tmp_path / "topics.tsv").write_text("q1\thow to open a jar\nq2\tferries\nq1\ttwice\nbad\n")
    documents = [{"_id": "d1", "title": "Jars", "text": "tap it"}, {"id": "d2", "contents": "two"}]
    documents += [{"id": "d3", "text": "ferries leave"}, {"id": "d4"}, {"id": "d1", "text": "no"}]
    write_lines(tmp_path / "collection.jsonl", documents)
    (tmp_path / "in.run").write_text(RUN)
    return {
        "topics": str(tmp_path / "topics.tsv"),
        "collection": str(tmp_path / "collection.jsonl"),
    }


def test_a_run_is_reranked_with_texts_of_its_collection(fake, shelf, tmp_path):
    job = job_of(fake, tmp_path / "in.run", tmp_path / "out.run", run_tag="mine", **shelf)
    do(job)
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
    Path(shelf["collection"]).write_text("{}")
    with pytest.raises(InvalidInput, match="collection was"):
        do(job)


def test_a_query_of_too_many_lines_is_cut_off_and_told(fake, shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "ROW_DOCUMENTS", 2)
    job = job_of(fake, tmp_path / "in.run", tmp_path / "out.jsonl", **shelf)
    do(job)
    assert [len(answer["results"]) for answer in read_lines(job.output)] == [2, 1]
    reasons = [problem["reason"] for problem in read_lines(f"{job.output}.errors.jsonl")]
    assert any("began at line 1 and has ended" in reason for reason in reasons)


def test_quality_is_what_ir_measures_says_of_both_files(fake, tmp_path):
    records = [record for record in queries(12, seed=3) if len(record["documents"]) > 2]
    judged = [(r["id"], f"d{n}", n % 3) for r in records[1:] for n in (0, 2, 77)]
    qrels = tmp_path / "qrels"
    qrels.write_text("".join(f"{q} 0 {d} {g}\n" for q, d, g in [*judged, ("other", "d0", 1)]))
    source = write_lines(tmp_path / "in.jsonl", records)
    summary = do(job_of(fake, source, tmp_path / "out.run", qrels=str(qrels)))
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
    with pytest.raises(InvalidInput, match=r"qrels:2: .*Each line is"):
        do(job_of(fake, source, tmp_path / "out.jsonl", qrels=str(tmp_path / "qrels")))


def test_the_rest_takes_as_long_as_what_was_done():
    forecast = EtaEstimate(share=0.2)
    assert forecast.left_s() is None
    for part in range(1, 5):
        forecast.done([100] * 50, seconds=3.0, share=0.2 + 0.1 * part)
    left = forecast.left_s()
    assert left is not None
    assert math.isclose(left, 4 / 0.4 * 0.4 * 3.0)


def test_lines_put_back_do_not_count(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\n")
    with streams.Source(str(path), "INPUT") as source:
        lines = streams.Lines(source)
        next(lines)
        first = lines.mark()
        next(lines)
        lines.put_back()
        assert lines.mark() == first
        assert next(lines) == b"two\n"
        assert lines.mark() == ResumePoint(8, 2, streams.digest_of(io.BytesIO(b"one\ntwo\n")))


def test_the_command_tells_what_came_of_it(fake, tmp_path, monkeypatch, capsys):
    def opener(_, *, precision, **__):
        if precision == "int8":
            raise InvalidInput("precision", "int8 ranks differently here", "Use bf16.")
        return Frugal(max_tokens=130, precision="fp32" if precision == "auto" else precision)

    monkeypatch.setattr(precision_check, "open_scorer", opener)
    monkeypatch.setattr(ir_metrics, "candidate_precisions", lambda _: ["fp32", "bf16", "int8"])
    monkeypatch.setattr(launch, "pass_gate", lambda *_: [])
    source = write_lines(tmp_path / "in.jsonl", [*queries(3, documents=3), {"query": 1}])
    (tmp_path / "qrels").write_text("q0 0 d0 1\nq1 0 d1 1\nq2 0 d1 2\n")
    command = ["batch", source, "-o", tmp_path / "out.jsonl", "--model", fake]
    command += ["--qrels", tmp_path / "qrels", "--compare", "precision"]
    code, out, err = run_command(capsys, monkeypatch, *command)
    assert (code, out) == (9, "")
    for text in ("Quality on", "nDCG@10", "Precisions on your", "bf16", "pairs of 3 rows"):
        assert text in err
    assert "int8 was refused: precision: int8 ranks differently here" in err
    assert "echelon: 1 row could not be scored: " in err


def test_standard_input_and_output(bert):
    text = "".join(json.dumps(record) + "\n" for record in queries(5)) + "{}\n"
    command = [sys.executable, "-m", "echelon", "batch", "-", "-o", "-", "--model", str(bert)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 9
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [
        f"q{n}" for n in range(5)
    ]
    assert '{"line": 6, "reason": "query is missing"}' in done.stderr
    assert not list(Path().glob("-*"))
