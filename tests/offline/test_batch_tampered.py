"""Files of a job that another program changed or put there: refused, and never followed."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from offline_jobs import (
    CountingListener,
    interrupted,
    leftovers,
    make_job,
    queries,
    read_lines,
    read_state,
    run_job,
    write_lines,
    write_state,
)

from echelon.errors import InvalidInput, StorageError
from echelon.offline.resume import STATE_BYTES, VERSION, JobState, JobStore


@pytest.fixture
def stopped(fake, tmp_path):
    """A job that stopped after three windows, with bad rows and judgements."""
    records = [*queries(24, documents=9), {"query": 5}]
    source = write_lines(tmp_path / "in.jsonl", [records[-1], *records])
    (tmp_path / "qrels").write_text("q1 0 d0 1\nq2 0 d1 1\n")
    output = tmp_path / "out.jsonl"
    return interrupted(fake, source, output, qrels=str(tmp_path / "qrels"))


def state_of(job):
    return Path(f"{job.output}.job.json")


@pytest.mark.parametrize("ending", ["part", "errors.jsonl"])
def test_an_overwritten_file_of_the_same_length_is_refused(stopped, ending):
    path = Path(f"{stopped.output}.{ending}")
    content = path.read_bytes()
    for damaged in (content[:5] + b"#" + content[6:], b" " * len(content), content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(InvalidInput, match=f"{path.name} is not what its job wrote.*--restart"):
            run_job(stopped)
        assert not Path(stopped.output).exists()
    path.write_bytes(content + b"a part of a window")
    run_job(stopped)
    assert len(read_lines(stopped.output)) == 24


def test_an_output_in_place_of_the_blocks_is_refused(stopped):
    part, output = Path(f"{stopped.output}.part"), Path(stopped.output)
    blocks = part.read_bytes()
    part.unlink()
    for content in (b"x" * len(blocks), blocks + b"more"):
        output.write_bytes(content)
        with pytest.raises(InvalidInput, match="is not what its job wrote"):
            run_job(stopped)


def test_a_state_of_another_program_or_version_is_refused(stopped):
    path = state_of(stopped)
    whole = path.read_text()
    content = json.loads(whole)
    content[VERSION]["counts"]["pairs"] += 1
    old = {"version 1": content[VERSION]}
    deep = '{"version 2": ' + '{"identity": ' * 5000
    texts = [json.dumps(content), json.dumps(old), deep, deep + "1" + "}" * 5001]
    texts += ["", "null", "[]", "{}", "{", "\0", "\ufeff{}", " " * STATE_BYTES + whole]
    texts += [whole[: len(whole) * part // 7] for part in range(1, 7)]
    texts += [json.dumps({**json.loads(whole), "more": 1}), f'{{"{VERSION}": 1}}']
    for text in texts:
        path.write_text(text)
        with pytest.raises(InvalidInput, match=r"job\.json cannot be read") as refused:
            run_job(stopped)
        assert "--restart" in str(refused.value)
        assert len(str(refused.value)) < 700
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="cannot be read"):
        run_job(stopped)


def places_of(values, outer=()):
    """The places of all values in nested objects."""
    for key, value in values.items():
        yield (*outer, key)
        if isinstance(value, dict) and key != "identity":
            yield from places_of(value, (*outer, key))


def with_value(values, place, value):
    """A copy of nested objects with another value at a place."""
    key, *inner = place
    return {**values, key: with_value(values[key], inner, value) if inner else value}


def at(values, place):
    for key in place:
        values = values[key]
    return values


OPTIONAL = {"steps", "resume_point", "index", "batch_size"}
TOO_LARGE = (-1, 2**63, 10**400)
WRONG = (None, 0.5, "x", True, [], {}, [[[]]], *TOO_LARGE)


def test_every_field_of_a_state_is_checked(stopped):
    whole = read_state(stopped.output)
    places = list(places_of(whole))
    assert len(places) > 30
    checked = 0
    for place in places:
        for wrong in WRONG:
            same_type = type(wrong) is type(at(whole, place)) and wrong not in TOO_LARGE
            if same_type or (place[-1] in OPTIONAL and wrong in (None, "x")):
                continue
            write_state(stopped.output, with_value(whole, place, wrong))
            with pytest.raises(InvalidInput, match=r"job\.json cannot be read") as refused:
                JobState.load(state_of(stopped))
            named = ("quality",) if place[0] == "quality" else place
            assert f"state.{'.'.join(named)} " in str(refused.value), wrong
            checked += 1
        short = with_value(whole, place, None)
        del at(short, place[:-1])[place[-1]]
        write_state(stopped.output, short)
        with pytest.raises(InvalidInput, match=place[-1] if place[0] != "quality" else "quality"):
            JobState.load(state_of(stopped))
    assert checked > 200


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("steps", "token_budget"), 0),
        (("steps", "window"), 0),
        (("steps", "lowered"), "fp7"),
        (("quality",), {"queries": 1}),
        (("quality", "before"), {"nDCG@10": 1.0}),
    ],
)
def test_values_that_no_job_writes_are_refused(stopped, place, value):
    write_state(stopped.output, with_value(read_state(stopped.output), place, value))
    with pytest.raises(InvalidInput, match=r"state\..* has a value that no job writes"):
        run_job(stopped)


def test_long_differences_are_cut(stopped):
    state = read_state(stopped.output)
    write_state(stopped.output, {**state, "identity": {str(n): "x" * 999 for n in range(99)}})
    with pytest.raises(InvalidInput, match="its job began otherwise") as refused:
        run_job(stopped)
    assert len(str(refused.value)) < 10_000


@pytest.mark.parametrize("ending", ["part", "errors.jsonl", "job.json.new"])
def test_links_are_not_followed(fake, tmp_path, ending):
    other = tmp_path / "precious"
    other.write_text("precious")
    source = write_lines(tmp_path / "in.jsonl", [{"query": 5}, *queries(3)])
    output = tmp_path / "out.jsonl"
    Path(f"{output}.{ending}").symlink_to(other)
    if ending == "job.json.new":
        run_job(make_job(fake, source, output))
    else:
        with pytest.raises(StorageError, match="cannot be written"):
            run_job(make_job(fake, source, output))
    assert other.read_text() == "precious"


@pytest.fixture
def run_files(tmp_path):
    """A run over many windows, with queries that come back, bad and empty lines."""
    names = [f"q{n}" for n in range(30)]
    write_lines(tmp_path / "topics.jsonl", [{"id": n, "query": f"ferry {n}"} for n in names[1:]])
    texts = [{"id": f"d{n}", "text": f"ferries leave {n}"} for n in range(9)]
    write_lines(tmp_path / "collection.jsonl", [*texts, {"id": "bad"}])
    order = [*names[:20], *names[5:8], *names[20:], *names[:4]]
    lines = [f"{name} Q0 d{n} {n} {-n} t\n" for name in order for n in range(9)]
    lines[40:40] = ["\n", "bad line\n", "\n"]
    (tmp_path / "in.run").write_text("".join(lines))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("topics", "collection")}


@pytest.mark.parametrize("damage", [None, "replaced", "gone"])
def test_a_run_resumes_and_a_foreign_index_is_made_anew(fake, tmp_path, run_files, damage):
    whole = make_job(fake, tmp_path / "in.run", tmp_path / "whole.run", **run_files)
    run_job(whole)
    output = tmp_path / "out.run"
    index = Path(f"{output}.index")
    index.write_text("planted")
    job = interrupted(fake, tmp_path / "in.run", output, **run_files)
    if damage == "gone":
        index.unlink()
    elif damage == "replaced":
        with closing(sqlite3.connect(index)) as base, base:
            base.execute("update documents set text = 'another text'")
    listener = CountingListener()
    run_job(job, listener)
    assert listener.resumed_at > 0
    for ending in ("", ".errors.jsonl"):
        assert (
            Path(f"{output}{ending}").read_bytes() == Path(f"{whole.output}{ending}").read_bytes()
        )
    reasons = [problem["reason"] for problem in read_lines(f"{output}.errors.jsonl")]
    assert sum("began at line" in reason for reason in reasons) == 6
    assert leftovers(tmp_path) == []


def test_the_index_of_standard_output_is_private_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    planted = tmp_path / f"echelon-{os.getpid()}.index"
    planted.write_text("planted")
    with closing(JobStore("-", None, resumable=True)) as store:
        folder = store.index_path.parent
        assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IRWXU
        assert folder.parent == tmp_path
        store.index_path.write_text("texts")
    assert list(tmp_path.iterdir()) == [planted]


def test_devices_are_neither_replaced_nor_removed(fake, tmp_path):
    device = tmp_path / "pipe"
    os.mkfifo(device)
    source = write_lines(tmp_path / "in.jsonl", queries(3))
    with pytest.raises(InvalidInput, match=r"-o: .* is no place for a file"):
        run_job(make_job(fake, source, device, restart=True))
    with closing(JobStore(str(tmp_path / "out"), str(device), resumable=True)) as store:
        store.restart()
    assert device.exists()
