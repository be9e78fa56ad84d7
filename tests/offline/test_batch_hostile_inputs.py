"""Inputs of offline jobs that try to fill the memory, to end in a traceback or to be misread."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from contextlib import closing

import pyarrow as pa
import pytest
from helpers import run_command
from offline_jobs import make_job, read_lines, run_job
from pyarrow import parquet

from echelon.errors import InvalidInput
from echelon.offline import ir_metrics, readers
from echelon.offline.parquet_reader import ParquetReader
from echelon.offline.readers import BadRow, BadValue, Columns, TableReader, parse_json

MB = 2**20
GUARD_S = 120
GROWTH_MB = 120
"""Far above what a limit of 1 MiB takes, far below what the files below hold."""

READ = """
import json, resource, sys
from pathlib import Path
import pyarrow.parquet
from echelon.errors import InvalidInput
from echelon.offline.job import OfflineJob

def peak():  # ru_maxrss would begin with that of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, resource.RLIM_INFINITY))
before, found = peak(), {}
for path in sys.argv[1:]:
    rows = []
    try:
        with_rows = OfflineJob(path, "out.jsonl", max_record_mb=1).reader(Path("index"))
        for entry in with_rows.rows():
            rows.append(getattr(entry[0], "reason", "good"))
            del entry
    except InvalidInput as error:
        rows.append(str(error))
    found[Path(path).name] = [len(rows), rows[0], rows[-1], (peak() - before) // 1024]
print(json.dumps(found))
"""

ROW = b'{"query": "q", "documents": ["d"]}\n'


def bombs(folder):
    """Files of a few kilobytes that hold 8 to 150 MB."""
    folder.mkdir()
    head = b"query,document\n"
    packed = {
        "open.csv.gz": head + b'"a,b\n' + (b"x" * 99 + b"\n") * 200_000,
        "line.csv.gz": head + b"a,b\nab," + b"x" * (8 * MB),
        "fields.csv.gz": head + b"ab," * (4 * MB),
        "record.csv.gz": head + b'"ab\n",' * (6 * MB),
        "line.tsv.gz": b"query\tdocument\n" + b"ab\t" * (4 * MB) + b"\na\tb\n",
        "line.jsonl.gz": b"x" * (8 * MB) + b"\n" + ROW,
        "line.jsonl.zst": b"x" * (8 * MB) + b"\n" + ROW,
    }
    for name, content in packed.items():
        squeezed = pa.Codec("zstd").compress(content, asbytes=True)
        data = squeezed if name.endswith(".zst") else gzip.compress(content, 1)
        (folder / name).write_bytes(data)
    half = "x" * (MB // 2)
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([half]))
    write_pairs(folder / "dictionary.parquet", repeated)
    growing = pa.array([half + str(n) for n in range(100)], pa.large_string())
    delta = {"query": "PLAIN", "document": "DELTA_BYTE_ARRAY"}
    write_pairs(folder / "delta.parquet", growing, use_dictionary=False, column_encoding=delta)
    write_pairs(folder / "pages.parquet", growing, use_dictionary=False, write_batch_size=1)
    write_pairs(folder / "page.parquet", growing, use_dictionary=False, data_page_size=2**30)
    write_pairs(folder / "long.parquet", pa.array([half * 3, "d"]))
    return sorted(map(str, folder.iterdir()))


def write_pairs(path, documents, **how):
    table = pa.table({"query": ["q"] * len(documents), "document": documents})
    parquet.write_table(table, path, compression="zstd", **how)


@pytest.mark.skipif(sys.platform != "linux", reason="reads its peak of memory from /proc")
def test_memory_is_bounded_whatever_an_input_holds(tmp_path):
    names = bombs(tmp_path / "in")
    done = subprocess.run(
        [sys.executable, "-c", READ, *names],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        timeout=GUARD_S,
    )
    found = json.loads(done.stdout)
    for name, (*_, grown) in found.items():
        assert grown < GROWTH_MB, name
    results = {name: tuple(rows) for name, (*rows, _) in found.items()}
    for name in ("open.csv.gz", "line.csv.gz", "fields.csv.gz", "record.csv.gz", "page.parquet"):
        assert "larger --max-record-mb" in results[name][2], name
    assert "/in/open.csv.gz:2: the record has more than 1 MiB" in results["open.csv.gz"][2]
    assert "/in/line.csv.gz:3: the record" in results["line.csv.gz"][2]
    for name in ("line.tsv.gz", "line.jsonl.gz", "line.jsonl.zst", "long.parquet"):
        assert results[name][0] == 2, name
        assert "has more than 1 MiB" in results[name][1], name
        assert results[name][2] == "good", name
    counts = {"dictionary.parquet": 300, "delta.parquet": 100, "pages.parquet": 100}
    for name, count in counts.items():
        assert results[name] == (count, "good", "good"), name


def test_a_record_of_too_many_values_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(readers, "VALUES", 10)
    monkeypatch.setattr(readers, "FEW_VALUES_BYTES", 0)
    text = json.dumps(["[{,\\" * 9, '"[{,' * 9, 1, 2, 3]).encode()
    assert parse_json(text, MB) == json.loads(text)
    with pytest.raises(BadValue, match="values"):
        parse_json(b"[" + b"{}," * 10 + b"1]", MB)
    path = tmp_path / "in.csv"
    path.write_text("query,document\na,b\n" + "c" + "," * 11 + "\n")
    with closing(TableReader(str(path), Columns(), tabs=False)) as reader:
        rows = reader.rows()
        next(rows)
        with pytest.raises(InvalidInput, match=r"in\.csv:3: .* values"):
            next(rows)


ENCODINGS = ("PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY")


def ordinary(chance, count=3000):
    """Texts of many lengths, some missing, and more than fit into one page."""
    return [
        None if chance.random() < 0.05 else "ä" * chance.choice((0, 3, 40, 300, 2000))
        + str(chance.random())
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_parquet_is_read_as_it_was_written(tmp_path, compression, version):
    chance = random.Random(5)
    texts, queries = ordinary(chance), [f"q{n // 7}" for n in range(3000)]
    table = pa.table({"document": texts, "other": range(3000), "query": queries})
    path = tmp_path / "in.parquet"
    how = {"compression": compression, "data_page_version": version, "row_group_size": 1100}
    how |= {"data_page_size": 20_000, "write_batch_size": 16}
    how |= {"dictionary_pagesize_limit": 30_000}
    encoded = [{"column_encoding": {"document": e, "query": "PLAIN"}} for e in ENCODINGS]
    for more in ({}, *({"use_dictionary": False, **one} for one in encoded)):
        parquet.write_table(table, path, **how, **more)
        for limit in (32 * MB, 200_000):
            with closing(ParquetReader(str(path), Columns(), limit)) as reader:
                few = limit < MB and "DELTA_BYTE_ARRAY" in str(more)
                assert (reader._rows_at_a_time(0) < 40) == few
                found = [entry[0] for entry in reader.rows()]
            assert [row.line for row in found] == list(range(1, 3001))
            read = [
                None if isinstance(row, BadRow) else (row.query, *row.documents) for row in found
            ]
            expected = zip(queries, texts, strict=True)
            assert read == [None if text is None else (q, text) for q, text in expected]


def test_damaged_parquet_is_refused_or_read(tmp_path):
    chance = random.Random(8)
    path = tmp_path / "in.parquet"
    table = pa.table({"query": ["q"] * 400, "document": ordinary(chance, 400)})
    parquet.write_table(table, path, data_page_size=3000)
    whole = path.read_bytes()
    refused = 0
    for number in range(150):
        damaged = bytearray(whole)
        if number % 3:
            for _ in range(number % 3):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        else:
            del damaged[chance.randrange(len(damaged)) : -chance.choice((1, 8, 300))]
        path.write_bytes(damaged)
        try:
            with closing(ParquetReader(str(path), Columns())) as reader:
                list(reader.rows())
        except InvalidInput:
            refused += 1
    assert refused > 50


LONG = "x" * 2000
STRANGE = {
    "nul.jsonl": (b'\x00\n{"query": "a\\u0000b", "documents": ["\\u0000"]}\n', 9),
    "deep.jsonl": (b"[" * 5000 + b"]" * 5000 + b"\n", 9),
    "marks.jsonl": (b"\xef\xbb\xbf" + ROW + b"\xef\xbb\xbf" + ROW, 9),
    "utf16.jsonl": (ROW.decode().encode("utf-16"), 9),
    "id.jsonl": (json.dumps({"id": LONG, "query": "q", "documents": []}).encode(), 9),
    "digits.jsonl": (b'{"id": ' + b"9" * 4000 + b', "query": "q", "documents": []}', 9),
    "inner.jsonl": (
        json.dumps({"query": "q", "documents": [{"id": LONG, "text": ""}]}).encode(),
        9,
    ),
    "nul.csv": (b"query,document\na\x00b,c\n", 0),
    "header.csv": (b"\xff,\xfe\n", 2),
    "names.csv": (b"name," * 100_000 + b"\n", 2),
    "cr.csv": (b"query,document\ra,b\r", 2),
    "empty.csv": (b"", 2),
    "empty.parquet": (b"", 2),
    "short.parquet": (b"PAR1\xff\xff\xff\xffPAR1", 2),
    "text.jsonl.gz": (b"no gzip", 2),
    "text.jsonl.zst": (b"no zstd", 2),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_inputs_end_with_an_exit_code_and_no_traceback(
    fake, tmp_path, monkeypatch, capsys, name
):
    content, expected = STRANGE[name]
    (tmp_path / name).write_bytes(content)
    command = ["batch", tmp_path / name, "-o", tmp_path / "out.jsonl", "--model", fake, "--quiet"]
    code, _, err = run_command(capsys, monkeypatch, *command)
    assert code == expected, err
    assert len(err) < 1500


def test_columns_that_are_no_text_are_refused(fake, tmp_path):
    for values in ([1, 2], [b"a", b"b"], [["a"], ["b"]], [{"a": "b"}, None]):
        write_pairs(tmp_path / "in.parquet", pa.array(values))
        with pytest.raises(InvalidInput, match=r"--document-column: .*Name one of text"):
            run_job(make_job(fake, tmp_path / "in.parquet", tmp_path / "out.jsonl"))


def test_ids_and_fields_of_a_run_are_bounded(fake, tmp_path):
    (tmp_path / "topics.tsv").write_text(f"q1\tferries\n{LONG}\tferries\n")
    (tmp_path / "collection.tsv").write_text(f"d1\tleave\n{LONG}\tleave\nd2\t{'x' * MB}\n")
    good = "q1 Q0 d1 1 3.0 bm25\n"
    (tmp_path / "in.run").write_text(
        f"{good}q1 Q0 d1 {LONG} 3.0 bm25\n{'x' * MB}\nq1 Q0 d2 2 2 t\n"
    )
    texts = {name: str(tmp_path / f"{name}.tsv") for name in ("topics", "collection")}
    job = make_job(fake, tmp_path / "in.run", tmp_path / "out.run", **texts, max_record_mb=0.5)
    run_job(job)
    assert len((tmp_path / "out.run").read_text().splitlines()) == 1
    problems = read_lines(f"{job.output}.errors.jsonl")
    assert [problem["line"] for problem in problems] == [2, 2, 3, 2, 3, 4]
    assert sum("--max-record-mb" in problem["reason"] for problem in problems) == 2
    assert max(len(problem["reason"]) for problem in problems) < 200


@pytest.mark.parametrize("line", [f"q 0 {LONG} 1", f"q 0 d {2**40}", "q 0 d", "q 0 d 1 x", "\xff"])
def test_judgements_are_bounded(tmp_path, monkeypatch, line):
    path = tmp_path / "qrels"
    path.write_bytes(b"q 0 d 1\n" + line.encode("latin-1"))
    with pytest.raises(InvalidInput, match="qrels:2 is no judgement") as refused:
        ir_metrics.read_qrels(str(path))
    assert len(str(refused.value)) < 500
    monkeypatch.setattr(ir_metrics, "JUDGEMENTS", 2)
    path.write_text("".join(f"q 0 d{n} 1\n" for n in range(3)))
    with pytest.raises(InvalidInput, match="more than 2 judgements"):
        ir_metrics.read_qrels(str(path))


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_the_longest_record_has_bounds(fake, tmp_path, size):
    (tmp_path / "in.jsonl").write_bytes(ROW)
    with pytest.raises(InvalidInput, match="--max-record-mb"):
        run_job(make_job(fake, tmp_path / "in.jsonl", tmp_path / "out", max_record_mb=size))
