"""Input and output of offline jobs: formats, bad rows, windows, standard streams."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from offline_jobs import make_job, queries, read_lines, run_job, write_lines
from pyarrow import parquet

from echelon.errors import InvalidInput
from echelon.offline.progress import EtaEstimate
from echelon.offline.readers import Columns, JsonLinesReader
from echelon.offline.scoring import windows
from echelon.offline.streams import Lines, ResumePoint
from echelon.offline.writers import shortest
from echelon.reranker import Reranker, sigmoid

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
    summary = run_job(make_job(fake, write_lines(tmp_path / "in.jsonl", records), output))
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
    summary = run_job(make_job(fake, source, output))
    assert [answer["id"] for answer in read_lines(output)] == [7, 7]
    problems = read_lines(f"{output}.errors.jsonl")
    assert [problem["line"] for problem in problems] == list(range(3, 3 + len(BAD_LINES)))
    for problem, reason in zip(problems, BAD_LINES.values(), strict=True):
        assert reason in problem["reason"]
    assert summary.counts.bad == len(BAD_LINES)
    with pytest.raises(InvalidInput, match=r"in\.jsonl:3: the line is not JSON"):
        run_job(make_job(fake, source, tmp_path / "strict.jsonl", strict=True))


def test_a_line_that_is_too_long_is_passed_over(tmp_path):
    short = json.dumps({"query": "q", "documents": []}).encode() + b"\n"
    path = tmp_path / "in.jsonl"
    path.write_bytes(short + b"x" * 500 + b"\n" + short)
    reader = JsonLinesReader(str(path), limit=100)
    found = [item for entry in reader.rows() for item in entry]
    reader.close()
    assert [type(item).__name__ for item in found] == ["Row", "BadRow", "Row"]
    assert "larger --max-record-mb" in found[1].reason
    assert found[2].line == 3


def test_a_query_without_room_for_documents_is_a_bad_row(fake, tmp_path):
    records = [*queries(3), {"id": "long", "query": "the " * 300, "documents": ["a", "b"]}]
    job = make_job(fake, write_lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl")
    object.__setattr__(job.options, "truncation", "only_second")
    run_job(job)
    assert [answer["id"] for answer in read_lines(job.output)] == ["q0", "q1", "q2"]
    (problem,) = read_lines(f"{job.output}.errors.jsonl")
    assert problem["line"] == 4
    assert "leave no room for the document" in problem["reason"]


def test_a_document_that_cannot_be_divided_is_a_bad_row_alone(fake, tmp_path):
    records = [*queries(3), {"id": "run", "query": "rain", "documents": ["a", "x" * 140_000]}]
    records.append({"id": "other", "query": "rain", "documents": ["a"]})
    job = make_job(fake, write_lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl")
    run_job(job)
    assert [answer["id"] for answer in read_lines(job.output)] == ["q0", "q1", "q2", "other"]
    (problem,) = read_lines(f"{job.output}.errors.jsonl")
    assert problem["line"] == 4
    assert problem["reason"].startswith("document: the 131072 characters after character 0")


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
    job = make_job(fake, source, tmp_path / "out.jsonl", columns=COLUMNS)
    run_job(job)
    records = read_lines(job.output)
    assert [record["document_id"] for record in records] == ["d1", "d2", ""]
    assert [record["line"] for record in records] == {
        ".csv": [2, 4, 5], ".tsv": [2, 3, 4], ".parquet": [1, 2, 3]
    }[suffix]  # fmt: skip
    with Reranker(fake) as reranker:
        texts = [(q, d.replace("\n", " ") if suffix == ".tsv" else d) for q, d, _ in PAIRS]
        logits = reranker.score(texts)
    assert [np.float32(record["logit"]) for record in records] == logits.tolist()
    run_job(make_job(fake, source, tmp_path / "out.parquet", columns=COLUMNS))
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["logit"] for row in rows] == logits.tolist()
    assert [row["score"] for row in rows] == sigmoid(logits).tolist()


def test_bad_rows_of_tables(fake, tmp_path):
    source = tmp_path / "in.csv"
    source.write_bytes(b'query,document\na,b\na\n\xff,b\n"a"x,b\nc,d\n')
    job = make_job(fake, source, tmp_path / "out.jsonl")
    run_job(job)
    assert [record["line"] for record in read_lines(job.output)] == [2, 6]
    problems = {p["line"]: p["reason"] for p in read_lines(f"{job.output}.errors.jsonl")}
    assert problems.keys() == {3, 4, 5}
    assert problems[3] == "the row has 1 fields, the header 2"
    assert problems[4] == "query is not UTF-8 (byte 0xff)"
    binary = pa.array([b"ok", b"\xff", None]).cast(pa.binary()).view(pa.string())
    parquet.write_table(
        pa.table({"query": ["a", "b", "c"], "document": binary}), tmp_path / "in.parquet"
    )
    job = make_job(fake, tmp_path / "in.parquet", tmp_path / "out2.jsonl")
    run_job(job)
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
        run_job(
            make_job(
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
            run_job(make_job(fake, source, tmp_path / f"out{suffix}.jsonl"))
        source.write_bytes(data)
        run_job(make_job(fake, source, tmp_path / f"out{suffix}.jsonl", restart=True))
        assert len(read_lines(tmp_path / f"out{suffix}.jsonl")) == 50


def test_a_file_that_is_not_there_is_told_so(fake, tmp_path):
    with pytest.raises(InvalidInput, match=r"No such file or directory\)\. Check its name"):
        run_job(make_job(fake, tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl"))


def test_an_empty_input_gives_an_empty_output(fake, tmp_path):
    (tmp_path / "in.jsonl").touch()
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.run"):
        run_job(make_job(fake, tmp_path / "in.jsonl", tmp_path / name))
    assert (tmp_path / "a.jsonl").read_bytes() == b""
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == b""
    assert parquet.read_table(tmp_path / "a.parquet").num_rows == 0


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 200), st.integers(0, 60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_file_read_from_a_resume_point_is_cut_as_the_whole_is(tmp_path, sizes, full, at):
    lines = [json.dumps({"query": "q", "documents": ["d" * 9] * n} if n else n) for n in sizes]
    path = tmp_path / "in.jsonl"
    path.write_text("\n\n".join(lines))

    def cut(point=None):
        reader = JsonLinesReader(str(path))
        if point is not None:
            reader.skip_to(point)
        found = [(w.rows, w.bad, w.end) for w in windows(reader.rows(), reader, full, 100)]
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
    read = json.loads(json.dumps(shortest(logit)))
    assert np.float32(read) == logit
    assert shortest(np.float32(4.1)) == 4.1


def test_the_rest_takes_as_long_as_what_was_done():
    eta = EtaEstimate(share=0.2)
    assert eta.left_s() is None
    for part in range(1, 5):
        eta.done([100] * 50, seconds=3.0, share=0.2 + 0.1 * part)
    left = eta.left_s()
    assert left is not None
    assert math.isclose(left, 4 / 0.4 * 0.4 * 3.0)


def test_lines_put_back_do_not_count(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\n")
    with closing(Lines(str(path), "INPUT")) as lines:
        next(lines)
        first = lines.resume_point()
        next(lines)
        lines.put_back()
        assert lines.resume_point() == first
        assert next(lines) == b"two\n"
        assert lines.resume_point() == ResumePoint(8, 2, hashlib.sha256(b"one\ntwo\n").hexdigest())


def test_standard_input_and_output(light):
    text = "".join(json.dumps(record) + "\n" for record in queries(5)) + "{}\n"
    command = [sys.executable, "-m", "echelon", "batch", "-", "-o", "-", "--model", str(light)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 9
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [
        f"q{n}" for n in range(5)
    ]
    assert '{"line": 6, "reason": "query is missing"}' in done.stderr
    assert not list(Path().glob("-*"))
